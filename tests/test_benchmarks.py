"""The benchmarks' own logic: what the driver makes of contestants, and what verification says. No peer is needed."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import composing, driver, environments, holding_up, results, saving
from benchmarks.checks import common
from benchmarks.claims import NO_SEQUENCES, NOT_CHECKED, claims
from benchmarks.driver import ContestantError, Driver, Row
from benchmarks.environments import NAMES
from benchmarks.peers import CONTESTANTS
from benchmarks.peers.limits import BareGather
from benchmarks.peers.plain_files import PlainFiles, TorchSave
from benchmarks.peers.sum_tree import SumTree
from benchmarks.saving_steps import Steps, check_rows
from benchmarks.verification import LENGTHS, check_priorities, check_sequences, is_crossing, is_misread, rule_of
from benchmarks.workloads import (
    ALPHA,
    FIELDS,
    PRIORITIZED,
    RECENCY,
    UPDATE,
    UPDATED,
    Store,
    TaggedEnvs,
    Workload,
    blocks,
    offsets_of,
    tagged_rows,
    tags_of,
    transitions_of,
    workloads,
)

TINY = Workload("sampling", "tiny", Store("state", 400, 20), 8, 5)


def starts(share: np.ndarray, num: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """(episode, step) drawn with these shares `(episodes, steps)`."""
    flat = np.random.default_rng(0).choice(share.size, num, p=(share / share.sum()).ravel())
    return np.unravel_index(flat, share.shape)  # type: ignore[return-value]


def is_start(length: int) -> np.ndarray:
    return (np.arange(max(LENGTHS)) <= np.asarray(LENGTHS)[:, None] - length).astype(float)


# Data.


@pytest.mark.parametrize("kind", FIELDS)
def test_rows_carry_episode_and_step(kind):
    store = Store(kind, 2_400, 12)
    episode, step = (
        np.concatenate(values) for values in zip(*(tags_of(rows["obs"]) for rows in blocks(store)), strict=True)
    )
    assert episode.tolist() == np.repeat(np.arange(200), 12).tolist()
    assert step.tolist() == np.tile(np.arange(12), 200).tolist()


def test_transitions_stay_within_episodes():
    rows = transitions_of(next(blocks(Store("state", 60, 6))), 6)
    (episode, step), (next_episode, next_step) = tags_of(rows["obs"]), tags_of(rows["next_obs"])
    assert len(episode) == 50
    assert (episode == next_episode).all() and (step + 1 == next_step).all()
    assert (rows["terminated"] == (next_step == 5)).all()


def test_environments_end_episodes_one_row_after_the_other():
    envs = TaggedEnvs(Store("state", 100, 5, num_envs=3))
    seen: list[list[tuple[int, int, bool, bool]]] = [[], [], []]
    for _ in range(23):
        episode, step = tags_of(envs.rows["obs"])
        for i in range(3):
            seen[i].append((episode[i], step[i], bool(envs.rows["terminated"][i]), bool(envs.was_done[i])))
        envs.step()
    for rows in seen:
        for before, now in itertools.pairwise(rows):
            assert now[3] == before[2] == (before[1] == 4)
            assert now[:2] == ((before[0] + 3, 0) if before[2] else (before[0], before[1] + 1))


def test_a_workload_crosses_the_pipe_as_it_is():
    parts = (
        "sampling",
        "transitions",
        "disk",
        "adding",
        "growth",
        "training",
        "memory",
        "samplers",
        "wrapping",
        "padding",
        "offsets",
        "priorities",
        "priorities_growth",
        "saving",
    )
    everything = [workload for part in parts for workload in workloads(part)]
    assert [Workload.from_json(json.loads(json.dumps(w.to_json()))) for w in everything] == everything


# Verification.


def test_a_sequence_over_the_end_of_an_episode_is_crossing():
    episode = np.array([[1, 1, 1], [1, 1, 2], [1, 1, 1], [1, 1, 1]])
    step = np.array([[3, 4, 5], [3, 4, 0], [3, 5, 6], [3, 3, 4]])
    assert is_crossing(episode, step).tolist() == [False, True, True, True]


def test_rows_at_other_offsets_or_of_another_episode_are_misread():
    rows = tagged_rows("pixels", 0, 3, 20)
    first, anchor = np.array([0, 20, 40, 20])[:, None], np.array([0, 7, 19, 4])[:, None]
    at = {name: first + np.clip(anchor + offsets_of(name), 0, 19) for name in rows}
    assert not is_misread({name: rows[name][at[name]] for name in rows}, 20).any()
    for name, wrong in (("obs", 0), ("obs", 1), ("action", 3), ("action", 15)):
        for shift, is_wrong in ((20, name == "obs"), (1, True)):
            moved = at[name].copy()
            moved[1, wrong] += shift
            misread = is_misread({**{n: rows[n][at[n]] for n in rows}, name: rows[name][moved]}, 20)
            assert misread.tolist() == [False, is_wrong, False, False]


def test_the_rule_that_was_drawn_by_is_named():
    windows = is_start(3)
    episodes = windows / windows.sum(1, keepdims=True)
    rows = is_start(1)
    assert rule_of(*starts(windows), 3) == "all windows alike"
    assert rule_of(*starts(episodes), 3) == "all long enough episodes alike, then their windows"
    assert rule_of(*starts(rows), 3) == "all rows alike, whatever follows"
    assert rule_of(*starts(rows), 1) == "all rows alike"
    assert rule_of(*starts(is_start(4)), 3) == "none of the usual ones", "where last windows are never drawn"


class StaleSumTree(SumTree):
    """Keeps what was written first."""

    def spread_priorities(self, values):
        super().spread_priorities(values)
        self.update = lambda index, priorities: None


class TwiceSumTree(SumTree):
    """Takes the exponent twice."""

    def update(self, index, priorities):
        super().update(index, priorities**ALPHA)


class DriftingSumTree(SumTree):
    """Leaves the sums above as they were."""

    def update(self, index, priorities):
        if self._tree[1] == 0 or len(index) < sum(LENGTHS):
            super().update(index, priorities)
        self._tree[index + self._num_leaves] = priorities**ALPHA


def test_large_priorities_are_preferred_by_a_sum_tree():
    found = check_priorities(SumTree())
    assert found["deviation"] < 1.5 < 10 < found["of_uniform"]


@pytest.mark.parametrize("wrong", [StaleSumTree, TwiceSumTree, DriftingSumTree])
def test_priorities_that_are_drawn_by_otherwise_are_noticed(wrong):
    with pytest.raises(AssertionError, match="does not draw each row by its own"):
        check_priorities(wrong())


# The driver.


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(driver, "workloads", lambda part, scale: [TINY])
    monkeypatch.setattr(driver, "THREADS", {})


@pytest.mark.slow
def test_contestants_in_processes_of_their_own_are_verified_and_timed(tiny):
    with Driver(["copy", "gather", "ours"], rounds=3) as running:
        (row,) = running.run("sampling")
        distribution = running.distributions()["ours"]
        assert running.versions["buffers"]
    assert list(row.timings) == ["copy", "gather", "ours"] and not row.left_out
    assert all(len(measured) == 3 for measured in row.measured.values())
    for name, measured in row.measured.items():
        least, median, most = sorted(measured)
        assert row.timings[name] == {"median": median, "least": least, "most": most}
    assert row.crossing == {"copy": "", "gather": "", "ours": "0 of 160"}
    assert distribution["rule"] == "all windows alike" and distribution["last_step"]


@pytest.mark.slow
def test_offsets_are_verified_of_ours_with_and_without_workers_and_gathered_alike(tiny, monkeypatch):
    small = Workload("offsets", "small", Store("pixels", 400, 20), 8)
    monkeypatch.setattr(driver, "workloads", lambda part, scale: [small])
    with Driver(["copy", "gather", "ours", "ours_workers"], rounds=2) as running:
        (row,) = running.run("offsets")
    assert list(row.timings) == ["copy", "gather", "ours", "ours_workers"] and not row.left_out
    assert row.crossing["ours"] == row.crossing["ours_workers"] == "0 of 160"
    gather = BareGather()
    gather.fill(small.store)
    assert check_sequences(gather, small) == {"num_sequences": 160, "num_crossing": 0}


@pytest.mark.slow
def test_priorities_are_checked_drawn_and_updated_by_those_who_can(tiny, monkeypatch, capsys):
    rows = Workload("priorities", "", Store("state", 400, 20, prioritized=True), 8, 1)
    tasks = (PRIORITIZED, UPDATED, UPDATE, RECENCY)
    wanted = [replace(rows, label=task, task=task) for task in tasks]
    wanted.append(replace(rows, label="longer", task=PRIORITIZED, length=5))
    monkeypatch.setattr(driver, "workloads", lambda part, scale: wanted)
    with Driver(["gather", "ours", "sum_tree"], rounds=2) as running:
        found = {row.label: set(row.timings) for row in running.run("priorities")}
    all_three = {"gather", "ours", "sum_tree"}
    drawn = {PRIORITIZED: all_three, UPDATED: all_three, RECENCY: {"gather", "ours"}, "longer": {"gather", "ours"}}
    assert found == {**drawn, UPDATE: {"ours", "sum_tree"}}
    assert "sum tree by hand, priorities: {'deviation': " in capsys.readouterr().err


def test_who_does_not_prefer_large_priorities_is_left_out_and_ours_stops_the_run(tiny, monkeypatch):
    uniform = {"check_priorities": ContestantError("AssertionError: It does not draw by priorities")}
    with_fakes(monkeypatch, [], ours=uniform, cpprb_priorities=uniform)
    monkeypatch.setattr(driver, "workloads", lambda part, scale: [replace(TINY, part=part)])
    with Driver(["cpprb_priorities", "sum_tree"], rounds=1) as running:
        assert list(running.run("priorities")[0].timings) == ["sum_tree"]
        assert "does not draw by priorities" in running.missing["cpprb_priorities"]
    with Driver(["ours"], rounds=1) as running, pytest.raises(AssertionError, match="does not draw by priorities"):
        running.run("priorities")


@pytest.mark.skipif(not (driver.ROOT / ".git").exists(), reason="an earlier build comes from git")
def test_an_earlier_build_is_measured_by_todays_benchmarks(monkeypatch, tmp_path):
    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    small = {"samplers": replace(TINY, part="samplers"), "wrapping": workloads("wrapping")[0]}
    monkeypatch.setattr(driver, "workloads", lambda part, scale: [small[part]])
    with Driver(["ours", "before"], rounds=2, before="HEAD") as running:
        samplers, wrapping = running.run("samplers")[0], running.run("wrapping")[0]
        takers = running.takers("samplers")
        home = Path(takers["before"].imported_from).parents[1]
        assert home.parent == tmp_path and running.versions["before"] in home.name
        assert Path(takers["ours"].imported_from).parents[1] == driver.ROOT
    by_sampler = {f"{name}{variant}" for name in ("ours", "before") for variant in ("", "_episodes", "_own")}
    assert set(samplers.timings) == by_sampler
    assert set(wrapping.timings) == {"ours", "ours_long", "before", "before_long"}
    assert all(len(measured) == 2 for measured in (*samplers.measured.values(), *wrapping.measured.values()))
    page = results.timing_tables({"found": [asdict(samplers)]}, "samplers")
    assert "before, a sampler of one's own" in page and "Times before." in page


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("before", "before is left out: commit no-such-commit cannot be taken from git"),
        ("torchrl", "TorchRL is left out: its environment is not there: `python -m benchmarks environments`"),
    ],
)
def test_a_contestant_that_is_not_there_is_left_out_with_a_line(tiny, monkeypatch, capsys, name, why):
    if name != "before":
        monkeypatch.setattr(driver, "python_of", lambda environment: None)
    with Driver([name], rounds=1, before="no-such-commit") as running:
        (row,) = running.run("sampling")
    assert not row.timings and why in capsys.readouterr().err


def test_additions_are_timed_while_a_thread_reads(tmp_path):
    for _ in range(2):
        found = holding_up.hold_up(str(tmp_path), num_added=3, limit=60, large_length=20)
        assert len(found["milliseconds"]) == 3 and min(found["milliseconds"]) > 0
    assert holding_up.hold_up(str(tmp_path), num_added=3, limit=0, large_length=20)["milliseconds"] == []


# Saving.

SAVED = Workload("saving", "small", Store("state", 4_000))


@pytest.mark.parametrize("contestant_class", [PlainFiles, TorchSave])
def test_what_was_saved_again_is_loaded_with_what_was_new(contestant_class, tmp_path):
    contestant = contestant_class()
    contestant.fill(SAVED.store)
    steps = Steps(contestant, SAVED)
    for number in range(2):
        steps.start(str(tmp_path / str(number)))
        sizes = [steps.save()["files"], steps.save_new()["files_new"]]
        num_new = 1 if contestant_class is PlainFiles else 20
        assert sizes[1] == pytest.approx(sizes[0] * num_new / 20)
        assert list(steps.load()) == ["load"] and list(steps.load_from_disk()) == ["load_from_disk"]
        steps.check()
        assert steps.first == number + 1 and steps.hold_up(check=True) == {}


@pytest.mark.parametrize("name", SAVED.store.fields)
def test_a_row_that_comes_back_changed_is_noticed(name):
    rows = tagged_rows("state", 3, 20, 200)
    in_disorder = np.random.default_rng(0).permutation(4_000)
    check_rows({n: values[in_disorder] for n, values in rows.items()}, SAVED.store, 3)
    for first in (2, 4):
        with pytest.raises(AssertionError, match="is not what was stored"):
            check_rows(rows, SAVED.store, first)
    rows[name][77] += True
    with pytest.raises(AssertionError, match="is not what was stored"):
        check_rows(rows, SAVED.store, 3)
    rows[name] = rows[name].astype(np.float64)
    with pytest.raises(AssertionError, match="other fields"):
        check_rows(rows, SAVED.store, 3)


@pytest.mark.slow
def test_saves_are_measured_in_turn_beside_the_plain_copy(monkeypatch, tmp_path):
    monkeypatch.setattr(saving, "workloads", lambda part, scale: [SAVED])
    monkeypatch.setattr(saving, "FOLDER", tmp_path)
    with Driver(["plain", "torch_save"], rounds=2) as running:
        rows = {row.label.removeprefix("small: "): row for row in saving.saving(running)}
        found: dict = {"parts": {}}
        results.record(found, "saving", list(rows.values()), running)
    save, held_up = rows["a save, ms"], rows["`block=False` returns after, ms"]
    assert {name: len(values) for name, values in save.measured.items()} == {"plain": 2, "torch_save": 2}
    assert save.timings["plain"]["ratio"] == 1 and not held_up.timings and not list(tmp_path.iterdir())
    page = results.section(found, "saving")
    assert "| files new or changed with 5 % new, MB |" in " ".join(page.split()) and "Times the plain copy" in page


def test_datasets_are_drawn_from_in_turn_while_recording(monkeypatch, capsys):
    monkeypatch.setattr(composing, "CAPACITIES", {"state": 1_000})
    monkeypatch.setattr(composing, "SIZES", (("state", 8, 4),))
    composing.composing(1)
    (row,) = [line for line in capsys.readouterr().out.split("\n") if "state 8 x 4" in line]
    rates = [float(cell.replace(",", "")) for cell in row.split("|")[2:5]]
    assert len(rates) == 3 and min(rates) > 0


def test_a_peer_whose_python_is_not_there_is_left_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    monkeypatch.setattr(environments, "_PYTHONS", {"lerobot": "python-that-is-not-there"})
    assert list(environments.make(("lerobot",))) == ["lerobot"]
    assert "lerobot: left out" in capsys.readouterr().out


class FakeContestant:
    """Stands for a process: answers by name, and fails where the answer is an error."""

    def __init__(self, name, calls, **answers):
        self.name, self.spec, self.versions, self._is_alive = name, CONTESTANTS[name], {}, True
        self._calls, self._answers = calls, answers

    def ask(self, do, **arguments):
        self._calls.append((self.name, do))
        answer = self._answers.get(do, {"num_sequences": 10, "num_crossing": 0, "microseconds": {"": 5.0}})
        if isinstance(answer, Exception):
            raise answer
        return answer

    def serves(self, threads):
        return self._is_alive

    def close(self):
        self._is_alive = False


def with_fakes(monkeypatch, calls, **answers):
    def fake(name, *arguments):
        return FakeContestant(name, calls, **answers.get(name, {}))

    monkeypatch.setattr(driver, "Contestant", fake)


def test_measurements_are_interleaved_until_a_contestants_time_is_up(tiny, monkeypatch):
    calls: list[tuple[str, str]] = []
    with_fakes(monkeypatch, calls)
    for seconds, rounds in ((60.0, 3), (1e-9, 1)):
        calls.clear()
        with Driver(["gather", "ours", "cpprb"], rounds=3, seconds_to_measure=seconds) as running:
            running.run("sampling")
        assert [name for name, do in calls if do == "measure"] == ["gather", "ours", "cpprb"] * rounds


def test_a_contestant_that_fails_is_left_out_and_the_others_go_on(tiny, monkeypatch):
    slow, ended = ContestantError("it took more than 120 s"), ContestantError("its process has ended")
    with_fakes(monkeypatch, [], torchrl={"build": slow}, cpprb={"measure": ended})
    # SB3 stores every row twice, for which there is no memory here.
    monkeypatch.setattr(driver, "memory_available", lambda: driver._SPARE_BYTES + TINY.store.num_bytes)
    with Driver(["ours", "torchrl", "cpprb", "sb3"], rounds=2) as running:
        (row,) = running.run("sampling")
    assert "of memory are not free" in row.left_out.pop("sb3")
    assert row.left_out == {"torchrl": "it took more than 120 s", "cpprb": "its process has ended"}
    assert list(row.timings) == ["ours"]


def test_ours_crossing_an_episode_stops_the_run(tiny, monkeypatch):
    crossing = {"verify": {"num_sequences": 10, "num_crossing": 1}}
    with_fakes(monkeypatch, [], ours=crossing, flashbax=crossing)
    with Driver(["flashbax"], rounds=1) as running:
        assert running.run("sampling")[0].crossing == {"flashbax": "1 of 10"}
    with Driver(["ours"], rounds=1) as running, pytest.raises(AssertionError, match="cross episodes"):
        running.run("sampling")


def test_every_contestant_has_its_environment_pinned():
    # One makes frames, and measures nothing; one is beside shards alone.
    assert {spec.environment for spec in CONTESTANTS.values()} - {None} == set(NAMES) - {"frames", "reverb"}


# What is made of it.


def test_tables_stand_between_their_markers_and_nothing_else_changes(tmp_path, monkeypatch):
    timing = {"median": 12.0, "least": 10.0, "most": 14.0}
    copy = {"median": 4.0, "least": 4.0, "most": 4.0}
    row = Row("state 1 x 1", 1, {"copy": copy, "gather": timing, "ours": {**timing, "median": 24.0}}, {}, {})
    found: dict = {"parts": {}}
    with Driver([], rounds=7) as running:
        results.record(found, "sampling", [row], running)
    results.save(found, tmp_path / "results.json")
    monkeypatch.setattr(results, "load", lambda: json.loads((tmp_path / "results.json").read_text()))
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- table: sampling -->\nold\n<!-- end -->\nafter\n")
    results.paste([page])
    once = page.read_text()
    assert once.startswith("before\n<!-- table: sampling -->") and once.endswith("<!-- end -->\nafter\n")
    assert "old" not in once and "24 (10.0 to 14.0)" in once and "2.0 / 6.0" in once and "7 rounds" in once
    results.paste([page])
    assert page.read_text() == once


def test_claims_come_from_checks_and_measurements(monkeypatch):
    failing = {"check": ContestantError("no such thing")}
    with_fakes(monkeypatch, [], ours={"check": {"cell": "yes"}}, cpprb=failing)
    drawn = {"rule": "all windows alike", "share_crossing": 0.0, "last_step": True}
    distribution = {name: {**drawn, "draws_sequences": name == "ours"} for name in ("ours", "cpprb")}
    medians = {"100": 10.0, "1,000": 25.0}
    growth = [{"label": label, "timings": {"ours": {"median": median}}} for label, median in medians.items()]
    found = {"parts": {"distribution": {"found": distribution}, "growth": {"found": growth}}}
    with Driver(["ours", "cpprb"], rounds=1) as running:
        rows = {row["claim"]: row["cells"] for row in claims(running, found)["rows"]}
    assert rows["Sequences never cross the end of an episode"] == {"ours": "yes", "cpprb": NO_SEQUENCES}
    assert rows["On disk, survives a kill"] == {"ours": "yes", "cpprb": NOT_CHECKED}
    cost = rows["Cost as episodes are stored, one added before each batch"]
    assert cost == {"ours": "2.5 times, 10 to 25 us, 100 to 1,000 episodes", "cpprb": NOT_CHECKED}


@pytest.mark.parametrize(("episode", "is_new"), [(3, False), (5_000, False), (1e9, False), (7_654_321 + 19, True)])
def test_memory_that_was_never_written_is_not_taken_for_what_was_added(episode, is_new):
    class Garbage:
        def drawer(self, batch_size: int, length: int):
            return lambda: np.full((batch_size, length, 24), episode, np.float32)

        def arrays(self, batch, batch_size: int, length: int):
            return {"obs": batch}

    assert common._draws_new(Garbage()) is is_new
