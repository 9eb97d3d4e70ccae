"""Buffers that TorchRL has saved, against the log of their environments. `data/interop/torchrl/make.py` saves them."""

from __future__ import annotations

import ast
import inspect
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers.dataset import IndividualFileDataset
from buffers.interop import Episode, FormatError, import_episodes
from buffers.interop.torchrl import TorchRLReader, open, read
from tests.interop.made_up import killed_before
from tests.interop.torchrl_log import NUM_ROWS, Arrays, arrived, later, log

MADE = Path(__file__).parents[1] / "data" / "interop" / "torchrl" / "cases.tar.xz"
FIELDS = ["obs", "action", "reward", "terminated", "truncated", "is_first"]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files, unpacked, to be read only."""
    root = tmp_path_factory.mktemp("torchrl")
    with tarfile.open(MADE) as archive:
        archive.extractall(root, filter="data")
    return root


@pytest.fixture
def copy(cases: Path, tmp_path: Path) -> Any:
    """A function that copies a case, to be damaged."""

    def copied(name: str) -> Path:
        return Path(shutil.copytree(cases / name, tmp_path / name))

    return copied


def logs(num_envs: int) -> list[Arrays]:
    return [played for env in range(num_envs) for played in log(env)]


def key(obs: np.ndarray) -> tuple[float, ...]:
    """The environment and the episode that the first observation names."""
    return tuple(obs[0, :2].tolist())


def obs_of(rows: dict[str, Any]) -> np.ndarray:
    return rows["obs"]["observation"] if isinstance(rows["obs"], dict) else rows["obs"]


def assert_rows(rows: dict[str, Any], played: Arrays) -> None:
    """That rows, and dtypes, are those of a log."""
    expected = arrived(played)
    for name in FIELDS:
        found = obs_of(rows) if name == "obs" else rows[name]
        np.testing.assert_array_equal(found, expected[name], name, strict=True)
    if isinstance(rows["obs"], dict):
        np.testing.assert_array_equal(rows["obs"]["image"], expected["image"], strict=True)
    if "step_count" in rows:
        np.testing.assert_array_equal(rows["step_count"], expected["step_count"], strict=True)


def assert_logs(found: list[Episode], expected: list[Arrays]) -> None:
    """That the episodes are those of logs, in any order."""
    by_key = {key(played["obs"]): played for played in expected}
    assert sorted(key(obs_of(episode.rows)) for episode in found) == sorted(by_key)
    for episode in found:
        assert_rows(episode.rows, by_key[key(obs_of(episode.rows))])


def without_first(played: list[Arrays], lost: int) -> list[Arrays]:
    """The episodes of an environment of which the first rows were overwritten."""
    kept = []
    for each in played:
        length = len(each["action"])
        if lost < length:
            kept.append(later(each, lost))
        lost = max(lost - length, 0)
    return kept


@pytest.mark.parametrize("case", ["one", "full", "plain", "padded"])
def test_one_environment_is_read_as_its_log(cases: Path, case: str) -> None:
    reader = read(cases / case)
    found = [*reader]
    assert len(found) == reader.num_episodes == 5
    assert reader.num_steps == NUM_ROWS + 5
    assert list(reader.notes) == []
    for episode, played in zip(found, log(), strict=True):
        assert [*episode.rows][:6] == FIELDS
        assert_rows(episode.rows, played)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("ndim2", {}),
        ("turns", {"num_envs": 3}),
        ("items_of_envs", {"time_axis": 0}),
        ("plain_of_envs", {}),
        ("blocks", {}),
        ("collected", {}),
        ("cuts_with_is_init", {}),
        ("cuts", {"gaps": "split"}),
    ],
)
def test_several_environments_are_read_as_their_logs(cases: Path, case: str, options: dict[str, Any]) -> None:
    found = [*read(cases / case, **options)]
    assert len(found) == 15
    assert_logs(found, logs(3))


@pytest.mark.parametrize(("case", "capacity"), [("wrapped", 8), ("twice_round", 4)])
def test_a_buffer_that_was_full_begins_with_its_oldest_row(cases: Path, case: str, capacity: int) -> None:
    reader = read(cases / case)
    expected = without_first(log(), NUM_ROWS - capacity)
    for episode, played in zip(reader, expected, strict=True):
        assert_rows(episode.rows, played)
    assert any("overwritten" in note for note in reader.notes)


def test_each_environment_of_a_buffer_that_was_full_begins_with_its_oldest_row(cases: Path) -> None:
    expected = [played for env in range(3) for played in without_first(log(env), NUM_ROWS - 8)]
    assert_logs([*read(cases / "ndim2_wrapped")], expected)


def test_environments_keep_their_turns_in_a_buffer_that_was_full(cases: Path) -> None:
    # 33 rows in room for 20, which is no multiple of 3: the oldest row is number 13, of environment 1.
    lost = {0: 5, 1: 4, 2: 4}
    expected = [played for env, num in lost.items() for played in without_first(log(env), num)]
    found = [*read(cases / "turns_wrapped", num_envs=3)]
    assert_logs(found, expected)
    assert all(episode.info == {"environment": key(obs_of(episode.rows))[0]} for episode in found)


def test_whose_turn_it_is_is_not_guessed(copy: Any) -> None:
    path = copy("turns_wrapped")
    edit(path / "writer" / "metadata.json", write_count=34)  # Does not fit the cursor.
    with pytest.raises(FormatError, match="Nothing says of which of 3 environments"):
        read(path, num_envs=3)


def test_trajectory_ids_join_the_pieces_of_an_episode(cases: Path) -> None:
    reader = read(cases / "blocks_wrapped")
    # The first 13 of 33 rows are lost: 5 of environment 0, 5 of environment 1, 3 of environment 2.
    expected = [played for env, num in {0: 5, 1: 5, 2: 3}.items() for played in without_first(log(env), num)]
    assert_logs([*reader], expected)
    assert any("lack their beginning" in note for note in reader.notes)


def test_trajectories_are_in_the_info(cases: Path) -> None:
    for episode in read(cases / "blocks"):
        env, number = key(obs_of(episode.rows))
        assert episode.info == {"traj_id": 10 * number + env}
    for episode in read(cases / "ndim2"):
        assert episode.info == {"environment": key(obs_of(episode.rows))[0]}
    assert all(episode.info == {} for episode in read(cases / "one"))


def test_episodes_come_by_when_they_began(cases: Path) -> None:
    found = [key(obs_of(episode.rows)) for episode in read(cases / "ndim2")]
    begins = {(env, n): sum(len(e["action"]) for e in log(env)[:n]) for env in range(3) for n in range(5)}
    assert found == sorted(found, key=lambda name: (begins[name], name[0]))


def test_recordings_that_are_rows_themselves_are_cut(cases: Path) -> None:
    # Each item has 5 steps of an environment, so an episode that goes on in the next item is two.
    found = [*read(cases / "items_of_time", time_axis=1)]
    steps = [row.tolist() for episode in found for row in obs_of(episode.rows)[:-1]]
    assert sorted(steps) == sorted(row.tolist() for played in logs(3) for row in played["obs"][:-1] if is_early(row))
    assert all(len(episode.rows["obs"]) <= 6 for episode in found)


def is_early(row: np.ndarray) -> bool:
    """Whether a row is one of the first 10 of its environment."""
    env, number, step = row.astype(int).tolist()
    return sum(len(each["action"]) for each in log(env)[:number]) + step < 10


def test_the_final_observation_is_the_last_next_observation(cases: Path) -> None:
    for episode, played in zip(read(cases / "one"), log(), strict=True):
        assert len(episode.rows["obs"]) == len(played["action"]) + 1
        np.testing.assert_array_equal(episode.rows["obs"][-1], played["obs"][-1])


def test_a_cut_recording_has_neither_flag(cases: Path) -> None:
    last = [*read(cases / "one")][-1].rows
    assert not last["terminated"].any() and not last["truncated"].any()


def test_the_first_action_is_not_made_up(cases: Path) -> None:
    for episode in read(cases / "one"):
        assert not episode.rows["action"][0].any() and episode.rows["reward"][0] == 0


def test_reading_from_an_episode_on_gives_the_rest(cases: Path) -> None:
    reader = read(cases / "ndim2")
    whole, rest = [*reader], [*reader.episodes(9)]
    assert [key(obs_of(e.rows)) for e in rest] == [key(obs_of(e.rows)) for e in whole[9:]]


def test_keys_keep_their_types_and_levels(cases: Path) -> None:
    reader = read(cases / "odd")
    rows = {name: [episode.rows[name] for episode in reader] for name in ("a/b c", "brain", "deep", "nothing")}
    steps = np.arange(NUM_ROWS)
    np.testing.assert_array_equal(np.concatenate([r[1:] for r in rows["a/b c"]]), (steps / 8).astype(np.float32))
    brain = torch.cat([r[1:] for r in rows["brain"]])
    assert torch.equal(brain, torch.arange(2 * NUM_ROWS).reshape(-1, 2).to(torch.bfloat16))
    deep = np.concatenate([r["er"]["values"][1:] for r in rows["deep"]])
    np.testing.assert_array_equal(deep, steps.astype(np.float64), strict=True)
    assert rows["nothing"][0].shape == (4, 0)
    after = np.concatenate([episode.rows["value_after"][1:] for episode in reader])
    np.testing.assert_array_equal(after, steps.astype(np.int32), strict=True)
    notes = " ".join(reader.notes)
    for name in ("task", "half", "tiny", "ragged"):
        assert f"`{name}` is" in notes


def test_text_and_pickles_are_never_opened(copy: Any) -> None:
    path = copy("odd")
    (path / "half" / "other.pickle").write_bytes(pickle.dumps(Poison()))
    (path / "task" / "other.pickle").write_bytes(pickle.dumps(Poison()))
    assert len([*read(path)]) == 5
    path = copy("one")
    for name in ("prefetch.pkl", "transform.t"):
        (path / name).write_bytes(pickle.dumps(Poison()))
    reader = read(path)
    assert len([*reader]) == 5
    assert any("transform.t" in note for note in reader.notes)


class Poison:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("A pickle was loaded.",)


def test_rows_that_do_not_follow_each_other_are_an_error_that_names_the_options(cases: Path) -> None:
    for case in ("turns", "blocks_without_ids", "cuts"):
        with pytest.raises(FormatError, match="next/observation") as caught:
            read(cases / case)
        assert "num_envs" in str(caught.value) and "gaps=" in str(caught.value)
    with pytest.raises(FormatError, match="time_axis"):
        read(cases / "ndim2", time_axis=1)


def test_rows_of_one_axis_can_be_ended_where_they_do_not_follow(cases: Path) -> None:
    found = [*read(cases / "blocks_without_ids", gaps="split")]
    rows = [row.tolist() for episode in found for row in obs_of(episode.rows)[:-1]]
    assert sorted(rows) == sorted(row.tolist() for played in logs(3) for row in played["obs"][:-1])
    for episode in found:
        obs = obs_of(episode.rows)
        assert len({key(row[None]) for row in obs}) == 1 and (np.diff(obs[:, 2]) == 1).all()


def test_every_row_is_compared_not_only_the_first(cases: Path, copy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copy("one")
    change(path / "storage" / "next" / "observation.memmap", np.float32, 3 * 5 + 2, 77)  # Row 5, within episode 2.
    with pytest.raises(FormatError, match="of row 5"):
        read(path)
    monkeypatch.setattr("buffers.interop.torchrl.episodes._FIRST_BYTES", 24)
    reader = read(path)
    episodes = iter(reader)
    next(episodes), next(episodes)
    with pytest.raises(FormatError, match="of row 5"):
        next(episodes)
    assert len([*read(path, fields=["reward"]).episodes(3)]) == 2
    with pytest.raises(FormatError, match="of row 5"):  # The bounds depend on it, too.
        list(read(path, fields=["reward"]))
    path = copy("plain_of_envs")
    change(path / "next" / "image.memmap", np.uint8, 12, 200)  # Row 1, within episode 0.
    assert len([*read(path, fields=["obs/observation"])]) == 15
    with pytest.raises(FormatError, match="of row 1"):
        list(read(path, fields=["obs/image"]))


def change(path: Path, dtype: Any, index: int, value: Any) -> None:
    values = np.fromfile(path, dtype)
    values[index] = value
    values.tofile(path)


def test_equal_nan_follow_each_other(copy: Any) -> None:
    path = copy("one")
    change(path / "storage" / "observation.memmap", np.float32, 3 * 5, np.nan)
    change(path / "storage" / "next" / "observation.memmap", np.float32, 3 * 4, np.nan)
    assert np.isnan([*read(path)][2].rows["obs"][1, 0])


@pytest.mark.parametrize("value", [np.nan, 0])
def test_final_observations_that_were_made_up_are_noted(copy: Any, value: float) -> None:
    path = copy("one")
    for index in range(6, 9):  # Row 2 ends episode 0.
        change(path / "storage" / "next" / "observation.memmap", np.float32, index, value)
    reader = read(path)
    np.testing.assert_array_equal(next(iter(reader)).rows["obs"][-1], [value] * 3)
    assert any("NaN" in note for note in reader.notes)


def test_multi_step_transforms_are_refused(cases: Path) -> None:
    with pytest.raises(FormatError, match="steps_to_next_obs` is more than 1"):
        read(cases / "multi_step")


def test_rows_that_repeat_an_end_are_no_episodes(cases: Path) -> None:
    with pytest.raises(FormatError, match="break_when_all_done"):
        read(cases / "repeats")
    reader = read(cases / "repeats", repeats="drop")
    assert_logs([*reader], [log(env)[0] for env in range(3)])
    assert any("repeat" in note for note in reader.notes)
    assert read(cases / "repeats", repeats="keep").num_episodes == 7


def test_is_init_tells_which_rows_repeat_an_end(cases: Path) -> None:
    assert_logs([*read(cases / "repeats_with_is_init")], [log(0)[0], log(2)[0]])
    # It is repeated, too, so that it does not tell for an episode of one step.
    with pytest.raises(FormatError, match="break_when_all_done"):
        read(cases / "repeats_of_one_step")
    assert_logs([*read(cases / "repeats_of_one_step", repeats="drop")], [log(0)[0], log(1)[0]])


def test_padding_is_left_out(cases: Path) -> None:
    with pytest.raises(FormatError, match="mask_key"):
        read(cases / "padded_by_done")
    found = [*read(cases / "padded_by_done", mask_key="mask")]
    assert sum(len(episode.rows["obs"]) - 1 for episode in found) == NUM_ROWS


def test_next_observations_that_are_missing_are_not_made_up(cases: Path) -> None:
    with pytest.raises(FormatError, match="observations"):
        read(cases / "no_next")
    with pytest.raises(FormatError, match="num_envs"):
        read(cases / "no_next", observations=["observation"])
    reader = read(cases / "no_next", observations=["observation"], num_envs=1)
    for episode, played in zip(reader, log(), strict=True):
        rows = episode.rows
        np.testing.assert_array_equal(rows["obs"], np.concatenate([played["obs"][:-1], played["obs"][-2:-1]]))
        assert rows["final_obs_missing"].tolist() == [False] * len(played["action"]) + [True]
        np.testing.assert_array_equal(rows["reward"], arrived(played)["reward"])
    assert any("final" in note for note in reader.notes)


def test_missing_columns_are_noted_and_not_made_up(copy: Any) -> None:
    path = copy("one") / "storage"
    drop(path / "next", "reward", "truncated")
    drop(path, "action")
    reader = read(path.parent)
    rows = next(iter(reader)).rows
    assert [*rows] == ["obs", "terminated", "is_first"]
    assert len(reader.notes) == 3


def drop(path: Path, *names: str) -> None:
    """Take keys out of the metadata, with their files."""
    meta = json.loads((path / "meta.json").read_text())
    for name in names:
        del meta[name]
        (path / f"{name}.memmap").unlink()
    (path / "meta.json").write_text(json.dumps(meta))


def edit(path: Path, **values: Any) -> None:
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({**meta, **values}))


def test_ends_come_from_both_flags_where_done_is_missing(copy: Any) -> None:
    path = copy("one")
    drop(path / "storage" / "next", "done")
    for episode, played in zip(read(path), log(), strict=True):
        assert_rows(episode.rows, played)
    drop(path / "storage" / "next", "truncated")
    with pytest.raises(FormatError, match="next/done"):
        read(path)


def test_a_flag_without_an_end_is_an_error(copy: Any) -> None:
    path = copy("one")
    change(path / "storage" / "next" / "terminated.memmap", bool, 0, True)
    with pytest.raises(FormatError, match="Row 0 has `next/terminated`"):
        read(path)


def test_chosen_fields_are_read_alone(cases: Path, copy: Any) -> None:
    path = copy("plain_of_envs")
    chosen = ["obs/observation", "reward"]
    reader = read(path, fields=chosen, dtypes={"reward": np.float64})
    rows = next(iter(reader)).rows
    assert [*rows] == ["obs", "reward"] and [*rows["obs"]] == ["observation"]
    assert rows["reward"].dtype == np.float64
    with pytest.raises(ValueError, match="nonsense"):
        read(path, fields=["nonsense"])


def test_the_key_of_observations_can_be_named(cases: Path) -> None:
    rows = next(iter(read(cases / "plain_of_envs", observations=["observation"]))).rows
    assert rows["obs"].shape == (4, 3)
    # What is there also after the step, and is none, is read for each row, too.
    np.testing.assert_array_equal(rows["image"], log()[0]["image"])
    with pytest.raises(ValueError, match="'pixels'"):
        read(cases / "plain_of_envs", observations=["pixels"])


def test_the_axes_of_a_storage_are_found_or_asked_for(copy: Any) -> None:
    path = copy("ndim2")
    assert read(path, ndim=2).num_episodes == 15
    with pytest.raises(FormatError, match="33 rows"):
        read(path, ndim=1)
    # 15 rows of (20, 3) are 15 items, or 5 times 3.
    edit(path / "storage" / "storage_metadata.json", len=15)
    edit(path / "writer" / "metadata.json", cursor=5, write_count=5)
    assert read(path).num_steps == 15 + read(path).num_episodes
    (path / "writer" / "metadata.json").unlink()
    with pytest.raises(FormatError, match="`ndim`"):
        read(path)
    assert read(path, ndim=2).num_steps == 15 + read(path, ndim=2).num_episodes


def test_the_axes_of_a_storage_are_told_by_what_was_written(copy: Any) -> None:
    # 12 rows of (12, 3) are 12 items, or 4 times 3.
    path = copy("items_of_envs")
    edit(path / "storage" / "storage_metadata.json", len=12)
    writer = path / "writer" / "metadata.json"
    edit(writer, cursor=4, write_count=4)
    reader = read(path)
    assert reader.num_steps == 12 + (reader.num_episodes or 0)
    edit(writer, write_count=16)
    with pytest.raises(FormatError, match="`time_axis`"):
        read(path)
    writer.write_text('{"cursor": 4}')
    with pytest.raises(FormatError, match="`ndim`"):
        read(path)


def test_a_storage_alone_is_read_while_it_is_not_full(cases: Path) -> None:
    assert_logs([*read(cases / "one" / "storage")], log())
    with pytest.raises(FormatError, match="oldest"):
        read(cases / "wrapped" / "storage")


def test_rows_that_were_never_written_are_not_read(cases: Path) -> None:
    with pytest.raises(FormatError, match="num_rows"):
        read(cases / "scratch")
    assert_logs([*read(cases / "scratch", num_rows=NUM_ROWS)], log())
    with pytest.raises(ValueError, match="num_rows"):
        read(cases / "scratch", num_rows=99)


@pytest.mark.parametrize(
    ("case", "found"),
    [
        ("ranked", "highest rank"),
        ("compact", "leaves out next observations"),
        ("dicts", "plain dicts"),
        ("ensemble", "ensemble"),
        ("emptied", "no rows"),
        ("lazy_stack", "LazyStackedTensorDict"),
    ],
)
def test_other_kinds_are_named(cases: Path, case: str, found: str) -> None:
    with pytest.raises(FormatError, match=found) as caught:
        read(cases / case)
    assert str(cases / case) in str(caught.value)


def test_what_is_not_there_or_not_whole_is_an_error_with_the_path(cases: Path, copy: Any, tmp_path: Path) -> None:
    empty, file = tmp_path / "empty", tmp_path / "file"
    empty.mkdir()
    file.write_bytes(b"")
    for path in (tmp_path / "nothing", empty, file, cases):
        with pytest.raises(FormatError) as caught:
            read(path)
        assert caught.value.path == str(path)
    path = copy("one")
    (path / "storage" / "storage_metadata.json").unlink()
    with pytest.raises(FormatError, match="not finished"):
        read(path)


@pytest.mark.parametrize(
    "name", ["observation.memmap", "next/done.memmap", "next/observation.memmap", "meta.json", "next/meta.json"]
)
@pytest.mark.parametrize("kept", [None, 0, 7])
def test_files_that_are_cut_are_an_error(copy: Any, name: str, kept: int | None) -> None:
    path = copy("one")
    file = path / "storage" / name
    if kept is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(FormatError) as caught:
        read(path)
    assert caught.value.path == str(path)


@pytest.mark.parametrize(
    ("shape", "found"),
    [
        ([20, 2**50], "takes"),
        ([2**50, 3], "does not begin"),
        ([19, 3], "does not begin"),
        ([], "does not begin"),
        ([20, 10**4000, 10**4000], "has the shape"),
        ([20, -3], "has the shape"),
        ([20, 1.5], "has the shape"),
        ([20, True], "has the shape"),
        ("20", "has the shape"),
        (None, "has the shape"),
    ],
)
def test_a_shape_that_lies_is_an_error(copy: Any, shape: Any, found: str) -> None:
    path = copy("one")
    meta = path / "storage" / "meta.json"
    described = json.loads(meta.read_text())
    edit(meta, action={**described["action"], "shape": shape})
    with pytest.raises(FormatError, match=f"`action` .*{found}"):
        read(path)


def test_an_observation_has_one_type_before_and_after_the_step(copy: Any) -> None:
    path = copy("one")
    edit(path / "storage" / "next" / "meta.json", observation={"dtype": "torch.float16", "shape": [20, 3]})
    with pytest.raises(FormatError, match="torch.float16"):
        read(path)


def test_flags_are_true_or_false_whatever_their_bytes_are(copy: Any) -> None:
    path = copy("one")
    for name in ("done", "terminated", "truncated"):
        file = path / "storage" / "next" / f"{name}.memmap"
        (2 * np.fromfile(file, np.uint8)).tofile(file)
    for episode, played in zip(read(path), log(), strict=True):
        assert_rows(episode.rows, played)
        assert episode.rows["terminated"].view(np.uint8).max() <= 1


def test_a_batch_that_lies_is_an_error(copy: Any) -> None:
    path = copy("plain")
    num = 2**50
    # No column has bytes, so that no file contradicts.
    empty = {"observation": {"dtype": "torch.float32", "shape": [num, 0]}, "shape": [num], "_type": "x.TensorDict'>"}
    (path / "meta.json").write_text(json.dumps(empty))
    for options in ({}, {"num_rows": num}):
        with pytest.raises(FormatError, match="has no values"):
            read(path, **options)


@pytest.mark.parametrize(
    "values",
    [
        {"len": 10**30},
        {"len": -1},
        {"len": "11"},
        {"len": 21},
        {"len": 10},
        {"cursor": 12},
        {"cursor": None},
        {"cursor": -5},
        {"write_count": 1.5},
    ],
)
def test_counts_that_contradict_the_rows_are_an_error(copy: Any, values: dict[str, Any]) -> None:
    path = copy("one")
    name = "storage/storage_metadata.json" if "len" in values else "writer/metadata.json"
    edit(path / name, **values)
    with pytest.raises(FormatError) as caught:
        read(path)
    assert caught.value.path == str(path)


def test_a_cursor_behind_the_rows_is_an_error(copy: Any) -> None:
    path = copy("wrapped")
    edit(path / "writer" / "metadata.json", cursor=8)
    with pytest.raises(FormatError, match="The cursor is 8"):
        read(path)


@pytest.mark.parametrize("text", [b"", b"[1]", b"{", b"\xff", b"[" * 100_000, b'{"shape": [' + b"9" * 5000 + b"]}"])
def test_metadata_that_is_no_object_is_an_error(copy: Any, text: bytes) -> None:
    path = copy("one")
    (path / "storage" / "meta.json").write_bytes(text)
    with pytest.raises(FormatError):
        read(path)


@pytest.mark.parametrize("name", ["../outside", "..", ".", "/etc/passwd", "a\0b", "", "\ud800", "x" * 5000])
def test_keys_never_lead_out_of_the_directory(copy: Any, name: str) -> None:
    path = copy("plain")
    (path.parent / "outside.memmap").write_bytes(bytes(1000))
    outside = {"outside": {"dtype": "torch.uint8", "shape": [11]}, "_type": "<class 'tensordict.TensorDict'>"}
    (path.parent / "meta.json").write_text(json.dumps(outside))
    meta = json.loads((path / "meta.json").read_text())
    for described in ({"dtype": "torch.uint8", "shape": [11, 2]}, {"type": "TensorDict"}):
        (path / "meta.json").write_text(json.dumps({**meta, name: described}))
        with pytest.raises(FormatError):
            read(path)


def test_a_key_that_is_no_text_is_an_error(copy: Any) -> None:
    path = copy("plain")
    edit(path / "meta.json", **{"\ud800": {"is_nested": True}})
    with pytest.raises(FormatError, match="no text"):
        read(path)


@pytest.mark.parametrize("name", ["observation.memmap", "meta.json"])
def test_what_is_no_file_is_an_error(copy: Any, name: str) -> None:
    path = copy("plain")
    (path / name).unlink()
    (path / name).mkdir()
    with pytest.raises(FormatError, match=name.removesuffix(".memmap")):
        read(path)


def test_names_of_other_fields_are_left_alone(copy: Any) -> None:
    path = copy("plain")
    edit(path / "meta.json", is_first={"dtype": "torch.uint8", "shape": [11]})
    (path / "is_first.memmap").write_bytes(bytes(11))
    reader = read(path)
    assert_logs([*reader], log())
    assert any("`is_first`" in note for note in reader.notes)


def test_a_name_below_another_is_an_error(copy: Any) -> None:
    path = copy("odd")
    edit(path / "next" / "meta.json", deep={"dtype": "torch.uint8", "shape": [11]})
    (path / "next" / "deep.memmap").write_bytes(bytes(11))
    with pytest.raises(FormatError, match="`deep` is below, or above"):
        read(path)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(copy: Any) -> None:
    path = copy("one")
    episodes = iter(read(path))
    next(episodes)
    os.truncate(path / "storage" / "next" / "reward.memmap", 8)
    with pytest.raises(FormatError, match="next/reward"):
        list(episodes)


def test_a_file_of_a_larger_buffer_may_be_reused(copy: Any) -> None:
    path = copy("one")
    file = path / "storage" / "action.memmap"
    file.write_bytes(file.read_bytes() + b"\xff" * 100)
    assert_logs([*read(path)], log())


def test_keys_of_older_versions_are_found(copy: Any) -> None:
    path = copy("odd")
    edit(path / "meta.json", **{"b c": {"dtype": "torch.uint8", "shape": [11]}})
    (path / "b c.memmap").write_bytes(bytes(range(11)))
    assert next(iter(read(path))).rows["b c"].tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(
    "options",
    [
        {"num_envs": 0},
        {"ndim": 2},
        {"gaps": "ignore"},
        {"repeats": "x"},
        {"traj_key": "nothing"},
        {"mask_key": "nothing"},
        {"num_envs": True},
        {"observations": "observation"},
        {"observations": []},
        {"observations": ["observation", "action"]},
        {"traj_key": "action"},
        {"traj_key": "next/reward"},
        {"mask_key": "action"},
        {"time_axis": -1},
    ],
)
def test_options_are_checked(cases: Path, options: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        read(cases / "one", **options)
    name, value = next(iter(options.items()))
    assert name in str(caught.value) or str(value) in str(caught.value)


@settings(max_examples=15)
@given(st.data())
def test_changed_bytes_of_metadata_are_read_or_a_format_error(cases: Path, data: st.DataObject) -> None:
    path = cases / "one" / "storage" / data.draw(st.sampled_from(["meta.json", "next/meta.json"]))
    whole = path.read_bytes()
    index = data.draw(st.integers(0, len(whole) - 1))
    try:
        path.write_bytes(whole[:index] + bytes([data.draw(st.integers(32, 126))]) + whole[index + 1 :])
        for episode in read(cases / "one"):
            assert len(episode.rows["is_first"]) > 1
    except FormatError as error:
        assert error.path == str(cases / "one")
    finally:
        path.write_bytes(whole)


def windows_of(path: Path, **options: Any) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each window of each length, in place and from what `read` yields."""
    with open(path, **options) as dataset:
        assert dataset.fields is not None
        for number, episode in enumerate(read(path, **options)):
            leaves = dict(zip(dataset.fields, dataset.fields.flatten(episode.rows), strict=True))
            length = len(leaves["is_first"])
            for start in range(length):
                for stop in range(start + 1, length + 1):
                    expected = {name: values[start:stop] for name, values in leaves.items()}
                    out = {name: np.full_like(values, 1) for name, values in expected.items()}
                    dataset._read_rows(dataset._opened(), number, start, stop, out)
                    yield out, expected


