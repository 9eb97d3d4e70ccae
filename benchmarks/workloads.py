"""The data that everything is measured on: rows of state, and rows of pixels."""

from __future__ import annotations

from typing import Any

import numpy as np

from buffers.dataset import EpisodeDataset, RingBufferDataset
from buffers.dataset.fields import ColorImage, Fields, Scalar, Vector
from buffers.dataset.info import EpisodeDatasetInfo

_FLAGS = {"terminated": Scalar(dtype=bool), "truncated": Scalar(dtype=bool)}
STATE = Fields(obs=Vector(24), action=Vector(6), reward=Scalar(), **_FLAGS)
PIXELS = Fields(obs=ColorImage((64, 64, 3)), action=Vector(6), reward=Scalar(), **_FLAGS)
NUM_STEPS = {"state": 1_000_000, "pixels": 100_000}
FIELDS = {"state": STATE, "pixels": PIXELS}
SIZES = [("state", 256, 64), ("state", 32, 16), ("state", 256, 1), ("pixels", 16, 64), ("pixels", 256, 3)]
EPISODE_LENGTH = 200


def rows(fields: Fields, *leading: int) -> dict[str, Any]:
    """Random rows `(*leading, *shape)`."""
    rng = np.random.default_rng(0)
    values = {name: rng.integers(0, 255, (*leading, *t.shape)) for name, t in fields.items()}
    return {name: np.asarray(values[name]).astype(tensor_type.numpy_dtype) for name, tensor_type in fields.items()}


def filled_ring(kind: str, num_steps: int | None = None, episode_length: int = EPISODE_LENGTH) -> RingBufferDataset:
    """A full ring of episodes of one length."""
    fields = FIELDS[kind]
    ring = RingBufferDataset(num_steps or NUM_STEPS[kind], EpisodeDatasetInfo(fields))
    fill(ring, fields, episode_length)
    return ring


def fill(dataset: EpisodeDataset, fields: Fields, episode_length: int) -> None:
    """Add episodes until the dataset is full."""
    episode = rows(fields, episode_length)
    for _ in range(dataset.capacity // episode_length):
        dataset.add_episode(episode)
