"""What is written is a dataset that Minari reads, and that comes back as it was."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import minari as library
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from minari.namespace import list_local_namespaces

from buffers.dataset import IndividualFileDataset, RingBufferDataset
from buffers.interop import export_episodes, import_episodes, minari
from tests.interop.minari_files import (
    ENDS,
    FORMATS,
    arrived,
    assert_same,
    buffer,
    create,
    expected,
    leaves,
    transitions,
)

each_format = pytest.mark.parametrize("data_format", FORMATS)


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The local store of Minari."""
    path = tmp_path / "store"
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(path))
    monkeypatch.setattr(os, "sync", lambda: None)  # It waits for what all other programs write.
    return path


def played(episodes: Any = ENDS, info: Any = (), **others: Any) -> RingBufferDataset:
    """A dataset with games; `others` are fields, `name -> function of (number, length)`, or None to leave one out."""
    dataset = RingBufferDataset(capacity=100_000)
    infos = dict(enumerate(info))
    for number, end in enumerate(episodes):
        rows = expected(number, *end) | {name: made and made(number, end[0]) for name, made in others.items()}
        dataset.add_episode({name: value for name, value in rows.items() if value is not None}, infos.get(number))
    return dataset


def opened(path: Path) -> library.MinariDataset:
    return library.MinariDataset(path / "data")


@each_format
def test_minari_reads_the_log(data_format: str, tmp_path: Path):
    summary = minari.write(played(), tmp_path / "out", data_format=data_format)
    assert (summary.num_episodes, summary.num_steps) == (5, 20)
    found = opened(tmp_path / "out")
    assert (found.total_episodes, found.total_steps) == (5, 15)
    assert data_format == found.storage.FORMAT
    assert found.storage.metadata["dataset_size"] == found.storage.get_size()
    for number, episode in enumerate(found):
        assert episode.id == number
        for name, values in transitions(number, *ENDS[number]).items():
            assert_same({name: getattr(episode, name)}, {name: values})


@each_format
def test_images_are_stored_as_they_are(data_format: str, tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 256, (2, 48, 32, 3), np.uint8)
    minari.write(played(ENDS[:1], obs=lambda *_: noise), tmp_path / "out", data_format=data_format)
    found = opened(tmp_path / "out")
    np.testing.assert_array_equal(found[0].observations, noise)
    assert found.observation_space == spaces.Box(0, 255, (48, 32, 3), np.uint8)


@each_format
def test_a_nested_dataset_of_minari_comes_back_equal(data_format: str, tmp_path: Path):
    space = spaces.Dict(
        {
            "box": spaces.Box(np.array([-1, -2.5]), np.array([1, np.inf]), (2,), np.float64),
            "pair": spaces.Tuple((spaces.Discrete(9, start=-3), spaces.MultiBinary([2, 2]))),
            "grid": spaces.Box(0, 7, (3, 4), np.uint8),
        }
    )
    values = {
        "box": np.array([[0.5, 2], [-1, 4], [1, 0]]),
        "pair": (np.array([5, -3, 0]), np.array([[[0, 1], [1, 0]]] * 3, np.int8)),
        "grid": np.arange(36, dtype=np.uint8).reshape(3, 3, 4) % 7,
    }
    infos = {"count": [4, 5, 6], "inner": {"deep": np.arange(12.0).reshape(3, 2, 2), "flag": [True, False, True]}}
    actions = spaces.MultiDiscrete([3, 4])
    one = buffer(0, 2, observations=values, actions=np.array([[1, 2], [2, 3]]), infos=infos, seed=2**63 + 1)
    path = create(
        tmp_path / "in", [one], data_format, space, actions, author="me", algorithm_name="x", code_permalink="here"
    )
    import_episodes("minari", path, tmp_path / "own")
    summary = export_episodes("minari", tmp_path / "own", tmp_path / "out", data_format=data_format)
    assert summary.lost == []
    before, after = opened(path), opened(tmp_path / "out")
    assert after.observation_space == before.observation_space
    assert after.action_space == before.action_space
    kept = {"author": {"me"}, "algorithm_name": "x", "code_permalink": "here", "dataset_id": "out-v0"}
    assert {name: after.storage.metadata[name] for name in kept} == kept
    for name in ("observations", "actions", "rewards", "terminations", "truncations"):
        assert_same(getattr(after[0], name), leaves(getattr(before[0], name)))
    if data_format == "hdf5":  # Minari gives nested infos of Arrow back as dicts.
        assert_same(after[0].infos, leaves(before[0].infos))
    [metadata] = after.storage.get_episode_metadata([0])
    assert metadata == {"id": 0, "seed": 2**63 + 1, "total_steps": 2}
    for (found, info), (rows, wanted) in zip(minari.read(str(tmp_path / "out")), minari.read(str(path)), strict=True):
        assert_same(found, leaves(rows))
        assert info == wanted