@pytest.mark.parametrize("case", ["wrapped", "ndim2_wrapped", "blocks_wrapped"])
def test_windows_in_place_are_those_of_the_episodes(cases: Path, case: str) -> None:
    for found, expected in windows_of(cases / case):
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values, name)


def test_it_reads_the_same_from_another_directory(cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cases)
    with open("blocks") as dataset:
        expected = dataset.get_episode(3)
        dataset.close()
        monkeypatch.chdir(tmp_path)
        for one in (dataset, pickle.loads(pickle.dumps(dataset))):
            assert torch.equal(one.get_episode(3)["action"], expected["action"])


def test_batches_are_drawn_in_place(cases: Path) -> None:
    with open(cases / "blocks") as dataset:
        assert dataset.num_episodes == 15 and dataset.is_reader
        assert dataset.episode_info(0) == {"traj_id": 0}
        batch = next(iter(dataset.get_loader(batch_size=8, sequence_length=2, seed=0)))
        obs = batch["obs"]["observation"]
        assert torch.equal(obs[:, 1, :2], obs[:, 0, :2]) and torch.equal(obs[:, 1, 2], obs[:, 0, 2] + 1)
        with pytest.raises(RuntimeError, match="in place"):
            dataset.check_writable()
        # As workers get it: without what is in the files.
        assert dataset._source.columns._mapped
        again = pickle.loads(pickle.dumps(dataset))
        assert not again._source.columns._mapped
        for number in range(15):
            expected, found = dataset.arrays_of_id(number), again.arrays_of_id(number)
            assert all(np.array_equal(found[name], values) for name, values in expected.items())


