from __future__ import annotations

import os
import threading
from typing import NamedTuple

import numpy as np
import pytest
import torch

from buffers.dataset import RingBufferDataset
from buffers.utils import ThreadLock, format_bytes, to_torch
from tests.faults import in_child, status_of


class Pair(NamedTuple):
    left: object
    right: object


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (1.5, torch.float32),
        (3, torch.int64),
        (True, torch.bool),
        (1j, torch.complex64),
        (np.float64(1.5), torch.float64),
        (np.uint8(3), torch.uint8),
        (np.bool_(True), torch.bool),
        (np.zeros((2, 3), np.uint8), torch.uint8),
        (np.zeros((2, 3), ">f4"), torch.float32),
        (np.zeros((2, 3))[::-1], torch.float64),
        (torch.zeros(2, dtype=torch.bfloat16), torch.bfloat16),
    ],
)
def test_numbers_arrays_and_tensors_keep_their_dtype(value, dtype) -> None:
    tensor = to_torch(value)
    assert tensor.dtype == dtype
    assert tensor.shape == np.shape(value)
    if not isinstance(value, torch.Tensor):
        np.testing.assert_array_equal(tensor.numpy(), value)


def test_nested_structures_are_rebuilt() -> None:
    found = to_torch({"a": [1, (2.0, np.zeros(3))], "b": {"c": Pair(True, "text")}})
    assert isinstance(found["a"], list) and isinstance(found["a"][1], tuple)
    assert found["a"][0].dtype == torch.int64 and found["a"][1][1].shape == (3,)
    assert isinstance(found["b"]["c"], Pair)
    assert found["b"]["c"].right == "text" and found["b"]["c"].left.item() is True


@pytest.mark.parametrize("value", ["text", None, b"bytes", np.array(["a"]), np.array([None]), 2**80, {1, 2}])
def test_what_is_no_number_comes_back_as_it_is(value) -> None:
    assert to_torch(value) is value


def test_read_only_arrays_are_copied_without_a_warning() -> None:
    array = np.arange(3)
    array.flags.writeable = False
    tensor = to_torch(array)
    tensor[0] = 5
    assert array[0] == 0


def test_a_device_can_be_asked_for() -> None:
    assert to_torch([1.0], device="meta")[0].device.type == "meta"


def test_bytes_are_printed_for_people() -> None:
    found = " ".join(format_bytes(n) for n in (0, 999, 1500, 2.5e6, 1e9, 3e12))
    assert found == "0 B 999 B 1.5 kB 2.5 MB 1.0 GB 3.0 TB"


def test_a_forked_child_can_take_a_lock_held_elsewhere() -> None:
    lock, is_held, may_end = ThreadLock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            is_held.set()
            may_end.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert is_held.wait(60)
    child = in_child(lambda: os._exit(0 if lock.acquire(blocking=False) else 3))
    assert status_of(child) == 0 and not lock.acquire(blocking=False), "and the parent's is still held"
    may_end.set()
    thread.join()
    assert lock.acquire(blocking=False)


def test_a_forked_child_cannot_change_a_ring() -> None:
    ring = RingBufferDataset(10)
    ring.add_episode({"x": np.arange(3.0)})

    def change() -> None:
        with pytest.raises(RuntimeError, match="Only the process that made"):
            ring.add_episode({"x": np.arange(3.0)})

    assert status_of(in_child(change)) == 0
    assert ring.num_episodes == 1
