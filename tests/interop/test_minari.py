"""Datasets of Minari give the log of the games that were recorded."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import minari as library
import numpy as np
import pytest
from gymnasium import spaces

from buffers.dataset import IndividualFileDataset
from buffers.interop import FormatError, import_episodes, minari
from buffers.interop.minari.hdf5_storage import Hdf5Storage
from tests.interop.made_up import killed_before
from tests.interop.minari_files import (
    ENDS,
    FORMATS,
    STATE,
    arrived,
    assert_same,
    buffer,
    change_json,
    create,
    expected,
    leaves,
)

DATA = Path(__file__).parent.parent / "data" / "interop" / "minari"
RECORDED = ["hdf5", "arrow"]
each_format = pytest.mark.parametrize("data_format", FORMATS)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Minari's DataCollector has written, see make.py."""
    path = tmp_path_factory.mktemp("recorded")
    with zipfile.ZipFile(DATA / "recorded.zip") as archive:
        archive.extractall(path)
    return path


@pytest.fixture(scope="module")
def log() -> dict[str, np.ndarray]:
    with np.load(DATA / "log.npz") as found:
        return dict(found)


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The local store of Minari."""
    path = tmp_path / "store"
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(path))
    monkeypatch.setattr(os, "sync", lambda: None)  # It waits for what all other programs write.
    return path


def logged(log: dict[str, np.ndarray], data_format: str, episode: int, is_last: bool) -> dict[str, np.ndarray]:
    """The rows that the log of a game makes; the DataCollector calls a recording that ends truncated."""
    one = {name: log[f"{data_format}/{episode}/{name}"] for name in ("state", "number", "real", "lives", "deep")}
    steps = {name: log[f"{data_format}/{episode}/{name}"] for name in ("action", "reward", "terminated", "truncated")}
    steps["truncated"][-1] |= is_last
    return {
        "obs/place/0": one["number"],
        "obs/place/1": one["real"],
        "obs/state": one["state"].astype(np.float32),
        **{name: arrived(values) for name, values in steps.items()},
        "is_first": np.arange(len(one["state"])) == 0,
        "infos/inner/deep": one["deep"],
        "infos/lives": one["lives"],
    }


@pytest.mark.parametrize("data_format", RECORDED)
def test_every_row_is_that_of_the_log(data_format: str, recorded: Path, log: dict[str, np.ndarray]):
    with minari.read(str(recorded / data_format)) as reader:
        assert reader.num_episodes == 5
        episodes = list(reader)
        assert reader.num_steps == sum(len(rows["reward"]) for rows, _ in episodes) == 17
    for number, (rows, _) in enumerate(episodes):
        assert_same(rows, logged(log, data_format, number, number == 4))
    ends = [(bool(rows["terminated"][-1]), bool(rows["truncated"][-1])) for rows, _ in episodes]
    assert ends == [(True, False), (True, False), (False, True), (True, True), (False, True)]


@pytest.mark.parametrize("name", ["hdf5", "arrow", "exact_hdf5", "exact_arrow", "jpeg_hdf5", "jpeg_arrow"])
def test_minari_reads_the_same(name: str, recorded: Path):
    theirs = library.MinariDataset(recorded / name / "data")
    for own, (rows, info) in zip(theirs, minari.read(str(recorded / name)), strict=True):
        assert own.id == info["id"]
        for column, field in (("observations", "obs"), ("actions", "action"), ("rewards", "reward")):
            wanted = {n: v for n, v in leaves(getattr(own, column)).items() if n != "said"}
            ours = {n: v if field == "obs" else v[1:] for n, v in leaves(rows[field]).items()}
            assert wanted.keys() == ours.keys()
            for key, values in wanted.items():
                np.testing.assert_array_equal(ours[key], values)


@pytest.mark.parametrize("data_format", RECORDED)
def test_seeds_and_options_are_in_the_info(data_format: str, recorded: Path):
    infos = [info for _, info in minari.read(str(recorded / data_format))]
    assert [info["id"] for info in infos] == [0, 1, 2, 3, 4]
    # None was stated for episode 1, and beyond int64 a seed is text.
    assert [info.get("seed") for info in infos] == [7, None, str(2**63 + 5), 0, 1]
    assert infos[0]["options/level/speed"] == 2
    assert infos[1]["options/minari_autoseed"] is False
    assert infos[2]["rewards_sum"] == 200 * 4 + 10 + 2


@pytest.mark.parametrize("data_format", RECORDED)
def test_text_is_said_and_not_read(data_format: str, recorded: Path):
    notes = minari.read(str(recorded / data_format)).notes.texts
    assert "`obs/said` is text, and is not read." in notes
    assert "`infos/words` is text, and is not read." in notes


def test_rewards_of_several_dtypes_get_one_that_holds_them_all(recorded: Path):
    reader = minari.read(str(recorded / "hdf5"))
    assert "`reward` is int64 or float64, by episode. All of it is float64 here." in reader.notes.texts
    assert {rows["reward"].dtype for rows, _ in reader} == {np.dtype(np.float64)}


@pytest.mark.parametrize("data_format", RECORDED)
def test_exact_images_are_exact(data_format: str, recorded: Path, log: dict[str, np.ndarray]):
    reader = minari.read(str(recorded / f"exact_{data_format}"))
    for (rows, _), images in zip(reader, log["images"], strict=True):
        np.testing.assert_array_equal(rows["obs"], images)
    assert not reader.notes.texts


@pytest.mark.parametrize("data_format", RECORDED)
def test_jpeg_images_are_decoded_and_said_to_be_lossy(data_format: str, recorded: Path, log: dict[str, np.ndarray]):
    reader = minari.read(str(recorded / f"jpeg_{data_format}"))
    assert reader.notes.texts == ["`obs` was stored as JPEG: pixels differ from those that were recorded."]
    for (rows, _), images in zip(reader, log["images"], strict=True):
        assert rows["obs"].dtype == np.uint8
        assert rows["obs"].shape == images.shape
        error = np.abs(rows["obs"].astype(int) - images)
        assert 0 < error.mean() < 8


@pytest.mark.parametrize("name", ["exact_hdf5", "exact_arrow", "jpeg_hdf5", "jpeg_arrow"])
def test_images_tell_by_themselves_whether_they_are_jpeg(name: str, recorded: Path, tmp_path: Path):
    """Minari 0.5.0 wrote arrays, 0.5.3 wrote JPEG, and neither said so; 0.5.4 takes all of them for JPEG."""
    with zipfile.ZipFile(DATA / "recorded.zip") as archive:
        archive.extractall(tmp_path, [member for member in archive.namelist() if member.startswith(f"{name}/")])
    change_json(tmp_path / name / "data" / "metadata.json", jpeg_encoding=None)
    for (found, _), (rows, _) in zip(minari.read(str(tmp_path / name)), minari.read(str(recorded / name)), strict=True):
        np.testing.assert_array_equal(found["obs"], rows["obs"])


@pytest.mark.parametrize("data_format", RECORDED)
def test_jpeg_images_of_one_length_are_images(data_format: str, tmp_path: Path):
    frame = np.full((32, 48), 77, np.uint8)
    path = create(
        tmp_path / "flat",
        [buffer(0, 2, observations=np.stack([frame] * 3))],
        data_format,
        spaces.Box(0, 255, frame.shape, np.uint8),
        jpeg_encoding=True,
    )
    [(rows, _)] = minari.read(str(path))
    np.testing.assert_array_equal(rows["obs"], [frame] * 3)


@each_format
def test_episodes_end_as_the_files_say(data_format: str, tmp_path: Path):
    path = create(tmp_path / "ends", [buffer(i, *end) for i, end in enumerate(ENDS)], data_format)
    with minari.read(str(path)) as reader:
        for number, (rows, info) in enumerate(reader):
            assert_same(rows, expected(number, *ENDS[number]))
            assert info == {"id": number}
        assert not reader.notes.texts
    assert not rows["terminated"].any() and not rows["truncated"].any()  # The last was cut.


def test_episodes_come_in_the_order_of_their_numbers(tmp_path: Path):
    for data_format in FORMATS:
        path = create(tmp_path / data_format, [buffer(i, 1) for i in range(12)], data_format)
        assert [info["id"] for _, info in minari.read(str(path))] == [*range(12)]


@each_format
def test_split_and_filtered_datasets_are_read_by_their_indices(data_format: str, tmp_path: Path):
    path = create(tmp_path / "whole", [buffer(i, i + 1) for i in range(6)], data_format)
    whole = library.MinariDataset(path / "data")
    parts = library.split_dataset(whole, [4, 2], seed=3)
    assert [*parts[0].episode_indices] != sorted(parts[0].episode_indices)
    for part in (*parts, whole.filter_episodes(lambda episode: len(episode) % 2 == 0)):
        reader = minari.read(part.spec.data_path, episode_indices=part.episode_indices)
        assert reader.num_episodes == part.total_episodes
        assert reader.num_steps == part.total_steps + part.total_episodes
        for theirs, (rows, info) in zip(part, reader, strict=True):
            assert theirs.id == info["id"]
            assert_same(rows, expected(theirs.id, theirs.id + 1))


@pytest.mark.parametrize(("indices", "message"), [([0, 0], "none twice"), ([], "at least one"), ([1, 9], r"\[9\]")])
def test_indices_must_be_those_of_episodes(indices: list[int], message: str, tmp_path: Path):
    path = create(tmp_path / "two", [buffer(0, 1), buffer(1, 1)])
    with pytest.raises(ValueError, match=message):
        minari.read(str(path), episode_indices=indices)


@pytest.mark.parametrize("data_format", ["arrow", "parquet"])
def test_long_episodes_are_whole(data_format: str, tmp_path: Path):
    lengths = [3, 70_000, 2]
    path = create(tmp_path / "long", [buffer(i, length) for i, length in enumerate(lengths)], data_format)
    # Minari takes the pieces that Arrow makes for episodes, with the ids of others.
    theirs = [(episode.id, len(episode)) for episode in library.MinariDataset(path / "data")]
    assert theirs == [(0, 3), (1, 32_767), (2, 32_767)]
    for number, (rows, _) in enumerate(minari.read(str(path))):
        assert_same(rows, expected(number, lengths[number]))


@each_format
def test_all_dtypes_are_kept(data_format: str, tmp_path: Path):
    for dtype in map(np.dtype, ("bool", "int8", "uint8", "int32", "uint16", "uint64", "float16", "float64")):
        low, high = (False, True) if dtype.kind == "b" else (0, 9)
        box = spaces.Box(np.full(2, low, dtype), np.full(2, high, dtype), (2,), dtype)
        values = np.array([[0, 1], [1, 1], [1, 0]], dtype)
        one = buffer(0, 2, observations=values, actions=values[1:], rewards=values[1:, 0])
        path = create(tmp_path / str(dtype), [one], data_format, box, box)
        [(rows, _)] = minari.read(str(path))
        for name, wanted in (("obs", values), ("action", arrived(values[1:])), ("reward", arrived(values[1:, 0]))):
            assert_same({name: rows[name]}, {name: wanted})


@each_format
def test_nested_spaces_become_nested_dicts(data_format: str, tmp_path: Path):
    parts = spaces.Tuple([spaces.Box(-9, 99, (), np.float32) for _ in range(11)])
    space = spaces.Dict({"z": spaces.MultiBinary(3), "a": spaces.Dict({"m": spaces.MultiDiscrete([5, 6])}), "p": parts})
    values = {
        "z": np.array([[1, 0, 1], [0, 0, 1]], np.int8),
        "a": {"m": np.array([[4, 5], [3, 2]])},
        "p": tuple(np.array([i, i + 20], np.float32) for i in range(11)),
    }
    actions = spaces.Tuple((spaces.Discrete(3), STATE))
    one = buffer(0, 1, observations=values, actions=(np.array([2]), np.array([[1, 2]], np.float32)))
    [(rows, _)] = minari.read(str(create(tmp_path / "nested", [one], data_format, space, actions)))
    # Numbers come as numbers, 2 before 10.
    wanted = {"a/m": values["a"]["m"], **{f"p/{i}": values["p"][i] for i in range(11)}, "z": values["z"]}
    found = leaves(rows["obs"])
    assert found.keys() == wanted.keys()
    assert [name for name in found if name.startswith("p/")] == [f"p/{i}" for i in range(11)]
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)
    assert_same(rows["action"], {"0": np.array([0, 2]), "1": np.array([[0, 0], [1, 2]], np.float32)})


@each_format
def test_infos_keep_their_names_and_shapes(data_format: str, tmp_path: Path):
    deep = np.arange(12, dtype=np.int16).reshape(3, 2, 2)
    infos = {"count": [1, 2, 3], "inner": {"deep": deep, "pair": ([0.5, 1.5, 2.5], [True, False, True])}}
    [(rows, _)] = minari.read(str(create(tmp_path / "infos", [buffer(0, 2, infos=infos)], data_format)))
    wanted = {"count": np.array([1, 2, 3]), "inner/deep": deep}
    wanted |= {"inner/pair/0": np.array([0.5, 1.5, 2.5]), "inner/pair/1": np.array([True, False, True])}
    assert_same(rows["infos"], wanted)


@each_format
def test_infos_that_are_not_in_all_episodes_are_said_and_not_read(data_format: str, tmp_path: Path):
    infos = [{"a": [1, 2], "b": [1, 2], "c": [1, 2]}, {"b": [0.5, 1.5], "c": [np.zeros(2), np.ones(2)], "d": [1, 2]}]
    reader = minari.read(
        str(create(tmp_path / "some", [buffer(i, 1, infos=one) for i, one in enumerate(infos)], data_format))
    )
    assert [leaves(rows["infos"]).keys() for rows, _ in reader] == [{"b"}, {"b"}]
    assert [rows["infos"]["b"].tolist() for rows, _ in reader] == [[1, 2], [0.5, 1.5]]
    assert set(reader.notes) == {
        "`infos/a` is not in all episodes, and is not read.",
        "`infos/d` is not in all episodes, and is not read.",
        "`infos/c` has other shapes in other episodes, and is not read.",
        "`infos/b` is int64 or float64, by episode. All of it is float64 here.",
    }


def test_infos_of_other_lengths_are_said(tmp_path: Path):
    infos = {"steps": [5, 6], "rows": [7, 8, 9], "other": [1, 2, 3, 4, 5]}
    reader = minari.read(str(create(tmp_path / "lengths", [buffer(0, 2, infos=infos)])))
    [(rows, _)] = reader
    assert_same(rows["infos"], {"rows": np.array([7, 8, 9]), "steps": np.array([0, 5, 6])})
    assert reader.notes.texts == [
        "`infos/other` has neither a value for each step nor one more, and is not read.",
        "`infos/steps` has no value for first rows: they are zero.",
    ]


@each_format
def test_a_final_observation_is_not_made_up(data_format: str, tmp_path: Path):
    whole, part = buffer(0, 2), buffer(1, 3)
    part = buffer(1, 3, observations=part.observations[:-1])
    reader = minari.read(str(create(tmp_path / "final", [whole, part], data_format)))
    (first, _), (second, _) = reader
    assert first["final_obs_missing"].tolist() == [False] * 3
    assert second["final_obs_missing"].tolist() == [False, False, False, True]
    np.testing.assert_array_equal(second["obs"], part.observations[[0, 1, 2, 2]])
    np.testing.assert_array_equal(second["action"], expected(1, 3)["action"])
    assert list(second)[5:7] == ["is_first", "final_obs_missing"]
    assert any("no final observation" in note for note in reader.notes)


def test_rewards_of_an_array_are_scalars(tmp_path: Path):
    path = create(tmp_path / "axis", [buffer(0, 2, rewards=np.array([[1.5], [2.5]]))])
    [(rows, _)] = minari.read(str(path))
    assert rows["reward"].tolist() == [0, 1.5, 2.5]


def test_flags_within_an_episode_are_kept_and_said(tmp_path: Path):
    path = create(tmp_path / "on", [buffer(0, 3, terminations=[1, 0, 1])])
    reader = minari.read(str(path))
    [(rows, _)] = reader
    assert_same({"t": rows["terminated"]}, {"t": np.array([False, True, False, True])})
    assert reader.notes.texts == ["Some episodes go on behind a row that is terminated or truncated."]


def test_integers_are_not_rounded_to_fit_other_episodes(tmp_path: Path):
    buffers = [buffer(0, 1, rewards=[2**53 + 1]), buffer(1, 1, rewards=[0.5])]
    reader = minari.read(str(create(tmp_path / "large", buffers)))
    with pytest.raises(FormatError, match="integers in `reward` that float64 cannot hold"):
        list(reader)


@each_format
def test_only_wanted_columns_are_read(data_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    space = spaces.Dict({"state": STATE, "other": STATE})
    states = buffer(0, 2).observations
    one = buffer(0, 2, observations={"state": states, "other": states}, infos={"k": [1, 2, 3]})
    path = create(tmp_path / "wanted", [one], data_format, space)
    for fields in (["reward"], ["obs/state", "action"], ["infos"], ["terminated", "obs"]):
        reader = minari.read(str(path), fields=fields)
        asked: list[Any] = []
        read = reader._storage.read
        monkeypatch.setattr(reader._storage, "read", lambda i, c, read=read, asked=asked: asked.append(c) or read(i, c))
        [(rows, _)] = reader
        assert all(any(f"{name}/".startswith(f"{field}/") for field in fields) for name in leaves(rows))
        wanted = {"obs": 2}.get("obs" if "obs" in fields else "", 0)
        assert len(asked[0]) == wanted + len(fields) - ("obs" in fields)


def test_reading_starts_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    reader = minari.read(str(create(tmp_path / "later", [buffer(i, 1) for i in range(5)])))
    seen: list[int] = []
    read = Hdf5Storage.read
    monkeypatch.setattr(Hdf5Storage, "read", lambda self, i, columns: seen.append(i) or read(self, i, columns))
    assert [info["id"] for _, info in reader.episodes(3)] == [3, 4] == seen


def test_a_closed_reader_opens_again(tmp_path: Path):
    reader = minari.read(str(create(tmp_path / "again", [buffer(0, 1)])))
    reader.close()
    assert len(list(reader)) == 1


def test_datasets_are_found_by_id(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    create(tmp_path / "named", [buffer(0, 1)])
    assert minari.read("named-v0").num_episodes == 1
    (store / "space").mkdir()
    (store / "named-v0").rename(store / "space" / "named-v3")
    assert minari.read("space/named-v3").num_episodes == 1
    with pytest.raises(FormatError, match="is no path, and .* is not there. Get it by `minari download named-v0`"):
        minari.read("named-v0")
    # A path goes before an id.
    monkeypatch.chdir(create(tmp_path / "elsewhere", [buffer(0, 1), buffer(1, 1)]).parent)
    (store / "elsewhere-v0").rename(store / "other-v0")
    assert minari.read("other-v0").num_episodes == 2


def test_a_directory_or_its_data_is_given(tmp_path: Path):
    path = create(tmp_path / "both", [buffer(0, 1)])
    assert minari.read(str(path)).num_episodes == minari.read(str(path / "data")).num_episodes == 1


def test_metadata_are_those_of_the_dataset(recorded: Path, tmp_path: Path):
    found = minari.read(str(recorded / "hdf5")).metadata
    assert (found["algorithm_name"], found["author"], found["description"]) == ("scripted", ["tests"], "Logged games.")
    assert found["minari_version"] == "0.5.4"
    assert found["action_space"] == '{"type": "Discrete", "dtype": "int64", "start": -1, "n": 1000}'
    path = create(tmp_path / "env", [buffer(0, 1)], code_permalink="https://example.org/code")
    change_json(path / "data" / "metadata.json", env_spec='{"id": "CartPole-v1"}', long="x" * 2_000_000)
    reader = minari.read(str(path))
    assert reader.metadata["env_spec"] == '{"id": "CartPole-v1"}'
    assert reader.metadata["code_permalink"] == "https://example.org/code"
    assert "long" not in reader.metadata
    assert "`long` of the metadata has more than 1,048,576 characters, and is left out." in reader.notes.texts


def test_bounds_of_images_are_one_number(recorded: Path):
    reader = minari.read(str(recorded / "exact_hdf5"))
    space = '{"type": "Box", "dtype": "uint8", "shape": [32, 40, 3], "low": 0, "high": 255}'
    assert reader.metadata["observation_space"] == space


def test_hdf5_is_read_without_spaces(tmp_path: Path):
    """Older datasets have none, and Minari makes their environment, which runs what the metadata name."""
    path = create(tmp_path / "bare", [buffer(0, 2)])
    change_json(path / "data" / "metadata.json", observation_space=None, action_space=None)
    [(rows, _)] = minari.read(str(path))
    assert_same(rows, expected(0, 2))


def test_what_only_the_space_has_is_said(tmp_path: Path):
    space = spaces.Dict({"state": STATE, "other": STATE})
    path = create(tmp_path / "less", [buffer(0, 1, observations={"state": buffer(0, 1).observations})], "hdf5", space)
    reader = minari.read(str(path))
    assert reader.notes.texts == ["`obs/other` is in the space, and not in the episodes."]
    assert [*leaves(next(iter(reader)).rows["obs"])] == ["state"]


@each_format
def test_import_gives_the_rows(data_format: str, tmp_path: Path):
    path = create(tmp_path / "all", [buffer(i, *end, seed=i) for i, end in enumerate(ENDS)], data_format)
    summary = import_episodes("minari", path, tmp_path / "whole")
    assert (summary.num_episodes, summary.num_steps) == (5, 20)
    with IndividualFileDataset(directory=tmp_path / "whole", mode="r") as dataset:
        for number, episode in enumerate(dataset.episodes()):
            assert_same({n: v.numpy() for n, v in episode.items()}, expected(number, *ENDS[number]))
            assert dataset.episode_info(number) == {"id": number, "seed": number}
    summary = import_episodes("minari", path, tmp_path / "part", fields=["obs", "reward"], limit=2)
    assert (summary.num_episodes, summary.num_steps, [*summary.fields]) == (2, 6, ["obs", "reward"])


@each_format
def test_an_import_that_was_killed_goes_on(data_format: str, tmp_path: Path):
    path = create(tmp_path / "all", [buffer(i, *end) for i, end in enumerate(ENDS)], data_format)
    for number in (2, 4):
        with killed_before(number):
            import_episodes("minari", path, tmp_path / "whole")
        assert not (tmp_path / "whole").exists()
    assert import_episodes("minari", path, tmp_path / "whole").num_episodes == 5
    with IndividualFileDataset(directory=tmp_path / "whole", mode="r") as dataset:
        for number, episode in enumerate(dataset.episodes()):
            assert_same({n: v.numpy() for n, v in episode.items()}, expected(number, *ENDS[number]))


@pytest.mark.parametrize(
    ("data_format", "name"), [("hdf5", "h5py"), ("arrow", "pyarrow"), ("parquet", "pyarrow.parquet")]
)
def test_a_missing_library_is_named_with_its_extra(
    data_format: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = create(tmp_path / "lib", [buffer(0, 1)], data_format)
    monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(ImportError, match=rf"needs {name} .*\[minari\]"):
        minari.read(str(path))
