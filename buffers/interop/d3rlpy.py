"""Replay buffers that d3rlpy has dumped (`ReplayBuffer.dump`), read with h5py."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from buffers.conversion import torch_dtype
from buffers.interop.alignment import rows_on_arrival
from buffers.interop.base import Episode, FormatError, FormatReader, library

__all__ = ["D3rlpyReader", "read"]

_VERSION = "2.1"
_COLUMNS = ("observations", "actions", "rewards", "terminated")
_NUMBERED = re.compile(r"(.+?)(_\d+){1,2}")
_MOST_NAMES = 20
# Deflate, shuffle, checksums and LZF, which h5py brings. HDF5 would look for plugins to load for others.
_FILTERS = (1, 2, 3, 32000)
# Neither deflate nor LZF expands further.
_MOST_EXPANSION = 1100


class _Column(NamedTuple):
    """What all episodes of a file have in common in one column."""

    suffix: str  # "observations_3_1" of episode 3 has "_1".
    dtype: np.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


def read(
    path: str | os.PathLike[str], *, fields: Sequence[str] | None = None, dtypes: Mapping[str, Any] | None = None
) -> D3rlpyReader:
    """The episodes of a file of `d3rlpy.dataset.ReplayBuffer.dump`, in its order.

    Row t of d3rlpy's episode i has an observation, the action taken at it, and the reward that it brought. The
    observation after the last action is not in the file, so that the last row here repeats the one before:

        observations_i       o0    o1    o2   ...   on-1
        actions_i            a0    a1    a2         an-1
        rewards_i            r1    r2    r3         rn

        row                  0     1     2    ...   n-1     n
        obs                  o0    o1    o2         on-1    on-1
        action               0     a0    a1         an-2    an-1
        reward               0     r1    r2         rn-1    rn
        terminated           -     -     -          -       terminated_i
        final_obs_missing    -     -     -          -       x

    d3rlpy trains on n transitions of a terminated episode (the next observation of the last is zeros) and on n - 1 of
    another, whose last action and reward it does not use; here, all n are rows. Of ends, it stores `terminated` only:
    there is no field `truncated`, because an episode that is not terminated was truncated, or was still being recorded.

    The observations of a tuple are `obs/0`, `obs/1` and so on. Rewards (n, 1) become numbers; actions keep their shape,
    also (n, 1), in which d3rlpy keeps discrete ones. Frames that d3rlpy stacks while it samples are stored, and come,
    one by one.

    Args:
        path: Of the file.
        fields: The fields to read, where "obs" stands for all below it; None for all.
        dtypes: `field -> dtype` for fields that are to be stored as another one.

    Raises:
        FormatError: The file is damaged, or not one of d3rlpy 2.1 or later.
        ImportError: h5py is missing.
    """
    return D3rlpyReader(os.fspath(path), fields, dtypes)


class D3rlpyReader(FormatReader):
    """See `read`."""

    format = "d3rlpy"

    def __init__(self, path: str, fields: Sequence[str] | None = None, dtypes: Mapping[str, Any] | None = None) -> None:
        super().__init__(path, fields, dtypes)
        if not os.path.isfile(path):
            found = "is a directory" if os.path.isdir(path) else "is not there"
            raise self.damaged(found, "Give the file that `ReplayBuffer.dump` has written")
        with self._opened() as file:
            self.metadata = {"version": self._version(file)}
            num_episodes = self._number_of_episodes(file)
            self._observations = self._observation_columns(file)
            self._action, self._reward = (self._column(file, name)[0] for name in ("actions", "rewards"))
            self._lengths = [self._length(file, episode) for episode in range(num_episodes)]
            self._note_others(file, num_episodes)
        self.num_episodes, self.num_steps = num_episodes, sum(self._lengths) + num_episodes
        self.notes.add("Final observations are not in the file: `final_obs_missing` marks the rows that have none.")
        self.notes.add(
            "There is no `truncated`: an episode that is not terminated was truncated, or cut off while recording."
        )

    def read_from(self, number: int) -> Iterator[Episode]:
        """As `FormatReader.read_from`."""
        with self._opened() as file:
            for episode in range(number, self.num_episodes or 0):
                yield Episode(self._rows(file, episode), {})

    def _rows(self, file: Any, episode: int) -> dict[str, Any]:
        length = self._lengths[episode]
        steps: dict[str, Any] = {"terminated": np.zeros(length, bool)}
        steps["terminated"][-1] = self._is_terminated(file, episode)
        if self.wants("action"):
            steps["action"] = self._dataset(file, f"actions_{episode}")[()]
        if self.wants("reward"):
            rewards = self._dataset(file, f"rewards_{episode}")[()]
            steps["reward"] = rewards[:, 0] if rewards.shape == (length, 1) else rewards
        parts = {
            column.suffix: self._dataset(file, f"observations_{episode}{column.suffix}")[()]
            for column in self._observations
            if self.wants(f"obs/{column.suffix[1:]}" if column.suffix else "obs")
        }
        observations = parts.get("", {suffix[1:]: array for suffix, array in parts.items()})
        rows = rows_on_arrival(observations if parts else np.zeros(length), steps, final_missing=True)
        if not parts:
            del rows["obs"]
        return rows

    def _is_terminated(self, file: Any, episode: int) -> bool:
        name = f"terminated_{episode}"
        flag = self._dataset(file, name)
        if flag.shape not in ((), (1,)) or flag.dtype.kind not in "biuf":
            raise self.damaged(f"`{name}` is {flag.dtype} {flag.shape}, expected one bool")
        return bool(np.any(flag[()]))

    def _length(self, file: Any, episode: int) -> int:
        """n, after a comparison of all columns with those of episode 0."""
        length = -1
        columns = [("observations", column) for column in self._observations]
        for name, column in (*columns, ("actions", self._action), ("rewards", self._reward)):
            found, rows = self._column(file, name, episode, column.suffix)
            if found != column:
                raise self.damaged(
                    f"`{name}{column.suffix}` of episode {episode} is {found}, that of episode 0 is {column}",
                    "Give all episodes the same types and shapes",
                )
            if rows < 1 or length not in (-1, rows):
                raise self.damaged(f"`{name}` of episode {episode} has {rows} rows, others {length}")
            length = rows
        self._dataset(file, f"terminated_{episode}")
        return length

    def _column(self, file: Any, name: str, episode: int = 0, suffix: str = "") -> tuple[_Column, int]:
        """The column as an episode has it, and the number of its rows."""
        dataset = self._dataset(file, f"{name}_{episode}{suffix}")
        if not dataset.shape:
            raise self.damaged(f"`{name}` of episode {episode} has no rows")
        return _Column(suffix, dataset.dtype.newbyteorder("="), dataset.shape[1:]), dataset.shape[0]

    def _observation_columns(self, file: Any) -> list[_Column]:
        if self._has(file, "observations_0"):
            return [self._column(file, "observations")[0]]
        parts = 0
        while self._has(file, f"observations_0_{parts}"):
            parts += 1
        if not parts:
            raise self.damaged("There is no dataset `observations_0`")
        return [self._column(file, "observations", 0, f"_{part}")[0] for part in range(parts)]

    def _version(self, file: Any) -> str:
        if self._has(file, "observations") and self._has(file, "terminals"):
            raise self.damaged(
                "has the datasets `observations` and `terminals` of d3rlpy 1",
                "Read it by `d3rlpy.dataset.load_v1`, give the episodes to a ReplayBuffer, and dump that",
            )
        if not self._has(file, "version"):
            raise self.damaged(
                "There is no dataset `version`, which d3rlpy writes last",
                "Dump the buffer again, or name the format that the file has",
            )
        dataset = self._dataset(file, "version", of_text=True)
        found = dataset.asstr(errors="replace")[()] if dataset.shape == () else None
        if found != _VERSION:
            advice = f"Dump the buffer with a version of d3rlpy that writes {_VERSION}"
            raise self.damaged(f"is of version {found!r:.40}, expected {_VERSION!r}", advice)
        return str(found)

    def _number_of_episodes(self, file: Any) -> int:
        dataset = self._dataset(file, "num_episodes")
        if dataset.shape != () or dataset.dtype.kind not in "iu":
            raise self.damaged(f"`num_episodes` is {dataset.dtype} {dataset.shape}, expected one integer")
        found, most = int(dataset[()]), len(file) // len(_COLUMNS)
        if not 0 < found <= most:
            raise self.damaged(f"`num_episodes` is {found}, and there are datasets for {most} episodes")
        if self._has(file, f"actions_{found}"):
            raise self.damaged(f"There is an episode {found}, and `num_episodes` is {found}")
        return found

    def _note_others(self, file: Any, num_episodes: int) -> None:
        if len(file) == 3 + num_episodes * (3 + len(self._observations)):
            return
        match = [_NUMBERED.fullmatch(name) for name in file]
        numbered = {found[1] for found in match if found is not None}
        others = {name for name, found in zip(file, match, strict=True) if found is None}
        names = sorted((numbered - {*_COLUMNS}) | (others - {"columns", "num_episodes", "version"}))
        for name in names[:_MOST_NAMES]:
            self.notes.add(f"`{name:.100}` is not read.")
        if len(names) > _MOST_NAMES:
            self.notes.add(f"{len(names) - _MOST_NAMES} more columns are not read.")

    @staticmethod
    def _has(file: Any, name: str) -> bool:
        # Not `name in file`, which follows links into other files.
        return bool(file.id.links.exists(name.encode()))

    def _dataset(self, file: Any, name: str, of_text: bool = False) -> Any:
        """A dataset that lies in this file, whole, with numbers (or text) and nothing to run."""
        h5py = library("h5py", "hdf5")
        if not self._has(file, name):
            raise self.damaged(f"There is no dataset `{name}`")
        if file.id.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
            raise self.damaged(f"`{name}` is a link", "Copy what it points at into the file")
        dataset = file[name]
        if not isinstance(dataset, h5py.Dataset) or dataset.shape is None:
            raise self.damaged(f"`{name}` is no dataset with values")
        if of_text:
            if h5py.check_string_dtype(dataset.dtype) is None:
                raise self.damaged(f"`{name}` is {dataset.dtype}, expected text")
            return dataset
        try:
            torch_dtype(dataset.dtype)
        except TypeError:
            raise self.damaged(f"`{name}` is {dataset.dtype}", "Store numbers") from None
        self._check_storage(dataset, name)
        return dataset

    def _check_storage(self, dataset: Any, name: str) -> None:
        """Compare the shape with the bytes that are there, before anything of that shape is allocated."""
        created, h5d = dataset.id.get_create_plist(), library("h5py", "hdf5").h5d
        if created.get_layout() == h5d.VIRTUAL or created.get_external_count():
            raise self.damaged(f"`{name}` has its values in other files", "Copy them into this one")
        stored, needed = int(dataset.id.get_storage_size()), math.prod(dataset.shape) * dataset.dtype.itemsize
        if created.get_layout() == h5d.CHUNKED:
            filters = [created.get_filter(number)[0] for number in range(created.get_nfilters())]
            if not {*filters} <= {*_FILTERS}:
                raise self.damaged(f"`{name}` is packed by the filters {filters}", "Repack it with gzip (h5repack)")
            chunks = math.prod(-(-size // chunk) for size, chunk in zip(dataset.shape, dataset.chunks, strict=True))
            needed = chunks * math.prod(dataset.chunks) * dataset.dtype.itemsize
            is_whole = dataset.id.get_num_chunks() == chunks
            is_whole = is_whole and needed <= stored * (_MOST_EXPANSION if filters else 1)
        else:
            is_whole = stored == needed
        if not is_whole or stored > os.path.getsize(self.path):
            raise self.damaged(f"`{name}` has the shape {dataset.shape}, of which the file does not hold the values")

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        h5py = library("h5py", "hdf5")
        try:
            with h5py.File(self.path, "r") as file:
                yield file
        except FormatError:
            raise
        except BlockingIOError as error:
            raise self.damaged(f"is open elsewhere ({error})", "Close it there first") from error
        except (OSError, RuntimeError, LookupError, ValueError, TypeError) as error:
            if isinstance(error, OSError) and error.errno:
                raise  # Of the disk, not of what the file says.
            text = f"cannot be read as HDF5 ({type(error).__name__}: {str(error)[:200]})"
            raise self.damaged(text, "Dump the buffer again, or name the format that the file has") from error
