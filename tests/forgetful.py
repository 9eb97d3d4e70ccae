"""A storage of which some episodes are gone when they are read."""

from __future__ import annotations

import numpy as np
import torch

from buffers.table import Windows
from tests.list_dataset import ListDataset


class Forgetful(ListDataset):
    """Says of windows of some episodes that they are gone."""

    gone: frozenset[int] = frozenset()
    num_reads = 0

    def _read(self, windows: Windows, out: dict[str, torch.Tensor]) -> np.ndarray | None:  # type: ignore[override]
        self.num_reads += 1
        was_read = ~np.isin(windows.episode, list(self.gone))
        part = {name: tensor[was_read] for name, tensor in out.items()}
        super()._read(windows[was_read], part)
        for name, tensor in out.items():
            tensor[was_read] = part[name]
        return None if was_read.all() else was_read
