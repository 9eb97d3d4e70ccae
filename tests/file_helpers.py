"""What the tests of files share."""

from __future__ import annotations

import os
from pathlib import Path

from buffers.dataset import EpisodeDataset
from tests import tagged


def files(path: Path) -> list[str]:
    return sorted(name for name in os.listdir(path) if not name.startswith("."))


def open_files(path: Path) -> list[str]:
    """Files below a folder that this process has open."""
    found = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    return [name for name in found if name.startswith(str(path))]


def numbers(dataset: EpisodeDataset) -> list[tuple[int, int]]:
    """(number, length) of all episodes, each checked whole."""
    return [tagged.number_and_length(episode) for episode in dataset.episodes()]


def add(dataset: EpisodeDataset, lengths: list[int], first: int = 0) -> list[int]:
    return [dataset.add_episode(tagged.episode(length, first + i)) for i, length in enumerate(lengths)]


def numbers_drawn(dataset: EpisodeDataset, length: int = 1, num: int = 64, seed: int = 0) -> set[int]:
    batch = dataset.get_loader(num, length, seed=seed).stream.take()
    return {number for _, number, _, _ in tagged.origins(batch)}
