"""Flat arrays mean what their convention says: under each, the log of the game comes back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers.dataset import IndividualFileDataset
from buffers.interop import FormatError, flat, import_episodes
from buffers.interop.alignment import arrays_in
from buffers.interop.npy import FileColumn
from tests.interop.logged import PLAYED, on_arrival, play
from tests.interop.made_up import killed_before
from tests.interop.npy_files import npy, npz, pickled_objects

FLAGS = ("terminated", "truncated")
JUNK = 77  # In what belongs to no transition.


def with_last(values: np.ndarray) -> np.ndarray:
    """T values of transitions as T + 1 rows, the last of which means nothing."""
    return np.concatenate([values, np.full_like(values[:1], JUNK)])


def with_first(values: np.ndarray) -> np.ndarray:
    return np.concatenate([np.full_like(values[:1], JUNK), values])


def flat_of(logs: list[dict[str, np.ndarray]], convention: str) -> dict[str, np.ndarray]:
    """The arrays that a program of this convention would have saved."""
    parts = []
    for log in logs:
        kept = {"observations": log["obs"], **{name: on_arrival(log[name]) for name in FLAGS}}
        if convention == "transitions":
            part = {"observations": log["obs"][:-1], "actions": log["action"], "rewards": log["reward"]}
            part |= {name: log[name] for name in FLAGS}
        elif convention == "extra_row":
            part = {**kept, "actions": with_last(log["action"]), "rewards": with_last(log["reward"])}
        elif convention == "arrival":
            part = {**kept, "actions": with_first(log["action"]), "rewards": with_first(log["reward"])}
        else:
            part = {**kept, "actions": with_last(log["action"]), "rewards": with_first(log["reward"])}
        parts.append(part)
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {{"terminated": "terminals", "truncated": "timeouts"}.get(name, name): found[name] for name in found}


def expected_rows(log: dict[str, np.ndarray], convention: str) -> dict[str, np.ndarray]:
    rows = {
        "obs": log["obs"],
        "action": with_first(log["action"]) if convention == "arrival" else on_arrival(log["action"]),
        "reward": with_first(log["reward"]) if convention in ("arrival", "next_action") else on_arrival(log["reward"]),
        "terminated": on_arrival(log["terminated"]),
        "truncated": on_arrival(log["truncated"]),
        "is_first": np.arange(len(log["obs"])) == 0,
    }
    if convention == "transitions":
        rows["obs"] = np.concatenate([log["obs"][:-1], log["obs"][-2:-1]])
        rows["final_obs_missing"] = np.arange(len(log["obs"])) == len(log["obs"]) - 1
    return rows


def assert_rows(found: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    found = {name: np.asarray(values) for name, values in arrays_in(found)}
    assert list(found) == list(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
        assert found[name].dtype == values.dtype, name


def assert_logs(reader: flat.FlatReader, logs: list[dict[str, np.ndarray]], convention: str) -> None:
    assert reader.num_episodes == len(logs)
    assert reader.num_steps == sum(len(log["obs"]) for log in logs)
    for (rows, info), log in zip(reader, logs, strict=True):
        assert_rows(rows, expected_rows(log, convention))
        assert info == {}


# The conventions


@pytest.mark.parametrize("convention", flat.CONVENTIONS)
@pytest.mark.parametrize("kind", ["npz", "compressed", "directory", "dict", "tensors"])
def test_the_log_comes_back(tmp_path: Path, convention: str, kind: str):
    arrays = flat_of(play(), convention)
    source: Any = tmp_path / "a.npz"
    if kind == "directory":
        source = tmp_path
        for name, values in arrays.items():
            np.save(tmp_path / f"{name}.npy", values)
    elif kind in ("dict", "tensors"):
        source = arrays if kind == "dict" else {name: torch.from_numpy(values) for name, values in arrays.items()}
    else:
        (np.savez if kind == "npz" else np.savez_compressed)(source, **arrays)
    assert_logs(flat.read(source, convention=convention), play(), convention)


@settings(max_examples=15)
@given(data=st.data())
def test_any_game_comes_back_under_any_convention_by_flags_or_by_bounds(data: st.DataObject):
    convention = data.draw(st.sampled_from([*flat.CONVENTIONS]))
    ends = st.sampled_from(["terminated", "truncated", "both"])
    played = data.draw(st.lists(st.tuples(st.integers(1, 5), ends), min_size=1, max_size=5))
    by = data.draw(st.sampled_from(["flags", "ends", "starts", "mask"]))
    cuts = [len(played) - 1] if by == "flags" else range(len(played))
    played = [
        (length, "cut" if n in cuts and data.draw(st.booleans()) else end) for n, (length, end) in enumerate(played)
    ]
    logs = play(played)
    arrays: dict[str, Any] = flat_of(logs, convention)
    num_rows = [length + (convention != "transitions") for length, _ in played]
    stops = np.cumsum(num_rows)
    if by == "ends":
        arrays["episode_ends"] = stops
    elif by == "starts":
        arrays["episode_starts"] = stops - num_rows
    elif by == "mask":
        arrays["episode_starts"] = np.isin(np.arange(stops[-1]), stops - num_rows)
    reader = flat.read(arrays, convention=convention)
    assert_logs(reader, logs, convention)
    first = data.draw(st.integers(0, len(logs)))
    for (rows, _), log in zip(reader.episodes(first), logs[first:], strict=True):
        assert_rows(rows, expected_rows(log, convention))


def next_of(logs: list[dict[str, np.ndarray]]) -> np.ndarray:
    return np.concatenate([log["obs"][1:] for log in logs])


def test_next_observations_say_the_convention_and_give_the_final_ones():
    arrays = flat_of(play(), "transitions") | {"next_observations": next_of(play())}
    for convention in (None, "transitions"):
        for (rows, _), log in zip(flat.read(arrays, convention=convention), play(), strict=True):
            expected = expected_rows(log, "transitions") | {"obs": log["obs"]}
            del expected["final_obs_missing"]
            assert_rows(rows, expected)
    with pytest.raises(FormatError, match=r"next observations, \['next_observations'\], which only"):
        flat.read(arrays, convention="arrival")


def test_next_observations_that_are_not_those_of_the_rows_behind_are_refused():
    arrays = flat_of(play(), "transitions") | {"next_observations": next_of(play())}
    arrays["next_observations"][6] = 0
    reader = flat.read(arrays)
    with pytest.raises(FormatError, match="`next_observations` of row 6 is not the observation of the row behind it"):
        list(reader)
    arrays["next_observations"] = next_of(play())[:, :2]
    with pytest.raises(FormatError, match="next ones"):
        flat.read(arrays)
    # Rows that were shuffled, as a replay of loose transitions has them.
    arrays = {name: values[::-1] for name, values in flat_of(play(), "transitions").items()}
    arrays["next_observations"] = next_of(play())[::-1]
    with pytest.raises(FormatError, match="must be in the order of their episodes"):
        list(flat.read(arrays))


def test_under_arrival_and_next_action_first_rows_are_kept_as_they_are():
    for convention, name in (("arrival", "action"), ("arrival", "reward"), ("next_action", "reward")):
        rows = next(iter(flat.read(flat_of(play(), convention), convention=convention))).rows
        assert (rows[name][0] == JUNK).all()


def test_values_of_no_transition_are_left_out_and_said():
    reader = flat.read(flat_of(play(), "extra_row"), convention="extra_row")
    assert all(JUNK not in rows["action"] and JUNK not in rows["reward"] for rows, _ in reader)
    assert any("action and reward in the last row of an episode belongs to no transition" in n for n in reader.notes)


def test_a_flag_may_lie_with_the_last_action_where_bounds_are_given():
    logs = play()
    arrays = flat_of(logs, "extra_row")
    for name in ("terminals", "timeouts"):
        both = arrays[name] | np.append(arrays[name][1:], False)
        for values in (both, both & ~arrays[name]):
            changed = arrays | {name: values, "episode_ends": np.cumsum([len(log["obs"]) for log in logs])}
            assert_logs(flat.read(changed, convention="extra_row"), logs, "extra_row")


# What is not said


def test_without_a_convention_an_error_says_what_each_would_mean(tmp_path: Path):
    np.savez(tmp_path / "a.npz", **flat_of(play(), "next_action"))
    with pytest.raises(FormatError) as error:
        flat.read(tmp_path / "a.npz")
    text = str(error.value)
    assert text.startswith(f"{tmp_path / 'a.npz'}: Its 23 rows can mean several things")
    for line in [
        '"transitions": a row has an observation, the action taken at it, and the reward for that. '
        "6 episodes of 5, 2, 7, 2, ... transitions, which end with the rows 4, 6, 13, 15, ...; "
        "final observations are not there, and repeat those before",
        '"extra_row": as before, but an episode\'s last row is only an observation. '
        "6 episodes of 4, 1, 6, 1, ... transitions, which end with the rows 4, 6, 13, 15, ...; "
        "the action of the rows 4, 6, 13, 15, ... belongs to no transition (not all zero), "
        "the reward of the rows 4, 6, 13, 15, ... belongs to no transition (not all zero)",
        '"arrival": a row has an observation, and the action and reward that led to it. ',
        "the action of the rows 0, 5, 7, 14, ... belongs to no transition (not all zero), ",
        '"next_action": a row has an observation, the reward that came with it, and the next action. ',
    ]:
        assert line in text, line


def test_the_error_says_whether_what_is_left_over_is_zero():
    arrays = flat_of(play(), "arrival")
    firsts = [0, 5, 7, 14, 16, 20]
    arrays["actions"][firsts] = 0
    with pytest.raises(FormatError) as error:
        flat.read(arrays)
    arrival = str(error.value).split("\n")[3]
    assert '"arrival"' in arrival
    assert re.search(r"the action of the rows 0, 5.*\(all zero\), the reward of .*\(not all zero\)", arrival)


def test_the_error_says_which_convention_does_not_fit():
    arrays = {"obs": np.arange(4), "action": np.arange(4), "dones": np.array([0, 0, 1, 1])}
    with pytest.raises(FormatError) as error:
        flat.read(arrays)
    assert str(error.value).count("It does not fit: row 3 is an episode by itself, without a transition") == 3
    with pytest.raises(FormatError, match="row 3 is an episode by itself"):
        flat.read(arrays, convention="arrival")
    assert flat.read(arrays, convention="transitions").num_episodes == 2


def test_dones_alone_stay_dones_and_missing_flags_are_said():
    arrays = flat_of(play(), "transitions")
    dones = arrays.pop("terminals") | arrays.pop("timeouts")
    reader = flat.read({**arrays, "dones": dones}, convention="transitions")
    rows = next(iter(reader)).rows
    assert rows["done"].tolist() == [False] * 4 + [True] and not {"terminated", "truncated"} & {*rows}
    assert "`dones` does not say why an episode ends: it is `done`." in reader.notes.texts
    assert "There is no `terminated` and no `truncated`." in reader.notes.texts
    # Those that mark any end are named so.
    reader = flat.read({**arrays, "terminals": dones}, convention="transitions", done="terminals")
    assert "done" in next(iter(reader)).rows and "terminated" not in next(iter(reader)).rows


def test_what_is_missing_is_said():
    reader = flat.read({"obs": np.arange(5), "episode_ends": [2, 5], "text": np.array(["a"])}, convention="arrival")
    assert [list(rows) for rows, _ in reader] == [["obs", "is_first"]] * 2
    assert reader.notes.texts == [
        "There are no actions.",
        "There are no rewards.",
        "There is no `terminated` and no `truncated`.",
        "`text` is no array of numbers, and is not read.",
    ]
    reader = flat.read(flat_of(play(), "transitions"), convention="transitions")
    assert "The last 2 rows have no end: they are an episode." in reader.notes.texts
    assert any("There are no final observations" in note for note in reader.notes)


# Names


def test_arrays_are_found_by_names_that_are_given_or_usual():
    logs = play()
    usual = flat_of(logs, "arrival")
    other = {
        "states": usual["observations"],
        "controls": usual["actions"],
        "costs": usual["rewards"],
        "died": usual["terminals"],
        "timeouts": usual["timeouts"],
    }
    names = {"obs": "states", "action": "controls", "reward": "costs", "terminated": "died"}
    assert_logs(flat.read(other, convention="arrival", **names), logs, "arrival")
    with pytest.raises(FormatError, match=r"usual name for observations\. Say which by `obs=`; it has \['controls'"):
        flat.read(other, convention="arrival")
    with pytest.raises(FormatError, match=r"no array `sates`.*Name one of \['controls', 'costs'"):
        flat.read(other, convention="arrival", obs="sates")
    with pytest.raises(FormatError, match=r"\['rewards', 'reward'\] could all be `reward`"):
        flat.read({**usual, "reward": usual["rewards"]}, convention="arrival")


def test_several_arrays_of_observations_are_nested(tmp_path: Path):
    logs = play()
    arrays = flat_of(logs, "arrival")
    arrays["observations/vector"] = arrays.pop("observations")
    arrays["observations/deep/image"] = np.concatenate([log["image"] for log in logs])
    arrays["state"] = np.concatenate([log["state"] for log in logs])
    np.savez(tmp_path / "a.npz", **arrays)
    rows = next(iter(flat.read(tmp_path / "a.npz", convention="arrival"))).rows
    np.testing.assert_array_equal(rows["obs"]["deep"]["image"], logs[0]["image"])
    assert rows["obs"]["vector"].dtype == np.float64 and rows["state"].tolist() == logs[0]["state"].tolist()
    obs = {"all": "observations", "state": "state"}
    rows = next(iter(flat.read(tmp_path / "a.npz", convention="arrival", obs=obs))).rows
    assert list(dict(arrays_in(rows)))[:3] == ["obs/all/vector", "obs/all/deep/image", "obs/state"]
    nested = {"obs": {"a": arrays["state"]}, "terminals": arrays["terminals"] | arrays["timeouts"]}
    assert list(next(iter(flat.read(nested, convention="arrival"))).rows["obs"]) == ["a"]


def test_other_arrays_are_read_where_it_is_said_what_they_belong_to():
    logs = play()
    counts = np.cumsum([0] + [len(log["action"]) for log in logs])
    for convention, shift in (("transitions", None), ("extra_row", None), ("next_action", "reward")):
        arrays = flat_of(logs, convention)
        arrays["log_probs"] = np.arange(len(arrays["actions"])) * 1.0
        reader = flat.read(arrays, convention=convention)
        assert any(note.startswith("`log_probs` is not read: name it in `obs=`") for note in reader.notes)
        assert "log_probs" not in next(iter(reader)).rows
        for option in ("with_action", "with_reward"):
            reader = flat.read(arrays, convention=convention, **{option: ["log_probs"]})
            start = 0
            for (rows, _), log in zip(reader, logs, strict=True):
                values = start + np.arange(len(log["obs"])) - (not (option == "with_reward" and shift))
                values[0] = start if option == "with_reward" and shift else 0
                np.testing.assert_array_equal(rows["log_probs"], values)
                start += len(log["action"]) + (convention != "transitions")
    assert counts[-1] == sum(length for length, _ in PLAYED)
    arrays = flat_of(logs, "arrival") | {"values": np.arange(23)}
    assert [int(rows["values"][0]) for rows, _ in flat.read(arrays, convention="arrival")] == [0, 5, 7, 14, 16, 20]


def test_names_that_mean_something_else_here_are_refused():
    arrays = flat_of(play(), "arrival")
    with pytest.raises(FormatError, match="`done` has the name of a field that is something else"):
        flat.read({**arrays, "done": np.zeros(23)}, convention="arrival", done="terminals", terminated="timeouts")
    with pytest.raises(TypeError, match="are sequences of names"):
        flat.read(arrays, convention="arrival", with_action="timeouts")
    with pytest.raises(TypeError, match="`reward` must be the name of an array"):
        flat.read(arrays, convention="arrival", reward=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`convention` must be one of"):
        flat.read(arrays, convention="sarsa")


def test_fields_that_are_not_wanted_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    np.savez(tmp_path / "a.npz", **flat_of(play(), "extra_row"))
    reader = flat.read(tmp_path / "a.npz", convention="extra_row", fields=["reward", "truncated"])
    read = []
    rows_of = FileColumn.rows

    def spying(self: Any, start: int, stop: int) -> Any:
        read.append(self.name)
        return rows_of(self, start, stop)

    monkeypatch.setattr(FileColumn, "rows", spying)
    for (rows, _), log in zip(reader, play(), strict=True):
        assert_rows(rows, {name: expected_rows(log, "extra_row")[name] for name in ("reward", "truncated")})
    assert {*read} == {"rewards"}


def test_an_import_gives_the_log_and_goes_on_after_a_kill(tmp_path: Path):
    source = tmp_path / "a.npz"
    np.savez_compressed(source, **flat_of(play(), "next_action"))
    options = {"fields": ["obs", "action", "terminated"], "limit": 5, "convention": "next_action"}
    with killed_before(3):
        import_episodes("flat", source, tmp_path / "out", **options)
    summary = import_episodes("flat", source, tmp_path / "out", **options)
    assert summary.num_episodes == 5 and any("belongs to no transition" in text for text in summary.lost)
    with IndividualFileDataset(directory=tmp_path / "out", mode="r") as dataset:
        assert dataset.num_episodes == 5
        for number, log in enumerate(play()[:5]):
            wanted = expected_rows(log, "next_action")
            assert_rows(dataset.get_episode(number), {name: wanted[name] for name in ("obs", "action", "terminated")})


# What does not fit


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"timeouts": None, "terminals": None}, "no array says where episodes end"),
        ({"actions": np.zeros((22, 2))}, "`actions` has 22 rows, observations 23"),
        ({"terminals": np.zeros(22)}, "`terminals` has 22 rows"),
        ({"terminals": np.full(23, 3)}, "no array of flags"),
        ({"episode_ends": [5, 22]}, "found 5, 22 with 22 for the last"),
        ({"episode_ends": [0, 23]}, "found 0, 23 with 23 for the last"),
        ({"episode_ends": [9, 5, 23]}, "must ascend, within 23 rows"),
        ({"episode_ends": [9, 30]}, "must ascend, within 23 rows"),
        ({"episode_ends": [9.5, 23.0]}, "expected integers"),
        ({"episode_starts": [1, 5]}, "are the first rows of episodes"),
        ({"episode_starts": np.arange(23) == 3}, "are the first rows of episodes"),
        ({"episode_starts": [0, 6], "episode_ends": [5, 23]}, "`episode_starts` 0, 6 do not fit `episode_ends` 5, 23"),
        ({"episode_starts": [0, 6]}, "`terminated` is set in row 4, within an episode"),
        ({name: np.zeros((0, 2)) for name in ("observations", "actions")}, "`rewards` has 23 rows, observations 0"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_with_what_was_found(changes: dict[str, Any], found: str):
    arrays = {name: values for name, values in {**flat_of(play(), "arrival"), **changes}.items() if values is not None}
    with pytest.raises(FormatError, match=re.escape(found)):
        flat.read(arrays, convention="arrival")


def test_bounds_can_be_given_as_values_or_by_a_name():
    arrays = {"obs": np.arange(6), "action": np.arange(6), "last": np.array([2, 6])}
    for bounds in ({"episode_ends": [2, 6]}, {"episode_ends": "last"}, {"episode_starts": [0, 2]}):
        reader = flat.read(arrays, convention="transitions", **bounds)
        assert [len(rows["obs"]) for rows, _ in reader] == [3, 5]


def test_a_pickle_and_a_file_of_hdf5_are_called_what_they_are(tmp_path: Path):
    np.savez(tmp_path / "a.npz", observations=np.array([{"a": 1}, None], object), dones=np.array([0, 1]))
    with pytest.raises(FormatError, match="`observations` holds pickled objects: refused, save numbers"):
        flat.read(tmp_path / "a.npz", convention="transitions")
    (tmp_path / "b").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(FormatError, match="is an HDF5 file. Read it by the format hdf5"):
        flat.read(tmp_path / "b")


def test_sources_that_are_none_are_refused(tmp_path: Path):
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "whole.npz", **flat_of(play(), "arrival"))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:700])
    npz(tmp_path / "lying.npz", {"obs.npy": npy(np.zeros(2), shape=(10**14,))})
    npz(tmp_path / "pickled.npz", {"obs.npy": pickled_objects()})
    for name, found in [
        ("none", "is not there"),
        ("text.npz", "not a zip"),
        ("empty", "usual name for observations"),
        ("cut.npz", "not a zip"),
        ("lying.npz", "says that it has the shape"),
        ("pickled.npz", "usual name for observations"),
    ]:
        with pytest.raises(FormatError, match=found) as error:
            flat.read(tmp_path / name, convention="arrival")
        assert str(tmp_path / name) in str(error.value)
    with pytest.raises(FormatError, match="`obs` is pickled objects"):
        flat.read(tmp_path / "pickled.npz", convention="arrival", obs="obs")
    with pytest.raises(FormatError, match="It has no rows"):
        flat.read({"obs": np.zeros((0, 2))}, convention="arrival")
