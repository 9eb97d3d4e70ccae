"""An extension and errors: an episode is in all of a chain or in none, and bad input changes nothing."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from buffers import Evictor, ReplayBuffer
from buffers.dataset import EpisodeDataset, IndividualFileDataset, MixtureDataset, RingBufferDataset
from buffers.dataset.fields import Fields, Vector
from buffers.dataset.info import EpisodeDatasetInfo
from tests import tagged
from tests.list_dataset import ListDataset
from tests.tagged import numbers


class FailingEvictor(Evictor):
    """The oldest leaves, but for the calls that fail."""

    num_until_failure = 10**9

    def evict(self, dataset: Any) -> int:
        self.num_until_failure -= 1
        if self.num_until_failure < 0:
            raise OSError("cannot evict")
        return 0


class FullDisk(ListDataset):
    evicts_before_writing = False
    num_until_failure = 10**9

    def _write(self, episode, start, episode_id) -> None:
        self.num_until_failure -= 1
        if self.num_until_failure < 0:
            raise OSError("no space")
        super()._write(episode, start, episode_id)


def make(kind: str, capacity: int) -> EpisodeDataset:
    if kind == "evictor":
        return ListDataset(capacity, evictor=FailingEvictor())
    return {"disk": FullDisk, "ring": RingBufferDataset, "list": ListDataset}[kind](capacity)


@pytest.mark.filterwarnings("ignore:An episode of 9 steps is longer")
@pytest.mark.parametrize("length", [5, 9])  # The second is too long for the middle one of three.
@pytest.mark.parametrize(
    ("kinds", "failing"),
    [("disk+disk", 0), ("disk+disk", 1), ("disk+list+list", 0), ("list+list+disk", 2)]
    + [("evictor+ring", 0), ("evictor+list", 0), ("evictor+ring+ring", 0)],
)
def test_what_one_cannot_take_is_in_none(kinds, failing, length) -> None:
    names = kinds.split("+")
    sets = [make(kind, 20 if n == 0 else 7 if n == 1 and len(names) == 3 else 1000) for n, kind in enumerate(names)]
    for front, behind in reversed(list(itertools.pairwise(sets))):
        front.extend(behind, other_batch_size=1, fetch_from_other_every=1000, seed=0)
    for number in range(8):
        sets[0].add_episode(tagged.episode(5, number))
    fault: Any = sets[failing].evictor if names[failing] == "evictor" else sets[failing]
    fault.num_until_failure = 0
    before = [numbers(dataset) for dataset in sets]
    for _ in range(3):
        with pytest.raises(OSError, match="no space|cannot evict"):
            sets[0].add_episode(tagged.episode(length, 99))
        assert [numbers(dataset) for dataset in sets[:: len(sets) - 1]] == before[:: len(sets) - 1]
    fault.num_until_failure = 10**9
    sets[0].add_episode(tagged.episode(length, 8))
    assert numbers(sets[0])[-1] == 8 and numbers(sets[-1]) == list(range(9))


def test_what_a_ring_in_the_middle_keeps_the_last_keeps_too() -> None:
    # A ring can only let its oldest go, so it cannot take an addition back.
    small, middle, large = FullDisk(20), RingBufferDataset(50), FullDisk(1000)
    middle.extend(large, other_batch_size=1, fetch_from_other_every=1000)
    small.extend(middle, other_batch_size=1, fetch_from_other_every=1000)
    small.add_episode(tagged.episode(5, 0))
    small.num_until_failure = 0
    with pytest.raises(OSError, match="no space"):
        small.add_episode(tagged.episode(5, 1))
    assert numbers(small) == [0] and numbers(middle) == numbers(large)


def test_what_cannot_be_brought_back_is_no_error_of_the_addition() -> None:
    evictor = FailingEvictor()
    fast, large = ListDataset(20, evictor=evictor), ListDataset(1000)
    fast.extend(large, other_batch_size=8, seed=0)
    for number in range(6):
        fast.add_episode(tagged.episode(5, number))
    evictor.num_until_failure = 1
    with pytest.warns(UserWarning, match="cannot be brought back: OSError"):
        fast.add_episode(tagged.episode(5, 6))
    assert numbers(large) == list(range(7)) and numbers(fast)[-1] == 6
    evictor.num_until_failure = 10**9
    for number in range(7, 30):
        fast.add_episode(tagged.episode(5, number))
        assert number in numbers(fast) and large.num_episodes == number + 1


def test_an_extension_that_cannot_copy_changes_nothing() -> None:
    ring = RingBufferDataset(20)
    for number, length in enumerate((3, 10)):
        ring.add_episode(tagged.episode(length, number))
    with pytest.raises(ValueError, match="10 steps is here, which does not fit the `capacity` of 5 steps of `other`"):
        ring.extend(RingBufferDataset(5))
    large = FullDisk(100)
    large.num_until_failure = 1
    with pytest.raises(OSError, match="no space"):
        ring.extend(large)
    large.num_until_failure = 10**9
    assert large.is_empty and numbers(ring) == [0, 1]
    ring.extend(large)
    assert numbers(large) == [0, 1]


def test_what_only_the_large_set_refuses_is_refused() -> None:
    ring, large = RingBufferDataset(20), RingBufferDataset(100, half_precision=True)
    ring.extend(large)
    buffer = ReplayBuffer(ring, 4, num_envs=1)
    buffer.add_step({"x": 1.0}, False)
    with pytest.raises(ValueError, match="half_precision=True cannot store"):
        buffer.add_step({"x": 1e6}, True)
    buffer.add_step({"x": 2.0}, True)
    assert ring.get_episode(0)["x"].tolist() == large.get_episode(0)["x"].tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match=r"missing \['x'\]"):
        ring.add_episode({"y": [1.0]})
    assert ring.num_episodes == large.num_episodes == 1


def test_what_cannot_come_back_stays_away_with_one_warning() -> None:
    ring, large = RingBufferDataset(6, half_precision=True), ListDataset(1000)
    for value in (1e6, 2e6, 3.0):
        large.add_episode({"x": np.full(2, value, np.float32)})
    ring.extend(large, other_batch_size=8, seed=0)
    with pytest.warns(UserWarning, match="cannot all be brought back: Field `x` holds numbers beyond") as caught:
        for _ in range(20):
            ring.add_episode({"x": np.ones(2, np.float32)})
    assert len(caught) == 1


def test_bad_arguments_are_refused_and_change_nothing(tmp_path) -> None:
    ring, large = RingBufferDataset(20), ListDataset(100)
    with pytest.raises(TypeError, match="`other` must be an EpisodeDataset, found list"):
        ring.extend([])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the dataset itself"):
        ring.extend(ring)
    for name in ("other_batch_size", "fetch_from_other_every"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1, found 0"):
            ring.extend(large, **{name: 0})
    with pytest.raises(ValueError, match="`other_num_workers` must be at least 0"):
        ring.extend(large, other_num_workers=-1)
    with pytest.raises(TypeError, match="`other` must be an EpisodeDataset, found MixtureDataset"):
        ring.extend(MixtureDataset([large], [1]))  # type: ignore[arg-type]
    IndividualFileDataset(100, directory=tmp_path).close()
    with pytest.raises(RuntimeError, match="This dataset only reads .* mode='r'"):
        ring.extend(IndividualFileDataset(100, directory=tmp_path, mode="r"))
    with pytest.raises(RuntimeError, match=r"call `extend\(other\)` first"):
        ring.refill()
    ring.add_episode(tagged.episode(3, 0))
    assert numbers(ring) == [0] and large.is_empty
    ring.extend(large)
    with pytest.raises(RuntimeError, match="extended already, by a ListDataset"):
        ring.extend(ListDataset(100))
    with pytest.raises(ValueError, match="leads back to it"):
        large.extend(ring)
    with pytest.raises(RuntimeError, match="behind another dataset already"):
        large.extend(ListDataset(1000))


def test_fields_must_agree_and_are_settled_for_both() -> None:
    vectors = EpisodeDatasetInfo(Fields(x=Vector(3)))
    ring, large = RingBufferDataset(20), ListDataset(100, info=vectors)
    with pytest.raises(ValueError, match=r"differ .* field `x` is float32 \(3,\), expected float32 \(2,\)"):
        RingBufferDataset(20, EpisodeDatasetInfo(Fields(x=Vector(2)))).extend(large)
    ring.extend(large)
    assert ring.fields == large.fields
    other = ListDataset(100)
    RingBufferDataset(20, vectors).extend(other)
    assert other.fields == vectors.fields
    # Neither knows; then the large one gets an episode from elsewhere.
    ring, large = RingBufferDataset(20), ListDataset(100)
    ring.extend(large)
    large.add_episode({"x": np.zeros((2, 3), np.float32)})
    with pytest.raises(ValueError, match=r"missing \['x'\], unexpected \['y'\]"):
        ring.add_episode({"y": np.zeros(2, np.float32)})
    assert ring.is_empty and large.num_episodes == 1
    ring.add_episode({"x": np.ones((2, 3), np.float32)})
    assert ring.num_episodes == 1 and large.num_episodes == 2
