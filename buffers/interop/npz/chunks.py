"""The replay of DreamerV3: streams of one environment each, in files of some rows, episodes one after the other."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from buffers.interop.arrays import Archive, as_flags, in_order, note_unread, tree_of
from buffers.interop.base import Episode, FormatError, FormatReader
from buffers.interop.npz.episodes import check_observations, check_reserved, is_observation
from buffers.interop.npz.layouts import LAYOUTS

__all__ = ["ChunkReader"]

# Of the storage, not of the environment.
_STORAGE = ("id", "stepid", "reset", "consec", "seed")
_FLAGS = ("is_first", "is_last", "is_terminal")


class _Chunk(NamedTuple):
    """A file: its name says which chunk follows, and how many of its rows are used."""

    path: str
    time: str
    uuid: str
    successor: str
    length: int


class _Piece(NamedTuple):
    """Rows [start, stop) of a chunk."""

    chunk: _Chunk
    start: int
    stop: int


def _chunk(directory: str, stem: str) -> _Chunk:
    path = os.path.join(directory, f"{stem}.npz")
    match = LAYOUTS["dreamerv3"].pattern.fullmatch(stem)
    if match is None:
        raise FormatError(path, "Its name is not <time>-<id>-<next>-<length>", "Move it away, or try another layout")
    time, uuid, successor, length = match.groups()
    return _Chunk(path, time, uuid, successor, int(length))


class ChunkReader(FormatReader):
    """See `buffers.interop.npz.read`."""

    format = "npz"

    def __init__(
        self,
        path: str,
        directory: str,
        stems: Sequence[str],
        observations: Collection[str] | None,
        fields: Sequence[str] | None = None,
        dtypes: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(path, fields, dtypes)
        self.observations = observations
        self._chunks = self._newest([_chunk(directory, stem) for stem in stems])
        self.arrays: dict[str, Any] | None = None
        first = self._opened(min(self._chunks.values(), key=lambda chunk: (chunk.time, chunk.uuid)))
        self.arrays = _kinds(first)
        self._pieces: list[list[_Piece]] = []  # Of each episode.
        for stream in self._streams():
            self._split(stream)
        self.num_episodes = len(self._pieces)
        self.num_steps = sum(piece.stop - piece.start for pieces in self._pieces for piece in pieces)
        self.metadata = {"layout": "dreamerv3"}
        note_unread(first, self.notes)
        self._note()

    def _newest(self, chunks: list[_Chunk]) -> dict[str, _Chunk]:
        """By id. A chunk that was saved before it was full is in the directory again when it is."""
        found: dict[str, _Chunk] = {}
        for chunk in sorted(chunks, key=lambda chunk: (chunk.length, chunk.successor.strip("0") != "", chunk.path)):
            found[chunk.uuid] = chunk
        if len(found) < len(chunks):
            self.notes.add(f"{len(chunks) - len(found)} files are earlier versions of others, and are not read.")
        return found

    def files(self) -> list[str]:
        """As `FormatReader.files`."""
        return sorted(chunk.path for chunk in self._chunks.values())

    def _streams(self) -> list[list[_Chunk]]:
        """The chunks of each environment, one after the other; that which began first, first."""
        chunks = self._chunks
        successors = [chunk.successor for chunk in chunks.values() if chunk.successor in chunks]
        starts = [chunk for uuid, chunk in chunks.items() if uuid not in {*successors}]
        streams = []
        for chunk in sorted(starts, key=lambda chunk: (chunk.time, chunk.uuid)):
            streams.append([chunk])
            while (following := chunks.get(streams[-1][-1].successor)) is not None:
                streams[-1].append(following)
        # Each chunk but the starts follows exactly one other, or the names are not those of the library.
        if len({*successors}) < len(successors) or sum(map(len, streams)) < len(chunks):
            raise self.damaged("The names of its files do not say which chunk follows which", "Get a whole copy of it")
        return streams

    def _opened(self, chunk: _Chunk) -> Archive:
        """A chunk, whose arrays may have more rows than its name says: those behind were never written."""
        archive = Archive(chunk.path)
        short = {name: len(column) for name, column in archive.columns.items() if len(column) < chunk.length}
        found, expected = _kinds(archive), self.arrays or _kinds(archive)
        archive.close()
        if short or not chunk.length:
            text = f"Its name says {chunk.length} rows, its arrays have {short}"
            raise FormatError(chunk.path, text, "Get a whole copy of it")
        if found != expected:
            name = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))[0]
            text = f"`{name}` is {found.get(name)}, in other chunks of {self.path} {expected.get(name)}"
            raise FormatError(chunk.path, text, "All chunks must have the same arrays")
        return archive

    def _split(self, stream: list[_Chunk]) -> None:
        """Find the episodes of a stream."""
        pieces: list[_Piece] = []
        has_ended = False
        for chunk in stream:
            archive = self._opened(chunk)
            try:
                is_first, is_last = (self._flags(archive, name, chunk.length) for name in ("is_first", "is_last"))
            finally:
                archive.close()
            if (np.append(has_ended, is_last[:-1]) & ~is_first).any():
                found = "A row behind that with `is_last` has no `is_first`"
                raise FormatError(chunk.path, found, "Get a whole copy of the directory")
            has_ended = bool(is_last[-1])
            starts = np.flatnonzero(is_first[1:]) + 1
            for start, stop in zip([0, *starts.tolist()], [*starts.tolist(), chunk.length], strict=True):
                if is_first[start] and pieces:
                    self._pieces.append(pieces)
                    pieces = []
                if not pieces and not is_first[start]:
                    self.notes.add("Some episodes begin in their middle, as the chunks before are not there.")
                pieces.append(_Piece(chunk, start, stop))
        self._pieces.append(pieces)

    def _flags(self, archive: Archive, name: str, length: int) -> np.ndarray:
        column = archive.columns.get(name)
        if column is None:
            return np.zeros(length, bool)
        return as_flags(archive.path, name, column.rows(0, length))

    def _note(self) -> None:
        arrays = {*(self.arrays or ())}
        observations = [name for name in arrays if self._is_observation(name)]
        check_observations(self, arrays, observations)
        check_reserved(self, arrays - {*observations})
        for name in sorted(arrays & {*_STORAGE}):
            if not self._is_observation(name):
                self.notes.add(f"`{name}` is of Dreamer's storage, and is not read.")
        if "reward" not in arrays:
            self.notes.add("There are no rewards.")
        if "is_terminal" not in arrays:
            self.notes.add("Why an episode ends is not said.")

    def _is_observation(self, name: str) -> bool:
        if self.observations is None and name in _STORAGE:
            return False
        return is_observation(name, self.observations)

    def read_from(self, number: int) -> Iterator[Episode]:
        """As `FormatReader.read_from`."""
        archive: Archive | None = None
        try:
            for pieces in self._pieces[number:]:
                parts = []
                for piece in pieces:
                    if archive is None or archive.path != piece.chunk.path:
                        if archive is not None:
                            archive.close()
                        archive = self._opened(piece.chunk)
                    parts.append(self._part(archive, piece))
                arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
                yield Episode(self._rows(arrays), {"file": os.path.basename(pieces[0].chunk.path)})
        finally:
            if archive is not None:
                archive.close()

    def _part(self, archive: Archive, piece: _Piece) -> dict[str, np.ndarray]:
        """The arrays of a piece that are wanted."""
        found = {}
        for name, column in archive.columns.items():
            is_obs = self._is_observation(name)
            is_unread = name in _STORAGE and not is_obs
            if name in _FLAGS or (not is_unread and self.wants(f"obs/{name}" if is_obs else name)):
                found[name] = column.rows(piece.start, piece.stop)
        return found

    def _rows(self, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        flags = {name: as_flags(self.path, name, arrays.pop(name)) for name in _FLAGS if name in arrays}
        rows: dict[str, Any] = {"is_first": flags["is_first"]}
        obs = {name: arrays.pop(name) for name in [*arrays] if self._is_observation(name)}
        if obs:
            rows["obs"] = tree_of(self.path, obs)
        if "action" in arrays:
            action = arrays.pop("action")
            # The action of a row is taken there, so it arrives with the next one.
            rows["action"] = np.concatenate([np.zeros_like(action[:1]), action[:-1]])
        if "is_terminal" in flags:
            rows["terminated"] = flags["is_terminal"]
            if "is_last" in flags:
                rows["truncated"] = flags["is_last"] & ~flags["is_terminal"]
        elif "is_last" in flags:
            rows["done"] = flags["is_last"]
        return in_order(rows | tree_of(self.path, arrays))


def _kinds(archive: Archive) -> dict[str, Any]:
    """Type and shape of the rows of each array."""
    return {name: (column.dtype, column.shape[1:]) for name, column in archive.columns.items()}
