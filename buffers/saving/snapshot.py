"""Snapshot: one save, from the moment of the call until all of it is on the disk."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from buffers.disk import Directory
from buffers.fields import TensorType
from buffers.saving.packed_file import PackedWriter
from buffers.saving.pieces import Pieces
from buffers.saving.places import Places, files_to_pack
from buffers.saving.regions import BYTE, REGIONS
from buffers.saving.tree import pack_tree
from buffers.table import Int64Array
from buffers.utils import ThreadLock

__all__ = ["Snapshot"]


class Snapshot:
    """What is being saved: rows by pieces, which are read when they are written, and small states.

    Args:
        number: Of the save.
        directory: Where it goes.
        places: For each store, where its episodes have been saved before.
        sizes: Of the files of the saves before that are needed, in bytes.

    Attributes:
        needs: The saves before whose files this one needs.
        num_bytes: Of all arrays, once it is prepared.
    """

    def __init__(self, number: int, directory: Directory, places: list[Places], sizes: dict[int, int]) -> None:
        self.number, self.directory, self._places, self._sizes = number, directory, places, sizes
        self.needs: set[int] = set()
        self.num_bytes = 0
        #: What the file will say.
        self.said: dict[str, Any] = {}
        #: Called once everything is written, or has failed.
        self.at_end: list[Callable[[], object]] = []
        #: Called when all pieces are written.
        self.at_written: list[Callable[[], object]] = []
        #: Told of each number of bytes that is written.
        self.on_progress: Callable[[int], object] | None = None
        self._arrays: dict[str, tuple[TensorType, int]] = {}
        self._whole: dict[str, tuple[TensorType, np.ndarray]] = {}
        self._parts: list[Pieces] = []
        self._num_pieces = 0
        self._writer: PackedWriter | None = None

    def places(self, store: int) -> Places:
        """Where the episodes of a store have been saved before."""
        return self._places[store] if store < len(self._places) else []

    def files_to_pack(self, live_bytes: Mapping[int, int]) -> set[int]:
        """The saves whose rows that live, so many bytes, are to be written anew."""
        return files_to_pack(self._sizes, live_bytes)

    def state(self, name: str, tree: Any) -> None:
        """Keep a state under a name; the arrays in it are copied."""
        self.said[name] = pack_tree(tree, name, self._whole)

    def rows(
        self,
        name: str,
        kinds: Mapping[str, TensorType],
        bounds: Int64Array,
        num_rows: Int64Array,
        read: Callable[[int], Mapping[str, np.ndarray]],
        lock: ThreadLock | None = None,
        regions: tuple[str, Int64Array] | None = None,
    ) -> Pieces:
        """Rows that are read when they are written.

        Args:
            name: What the names of the arrays begin with.
            kinds: Type of a row of each array.
            bounds: As `Pieces` has them, `(n, 2)`.
            num_rows: Rows of each piece, `(n,)`.
            read: The rows of a piece, by its number, `kinds -> (num_rows, *shape)`.
            lock: As `Pieces` has it.
            regions: The name of an array of bytes that `read` has, too, under the name `REGIONS`, and how many each
                piece has, `(n,)`.
        """
        arrays = {field: (f"{name}/{field}", kind, num_rows) for field, kind in kinds.items()}
        if regions is not None:
            arrays[REGIONS] = regions[0], BYTE, regions[1]
        firsts = {}
        for field, (full_name, kind, sizes) in arrays.items():
            self._arrays[full_name] = kind, int(sizes.sum())
            firsts[field] = sizes.cumsum() - sizes
        self._num_pieces += len(arrays) * len(bounds)

        def write(number: int) -> None:
            for field, array in read(number).items():
                full_name, _, sizes = arrays[field]
                assert len(array) == sizes[number]
                self._put(full_name, int(firsts[field][number]), array)

        return self.pieces(bounds, write, lock)

    def pieces(self, bounds: Int64Array, write: Callable[[int], None], lock: ThreadLock | None = None) -> Pieces:
        """Pieces that are written elsewhere."""
        self._parts.append(Pieces(bounds, write, ThreadLock() if lock is None else lock))
        return self._parts[-1]

    def array(self, name: str, kind: TensorType, rows: np.ndarray) -> None:
        """Rows `(n, *shape)` that do not change any more."""
        self._whole[name] = kind, rows

    def _put(self, name: str, row: int, rows: np.ndarray) -> None:
        assert self._writer is not None  # `prepare` comes first.
        self._writer.put(name, row, rows)
        if self.on_progress is not None:
            self.on_progress(rows.nbytes)

    def prepare(self, file: io.BufferedWriter) -> None:
        """Write the header: after this, `keep` may be called."""
        arrays = {**self._arrays, **{name: (kind, len(rows)) for name, (kind, rows) in self._whole.items()}}
        self._writer = PackedWriter(arrays, self._num_pieces + len(self._whole), self.said)
        self._writer.begin(file)
        self.num_bytes = sum(kind.nbytes * num for kind, num in arrays.values())
        for part in self._parts:
            part.begin()

    def write(self) -> None:
        """Write all that is left."""
        assert self._writer is not None  # `prepare` comes first.
        for part in self._parts:
            part.write_all()
        for call in self.at_written:
            call()
        for name, (_, rows) in self._whole.items():
            self._put(name, 0, rows)
        self._writer.end()

    def stop(self) -> None:
        """Let nobody write any more: the file is about to be closed."""
        for part in self._parts:
            part.stop()

    def end(self) -> None:
        """Let go of what was saved."""
        for call in self.at_end:
            call()
