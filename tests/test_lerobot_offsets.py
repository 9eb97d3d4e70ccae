"""What `offsets` reads equals what LeRobot reads for `delta_timestamps`, at every row of every episode.

`data/lerobot_delta_timestamps.json` was written by LeRobot itself; the script beside it says how.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from buffers.dataset import EpisodeDataset, IndividualFileDataset, RingBufferDataset

FOUND: dict[str, Any] = json.loads((Path(__file__).parent / "data/lerobot_delta_timestamps.json").read_text())
FIELDS = {"observation.state": "state", "observation.image": "image", "action": "action"}


def rows_of(seconds: Iterable[float], fps: int, tolerance: float = 1e-4) -> list[int]:
    """Offsets in rows of offsets in seconds, by LeRobot's rule."""
    rows = [round(value * fps) for value in seconds]
    misses = [value for value, row in zip(seconds, rows, strict=True) if abs(value * fps - row) > tolerance * fps]
    if misses:
        raise ValueError(f"{misses} are no multiples of 1 / {fps} s")
    return rows


def episode(number: int, length: int) -> dict[str, np.ndarray]:
    """Rows whose every field says (episode, frame); `frame` alone is never given offsets."""
    frame = np.arange(length)
    tag = np.stack([np.full(length, number), frame], -1)
    image = np.zeros((length, 4, 4, 3), np.uint8)
    image[..., :2] = tag[:, None, None]
    return {"state": tag.astype(np.float32), "action": -tag.astype(np.float32), "image": image, "frame": frame}


def tags(name: str, values: torch.Tensor) -> np.ndarray:
    """(episode, frame) of each row that was read, `(B, n, 2)`."""
    return abs((values[..., 0, 0, :2] if name == "image" else values).numpy().astype(np.int64))


@pytest.fixture(params=["ring", "files"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EpisodeDataset]:
    capacity = sum(FOUND["lengths"])
    if request.param == "ring":
        made: Any = RingBufferDataset(capacity)
    else:
        made = IndividualFileDataset(capacity, directory=tmp_path, durability="rename")
    for number, length in enumerate(FOUND["lengths"]):
        made.add_episode(episode(number, length))
    yield made
    if request.param == "files":
        made.close()


def one_pass(dataset: EpisodeDataset, offsets: dict[str, list[int]], batch_size: int) -> dict[str, Any]:
    """Every anchor once, in order; batches put together: `field -> (N, n, *shape)`, `mask` a dict of `(N, n)`."""
    loader = dataset.get_loader(
        batch_size,
        offsets=offsets,
        pad="edge",
        include=("episode", "step"),
        epochs=1,
        shuffle=False,
        num_workers=0,
    )
    batches = [{**batch, **{f"mask/{name}": values for name, values in batch["mask"].items()}} for batch in loader]
    flat = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0] if name != "mask"}
    masks = {name.removeprefix("mask/"): flat.pop(name) for name in list(flat) if name.startswith("mask/")}
    return {**flat, "mask": masks}


@pytest.mark.parametrize("batch_size", [1, 4, 31])
@pytest.mark.parametrize("name", FOUND["sets"])
def test_offsets_read_what_lerobot_reads_for_delta_timestamps(
    dataset: EpisodeDataset, name: str, batch_size: int
) -> None:
    deltas, episodes = FOUND["sets"][name]["delta_timestamps"], FOUND["sets"][name]["episodes"]
    offsets = {FIELDS[field]: rows_of(seconds, FOUND["fps"]) for field, seconds in deltas.items()}
    batch = one_pass(dataset, offsets, batch_size)
    anchors = [(number, frame) for number, length in enumerate(FOUND["lengths"]) for frame in range(length)]
    assert batch["step"].dtype == torch.int64
    assert batch["step"].tolist() == [[frame] for _, frame in anchors]
    assert batch["frame"].tolist() == [[frame] for _, frame in anchors]
    assert torch.unique_consecutive(batch["episode"], return_counts=True)[1].tolist() == FOUND["lengths"]
    for field, own in FIELDS.items():
        if field not in deltas:
            assert tags(own, batch[own]).tolist() == [[list(anchor)] for anchor in anchors]
            continue
        frames = list(itertools.chain.from_iterable(found[field]["frames"] for found in episodes))
        is_pad = list(itertools.chain.from_iterable(found[field]["is_pad"] for found in episodes))
        expected = [[[number, read] for read in reads] for (number, _), reads in zip(anchors, frames, strict=True)]
        assert tags(own, batch[own]).tolist() == expected
        assert batch["mask"][own].dtype == torch.bool
        assert (~batch["mask"][own]).int().tolist() == is_pad


def test_every_set_of_the_table_has_padding_and_rows_that_are_not() -> None:
    for found in FOUND["sets"].values():
        is_pad = [field["is_pad"] for fields in found["episodes"] for field in fields.values()]
        assert {flag for rows in is_pad for row in rows for flag in row} == {0, 1}


@pytest.mark.parametrize("found", FOUND["rounding"], ids=lambda found: f"{found['fps']} frames a second")
def test_offsets_in_seconds_become_rows_as_lerobot_makes_them(found: dict[str, Any]) -> None:
    for row in found["deltas"]:
        if row["offset"] is None:
            with pytest.raises(ValueError, match="are no multiples"):
                rows_of([row["delta"]], found["fps"])
        else:
            assert rows_of([row["delta"]], found["fps"]) == [row["offset"]]
