"""A shard, asked by hand: which episodes of a pack it stores."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from buffers.dataset import RingBufferDataset
from buffers.fields import Fields
from buffers.remote import on_ray
from buffers.remote.shard import Shard
from buffers.remote.wire import Pack
from tests.remote.simulated import episode, make_ring, number_of


def pack(first: int, end: int, writer: str = "a", kept_from: int = 0, wants_save: bool = False) -> Pack:
    episodes = [episode(number) for number in range(first, end)]
    rows = {name: np.concatenate([rows[name] for rows in episodes]) for name in (episodes[0] if episodes else ())}
    lengths = [len(rows["step"]) for rows in episodes]
    fields = Fields.from_episode(episodes[0]) if episodes else None
    return Pack(writer, kept_from, first, lengths, [0] * len(lengths), [None] * len(lengths), fields, rows, wants_save)


def numbers(shard: Shard) -> list[int]:
    return [number_of(rows) for rows in shard.episodes()]


@pytest.mark.parametrize(
    ("packs", "stored"),
    [
        ([(0, 3), (0, 3)], 3),  # Repeated.
        ([(0, 3), (1, 6)], 6),  # It has some of them.
        ([(0, 3), (0, 2)], 3),
        ([(0, 3), (4, 6)], 3),  # One before it is missing.
        ([(4, 6), (0, 3), (3, 4), (4, 6)], 6),
        ([(0, 0), (0, 1)], 1),
    ],
)
def test_each_episode_is_stored_once_and_in_order(packs: list[tuple[int, int]], stored: int) -> None:
    shard = Shard(0, make_ring)
    for first, end in packs:
        receipt = shard.add(pack(first, end))
    assert receipt.next == receipt.saved == stored and numbers(shard) == list(range(stored))


def test_writers_have_numbers_of_their_own() -> None:
    shard = Shard(0, make_ring)
    assert [shard.add(pack(0, 2, writer)).next for writer in "abab"] == [2, 2, 2, 2]
    assert numbers(shard) == [0, 1, 0, 1]


def test_what_a_writer_does_not_keep_any_more_is_passed_over() -> None:
    shard = Shard(0, make_ring)
    assert shard.add(pack(5, 7, kept_from=5)).next == 7
    assert numbers(shard) == [5, 6] and shard.stats()["num_missing"] == 5


def test_a_failure_in_the_middle_of_a_pack_leaves_those_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    shard = Shard(0, make_ring)
    add, left = shard.dataset.add, [2]

    def fail(*arguments: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return add(*arguments)

    monkeypatch.setattr(shard.dataset, "add", fail)
    receipt = shard.add(pack(0, 5))
    assert receipt.next == 2 and receipt.news.trouble == "OSError: [Errno 28] No space left on device"
    left[0] = 10
    receipt = shard.add(pack(0, 5))
    assert (receipt.next, receipt.news.trouble) == (5, None) and numbers(shard) == [0, 1, 2, 3, 4]


def test_nothing_is_called_saved_that_a_save_did_not_begin_with(tmp_path: Path) -> None:
    shard = Shard(0, make_ring, str(tmp_path), 1e9)
    assert shard.add(pack(0, 2)).saved == 0
    shard.add(pack(2, 3, wants_save=True))  # Begins a save, in a thread.
    receipt = shard.add(pack(3, 5))
    assert receipt.next == 5 and receipt.saved in (0, 3)
    shard._settle_save(block=True)
    assert shard.add(pack(5, 5)).saved == 3
    assert numbers(Shard(0, make_ring, str(tmp_path))) == [0, 1, 2]


def test_a_save_that_fails_promises_nothing_and_is_tried_again_seconds_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = [0.0]
    shard = Shard(0, make_ring, str(tmp_path), 1e9, lambda: time[0])
    save, calls = shard.dataset.save_with, []

    def fail(*arguments: Any) -> Any:
        calls.append(time[0])
        if len(calls) < 3:
            raise OSError(28, "No space left on device")
        return save(*arguments)

    monkeypatch.setattr(shard.dataset, "save_with", fail)
    for second in range(20):
        time[0] = float(second)
        shard.add(pack(second, second + 1, wants_save=True))
    shard._settle_save(block=True)
    assert calls[:3] == [0.0, 5.0, 10.0]
    receipt = shard.add(pack(20, 20))
    assert receipt.saved >= 11 and receipt.news.trouble is None


def test_others_are_told_of_learners_and_forget_none(tmp_path: Path) -> None:
    from buffers.remote.wire import Request, Told

    shard = Shard(0, make_ring, str(tmp_path))
    shard.add(pack(0, 5))
    for number in range(130):
        told = Told(f"loader {number}", 10 * number, 4, True)
        assert shard.draw(told, told.loader, Request(4, 1, {}), 0).num_windows == 15
    # As after a restart; it is told again.
    assert not shard.draw(Told("loader 0", 0, 4, True), "loader 0", None, 0).is_known
    shard.save()
    news = Shard(0, make_ring, str(tmp_path)).add(pack(5, 5)).news
    assert len(news.loaders) == 130 and news.num_added == 15 and news.loaders["loader 7"].num_drawn == 70


def test_a_full_dataset_evicts_and_stores_on() -> None:
    shard = Shard(0, lambda number: RingBufferDataset(20))
    assert shard.add(pack(0, 100)).next == 100
    assert numbers(shard)[-1] == 99 and shard.stats()["num_evicted"] > 90


@pytest.mark.parametrize(("is_restart", "seconds"), [(False, 10), (True, 600)])
def test_two_processes_do_not_save_in_one_directory_and_a_restarted_one_waits_longer(
    is_restart: bool, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, waits = SimpleNamespace(was_current_actor_reconstructed=is_restart), [0.0]
    monkeypatch.setattr(on_ray, "_ray", lambda: SimpleNamespace(get_runtime_context=lambda: context))
    monkeypatch.setattr(on_ray, "time", SimpleNamespace(monotonic=lambda: sum(waits), sleep=waits.append))
    first = on_ray.ShardActor(0, make_ring, str(tmp_path), 60.0)
    first.add(pack(0, 3))
    with pytest.raises(RuntimeError, match="shard-0000 belongs to a shard that runs: two runs at a time cannot save"):
        on_ray.ShardActor(0, make_ring, str(tmp_path), 60.0)
    assert sum(waits) == pytest.approx(seconds, abs=0.2)
    first.save()
    del first
    assert numbers(on_ray.ShardActor(0, make_ring, str(tmp_path), 60.0)) == [0, 1, 2]
