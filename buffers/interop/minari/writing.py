"""Writing datasets of Minari, with its own library."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from buffers.dataset import EpisodeDataset
from buffers.interop.base import library
from buffers.interop.exporting import Exporter, new_target
from buffers.interop.minari.files import DATASET_ID, store_path
from buffers.interop.minari.hdf5_storage import HDF5_FILE
from buffers.interop.minari.layout import Layout
from buffers.interop.origin import Summary
from buffers.interop.output_file import OutputFile
from buffers.utils import one_of

__all__ = ["write"]

# What a new dataset has of its own.
_SET = {"observation_space", "action_space", "data_format", "dataset_id", "dataset_size", "jpeg_encoding"}
_SET |= {"minari_version", "total_episodes", "total_steps"}


def write(
    dataset: EpisodeDataset,
    path: str | os.PathLike[str],
    *,
    fields: Sequence[str] | None = None,
    limit: int | None = None,
    progress: bool = False,
    data_format: str = "hdf5",
    dataset_id: str | None = None,
    observation_space: Any = None,
    action_space: Any = None,
    metadata: Mapping[str, Any] | None = None,
) -> Summary:
    """Write episodes as a dataset of Minari, which `minari.load_dataset` and `minari.MinariDataset` read.

    Rows become transitions: row t is action t - 1, reward t, the flags t, and observation t. `infos/NAME` become infos.
    The info of episodes becomes what Minari keeps of an episode: seed, options, and others. Images are written as they
    are, not as JPEG, which is Minari's default.

    A dataset that was imported from Minari keeps its spaces and metadata. The spaces of others are made of the fields:
    a Box without bounds, and a Dict of such for nested fields. How many discrete actions there are is not in the data:
    state `action_space`.

    Args:
        dataset: With the fields `obs`, `action` and `reward`.
        path: A new directory, which will hold `data/`. Or the id of a new dataset of the local store of Minari: text
            such as "cartpole/expert-v0", that ends in a version and has no dot ("./expert-v0" is a directory).
        fields: The fields to write, where "obs" stands for all below it; None for all.
        limit: The number of episodes to write; None for all.
        progress: Whether to show a bar (of tqdm).
        data_format: "hdf5", "arrow" or "parquet". Minari reads no episodes of more than 32,767 steps from the last two.
        dataset_id: What the dataset is called in its metadata; None for the id, or the name of the directory.
        observation_space: A space of Gymnasium, or its JSON as Minari writes it; None for the imported, or made, one.
        action_space: As `observation_space`.
        metadata: Further metadata of the dataset, such as `author`, `description`, `algorithm_name`, `code_permalink`,
            `env_spec` (JSON). They replace imported ones.

    Raises:
        ValueError: The target exists; a field is missing or has a dtype or a name that Minari cannot hold; a stated
            space does not fit; an episode is too long for Arrow.
        ImportError: A library of the extra `minari` is missing.
    """
    one_of("data_format", data_format, ("hdf5", "arrow", "parquet"))
    for name in ("PIL.Image", "h5py" if data_format == "hdf5" else "pyarrow.dataset", "minari"):
        library(name, "minari")
    is_id = isinstance(path, str) and DATASET_ID.fullmatch(path) is not None
    exporter = Exporter(dataset, "minari", store_path(str(path)) if is_id else path, fields, limit, progress)
    dataset_id = _dataset_id(dataset_id, str(path) if is_id else None, exporter.path)
    known = _known_metadata(exporter.metadata, metadata)
    layout = Layout(exporter, data_format, {"obs": observation_space, "action": action_space})
    with new_target(exporter.path) as work:
        os.makedirs(work)
        data = os.path.join(work, "data")
        storage = layout.new_storage(data, {**known, "dataset_id": dataset_id})
        infos: list[dict[str, Any]] = []
        with _disk_errors_told(storage, data) as check_disk:
            storage.update_episodes(_checked(layout.buffers(infos), check_disk))
            if not infos:
                raise ValueError("There is no episode with a transition to write.")
            storage.update_episode_metadata(infos, range(len(infos)))
        del storage.get_size
        storage.update_metadata({"dataset_size": storage.get_size()})
        if library("minari", "minari").MinariDataset(data).total_episodes != len(infos):
            raise RuntimeError(f"Minari has stored another number of episodes than {len(infos)}.")
    if is_id and "/" in str(path):
        _enter_namespace(str(path).rpartition("/")[0])
    return exporter.summary()


@contextmanager
def _disk_errors_told(storage: Any, data: str) -> Iterator[Callable[[], None]]:
    """Let a storage of HDF5 write in a way in which errors of the disk are raised, see `OutputFile`."""
    where = os.path.join(data, HDF5_FILE)
    if not os.path.exists(where):
        yield lambda: None
        return
    os.unlink(where)  # Empty so far.
    with OutputFile(where) as output:
        storage._file_path = output
        yield output.check


def _checked(buffers: Iterator[Any], check: Callable[[], None]) -> Iterator[Any]:
    for buffer in buffers:
        check()
        yield buffer


def _dataset_id(stated: str | None, of_path: str | None, target: str) -> str:
    if of_path is not None and stated not in (None, of_path):
        raise ValueError(f"`dataset_id` is {stated!r}, and the path is the id {of_path!r}. Give one of them.")
    name = re.sub(r"[^-\w]", "-", os.path.basename(target))
    found = stated or of_path or (name if DATASET_ID.fullmatch(name) else f"{name}-v0")
    try:
        # Minari wants two characters of a namespace, for example.
        library("minari.dataset.minari_dataset", "minari").parse_dataset_id(found)
        is_right = DATASET_ID.fullmatch(found) is not None
    except (ValueError, TypeError):
        is_right = False
    if not is_right:
        raise ValueError(f"The id of a dataset must be like 'namespace/name-v0', found {found!r:.60}.")
    return found


def _enter_namespace(name: str) -> None:
    """As Minari does for datasets that it creates."""
    namespaces = library("minari.namespace", "minari")
    if name not in namespaces.list_local_namespaces():
        namespaces.create_namespace(name)


def _known_metadata(imported: Mapping[str, Any], stated: Mapping[str, Any] | None) -> dict[str, Any]:
    """What was imported and stated, without what a new dataset has of its own."""
    if refused := sorted({*(stated or {})} & _SET):
        raise ValueError(f"`metadata` must not have {refused}, which `write` sets.")
    found = {name: value for name, value in imported.items() if name not in _SET} | {**(stated or {})}
    for name in ("author", "author_email"):
        if name in found:
            names = [found[name]] if isinstance(found[name], str) else found[name]
            if not isinstance(names, (list, tuple, set)) or not all(isinstance(one, str) for one in names):
                raise ValueError(f"`{name}` of the metadata must be text, or a list of such, found {names!r:.60}.")
            found[name] = {*names}
    for name in ("code_permalink", "algorithm_name", "description", "env_spec", "eval_env_spec"):
        if name in found and not isinstance(found[name], str):
            raise ValueError(f"`{name}` of the metadata must be text, found {type(found[name]).__name__}.")
    for name, value in found.items():
        try:
            json.dumps(sorted(value) if isinstance(value, set) else value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`{name}` of the metadata is not what JSON can hold ({error}).") from None
    return found
