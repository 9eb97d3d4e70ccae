"""A storage of thirty lines: proof that the contract of EpisodeDataset is enough for a user's own."""

import numpy as np
import torch

from buffers.dataset import EpisodeDataset
from buffers.dataset.fields import Fields, as_tensor
from buffers.table import Windows


class ListDataset(EpisodeDataset):
    """Keeps each episode as it is, in a dict."""

    def _allocate(self, fields: Fields) -> None:
        self._episodes: dict[int, dict[str, torch.Tensor]] = {}
        self._types = dict(fields)

    def _write(self, episode: dict[str, np.ndarray], start: int, episode_id: int) -> None:
        self._episodes[episode_id] = {name: as_tensor(rows.copy(), self._types[name]) for name, rows in episode.items()}

    def _read(self, windows: Windows, out: dict[str, torch.Tensor]) -> None:
        rows = zip(windows.episode.tolist(), windows.step.tolist(), windows.num_rows.tolist(), strict=True)
        for b, (episode_id, step, num_rows) in enumerate(rows):
            for name, tensor in out.items():
                tensor[b, :num_rows] = self._episodes[episode_id][name][step : step + num_rows]

    def _erase(self, episode_id: int, start: int, length: int) -> None:
        del self._episodes[episode_id]