@st.composite
def datasets(draw: st.DrawFn) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Episodes of one kind, and their infos."""
    names = st.text("abcäß_0.- ", min_size=1, max_size=4).filter(lambda name: name not in (".", ".."))
    dtypes = st.sampled_from(["bool", "uint8", "int16", "uint64", "int64", "float16", "float32", "float64"]).map(
        np.dtype
    )
    leaf = st.tuples(dtypes, st.sampled_from([(), (1,), (2, 3)]))
    trees = st.recursive(leaf, lambda below: st.dictionaries(names, below, min_size=1, max_size=3), max_leaves=4)
    tree = {"obs": draw(trees), "action": draw(trees), "infos": draw(st.dictionaries(names, trees, max_size=2))}
    tree["reward"] = (draw(dtypes), ())
    values = st.one_of(
        st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.booleans(), st.text("aé/", max_size=5)
    )
    episodes = []
    for number in range(draw(st.integers(1, 3))):
        rng, length = np.random.default_rng(number), draw(st.integers(1, 4))

        def made(node: Any, rng: Any = rng, length: int = length) -> Any:
            if isinstance(node, dict):
                return {name: made(below) for name, below in node.items()}
            dtype, shape = node
            found = rng.integers(0, 256, (length + 1, *shape, dtype.itemsize), np.uint8)
            return found[..., 0] > 127 if dtype.kind == "b" else np.nan_to_num(found.view(dtype)[..., 0])

        rows = {name: made(node) for name, node in tree.items() if node}
        for name in ("action", "reward"):
            for leaf in leaves(rows[name]).values():
                leaf[0] = 0
        for name in ("terminated", "truncated"):
            rows[name] = arrived(rng.random(length) < 0.5)
        rows["is_first"] = np.arange(length + 1) == 0
        keys = st.sampled_from(["task", "success", "options/a", "options/b/c", "x y"])
        info = {"id": number, **draw(st.dictionaries(keys, values, max_size=3))}
        if draw(st.booleans()):
            info["seed"] = draw(st.integers(0, 2**63 - 1))
        episodes.append((rows, info))
    return episodes


@settings(max_examples=15)
@given(datasets(), st.sampled_from(FORMATS))
def test_what_is_written_comes_back(episodes: Any, data_format: str):
    dataset = RingBufferDataset(capacity=100)
    for rows, info in episodes:
        dataset.add_episode(rows, info)
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "out")
        minari.write(dataset, path, data_format=data_format)
        with minari.read(path) as reader:
            found = list(reader)
    for (rows, info), (wanted, kept) in zip(found, episodes, strict=True):
        assert info == kept
        flat, expected_rows = leaves(rows), leaves(wanted)
        assert flat.keys() == expected_rows.keys()
        for name, values in expected_rows.items():
            np.testing.assert_array_equal(flat[name], values)
            assert flat[name].dtype == values.dtype


@each_format
def test_infos_keep_their_first_row(data_format: str, tmp_path: Path):
    dataset = played(infos=lambda _, length: {"count": np.arange(5, length + 6)})
    summary = minari.write(dataset, tmp_path / "out", data_format=data_format)
    assert not any("infos" in text for text in summary.lost)
    for number, episode in enumerate(opened(tmp_path / "out")):
        assert episode.infos["count"].tolist() == [*range(5, ENDS[number][0] + 6)]


def test_what_row_0_has_is_said(tmp_path: Path):
    summary = minari.write(played(action=lambda _, length: np.arange(7, length + 8)), tmp_path / "out")
    assert "`action` of first rows, which belong to no transition, is left out where it is not zero." in summary.lost


@each_format
def test_episodes_keep_their_info(data_format: str, tmp_path: Path):
    infos = [{"id": 4, "seed": 9, "task": "pick", "success": True, "options/a": 1, "options/b/c": 0.5}]
    infos += [
        {},
        {"seed": str(2**64 - 1)},
        {"seed": "text"},
        {"a": 1, "a/b": 2, "nul": "\0", "seed": -1, "total_steps": 77},
    ]
    summary = minari.write(played(info=infos), tmp_path / "out", data_format=data_format)
    found = [*opened(tmp_path / "out").storage.get_episode_metadata(range(5))]
    assert found[0] == {
        "id": 0,
        "total_steps": 1,
        "seed": 9,
        "task": "pick",
        "success": True,
        "options": {"a": 1, "b": {"c": 0.5}},
    }
    assert found[1] == {"id": 1, "total_steps": 3}
    assert found[2] == {"id": 2, "total_steps": 4, "seed": 2**64 - 1}
    assert found[3] == {"id": 3, "total_steps": 2}
    assert found[4] == {"id": 4, "total_steps": 5, "a": {"b": 2}} or found[4] == {"id": 4, "total_steps": 5, "a/b": 2}
    for text in (
        "Episodes get the ids 0, 1, 2 ... of their order.",
        "`seed` of the info of episodes is no integer of 64 bits, and is left out.",
        "`a` of the info of episodes is the beginning of another name, and is left out.",
        "`nul` of the info of episodes has characters that HDF5 cannot hold, and is left out.",
    ):
        assert text in summary.lost


def test_spaces_are_made_of_fields_and_that_is_said(tmp_path: Path):
    dataset = played(
        obs=lambda number, length: {"x": np.zeros((length + 1, 2)), "flag": np.zeros(length + 1, np.bool_)},
        action=lambda number, length: np.zeros(length + 1, np.int32),
    )
    summary = minari.write(dataset, tmp_path / "out")
    found = opened(tmp_path / "out")
    box = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    flag = spaces.Box(np.array(False), np.array(True), (), np.bool_)
    assert found.observation_space == spaces.Dict({"x": box, "flag": flag})
    low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    assert found.action_space == spaces.Box(low, high, (), np.int32)
    assert "The space of `action` was made of dtypes and shapes. State `action_space` for another one." in summary.lost


@pytest.mark.parametrize("stated", [spaces.Discrete(405), '{"type": "Discrete", "n": 405, "start": 0}'])
def test_spaces_are_those_that_are_stated(stated: Any, tmp_path: Path):
    box = spaces.Box(-9, 99, (2,), np.float32)
    summary = minari.write(played(), tmp_path / "out", action_space=stated, observation_space=box)
    found = opened(tmp_path / "out")
    assert (found.action_space, found.observation_space) == (spaces.Discrete(405), box)
    assert summary.lost == []


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"action_space": spaces.Discrete(404)}, "`action` has values that its Discrete space does not have"),
        ({"action_space": spaces.Discrete(500, start=1)}, "`action` has values that its Discrete space does not have"),
        ({"action_space": spaces.Box(0, 1, (2,))}, r"`action` is int64 \(\), and its space is a Box of float32 \(2,\)"),
        ({"observation_space": spaces.Discrete(3)}, r"`obs` is float32 \(2,\), and its space is a Discrete"),
        (
            {"observation_space": spaces.Dict({"a": spaces.Discrete(2)})},
            r"`obs` is float32 \(2,\), and its space is a Dict",
        ),
        (
            {"observation_space": spaces.Tuple([spaces.Discrete(2)])},
            r"`obs` is float32 \(2,\), and its space is a Tuple",
        ),
        ({"observation_space": spaces.Sequence(spaces.Discrete(2))}, "must be a space that Minari can write"),
        ({"observation_space": "no json"}, "must be a space that Minari can write"),
        ({"observation_space": 7}, "must be a space that Minari can write"),
    ],
)
def test_stated_spaces_must_fit(stated: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        minari.write(played(), tmp_path / "out", **stated)
    assert not [name for name in os.listdir(tmp_path) if name.startswith("out")]


def test_floats_are_no_discrete_actions(tmp_path: Path):
    dataset = played(action=lambda _, length: np.zeros(length + 1))
    with pytest.raises(ValueError, match=r"`action` is float64 \(\), and its space is a Discrete"):
        minari.write(dataset, tmp_path / "out", action_space=spaces.Discrete(3))


def test_wider_floats_keep_the_bounds(tmp_path: Path):
    """A policy may give float64 where the space has float32: Minari only warns, and HDF5 keeps float64."""
    action = lambda number, length: expected(number, length)["action"] / 1000  # noqa: E731
    box = spaces.Box(-1, 1, (), np.float32)
    for data_format in FORMATS:
        path = tmp_path / data_format
        assert not any(
            "action" in text
            for text in minari.write(played(action=action), path, data_format=data_format, action_space=box).lost
        )
        assert opened(path).action_space == spaces.Box(-1, 1, (), np.float64)
        assert opened(path)[0].actions.dtype == np.float64


def test_spaces_of_fields_that_are_left_out_are_left_out(tmp_path: Path):
    box = spaces.Box(0, 9, (), np.float64)
    space = spaces.Dict({"a": box, "said": spaces.Text(5), "pair": spaces.Tuple((box, spaces.Discrete(9)))})
    value = np.array([1.0, 2])
    values = {"a": value, "said": ["x", "y"], "pair": (value, np.array([3, 4]))}
    path = create(tmp_path / "in", [buffer(0, 1, observations=values)], "hdf5", space)
    import_episodes("minari", path, tmp_path / "own")
    with IndividualFileDataset(directory=tmp_path / "own", mode="r") as dataset:
        summary = minari.write(dataset, tmp_path / "all")
        assert opened(tmp_path / "all").observation_space == spaces.Dict({"a": box, "pair": space["pair"]})
        assert summary.lost == ["`obs/said` is in the space, and no field: the space was changed."]
        minari.write(dataset, tmp_path / "part", fields=["obs/pair/1", "action", "reward"])
    assert opened(tmp_path / "part").observation_space == spaces.Dict({"pair": spaces.Dict({"1": spaces.Discrete(9)})})
    assert_same(opened(tmp_path / "part")[0].observations, {"pair/1": np.array([3, 4])})


@pytest.mark.parametrize("data_format", ["arrow", "parquet"])
def test_episodes_that_minari_would_cut_are_refused(data_format: str, tmp_path: Path):
    dataset = played([(32_767, True, False), (2, True, False)])
    minari.write(dataset, tmp_path / "whole", data_format=data_format)
    found = opened(tmp_path / "whole")
    assert [(len(one), one.observations[0].tolist()) for one in found] == [(32_767, [0, 0]), (2, [1, 0])]
    dataset = played([(32_768, True, False)])
    with pytest.raises(ValueError, match="32,768 steps. Minari cuts those of more than 32,767 .* Use `data_f"):
        minari.write(dataset, tmp_path / "out", data_format=data_format)
    assert not (tmp_path / "out").exists()


def test_long_episodes_are_whole_in_hdf5(tmp_path: Path):
    minari.write(played([(32_768, True, False), (2, True, False)]), tmp_path / "out")
    assert [len(one) for one in opened(tmp_path / "out")] == [32_768, 2]


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"action": None}, r"Minari needs the fields \['action'\]"),
        ({"obs": None, "reward": None}, r"Minari needs the fields \['obs', 'reward'\]"),
        (
            {"reward": lambda _, n: np.zeros((n + 1, 2))},
            "Minari needs a number for each step in `reward`, found float64",
        ),
        ({"obs": lambda _, n: np.zeros(n + 1, np.complex64)}, "`obs` is complex64 .*, and Minari has no space"),
        ({"obs": lambda _, n: torch.zeros(n + 1, dtype=torch.bfloat16)}, "'obs'.* are bfloat16"),
        ({"obs": lambda _, n: {"a/b": np.zeros(n + 1)}}, "HDF5 cannot hold the name 'a/b'"),
        ({"infos": lambda _, n: {".": np.zeros(n + 1)}}, "HDF5 cannot hold the name '.'"),
    ],
)
def test_what_minari_cannot_hold_is_refused(others: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        minari.write(played(**others), tmp_path / "out")
    assert not [name for name in os.listdir(tmp_path) if name.startswith("out")]


def test_names_with_a_slash_are_written_to_arrow(tmp_path: Path):
    minari.write(played(obs=lambda _, n: {"a/b": np.arange(n + 1)}), tmp_path / "out", data_format="arrow")
    assert opened(tmp_path / "out")[0].observations["a/b"].tolist() == [0, 1]


@pytest.mark.parametrize("data_format", ["arrow", "parquet"])
def test_rows_without_values_are_not_written_to_arrow(data_format: str, tmp_path: Path):
    dataset = played(obs=lambda _, n: np.zeros((n + 1, 0)))
    with pytest.raises(ValueError, match=r"Arrow cannot hold rows without a value: \['obs'\]"):
        minari.write(dataset, tmp_path / "out", data_format=data_format)
    minari.write(dataset, tmp_path / "out")
    assert opened(tmp_path / "out")[0].observations.shape == (2, 0)


def test_what_is_left_out_or_made_up_is_said(tmp_path: Path):
    others = {"discount": lambda _, n: np.ones(n + 1), "infos": lambda _, n: {"z": np.ones(n + 1, np.complex64)}}
    others["final_obs_missing"] = lambda _, n: np.arange(n + 1) == n
    summary = minari.write(played(terminated=None, truncated=None, **others), tmp_path / "out")
    for text in (
        "There is no `terminated`, which Minari needs: it is False throughout.",
        "There is no `truncated`, which Minari needs: it is False throughout.",
        "`discount` is left out: Minari has no place for it. It has one for fields below `infos`.",
        "`infos/z` is complex64 (), which infos of Minari cannot be. It is left out.",
        "Minari cannot say that a final observation is missing: the one before is there again.",
    ):
        assert text in summary.lost
    assert not any(one.terminations.any() or one.truncations.any() for one in opened(tmp_path / "out"))
    assert opened(tmp_path / "out")[0].infos == {}


def test_episodes_without_a_transition_are_left_out(tmp_path: Path):
    dataset = played([(0, False, False), (2, True, False)])
    assert minari.write(dataset, tmp_path / "out").num_episodes == 1
    assert [len(one) for one in opened(tmp_path / "out")] == [2]
    with pytest.raises(ValueError, match="no episode with a transition"):
        minari.write(dataset, tmp_path / "none", limit=1)
    assert not [name for name in os.listdir(tmp_path) if name.startswith("none")]


@each_format
def test_an_error_leaves_nothing(data_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dataset = played()
    whole = RingBufferDataset.arrays_of_id

    def failing(self: Any, episode_id: int) -> Any:
        if episode_id == 3:
            raise OSError("the disk is full")
        return whole(self, episode_id)

    monkeypatch.setattr(RingBufferDataset, "arrays_of_id", failing)
    with pytest.raises(OSError, match="the disk is full"):
        minari.write(dataset, tmp_path / "out", data_format=data_format)
    assert not [name for name in os.listdir(tmp_path) if name.startswith("out")]


def test_nothing_is_overwritten(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ValueError, match="exists. Choose another path"):
        minari.write(played(), tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["mine"]


def test_an_id_is_written_to_the_local_store(store: Path, tmp_path: Path):
    summary = minari.write(played(), "games/scripted-v2", metadata={"author": "me", "requirements": ["numpy>=1"]})
    assert summary.target == str(store / "games" / "scripted-v2")
    found = library.load_dataset("games/scripted-v2")
    assert (found.id, found.total_episodes) == ("games/scripted-v2", 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Minari warns of datasets that are not where their id says.
        listed = library.list_local_datasets()
    assert "games" in list_local_namespaces()
    assert listed["games/scripted-v2"]["author"] == ["me"]
    assert listed["games/scripted-v2"]["requirements"] == ["numpy>=1"]
    with pytest.raises(ValueError, match="exists"):
        minari.write(played(), "games/scripted-v2")
    assert minari.read("games/scripted-v2").num_episodes == 5


def test_a_path_with_a_dot_is_no_id(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    minari.write(played(), "./scripted-v2")
    assert (tmp_path / "scripted-v2" / "data" / "metadata.json").is_file()
    assert library.MinariDataset(tmp_path / "scripted-v2" / "data").id == "scripted-v2"
    minari.write(played(), Path("other-v1"), dataset_id="space/own-v3")
    assert opened(tmp_path / "other-v1").id == "space/own-v3"
    minari.write(played(), "my games.1")
    assert opened(tmp_path / "my games.1").id == "my-games-1-v0"
    assert not store.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_format": "zarr"}, "`data_format` must be one of"),
        ({"dataset_id": "no version"}, "The id of a dataset must be like"),
        ({"dataset_id": "no-version"}, "The id of a dataset must be like"),
        ({"dataset_id": "../x-v0"}, "The id of a dataset must be like"),
        ({"dataset_id": "a/one-letter-v0"}, "The id of a dataset must be like"),
        ({"dataset_id": 3}, "The id of a dataset must be like"),
        ({"metadata": {"total_steps": 3}}, r"`metadata` must not have \['total_steps'\]"),
        ({"metadata": {"code_permalink": 3}}, "`code_permalink` of the metadata must be text"),
        ({"metadata": {"other": np.zeros(3)}}, "`other` of the metadata is not what JSON can hold"),
        ({"metadata": {"author": 3}}, "`author` of the metadata must be text"),
    ],
)
def test_options_are_checked_before_anything_is_written(options: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        minari.write(played(), tmp_path / "out", **options)
    assert os.listdir(tmp_path) == []


def test_an_id_is_given_once(store: Path):
    with pytest.raises(ValueError, match="Give one of them"):
        minari.write(played(), "one-v0", dataset_id="two-v0")


def test_the_environment_is_kept(tmp_path: Path):
    import gymnasium

    spec = gymnasium.spec("CartPole-v1").to_json()
    box = spaces.Box(-9, 9, (2,), np.float32)
    minari.write(played(), tmp_path / "in", metadata={"env_spec": spec, "eval_env_spec": spec}, observation_space=box)
    import_episodes("minari", tmp_path / "in", tmp_path / "own")
    export_episodes(
        "minari", tmp_path / "own", tmp_path / "out", data_format="arrow", metadata={"description": "again"}
    )
    found = opened(tmp_path / "out")
    assert found.env_spec.id == "CartPole-v1"
    assert found.observation_space == box
    assert json.loads(found.storage.metadata["eval_env_spec"])["id"] == "CartPole-v1"
    assert found.storage.metadata["description"] == "again"


def test_long_spaces_come_back(tmp_path: Path):
    space = spaces.Box(0, 255, (64, 64, 3), np.uint8)
    frames = np.random.default_rng(1).integers(0, 256, (2, 64, 64, 3), np.uint8)
    path = create(tmp_path / "in", [buffer(0, 1, observations=frames)], "hdf5", space)
    import_episodes("minari", path, tmp_path / "own")
    assert os.path.getsize(tmp_path / "own" / "origin.json") < 4_000
    export_episodes("minari", tmp_path / "own", tmp_path / "out")
    assert opened(tmp_path / "out").observation_space == space
    np.testing.assert_array_equal(opened(tmp_path / "out")[0].observations, frames)
