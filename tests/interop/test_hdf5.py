"""What robomimic, Isaac Lab and D4RL wrote or read is read row by row as the game's own log has it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from buffers.dataset import IndividualFileDataset
from buffers.interop import FormatError, hdf5, import_episodes
from buffers.interop.hdf5.file import HDF5File
from tests.interop.hdf5_files import (
    DEMOS,
    assert_same,
    d4rl_log,
    isaaclab_log,
    robomimic_log,
    unpacked,
)
from tests.interop.logged import PLAYED, on_arrival, play
from tests.interop.made_up import killed_before
from tests.tagged import assert_same_episode

LOGS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "robomimic": robomimic_log,
    "robomimic_small": lambda: robomimic_log(has_next=False, done_mode=0),
    "isaaclab": isaaclab_log,
    "d4rl": d4rl_log,
}
Changed = Callable[..., Path]
each_file = pytest.mark.parametrize("name", LOGS)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked(tmp_path_factory.mktemp("files"))


@pytest.fixture
def changed(files: Path, tmp_path: Path) -> Changed:
    """A function that copies one of the files, changes it, and returns its path."""

    def change(name: str, *changes: Callable[[Any], None]) -> Path:
        target = tmp_path / f"{name}.hdf5"
        target.write_bytes((files / f"{name}.hdf5").read_bytes())
        with h5py.File(target, "r+") as file:
            for function in changes:
                function(file)
        return target

    return change


@each_file
def test_rows_are_those_of_the_log(name: str, files: Path) -> None:
    with hdf5.read(files / f"{name}.hdf5") as reader:
        assert reader.layout.name == name.removesuffix("_small")
        assert reader.num_episodes == len(PLAYED)
        assert reader.num_steps == sum(length + 1 for length, _ in PLAYED)
        for (found, _), expected in zip(reader, LOGS[name](), strict=True):
            assert_same(found, expected)
        # From any episode on, and as often as it is asked for.
        for number in (0, 4, 6):
            for (found, _), expected in zip(reader.episodes(number), LOGS[name]()[number:], strict=True):
                assert_same(found, expected)


@each_file
def test_fields_that_are_not_wanted_are_neither_read_nor_checked(name: str, changed: Changed) -> None:
    def damage(file: Any) -> None:
        observed = (file["observations"] if name == "d4rl" else file["data/demo_0/obs/vector"]).name
        del file[observed]
        file[observed] = "no numbers"

    path = changed(name, damage)
    with pytest.raises(FormatError):
        hdf5.read(path)
    with hdf5.read(path, fields=["action", "is_first"]) as reader:
        for (found, _), expected in zip(reader, LOGS[name](), strict=True):
            assert_same(found, {key: expected[key] for key in ("action", "is_first")})


def test_one_field_of_several_observations_is_read_alone(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    whole = HDF5File.read
    monkeypatch.setattr(HDF5File, "read", lambda self, s, *rest: (read.append(s.name), whole(self, s, *rest))[1])
    with hdf5.read(files / "robomimic.hdf5", fields=["obs/vector"], dtypes={"obs/vector": "float32"}) as reader:
        for (found, _), log in zip(reader, play(), strict=True):
            assert_same(found, {"obs": {"vector": log["obs"].astype(np.float32)}})
    assert read and all(name.endswith("obs/vector") for name in read)
    with (
        pytest.raises(ValueError, match=r"has no fields \['obs/depth'\]"),
        hdf5.read(files / "robomimic.hdf5", fields=["obs/depth", "action"]) as reader,
    ):
        next(iter(reader))


def test_demos_come_in_the_order_of_their_numbers_with_their_attributes(files: Path) -> None:
    infos = [info for _, info in hdf5.read(files / "robomimic.hdf5")]
    assert [info["demo"] for info in infos] == DEMOS
    assert [info["mask/two"] for info in infos] == [False, False, True, False, False, True]
    assert all(info["mask/train"] is True and info["mask/valid"] is False for info in infos)
    assert "model_file" not in infos[0] and infos[1]["model_file"] == "<mujoco/>"
    infos = [info for _, info in hdf5.read(files / "isaaclab.hdf5")]
    assert [info["seed"] for info in infos] == [100, 101, 102, 103, 104, 105]
    assert [info["success"] for info in infos] == [True, False, False, True, False, False]
    # The fourth demo of the file has no action.
    assert [info["demo"] for info in infos] == ["demo_0", "demo_1", "demo_2", "demo_4", "demo_5", "demo_6"]


def test_a_mask_chooses_demos_and_not_their_order(files: Path) -> None:
    with hdf5.read(files / "robomimic.hdf5", mask="two") as reader:
        assert [info["demo"] for _, info in reader] == ["demo_2", "demo_10"]
        for (found, _), number in zip(reader, (2, 5), strict=True):
            assert_same(found, robomimic_log()[number])
    with pytest.raises(ValueError, match=r"has no mask 'test'. It has \['train', 'two', 'valid'\]"):
        hdf5.read(files / "robomimic.hdf5", mask="test")
    with pytest.raises(FormatError, match="has no demos with actions"):
        hdf5.read(files / "robomimic.hdf5", mask="valid")
    with pytest.raises(ValueError, match="which has no `mask`"):
        hdf5.read(files / "d4rl.hdf5", mask="two")


def test_metadata_are_those_of_the_file(files: Path) -> None:
    env_args = {"env_name": "Game", "type": 1, "env_kwargs": {"size": 2}}
    assert hdf5.read(files / "robomimic.hdf5").metadata["env_args"] == env_args
    raw = hdf5.read(files / "robomimic_raw.hdf5", fields=["action"], layout="robomimic").metadata
    assert raw["data_attributes"] == {
        "date": "today", "env": "Game", "env_info": '{"size": 2}', "repository_version": "1.0"
    }  # fmt: skip
    isaac = hdf5.read(files / "isaaclab.hdf5").metadata
    assert isaac["attributes"] == {"format_version": 1} and isaac["env_args"]["sim_args"]["dt"] == 0.01
    assert hdf5.read(files / "d4rl.hdf5").metadata["metadata"] == {"algorithm": "SAC", "iteration": 7}


def test_what_a_file_lacks_or_is_not_read_is_said(files: Path) -> None:
    def notes(name: str) -> list[str]:
        with hdf5.read(files / f"{name}.hdf5") as reader:
            list(reader)
            return list(reader.notes)

    absent, last = "There is no `terminated` and no `truncated`.", "repeats the one before"
    robomimic = notes("robomimic")
    assert absent in robomimic and any("`done`, and is neither terminated nor truncated" in text for text in robomimic)
    assert any("`model_file` of demos does not fit" in text for text in robomimic)
    assert f"`states` has no final row: the last one {last}." in robomimic and len(robomimic) == 4
    assert f"Final observations are missing: the last row {last}, and says so." in notes("robomimic_small")
    assert notes("isaaclab")[:3] == ["Demos without an action are left out.", "There are no rewards.", absent]
    assert notes("d4rl") == [
        "The last episode was cut off by the end of the file: neither terminated nor truncated.",
        "`metadata/policy/weight`: arrays of metadata are not read.",
        "`infos/name`: no numbers, or not a row for each transition; not read.",
        "`infos/qpos`: taken to be recorded before the step, as in gym-mujoco's files, so that they belong to the "
        f"observation; the last row {last}. For AntMaze's, say `states='arrival'`.",
        f"Final observations are missing: the last row {last}, and says so.",
    ]


@pytest.mark.parametrize("name", ["robomimic_small", "isaaclab", "d4rl"])
def test_whether_final_observations_are_missing_comes_with_chosen_observations(name: str, files: Path) -> None:
    path = files / f"{name}.hdf5"
    for fields in (["obs"], ["action"]):
        with hdf5.open(path, fields=fields) as opened:
            (rows, _), found = next(iter(hdf5.read(path, fields=fields))), opened.get_episode(0)
        assert ("final_obs_missing" in rows) == ("final_obs_missing" in found) == (fields == ["obs"])
    assert rows["action"].any()


def test_what_fields_leave_out_is_not_said_to_be_missing(files: Path) -> None:
    for name in ("robomimic", "d4rl"):
        with hdf5.read(files / f"{name}.hdf5", fields=["obs"]) as reader:
            list(reader)
            assert not [note for note in reader.notes if "no rewards" in note or "`terminated`" in note]


def test_a_recording_without_observations_is_sent_to_robomimics_script(files: Path) -> None:
    with pytest.raises(FormatError, match="has no observations .*dataset_states_to_obs.py"):
        hdf5.read(files / "robomimic_raw.hdf5")
    with hdf5.read(files / "robomimic_raw.hdf5", fields=["action", "states"]) as reader:
        for (found, _), log in zip(reader, robomimic_log(), strict=True):
            assert_same(found, {"action": log["action"], "states": log["states"]})


def test_next_observations_that_repeat_the_last_observation_are_said(files: Path) -> None:
    # robomimic's converter wrote the last observation of D4RL's episodes again.
    with hdf5.read(files / "robomimic_d4rl.hdf5") as reader:
        for (found, _), expected in zip(reader, d4rl_log()[:-1], strict=True):
            assert_same(found["obs"]["flat"], expected["obs"])
        assert "robomimic's converter writes it so for D4RL" in reader.notes.texts[-1]


@pytest.mark.parametrize("row", [0, 2])
def test_a_next_observation_that_is_not_the_observation_of_the_row_behind_is_refused(
    row: int, changed: Changed, tmp_path: Path
) -> None:
    def of_demo(file: Any) -> None:
        file["data/demo_2/next_obs/vector"][row] += 1

    def of_rows(file: Any) -> None:
        with_next(file)
        file["next_observations"][row] += 1

    lengths = [len(log["action"]) for log in play()]
    assert lengths[0] > 3 and lengths[2] > 3
    for name, change, number in (("robomimic", of_demo, 2), ("d4rl", of_rows, 0)):
        path = changed(name, change)
        with pytest.raises(FormatError, match=f"next_obs.*` of row {row} is not the observation of the row behind it"):
            list(hdf5.read(path))
        with pytest.raises(FormatError, match=f"of row {row} is not the observation"):
            hdf5.open(path)
        found = import_episodes("hdf5", path, tmp_path / name, limit=number)
        assert found.num_episodes == number
        # Fields without observations are read.
        assert len(list(hdf5.read(path, fields=["action"]))) == len(lengths)


def test_the_final_observation_is_the_last_next_observation_and_not_made_up(changed: Changed) -> None:
    def mark(file: Any) -> None:
        file["data/demo_3/next_obs/image"][-1] = 77

    expected = robomimic_log()
    expected[3]["obs"]["image"][-1] = 77
    for (found, _), log in zip(hdf5.read(changed("robomimic", mark)), expected, strict=True):
        assert_same(found, log)

    def take(file: Any) -> None:
        del file["data/demo_3/next_obs/image"]

    rows = [rows for rows, _ in hdf5.read(changed("robomimic", take))]
    assert [bool(found["final_obs_missing"].any()) for found in rows] == [False, False, False, True, False, False]
    np.testing.assert_array_equal(rows[3]["obs"]["image"][1], rows[3]["obs"]["image"][0])


def test_isaac_labs_states_begin_with_the_last_initial_state(changed: Changed) -> None:
    def reset_twice(file: Any) -> None:
        count = file["data/demo_2/initial_state/rigid_object/cube/count"][()]
        del file["data/demo_2/initial_state/rigid_object/cube/count"]
        file["data/demo_2/initial_state/rigid_object/cube/count"] = np.concatenate([count + 50, count])

    for (found, _), expected in zip(hdf5.read(changed("isaaclab", reset_twice)), isaaclab_log(), strict=True):
        assert_same(found, expected)

    def drop(file: Any) -> None:
        for demo in file["data"].values():
            demo.pop("initial_state", None)

    with hdf5.read(changed("isaaclab", drop)) as reader:
        for (found, _), expected in zip(reader, isaaclab_log(), strict=True):
            expected["states"]["rigid_object"]["cube"]["count"][0] = 0
            expected["states"]["articulation"]["robot"]["root_pose"][0] = 0
            assert_same(found, expected)
        assert "States without an `initial_state` of the same shape are zero in first rows." in reader.notes


def test_d4rl_itself_reads_the_same_episodes_but_for_the_cut_one(files: Path) -> None:
    with np.load(files / "d4rl.npz") as theirs, hdf5.read(files / "d4rl.hdf5") as reader:
        ours = [rows for rows, _ in reader]
        assert {name.partition(":")[0] for name in theirs} == {"0", "1", "2", "3", "4"} and len(ours) == 6
        for number, rows in enumerate(ours[:-1]):
            np.testing.assert_array_equal(rows["obs"][:-1], theirs[f"{number}:observations"], strict=True)
            pairs = {"action": "actions", "reward": "rewards", "terminated": "terminals", "truncated": "timeouts"}
            for name, key in pairs.items():
                np.testing.assert_array_equal(rows[name][1:], theirs[f"{number}:{key}"], strict=True)
            np.testing.assert_array_equal(rows["infos"]["qpos"][:-1], theirs[f"{number}:infos/qpos"], strict=True)


def test_states_of_d4rl_belong_to_observations_or_arrive_as_is_said(files: Path, changed: Changed) -> None:
    def more(file: Any) -> None:
        file["infos/qvel"], file["infos/log_probs"] = 2 * file["infos/qpos"][:], 3 * file["infos/qpos"][:]

    path = changed("d4rl", more)
    for states in (None, "observation", "arrival"):
        reader, dataset = hdf5.read(path, states=states), hdf5.open(path, states=states)
        for number, ((rows, _), log) in enumerate(zip(reader, play(), strict=True)):
            known = log["state"][:-1].astype(np.float32)
            expected = on_arrival(known) if states == "arrival" else np.concatenate([known, known[-1:]])
            for name, factor in (("qpos", 1), ("qvel", 2)):
                np.testing.assert_array_equal(rows["infos"][name], factor * expected)
                np.testing.assert_array_equal(dataset.get_episode(number)["infos"][name], factor * expected)
            np.testing.assert_array_equal(rows["infos"]["log_probs"], 3 * on_arrival(known))
        said = "`infos/qpos`, `infos/qvel`: taken to be recorded before the step"
        assert any(note.startswith(said) for note in reader.notes) == (states != "arrival")
        dataset.close()
    with pytest.raises(ValueError, match="`states` must be one of"):
        hdf5.read(path, states="both")
    with pytest.raises(ValueError, match="`states` is for D4RL"):
        hdf5.read(files / "robomimic.hdf5", states="arrival")


def with_next(file: Any) -> None:
    file["next_observations"] = np.concatenate([log["obs"][1:] for log in play()]).astype(np.float32)


def test_d4rls_final_observations_are_next_observations(changed: Changed) -> None:
    with hdf5.read(changed("d4rl", with_next)) as reader:
        for (found, _), expected in zip(reader, d4rl_log(has_next=True), strict=True):
            assert_same(found, expected)
        assert not any("inal observation" in text for text in reader.notes)


def test_observations_of_d4rl_may_be_a_group_whose_final_ones_are_all_known_or_missing(changed: Changed) -> None:
    def group(file: Any) -> None:
        values = file.pop("observations")[()]
        file["observations/a"] = values
        file["observations/b"] = -values
        with_next(file)
        file.move("next_observations", "next_observations_a")
        file.move("next_observations_a", "next_observations/a")

    for (found, _), expected, known in zip(
        hdf5.read(changed("d4rl", group)), d4rl_log(), d4rl_log(has_next=True), strict=True
    ):
        assert_same({**found, "obs": 0}, {**expected, "obs": 0})
        assert_same(found["obs"], {"a": known["obs"], "b": -expected["obs"]})


def test_d4rl_without_timeouts_asks_for_the_rule(changed: Changed) -> None:
    def drop(file: Any) -> None:
        del file["timeouts"]

    path = changed("d4rl", drop)
    with pytest.raises(FormatError, match="has no `timeouts`.*max_episode_steps=1000"):
        hdf5.read(path)
    # Lengths 4 terminated, 1 not, 6 terminated, 1 terminated, 3 and 2 not.
    for most, ends in {
        100: ([4, 7, 1, 5], [False, False, False, False]),
        3: ([3, 1, 3, 3, 1, 1, 3, 2], [True, False, True, True, False, False, True, False]),
        1: ([1] * 17, [True] * 17),
    }.items():
        with hdf5.read(path, max_episode_steps=most) as reader:
            rows = [rows for rows, _ in reader]
            assert [len(found["obs"]) - 1 for found in rows] == ends[0]
            assert [bool(found["truncated"][-1]) for found in rows] == ends[1]
            assert not any(found["truncated"][:-1].any() for found in rows)
            assert "There are no `timeouts`: episodes are truncated after `max_episode_steps`" in " ".join(reader.notes)


def test_d4rls_columns_of_one_are_scalars_and_flags_may_be_numbers(changed: Changed) -> None:
    def reshape(file: Any) -> None:
        for name in ("rewards", "terminals", "timeouts"):
            values = file.pop(name)[()].reshape(-1, 1)
            file[name] = values if name == "rewards" else values.astype(np.float32)

    for (found, _), expected in zip(hdf5.read(changed("d4rl", reshape)), d4rl_log(), strict=True):
        assert_same(found, expected)


def test_robomimics_columns_of_one_are_scalars(changed: Changed) -> None:
    def reshape(file: Any) -> None:
        for demo in file["data"].values():
            for name in ("rewards", "dones"):
                demo[name] = demo.pop(name)[()].reshape(-1, 1)

    for (found, _), expected in zip(hdf5.read(changed("robomimic", reshape)), robomimic_log(), strict=True):
        assert_same(found, expected)


def test_other_arrays_are_kept_if_every_demo_has_a_row_for_each_action(changed: Changed) -> None:
    def add(file: Any) -> None:
        for number, demo in enumerate(file["data"].values()):
            num = len(demo["actions"])
            demo["planner/cost"] = np.arange(num) + number / 8
            demo["substeps"] = np.zeros((2 * num, 3))
            demo["label"] = np.array(["x"] * num, "S")
            demo["odd"] = np.zeros(num, np.float32 if number else np.float64)
            demo["is_first"] = np.zeros(num, bool)
            demo["pickled"] = np.array(["x"] * num, object)

    with hdf5.read(changed("robomimic", add)) as reader:
        for (found, _), name in zip(reader, DEMOS, strict=True):
            cost = np.arange(len(found["action"]) - 1) + sorted(DEMOS).index(name) / 8
            np.testing.assert_array_equal(found["planner"]["cost"], [0, *cost])
            assert list(found)[-2:] == ["planner", "states"] and "substeps" not in found
        [text] = [text for text in reader.notes if "not a row for each action" in text]
        assert text.startswith("`substeps`") or "`substeps`" in text
        assert all(f"`{name}`" in text for name in ("substeps", "label", "odd", "is_first", "pickled"))


def test_numbers_of_any_kind_come_as_torch_has_them(changed: Changed, tmp_path: Path) -> None:
    kinds = ["<f2", ">f4", ">i8", "<u4", "?", "<c8", ">u2"]

    def add(file: Any) -> None:
        for demo in file["data"].values():
            for kind in kinds:
                demo["kind" + str(kinds.index(kind))] = np.arange(len(demo["actions"])).astype(kind)
            enum = h5py.enum_dtype({"A": 0, "B": 1}, basetype="i1")
            demo.create_dataset("enum", data=np.ones(len(demo["actions"]), np.int8), dtype=enum)

    path = changed("robomimic", add)
    for rows, _ in hdf5.read(path):
        num = len(rows["action"]) - 1
        for kind in kinds:
            expected = np.concatenate([[0], np.arange(num)]).astype(kind)
            found = rows["kind" + str(kinds.index(kind))]
            assert found.dtype == np.dtype(kind).newbyteorder("=")
            np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(rows["enum"], np.int8([0] + [1] * num), strict=True)
    opened = hdf5.open(path)
    for found, (rows, _) in zip(opened.episodes(), hdf5.read(path), strict=True):
        assert_same_episode(found, rows)


def test_the_layout_is_found_and_an_ambiguous_one_is_refused(changed: Changed) -> None:
    def bare(file: Any) -> None:
        for demo in file["data"].values():
            for name in [name for name in demo if name not in ("obs", "actions")]:
                del demo[name]

    with pytest.raises(FormatError, match="has signs of neither. Say which: `layout='robomimic'`"):
        hdf5.read(changed("robomimic", bare))
    path = changed("robomimic", lambda file: file["data/demo_1"].create_group("initial_state"))
    with pytest.raises(FormatError, match="robomimic's `next_obs`, `dones`, an array `states`; isaaclab's `initial_st"):
        hdf5.read(path)
    for (found, _), expected in zip(hdf5.read(path, layout="robomimic"), robomimic_log(), strict=True):
        assert_same(found, expected)
    with pytest.raises(FormatError, match="has both `data` and arrays of D4RL"):
        hdf5.read(changed("robomimic", lambda file: file.create_dataset("actions", data=np.zeros(3))))
    with pytest.raises(FormatError, match="has no group `data`, but `actions`"):
        hdf5.read(changed("d4rl"), layout="isaaclab")
    with pytest.raises(ValueError, match="`layout` must be one of"):
        hdf5.read(changed("d4rl"), layout="minari")
    with pytest.raises(ValueError, match="`max_episode_steps` is for D4RL's"):
        hdf5.read(changed("robomimic"), max_episode_steps=4)


@each_file
def test_an_import_holds_the_log(name: str, files: Path, tmp_path: Path) -> None:
    summary = import_episodes("hdf5", files / f"{name}.hdf5", tmp_path / "a")
    assert (summary.num_episodes, summary.num_steps) == (6, sum(length + 1 for length, _ in PLAYED))
    with IndividualFileDataset(directory=tmp_path / "a", mode="r") as dataset:
        for found, expected in zip(dataset.episodes(), LOGS[name](), strict=True):
            assert_same_episode(found, expected)
        if name == "isaaclab":
            assert dataset.episode_info(0) == {"seed": 100, "success": True, "demo": "demo_0"}


def test_an_import_after_a_kill_holds_nothing_twice(files: Path, tmp_path: Path) -> None:
    with killed_before(3):
        import_episodes("hdf5", files / "robomimic.hdf5", tmp_path / "a", fields=["obs", "action"], limit=5)
    assert not (tmp_path / "a").exists()
    import_episodes("hdf5", files / "robomimic.hdf5", tmp_path / "a", fields=["obs", "action"], limit=5)
    with IndividualFileDataset(directory=tmp_path / "a", mode="r") as dataset:
        for found, expected in zip(dataset.episodes(), robomimic_log()[:5], strict=True):
            assert_same_episode(found, {name: expected[name] for name in ("obs", "action")})
