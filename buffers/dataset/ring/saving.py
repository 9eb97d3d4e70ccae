"""How a ring is saved, and how it comes back: rows as they lie in memory, compressed ones as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from buffers.compression import BlockRoom, choice_as, described, described_choice
from buffers.dataset.episode_dataset import EpisodeDataset
from buffers.dataset.episode_info import EpisodeInfo
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.dataset.ring.rows import RingRows
from buffers.dataset.saved_store import Arrays
from buffers.saving import Regions
from buffers.sharing import PublishedTable
from buffers.table import Int64Array

__all__ = ["SavedRing"]


class SavedRing(EpisodeDataset):
    """What saves need of a ring."""

    device: torch.device
    half_precision: bool
    _rows: RingRows
    _room: BlockRoom | None
    _published: PublishedTable | None

    @property
    def is_mapped(self) -> bool:  # type: ignore[override]
        """Whether the rows are in memory of the CPU."""
        return self.device.type == "cpu"

    def memory_of(self, start: int, num_rows: int) -> Arrays | None:
        """As `SavedStore.memory_of`."""
        return self._rows.memory(start % self.capacity, num_rows) if self.is_mapped else None

    def region_bytes(self, starts: Int64Array) -> Int64Array | None:
        """As `SavedStore.region_bytes`."""
        if self._room is None:
            return None
        sizes = self._room.sizes()
        return np.array([sizes[start] for start in starts.tolist()], np.int64)

    def regions_of(self, starts: Int64Array, num_bytes: Int64Array) -> np.ndarray:
        """As `SavedStore.regions_of`."""
        assert self._room is not None  # It has told their bytes.
        pairs = zip(starts.tolist(), num_bytes.tolist(), strict=True)
        return np.concatenate([self._room.stored(start, num) for start, num in pairs])

    def place_for(self, start: int, num_rows: int, regions: Regions | None = None) -> Arrays | None:
        """As `SavedStore.place_for`, with the same step ids."""
        fits = start % self.capacity + num_rows <= self.capacity and start >= self.table.next_start
        if not fits or self.lacks_room(start, num_rows) or (regions is None) != (self._room is None):
            return None
        if self._room is not None and regions is not None:
            own = described(self.codecs)
            # In the same order: regions are by the numbers of fields.
            if [*regions.codecs.items()] != [*own.items()] or self._room.lacks(int(regions.num_bytes.sum())):
                return None
        return self.memory_of(start, num_rows)

    def adopt(self, episodes: Int64Array, infos: Mapping[int, EpisodeInfo], regions: Regions | None = None) -> None:
        """As `SavedStore.adopt`."""
        if self._room is not None and regions is not None:
            for start, region in zip(episodes[:, 0].tolist(), regions.parts(), strict=True):
                self._room.write(start, region)
        start, end = int(episodes[0, 0]), int(episodes[-1, :2].sum())
        for sampler in self._listeners or ():
            for row in map(tuple, episodes.tolist()):
                sampler.episode_added(row, dict(infos.get(row[2], {})))
        if self.late.by_name:
            self.late.fill(start, end - start)
        self._infos.update(infos)
        self.table.extend(episodes)
        if self._published is not None:
            self._published.add_rows(episodes, self.table)

    def describe_store(self) -> dict[str, Any]:
        """As `SavedStore.describe_store`."""
        own: dict[str, Any] = {"device": str(self.device), "half_precision": self.half_precision}
        if self.compress:
            # Without fields, there are no codecs yet, or those of a first episode that was refused.
            is_known = self._fields is not None and len(self.codecs) > 0
            how = {"compress": described(self.codecs)} if is_known else {"choice": described_choice(self.compress)}
            own |= {**how, "capacity_bytes": self.capacity_bytes}
        return {**super().describe_store(), **own}

    @classmethod
    def made_as(cls, told: Mapping[str, Any], info: EpisodeDatasetInfo) -> EpisodeDataset:
        """As `SavedStore.made_as`."""
        more: dict[str, Any] = {}
        if "compress" in told:
            codecs = {name: described["codec"] for name, described in told["compress"].items()}
            more = {"compress": codecs, "capacity_bytes": told["capacity_bytes"]}
        elif "choice" in told:
            more = {"compress": choice_as(told["choice"]), "capacity_bytes": told["capacity_bytes"]}
        return cls(told["capacity"], info, None, told["device"], told["half_precision"], **more)  # type: ignore[call-arg]
