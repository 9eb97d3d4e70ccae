"""Under torch.compile, in inference mode, and with another default device, everything works as without."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from buffers import Recorder, ReplayBuffer
from buffers.dataset import MixtureDataset, RingBufferDataset
from buffers.dataset.fields import Fields, Scalar, Vector
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.sharing.column import Column
from tests.reading import reader_of

KNOWN = EpisodeDatasetInfo(Fields(obs=Vector(4), action=Vector(4)))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_compiled_code_may_sample_add_and_record(num_workers) -> None:
    buffer = ReplayBuffer(RingBufferDataset(100), 4, 3, num_workers=num_workers)
    recorder = Recorder(buffer, 2, "next_step")
    recorder.reset(np.zeros((2, 3), np.float32))
    single = ReplayBuffer(RingBufferDataset(100), 4, num_envs=1)

    @torch.compile(backend="eager")
    def step(values: torch.Tensor, number: int) -> torch.Tensor:
        doubled = 2 * values
        single.add_step({"x": doubled[0]}, number == 4)
        recorder.step(np.zeros(2), doubled, np.zeros(2), np.full(2, number % 5 == 4), np.zeros(2, bool))
        return doubled + (buffer.sample()["obs"].sum() if buffer.can_sample else 0)

    for number in range(7):
        found = step(torch.full((2, 3), float(number)), number)
    assert found.shape == (2, 3) and buffer.dataset.episode_lengths == [6, 6]
    assert buffer.dataset.get_episode(0)["obs"][:, 0].tolist() == [0, 0, 2, 4, 6, 8]
    assert single.dataset.get_episode(0)["x"][:, 0].tolist() == [0, 2, 4, 6, 8]
    buffer.close()


@pytest.mark.parametrize("in_mode", [(True, False, True), (False, True, False)])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_inference_mode_may_begin_and_end_anywhere(in_mode, stored) -> None:
    made, filled, drawn = (partial(torch.inference_mode, mode) for mode in in_mode)
    with made():
        buffer = ReplayBuffer(RingBufferDataset(9, KNOWN, half_precision=stored == torch.float16), 4, 2, num_envs=1)
        column = Column("x", Scalar(dtype=stored), torch.float32, 9, torch.device("cpu"), None)  # As on a GPU.
        row = torch.ones(4)
    with filled():
        for number in range(8):
            buffer.add_step({"obs": row, "action": row.clone()}, number % 4 == 3)
        column.write(0, np.ones(4, np.float32))
    with drawn():
        assert buffer.sample()["obs"].eq(1).all()
        column.gather(torch.zeros(2, dtype=torch.int64), 2, found := torch.empty(2, 2))
    buffer.add_step({"obs": row, "action": row}, True)
    assert buffer.sample()["action"].eq(1).all() and found.eq(1).all()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_are_where_the_ring_is_whatever_the_default_device(num_workers) -> None:
    include = ("index", "episode", "weight", "mask", "source")
    ring, other = (RingBufferDataset(9) for _ in range(2))
    for dataset in (ring, other):
        dataset.add_episode({"x": np.arange(5)})
    torch.set_default_device("meta")
    try:
        mixture = MixtureDataset([ring, reader_of(other)], [1, 1])
        buffer = ReplayBuffer(mixture, 4, None, num_workers=num_workers, include=include)
        batches = [buffer.sample(), next(iter(buffer.dataloader))]
        buffer.close()
    finally:
        torch.set_default_device(None)
    for batch in batches:
        assert {str(value.device) for value in batch.values()} == {"cpu"}
        assert batch["x"].tolist() == [[0, 1, 2, 3, 4]] * 4


CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))


@pytest.mark.parametrize("pin_memory", [None, False])
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("device", ["cpu", "meta", CUDA])
def test_batches_are_moved_to_the_output_device(device, num_workers, pin_memory) -> None:
    options = {"num_workers": num_workers, "pin_memory": pin_memory, "include": ("index",), "transform": nested}
    with ReplayBuffer(RingBufferDataset(9), 4, 2, seed=0, output_device=device, **options) as buffer:
        buffer.add_episode({"obs": {"x": np.arange(5)}})
        batches = [buffer.sample(), buffer.sample(), next(iter(buffer.dataloader))]
        for n, (obs, index) in enumerate(batches):
            assert obs["x"].device.type == index.device.type == device and obs["x"].shape == (4, 2)
            if device != "meta":
                expected = buffer.dataset.get_loader(4, 2, seed=0, include=("index",)).stream.batch(n)
                assert obs["x"].cpu().equal(expected["obs"]["x"]) and index.cpu().equal(expected["index"])


def nested(batch: dict[str, Any]) -> tuple[Any, Any]:
    return batch["obs"], batch["index"]
