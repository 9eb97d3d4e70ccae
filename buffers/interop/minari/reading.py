"""MinariReader: the episodes of a dataset of Minari."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from buffers.dataset.episode_info import EpisodeInfo
from buffers.fields import nested
from buffers.interop.alignment import rows_on_arrival
from buffers.interop.base import Episode, FormatError, FormatReader
from buffers.interop.minari.arrow_storage import ArrowStorage
from buffers.interop.minari.checks import CommonColumns, checked
from buffers.interop.minari.columns import ROOTS, Column, Path, Storage, field_of
from buffers.interop.minari.episode_metadata import info_of
from buffers.interop.minari.files import METADATA, data_directory, read_json
from buffers.interop.minari.hdf5_storage import Hdf5Storage
from buffers.interop.minari.spaces import Space, compact, image_shapes, leaves, parse_space
from buffers.utils import integer

__all__ = ["MinariReader"]

_FLAGS = ("terminations", "truncations")
_SPACES = {"observations": "observation_space", "actions": "action_space"}
# `metadata` goes into a JSON file of a bounded size, and a space has two numbers for each byte of an image.
_LONG_SPACE = 10_000
_MOST_CHARACTERS = 1 << 20


class _Known(NamedTuple):
    """What is kept of an episode until it is read."""

    episode_id: int
    num_steps: int
    final_missing: bool
    info: EpisodeInfo


class MinariReader(FormatReader):
    """Episodes of a dataset of Minari, by ascending id or in the order that was asked for. See `read`."""

    format = "minari"

    def __init__(
        self,
        path: str,
        fields: Sequence[str] | None = None,
        dtypes: Mapping[str, Any] | None = None,
        episode_indices: Sequence[int] | None = None,
    ) -> None:
        super().__init__(path, fields, dtypes)
        data = data_directory(path)
        self._metadata_path = os.path.join(data, METADATA)
        found = read_json(self._metadata_path)
        spaces = {
            root: parse_space(self._metadata_path, name, found[name]) for root, name in _SPACES.items() if name in found
        }
        self._storage = self._storage_of(data, found, spaces)
        self._known: list[_Known] = []
        try:
            self._columns = self._described(self._ids_of(found, episode_indices))
            self._note_columns(spaces)
        except BaseException:
            self._storage.close()
            raise
        self._can_miss_final = any(one.final_missing for one in self._known)
        self.num_episodes = len(self._known)
        self.num_steps = sum(one.num_steps + 1 for one in self._known)
        self.metadata = self._kept(found, spaces)
        if episode_indices is None and found.get("total_steps") != self.num_steps - self.num_episodes:
            steps = self.num_steps - self.num_episodes
            self.notes.add(f"The metadata count {found.get('total_steps')} steps, the episodes have {steps}.")

    def read_from(self, number: int) -> Iterator[Episode]:
        """As `FormatReader.read_from`."""
        wanted = {path: one for path, one in self._columns.items() if self.wants(field_of(path))}
        for known in self._known[number:]:
            arrays = self._storage.read(known.episode_id, wanted)
            values = {path: self._values(known, path, arrays[path]) for path in wanted}
            yield Episode(self._aligned(known, values), known.info)

    def files(self) -> list[str]:
        """As `FormatReader.files`."""
        return [os.path.dirname(self._metadata_path)]

    def close(self) -> None:
        """As `FormatReader.close`."""
        self._storage.close()

    def _storage_of(self, data: str, found: Mapping[str, Any], spaces: dict[str, Space]) -> Storage:
        kind = found.get("data_format")
        if kind == "hdf5":
            return Hdf5Storage(data, image_shapes(spaces))
        if kind not in ("arrow", "parquet"):
            text = f"has the data_format {kind!r:.60}"
            raise FormatError(self._metadata_path, text, "Known ones are hdf5, arrow and parquet")
        if missing := [name for root, name in _SPACES.items() if root not in spaces]:
            # Minari makes the environment to ask it, which runs what the metadata name.
            text = f"has no {' and no '.join(missing)}, which tell what the columns are"
            raise FormatError(
                self._metadata_path, text, "Add them, as `minari.serialization.serialize_space` writes them"
            )
        return ArrowStorage(data, kind, spaces)

    def _ids_of(self, found: Mapping[str, Any], episodes: Sequence[int] | None) -> list[int]:
        there, total = self._storage.ids(), found.get("total_episodes")
        if not there:
            raise FormatError(self._storage.path, "holds no episode", "Record some, or get a whole copy of the dataset")
        if episodes is None:
            if there != [*range(len(there))] or total != len(there):
                text = f"holds {len(there)} episodes, {there[0]} to {there[-1]}, and {METADATA} counts {total}"
                advice = "It was not written to its end. `episode_indices=[...]` reads those that you name"
                raise FormatError(self._storage.path, text, advice)
            return there
        ids = [integer("episode_indices", one, 0) for one in episodes]
        if len({*ids}) < len(ids) or not ids:
            raise ValueError(
                f"`episode_indices` must be ids of episodes, at least one and none twice, found {ids!r:.100}."
            )
        if missing := sorted({*ids} - {*there}):
            raise ValueError(f"{self.path} has no episodes {missing!r:.100}. It has {there[0]} to {there[-1]}.")
        return ids

    def _described(self, ids: Sequence[int]) -> dict[Path, Column]:
        """Look at all episodes, without reading rows; what they have in common."""
        common, padded, others = CommonColumns(self._storage.path), set(), dict.fromkeys(self._storage.others)
        for episode_id in ids:
            stored, final_missing = checked(self._storage.path, episode_id, self._storage.describe(episode_id))
            common.add(episode_id, stored.columns)
            padded |= {p for p, one in stored.columns.items() if p[0] == "infos" and one.rows == stored.num_steps}
            others.update(dict.fromkeys(stored.others))
            info = info_of(stored.metadata, self.notes)
            self._known.append(_Known(episode_id, stored.num_steps, final_missing, info))
        columns = common.finish(self.notes)
        if not any(path[0] == "observations" for path in columns):
            raise FormatError(self._storage.path, "has no observations of numbers", "Text is not read")
        for path in sorted(columns.keys() & padded):
            self.notes.add(f"`{field_of(path)}` has no value for first rows: they are zero.")
        for name in others:
            self.notes.add(f"{name!r} is unknown, and is not read.")
        return columns

    def _note_columns(self, spaces: Mapping[str, Space]) -> None:
        for path, one in self._columns.items():
            if one.is_jpeg and self.wants(field_of(path)):
                self.notes.add(f"`{field_of(path)}` was stored as JPEG: pixels differ from those that were recorded.")
        if any(one.final_missing for one in self._known):
            self.notes.add("Some episodes have no final observation: `final_obs_missing` is set where it is repeated.")
        for path, space in (leaf for root in spaces for leaf in leaves(spaces[root], (root,))):
            if space["type"] != "Text" and path not in self._columns:
                self.notes.add(f"`{field_of(path)}` is in the space, and not in the episodes.")

    def _kept(self, found: Mapping[str, Any], spaces: Mapping[str, Space]) -> dict[str, Any]:
        """The metadata, with one bound in place of many equal ones in long spaces."""
        kept = dict(found)
        for root, space in spaces.items():
            text = json.dumps(space)
            kept[_SPACES[root]] = text if len(text) <= _LONG_SPACE else json.dumps(compact(space))
        for name in [name for name, value in kept.items() if len(json.dumps(value)) > _MOST_CHARACTERS]:
            self.notes.add(f"`{name}` of the metadata has more than {_MOST_CHARACTERS:,} characters, and is left out.")
            del kept[name]
        return kept

    def _values(self, known: _Known, path: Path, values: np.ndarray) -> np.ndarray:
        """Those of a column, with the dtype and shape that it has in all episodes."""
        one = self._columns[path]
        rows = values.reshape(len(values), *one.shape)
        if path[0] in _FLAGS:
            if not np.isin(rows, (0, 1)).all():
                raise self._wrong(known, f"has {path[0]} that are neither 0 nor 1")
            return rows.astype(np.bool_)
        if rows.dtype == one.dtype:
            return rows
        with np.errstate(invalid="ignore"):
            found = rows.astype(one.dtype)
            is_kept = rows.dtype.kind not in "iu" or np.array_equal(found.real.astype(rows.dtype), rows)
        if not is_kept:
            raise self._wrong(known, f"has integers in `{field_of(path)}` that {one.dtype} cannot hold")
        return found

    def _wrong(self, known: _Known, found: str) -> FormatError:
        return FormatError(self._storage.path, f"Episode {known.episode_id} {found}", "Leave the field out by `fields`")

    def _aligned(self, known: _Known, arrays: Mapping[Path, np.ndarray]) -> dict[str, Any]:
        padded = {path: _with_first(values, known.num_steps) for path, values in arrays.items() if path[0] == "infos"}
        trees = nested({**arrays, **padded}.items())
        infos = {root: trees.pop(root) for root in ("infos",) if root in trees}
        # If no observation is wanted, an empty one tells the number of rows. It is left out in the end.
        num_observations = known.num_steps + (not known.final_missing)
        observations = trees.pop("observations", np.zeros((num_observations, 0), np.uint8))
        if any(trees[root][:-1].any() for root in _FLAGS if root in trees):
            self.notes.add("Some episodes go on behind a row that is terminated or truncated.")
        return rows_on_arrival(
            observations,
            {ROOTS[root]: tree for root, tree in trees.items()},
            more=infos,
            final_missing=known.final_missing if self._can_miss_final else None,
        )


def _with_first(values: np.ndarray, num_steps: int) -> np.ndarray:
    """T + 1 values: T have zeros before them."""
    if len(values) > num_steps:
        return values
    return np.concatenate([np.zeros((1, *values.shape[1:]), values.dtype), values])
