"""The simulation of many actors, shards and learners gives what arithmetic gives where that is simple."""

from __future__ import annotations

import pytest

from benchmarks import scaling
from benchmarks.scaling import SECONDS_A_STEP, Setting, simulate


def draw_seconds(setting: Setting) -> float:
    """That a shard's processor takes for a batch."""
    return scaling.SECONDS_A_REQUEST + setting.batch_bytes * scaling.SECONDS_A_BYTE_DRAWN


@pytest.mark.parametrize(("num_actors", "num_shards"), [(1, 1), (10, 3), (1_000, 64)])
def test_all_episodes_are_stored_where_shards_have_time(num_actors: int, num_shards: int) -> None:
    setting = Setting(num_actors, num_shards, 1, 100, steps_a_second=400.0)
    assert simulate(setting).episodes_a_second == pytest.approx(num_actors * 400 / 200, rel=0.1)


@pytest.mark.parametrize("num_learners", [1, 4])
def test_learners_take_a_batch_a_step_where_shards_have_time(num_learners: int) -> None:
    setting = Setting(1, 8, num_learners, 100)
    found = simulate(setting)
    assert found.batches_a_second == pytest.approx(num_learners / SECONDS_A_STEP, rel=0.02)
    assert found.busy["shards' processors"] < 0.5


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_shards_that_have_no_time_give_what_their_processors_can(num_shards: int) -> None:
    setting = Setting(1, num_shards, 32, 12_321)
    found = simulate(setting)
    assert found.batches_a_second == pytest.approx(num_shards / draw_seconds(setting), rel=0.05)
    assert found.busy["shards' processors"] == pytest.approx(1.0, rel=0.05)


def test_a_slow_link_is_what_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "LINK_BYTES_A_SECOND", 1e8)
    setting = Setting(1, 8, 2, 12_321)
    found = simulate(setting)
    assert found.batches_a_second == pytest.approx(2 * 1e8 / setting.batch_bytes, rel=0.05)
    assert max(found.busy, key=lambda kind: found.busy[kind]) == "learners' links"


def test_every_setting_of_the_table_is_simulated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(scaling, "simulate", lambda setting: simulate(setting, seconds=2.0))
    scaling.scaling()
    assert sum(line.startswith("| ") for line in capsys.readouterr().out.split("\n")) == 1 + len(scaling.SETTINGS)