def test_an_import_is_the_log(cases: Path, tmp_path: Path) -> None:
    summary = import_episodes("torchrl", cases / "ndim2", tmp_path / "whole")
    assert (summary.num_episodes, summary.num_steps) == (15, 3 * NUM_ROWS + 15)
    assert_logs(episodes_of(tmp_path / "whole"), logs(3))
    summary = import_episodes("torchrl", cases / "blocks", tmp_path / "part", fields=["obs/image", "action"], limit=4)
    assert summary.num_episodes == 4 and [*summary.fields] == ["obs/image", "action"]


def episodes_of(path: Path) -> list[Episode]:
    with IndividualFileDataset(directory=path, mode="r") as dataset:
        assert dataset.fields is not None
        return [
            Episode(dataset.fields.unflatten(dataset.arrays_of_id(n) or {}), {}) for n in dataset.table.ids.tolist()
        ]


def test_an_import_that_was_killed_goes_on_where_it_was(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = TorchRLReader.read_from
    asked = []
    with killed_before(7):
        import_episodes("torchrl", cases / "ndim2", tmp_path / "target")

    def counted(self: TorchRLReader, number: int) -> Iterator[Episode]:
        asked.append(number)
        return whole(self, number)

    monkeypatch.setattr(TorchRLReader, "read_from", counted)
    import_episodes("torchrl", cases / "ndim2", tmp_path / "target")
    assert asked == [7]
    assert_logs(episodes_of(tmp_path / "target"), logs(3))


def test_neither_library_is_imported() -> None:
    for path in Path(inspect.getfile(read)).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"torchrl", "tensordict", "pickle"} & {name.split(".")[0] for name in names}


@pytest.mark.slow
def test_the_library_still_writes_these_files(cases: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchrl")
    made = tmp_path / "cases.tar.xz"
    command = [sys.executable, "-W", "ignore", "-m", "tests.data.interop.torchrl.make", str(made)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    with tarfile.open(made) as archive:
        archive.extractall(tmp_path / "made", filter="data")
    for case in sorted(path.name for path in cases.iterdir()):
        assert outcome(tmp_path / "made" / case) == outcome(cases / case), case


def outcome(path: Path) -> list[Any] | str:
    """What reading gives, as plain values."""
    try:
        with read(path) as reader:
            return [[{n: torch.as_tensor(v).tolist() for n, v in flat(e.rows)}, e.info] for e in reader]
    except FormatError as error:
        return error.found


def flat(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    for part, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{name}{part}/")
        else:
            yield name + part, value
