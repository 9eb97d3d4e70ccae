"""What `write` writes is what the libraries write, and `read` gives it back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers.dataset import IndividualFileDataset, RingBufferDataset
from buffers.interop import export_episodes, hdf5, import_episodes
from buffers.interop.alignment import rows_on_arrival
from tests.interop.hdf5_files import assert_same, content, flattened, robomimic_log, unpacked
from tests.interop.logged import PLAYED, play


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked(tmp_path_factory.mktemp("files"))


def ring_of(episodes: list[dict[str, Any]], infos: list[dict[str, Any]] | None = None) -> RingBufferDataset:
    ring = RingBufferDataset(1000)
    for number, rows in enumerate(episodes):
        ring.add_episode(rows, None if infos is None else infos[number])
    return ring


def pictured(log: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"image": log["image"], "vector": log["obs"]}


def played(observed: Any = pictured, **more: Any) -> list[dict[str, Any]]:
    """The log as a recorder stores it."""
    found = []
    for log in play():
        steps = {name: log[name] for name in ("action", "reward", "terminated", "truncated")}
        found.append(rows_on_arrival(observed(log), steps, **more))
    return found


def assert_gives(path: Path, expected: list[dict[str, Any]], **options: Any) -> None:
    with hdf5.read(path, **options) as reader:
        for (found, _), rows in zip(reader, expected, strict=True):
            assert_same(found, rows)


@pytest.mark.parametrize("compression", [None, "gzip"])
@pytest.mark.parametrize("is_dict", [True, False])
def test_a_recording_comes_back_from_robomimics_layout(is_dict: bool, compression: str | None, tmp_path: Path) -> None:
    rows = played() if is_dict else played(lambda log: log["obs"])
    summary = hdf5.write(ring_of(rows), tmp_path / "a.hdf5", compression=compression)
    assert (summary.num_episodes, summary.num_steps) == (6, sum(length + 1 for length, _ in PLAYED))
    assert summary.lost == ["The environment has no name: `env_args` is that of an unnamed one."]
    assert_gives(tmp_path / "a.hdf5", rows)
    with h5py.File(tmp_path / "a.hdf5") as file:
        assert file["data"].attrs["total"] == 17 and file["data/demo_2"].attrs["num_samples"] == 6
        ends = [file[f"data/demo_{number}/dones"][-1] for number in range(6)]
        assert ends == [1, 1, 1, 1, 1, 0]  # Terminated, truncated, both, terminated, truncated, cut.
        assert file["data/demo_2/dones"][()].tolist() == [0, 0, 0, 0, 0, 1]
        array = file["data/demo_2/actions"]
        assert (array.compression, array.chunks is None) == (compression, compression is None)


def test_observations_are_written_before_and_after_each_action(tmp_path: Path) -> None:
    hdf5.write(ring_of(played()), tmp_path / "a.hdf5")
    with h5py.File(tmp_path / "a.hdf5") as file:
        for number, log in enumerate(play()):
            demo = file[f"data/demo_{number}"]
            for path, expected in {
                "obs/vector": log["obs"][:-1],
                "next_obs/vector": log["obs"][1:],
                "obs/image": log["image"][:-1],
                "next_obs/image": log["image"][1:],
                "actions": log["action"],
                "rewards": log["reward"],
            }.items():
                np.testing.assert_array_equal(demo[path][()], expected, strict=True)


def test_a_missing_final_observation_stays_missing(tmp_path: Path) -> None:
    rows = played()
    for number, episode in enumerate(rows):
        episode["final_obs_missing"] = np.arange(len(episode["action"])) == (len(episode["action"]) - 1) * (number % 2)
        episode["final_obs_missing"][0] = False
    order = ["obs", "action", "reward", "terminated", "truncated", "is_first", "final_obs_missing"]
    rows = [{name: episode[name] for name in order} for episode in rows]
    assert "its last row" not in str(hdf5.write(ring_of(rows[:1]), tmp_path / "none.hdf5"))
    assert_gives(tmp_path / "none.hdf5", rows[:1])
    summary = hdf5.write(ring_of(rows), tmp_path / "a.hdf5")
    assert "the last row of `next_obs` repeats the observation before" in str(summary)
    assert_gives(tmp_path / "a.hdf5", rows)
    with hdf5.read(tmp_path / "a.hdf5") as reader:
        list(reader)
        assert not any("is equal to the one before" in text for text in reader.notes)


def test_without_next_observations_the_final_ones_are_left_out(tmp_path: Path) -> None:
    rows = played()
    summary = hdf5.write(ring_of(rows), tmp_path / "a.hdf5", next_obs=False)
    assert "Final observations are left out." in summary.lost
    for (found, _), expected in zip(hdf5.read(tmp_path / "a.hdf5", layout="robomimic"), rows, strict=True):
        assert found.pop("final_obs_missing")[-1]
        assert_same(found["obs"], {k: np.concatenate([v[:-1], v[-2:-1]]) for k, v in expected["obs"].items()})
        assert_same({**found, "obs": 0}, {**expected, "obs": 0})


def without(found: dict[str, Any], *parts: str) -> dict[str, Any]:
    return {name: value for name, value in found.items() if not any(part in name for part in parts)}


def assert_same_content(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(found[name], value, err_msg=name, strict=True)
        else:
            assert found[name] == value, name


def renamed(found: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    def rename(name: str) -> str:
        demo = name.partition("data/")[2].partition("/")[0].partition("@")[0]
        return name.replace(demo, names[demo], 1) if demo in names else name

    return {rename(name): value for name, value in found.items()}


def test_robomimics_own_file_comes_back_array_by_array(files: Path, tmp_path: Path) -> None:
    import_episodes("hdf5", files / "robomimic.hdf5", tmp_path / "a")
    summary = export_episodes("hdf5", tmp_path / "a", tmp_path / "b.hdf5")
    assert summary.lost == []
    found, expected = content(tmp_path / "b.hdf5"), content(files / "robomimic.hdf5")
    # The XML of the first demo was too large for an info; JSON is written without line breaks; demos are renumbered.
    ignored = ("demo_0@model_file", "@env_args", "mask/")
    expected = renamed(expected, {"demo_10": "demo_5"})
    assert_same_content(without(found, *ignored), without(expected, *ignored))
    assert sorted(found["mask/two"]) == [b"demo_2", b"demo_5"] and len(found["mask/valid"]) == 0
    assert_gives(tmp_path / "b.hdf5", robomimic_log())


def test_isaac_labs_own_file_comes_back_array_by_array(files: Path, tmp_path: Path) -> None:
    import_episodes("hdf5", files / "isaaclab.hdf5", tmp_path / "a")
    summary = export_episodes("hdf5", tmp_path / "a", tmp_path / "b.hdf5", layout="isaaclab")
    assert summary.lost == []
    # Its fourth demo has no action, and was left out.
    names = {"demo_3": "left out", "demo_4": "demo_3", "demo_5": "demo_4", "demo_6": "demo_5"}
    expected = without(renamed(content(files / "isaaclab.hdf5"), names), "left out")
    assert_same_content(content(tmp_path / "b.hdf5"), expected)


def test_each_layout_is_written_as_the_other(files: Path, tmp_path: Path) -> None:
    with hdf5.open(files / "isaaclab.hdf5") as isaac:
        summary = hdf5.write(isaac, tmp_path / "r.hdf5")
    assert "robomimic has no nested observations: their names are joined by `.`." in summary.lost
    assert "The states behind the last actions are left out." in summary.lost
    with h5py.File(tmp_path / "r.hdf5") as file:
        for number, log in enumerate(play()):
            demo = file[f"data/demo_{number}"]
            assert demo["states/rigid_object/cube/count"][()].tolist() == log["state"][:-1].tolist()
            assert demo["obs/camera.rgb"].shape == (len(log["action"]), 2, 2, 3)
    import_episodes("hdf5", files / "robomimic.hdf5", tmp_path / "a")
    summary = export_episodes("hdf5", tmp_path / "a", tmp_path / "i.hdf5", layout="isaaclab")
    assert "Final observations are left out." in summary.lost
    assert "`states` of robomimic lack the one behind the last action, and are left out." in summary.lost
    with h5py.File(tmp_path / "i.hdf5") as file:
        assert "states" not in file["data/demo_0"] and file.attrs["format_version"] == 1


def test_states_of_a_recording_begin_with_the_initial_state(tmp_path: Path) -> None:
    rows = [{**episode, "states": {"cube": log["state"]}} for episode, log in zip(played(), play(), strict=True)]
    hdf5.write(ring_of(rows), tmp_path / "a.hdf5", layout="isaaclab", format_version=0)
    with h5py.File(tmp_path / "a.hdf5") as file:
        assert file.attrs["format_version"] == 0
        for number, log in enumerate(play()):
            demo = file[f"data/demo_{number}"]
            np.testing.assert_array_equal(demo["initial_state/cube"], log["state"][:1], strict=True)
            np.testing.assert_array_equal(demo["states/cube"], log["state"][1:], strict=True)
    for (found, _), expected in zip(hdf5.read(tmp_path / "a.hdf5"), rows, strict=True):
        assert_same(found["states"], expected["states"])
        assert_same(found["terminated"], expected["terminated"])


def test_infos_and_masks_come_back(tmp_path: Path) -> None:
    infos = [
        {"task": "öffnen", "seed": 2**40, "success": n == 1, "score": n / 3, "mask/train": n < 4} for n in range(6)
    ]
    rows = played()
    summary = hdf5.write(ring_of(rows, infos), tmp_path / "a.hdf5", env_args={"env_name": "Game", "type": 2})
    assert summary.lost == []
    with hdf5.read(tmp_path / "a.hdf5", mask="train") as reader:
        assert reader.num_episodes == 4 and reader.metadata["env_args"] == {"env_name": "Game", "type": 2}
    for number, (_, info) in enumerate(hdf5.read(tmp_path / "a.hdf5")):
        assert info == {**infos[number], "demo": f"demo_{number}"}


def test_what_an_attribute_cannot_hold_is_said(tmp_path: Path) -> None:
    infos: list[dict[str, Any]] = [{"num_samples": 9, "text": "a\0b", "half": "\ud800", "kept": 1}] * 6
    summary = hdf5.write(ring_of(played(), infos), tmp_path / "a.hdf5")
    assert "`num_samples` of the info of episodes has another meaning here, and is left out." in summary.lost
    for key in ("text", "half"):
        assert f"HDF5 cannot hold {key!r} as an attribute; it is left out." in summary.lost
    assert [info for _, info in hdf5.read(tmp_path / "a.hdf5")][0] == {"kept": 1, "demo": "demo_0"}


def test_what_a_demo_cannot_hold_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    rows = played()
    for change, match in {
        "next_obs": "Demos cannot hold the field `next_obs` of this name",
        "actions": "Demos cannot hold the field `actions` of this name",
        ".": "HDF5 cannot hold a field named '.'",
    }.items():
        with pytest.raises(ValueError, match=match):
            hdf5.write(ring_of([{**episode, change: episode["reward"]} for episode in rows]), tmp_path / "a.hdf5")
    matches = {"reward": "hold the field `reward` as a dict", "action": "need the field `action`, one array"}
    for name, match in matches.items():
        with pytest.raises(ValueError, match=match):
            hdf5.write(ring_of([{**episode, name: {"arm": episode[name]}} for episode in rows]), tmp_path / "a.hdf5")
    with pytest.raises(ValueError, match="Two observations would be named 'a.b'"):
        both = {"a": {"b": np.zeros(3)}, "a.b": np.zeros(3)}
        hdf5.write(ring_of([{"obs": both, "action": np.zeros(3)}]), tmp_path / "a.hdf5")
    assert not [path.name for path in tmp_path.iterdir()]


def test_arguments_out_of_their_range_are_refused(tmp_path: Path) -> None:
    ring = ring_of(played())
    for options, match in [
        ({"layout": "d4rl"}, "`layout` must be one of"),
        ({"compression": "lzf"}, "`compression` must be one of"),
        ({"format_version": -1}, "`format_version` must be at least 0"),
        ({"fields": ["obs"]}, "Demos need the field `action`"),
        ({"fields": ["depth"]}, "The dataset has no fields"),
        ({"limit": 0}, "There is no episode with a transition to write"),
    ]:
        with pytest.raises(ValueError, match=match):
            hdf5.write(ring, tmp_path / "a.hdf5", **options)  # type: ignore[arg-type]
    assert not [path.name for path in tmp_path.iterdir()]
    (tmp_path / "a.hdf5").write_text("mine")
    with pytest.raises(ValueError, match="exists. Choose another path"):
        hdf5.write(ring, tmp_path / "a.hdf5")


def test_chosen_fields_and_a_limit_are_written(tmp_path: Path) -> None:
    rows = played()
    summary = hdf5.write(ring_of(rows), tmp_path / "a.hdf5", fields=["obs/vector", "action"], limit=2)
    assert "There are no `dones`; robomimic takes zeros for them." in summary.lost
    expected = [{"obs": {"vector": r["obs"]["vector"]}, "action": r["action"], "is_first": r["is_first"]} for r in rows]
    assert_gives(tmp_path / "a.hdf5", expected[:2])


NUMBERS = st.sampled_from(["uint8", "int16", "int64", "float16", "float32", "float64", "bool", "uint32"])
SHAPES = st.sampled_from([(), (1,), (3,), (2, 2, 3), (2, 0)])


@given(data=st.data(), layout=st.sampled_from(["robomimic", "isaaclab"]), compression=st.sampled_from([None, "gzip"]))
@settings(max_examples=15)
def test_what_is_written_is_read(
    data: st.DataObject, layout: str, compression: str | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    kinds = {name: (data.draw(NUMBERS), data.draw(SHAPES)) for name in ("obs/a", "obs/b", "action", "extra/x", "y")}
    kinds |= {"reward": (data.draw(st.sampled_from(["float32", "float64"])), ())}
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))

    def drawn(name: str, num: int) -> np.ndarray:
        dtype, shape = kinds[name]
        return rng.integers(0, 2 if dtype == "bool" else 100, (num, *shape)).astype(dtype)

    episodes = []
    for num in lengths:
        steps = {"action": drawn("action", num), "reward": drawn("reward", num)}
        steps |= {"terminated": np.arange(num) == num - 1, "truncated": np.zeros(num, np.bool_)}
        steps |= {"extra": {"x": drawn("extra/x", num)}, "y": drawn("y", num)}
        observed = {key: drawn(f"obs/{key}", num + (layout == "robomimic")) for key in "ab"}
        episodes.append(rows_on_arrival(observed, steps, final_missing=None if layout == "robomimic" else True))
    path = tmp_path_factory.mktemp("written") / "a.hdf5"
    ring = ring_of(episodes)
    hdf5.write(ring, path, layout=layout, compression=compression)
    assert_gives(path, episodes, layout=layout)
    with hdf5.open(path, layout=layout) as opened:
        for found, expected in zip(opened.episodes(), episodes, strict=True):
            assert_same({k: v.numpy() for k, v in flattened_tensors(found).items()}, flattened(expected))


def flattened_tensors(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flattened_tensors(value, f"{path}/{key}" if path else key)
    return found


def test_a_directory_that_was_exported_and_imported_is_equal(tmp_path: Path) -> None:
    rows = played()
    with IndividualFileDataset(1000, directory=tmp_path / "a") as dataset:
        for episode in rows:
            dataset.add_episode(episode, {"task": "x"})
    export_episodes("hdf5", tmp_path / "a", tmp_path / "b.hdf5")
    import_episodes("hdf5", tmp_path / "b.hdf5", tmp_path / "c")
    with IndividualFileDataset(directory=tmp_path / "c", mode="r") as dataset:
        for found, expected in zip(dataset.episodes(), rows, strict=True):
            assert_same({k: v.numpy() for k, v in flattened_tensors(found).items()}, flattened(expected))
        assert dataset.episode_info(0) == {"task": "x", "demo": "demo_0"}


def test_infos_that_are_read_back_otherwise_are_said(tmp_path: Path) -> None:
    infos: list[dict[str, Any]] = [
        {"demo": "open", "mask/train": True, "mask/x": 3, "mask/a": True, "mask/a/b": True, "mask/": True},
        {"mask/train": False, "mask/\ud800": True, "mask/a": False},
        {"mask/a": True},
    ]
    summary = hdf5.write(ring_of(played()[:3], infos), tmp_path / "a.hdf5")
    left_out = [text.split("`")[1] for text in summary.lost if "cannot be a list of demos" in text]
    assert left_out == ["mask/x", "mask/a/b", "mask/", "mask/\ud800"]
    assert "`demo` of infos is left out: it is the name of the demo, `demo_0` for the first." in summary.lost
    assert [text for text in summary.lost if "is read back as False" in text] == [
        "`mask/train` is read back as False for episodes whose info does not have it."
    ]
    expected = [(True, True), (False, False), (False, True)]
    assert [episode.info for episode in hdf5.read(tmp_path / "a.hdf5")] == [
        {"demo": f"demo_{number}", "mask/a": is_a, "mask/train": is_trained}
        for number, (is_trained, is_a) in enumerate(expected)
    ]


def test_rewards_of_one_value_are_said_to_be_scalars(tmp_path: Path) -> None:
    rows = played()[:2]
    for episode in rows:
        episode["reward"] = episode["reward"][:, None]
    assert "`reward` of shape (1,) is read back as a scalar." in hdf5.write(ring_of(rows), tmp_path / "a.hdf5").lost
    assert next(iter(hdf5.read(tmp_path / "a.hdf5"))).rows["reward"].ndim == 1


def test_last_states_that_robomimic_does_not_have_are_said(files: Path, tmp_path: Path) -> None:
    episodes = [*hdf5.read(files / "robomimic.hdf5")]
    assert "states" in episodes[0].rows
    summary = hdf5.write(ring_of([rows for rows, _ in episodes]), tmp_path / "a.hdf5", layout="isaaclab")
    assert any("The last `states` of some episodes repeat those before" in text for text in summary.lost)
    recorded = played(lambda log: log["obs"])[1:3]
    for rows in recorded:
        rows["states"] = np.arange(len(rows["action"]))[:, None]
    summary = hdf5.write(ring_of(recorded), tmp_path / "b.hdf5", layout="isaaclab")
    assert not any("The last `states`" in text for text in summary.lost)
