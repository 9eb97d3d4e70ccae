from __future__ import annotations

import pytest

from buffers.dataset import EpisodeDataset, IndividualFileDataset
from buffers.dataset.individual_file import *
from tests.contract import DatasetContract


class _C(DatasetContract):
    @pytest.fixture(autouse=True)
    def _directories(self, tmp_path_factory):
        self.factory = tmp_path_factory

    strategy = None

    def make(self, capacity, info=None) -> EpisodeDataset:
        return IndividualFileDataset(
            capacity,
            info,
            directory=self.factory.mktemp("episodes"),
            durability="rename",
            serialization_strategy=self.strategy,
        )


class TestST(_C):
    pass


class TestNpz(_C):
    strategy = NumpyCompressedSerialization()


class TestPt(_C):
    strategy = TorchSerialization()
