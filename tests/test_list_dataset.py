from __future__ import annotations

from buffers.dataset import EpisodeDataset
from buffers.dataset.info import EpisodeDatasetInfo
from tests.contract import DatasetContract
from tests.list_dataset import ListDataset


class TestListDataset(DatasetContract):
    def make(self, capacity: int, info: EpisodeDatasetInfo | None = None) -> EpisodeDataset:
        return ListDataset(capacity, info)
