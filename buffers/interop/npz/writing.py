"""Episodes as files of Dreamer or ExoRL."""

from __future__ import annotations

import datetime
import os
import zipfile
from collections.abc import Mapping, Sequence

import numpy as np

from buffers.dataset import EpisodeDataset
from buffers.interop.alignment import FINAL_MISSING, Transitions, arrays_in
from buffers.interop.arrays import as_flags
from buffers.interop.base import Notes
from buffers.interop.exporting import Exporter, new_target
from buffers.interop.origin import Summary
from buffers.utils import one_of

__all__ = ["write"]

# Arrays that the layouts have besides observations and fields of the user.
_DREAMER = ("action", "reward", "discount", "is_first", "is_last", "is_terminal", FINAL_MISSING)
_EXORL = ("observation", "action", "reward", "discount", FINAL_MISSING)
_FLAGS = ("terminated", "truncated", "done", "is_first")
_KEPT = ("action", "reward", "discount", FINAL_MISSING)


def write(
    dataset: EpisodeDataset,
    path: str | os.PathLike[str],
    *,
    layout: str = "dreamer",
    fields: Sequence[str] | None = None,
    limit: int | None = None,
    progress: bool = False,
) -> Summary:
    """Write the episodes of a dataset into a new directory, one compressed `.npz` file each.

    Rows stay as they are, aligned on arrival; see `read` for the timeline. Files sort in the order of the episodes.

    * "dreamer" writes `<time>-<number>-<T>.npz` with `image` or other names below `obs`, `action`, `reward`,
      `is_first`, `is_last`, `is_terminal`, which DreamerV2 loads. An `obs` that is one array is named `image` if it has
      three axes, else `vector`.
    * "exorl" writes `episode_<number>_<T>.npz` with `observation`, `action`, `reward` and `discount` (T + 1, 1), which
      ExoRL and DrQ-v2 load. `discount` is 0 where `terminated`, unless there is a field `discount`.

    Args:
        dataset: Of episodes whose rows are aligned on arrival, with the field `obs`.
        path: The new directory.
        layout: "dreamer" or "exorl".
        fields: The fields to write; None for all.
        limit: The number of episodes to write; None for all.
        progress: Whether to show a bar (of tqdm).

    Returns:
        What was written, and what the layout cannot hold.

    Raises:
        ValueError: The target exists; fields that the layout would confuse.
    """
    layout = one_of("layout", layout, ["dreamer", "exorl"])
    exporter = Exporter(dataset, "npz", path, fields, limit, progress)
    exporter.keeps_first = exporter.fields
    names = _array_names(exporter, layout)
    convert = _dreamer if layout == "dreamer" else _exorl
    now = datetime.datetime.now().strftime("%Y%m%dT%H%M%S")
    width = max(6, len(str(len(exporter.ids))))
    with new_target(path) as work:
        os.makedirs(work)
        for number, found, info in exporter:
            length = found.num_steps
            stem = f"{now}-{number:032d}-{length}" if layout == "dreamer" else f"episode_{number:0{width}d}_{length}"
            rows = _rows(found, FINAL_MISSING in exporter.fields)
            arrays = {array: rows[name] for name, array in names.items()} | convert(rows, exporter.notes)
            _write_arrays(os.path.join(work, f"{stem}.npz"), arrays)
            if info:
                exporter.notes.add("Infos of episodes are left out.")
    return exporter.summary()


def _array_names(exporter: Exporter, layout: str) -> dict[str, str]:
    """`field -> array` of those that are written as they are; ValueError where two would have one name."""
    fields, notes = exporter.fields, exporter.notes
    found = {}
    for name in fields:
        if name in _FLAGS:
            continue
        if layout == "dreamer" and name == "obs":
            found[name] = "image" if len(fields[name].shape) == 3 else "vector"
            notes.add(f"`obs` is named `{found[name]}`, and is read back as `obs/{found[name]}`.")
        elif name == "obs":
            found[name] = "observation"
        else:
            found[name] = name.removeprefix("obs/") if layout == "dreamer" else name
    own = {*(_DREAMER if layout == "dreamer" else _EXORL)}
    clashing = [name for name, array in found.items() if array in own and name not in ("obs", *_KEPT)]
    twice = [name for name, array in found.items() if [*found.values()].count(array) > 1]
    parents = ("action/", "reward/") if layout == "dreamer" else ("action/", "reward/", "obs/")
    nested = [name for name in found if name.startswith(parents)]
    nul = [name for name in found if "\0" in name]
    problems = [(clashing, "names of its own"), (twice, "one name twice"), (nested, "no nested fields there")]
    for names, what in [*problems, (nul, "no names with a NUL")]:
        if names:
            raise ValueError(
                f"The layout {layout!r} has {what}: leave {names} out by `fields=`, or use another layout."
            )
    if "action" not in found:
        raise ValueError(f"The layout {layout!r} needs the field `action`, found {list(fields)}.")
    _note_fields(exporter, layout, [name for name in found if name.split("/")[0] != "obs" and name not in own])
    return found


def _note_fields(exporter: Exporter, layout: str, others: list[str]) -> None:
    fields, notes = exporter.fields, exporter.notes
    others = [name for name in others if not name.startswith("log_")]
    if layout == "dreamer" and others:
        notes.add(f"{others} are read back as observations, unless `obs=` names those.")
    if logged := [name for name in fields if name.startswith("obs/log_")] if layout == "dreamer" else []:
        notes.add(f"{logged} are read back without `obs/`, unless `obs=` names all observations.")
    if "reward" not in fields:
        notes.add("There are no rewards.")
    for name in ("reward", "discount"):
        if layout == "exorl" and name in fields and fields[name].shape == (1,):
            notes.add(f"`{name}` of shape (1,) is read back as a scalar.")
    if "terminated" in fields:
        kinds = {name: str(fields[name]) for name in ("terminated", "truncated") if name in fields}
        if cast := [name for name, kind in kinds.items() if kind != "bool ()"]:
            notes.add(f"{cast} are read back as one bool for each row.")
        if "done" in fields:
            notes.add("`done` is left out.")
        if layout == "dreamer" and "truncated" not in fields:
            notes.add("There is no `is_last`, as `truncated` is missing.")
    elif layout == "exorl" or "done" not in fields:
        lost = [name for name in ("truncated", "done") if name in fields]
        notes.add(
            f"`terminated` is missing, so files do not say why an episode ends{f': {lost} are left out' * bool(lost)}."
        )
    elif "truncated" in fields:
        notes.add("`truncated` is left out, as `terminated` is missing.")


def _rows(found: Transitions, has_missing: bool) -> dict[str, np.ndarray]:
    """`field -> (T + 1, *shape)`, first rows included."""
    first = dict(arrays_in(found.first))
    rows = {name: np.concatenate([first[name][None], values]) for name, values in arrays_in(found.steps)}
    rows |= {name: as_flags("The dataset", name, rows[name]) for name in _FLAGS if name in rows}
    is_last = np.arange(found.num_steps + 1) == found.num_steps
    missing = {FINAL_MISSING: is_last & found.final_missing} if has_missing else {}
    return {**dict(arrays_in(found.observations, "obs")), **rows, **missing}


def _dreamer(rows: Mapping[str, np.ndarray], notes: Notes) -> dict[str, np.ndarray]:
    """Flags as Dreamer has them."""
    positions = np.arange(len(next(iter(rows.values()))))
    is_last = positions == positions[-1]
    found = {"is_first": positions == 0}
    if "terminated" in rows:
        found["is_terminal"] = rows["terminated"]
        if "truncated" in rows:
            found["is_last"] = is_last & (rows["terminated"] | rows["truncated"])
            _note_both(rows, notes)
            _note_earlier("truncated", rows, notes)
    elif "done" in rows:
        found["is_last"] = is_last & rows["done"]
        _note_earlier("done", rows, notes)
        if "discount" in rows:
            notes.add("`done` is `is_last`, and is read back as `terminated` or `truncated`, by `discount`.")
    return found


def _exorl(rows: Mapping[str, np.ndarray], notes: Notes) -> dict[str, np.ndarray]:
    """Rewards and discounts of shape (T + 1, 1), and a discount that says where episodes terminated."""
    found = {name: rows[name][:, None] for name in ("reward", "discount") if name in rows and rows[name].ndim == 1}
    if "terminated" in rows:
        terminated = rows["terminated"]
        if "discount" not in rows:
            notes.add("`discount` is 0 where `terminated`, else 1.")
            found["discount"] = np.where(terminated, 0, 1).astype(np.float32)[:, None]
        elif not np.array_equal(terminated, rows["discount"].reshape(len(terminated), -1).max(1) == 0):
            notes.add("`terminated` is read back from `discount`, which says otherwise in some rows.")
        _note_both(rows, notes)
        _note_earlier("truncated", rows, notes)
        if not terminated[-1] and not rows.get("truncated", terminated)[-1]:
            notes.add("An episode that neither terminated nor was truncated is read back as truncated.")
    return found


def _note_both(rows: Mapping[str, np.ndarray], notes: Notes) -> None:
    if "truncated" in rows and (rows["terminated"] & rows["truncated"]).any():
        notes.add("Where an episode both terminated and was truncated, only the first is kept.")


def _note_earlier(name: str, rows: Mapping[str, np.ndarray], notes: Notes) -> None:
    if name in rows and rows[name][:-1].any():
        notes.add(f"`{name}` is left out where it is set before the last row: files say only how an episode ends.")


def _write_arrays(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """An `.npz` file as np.savez_compressed writes it, which cannot take every name."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
