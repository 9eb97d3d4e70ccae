"""Directories of .npz files of other libraries give the log of the games that were played, and what we write, too.

`tests/data/interop/npz/make.py` has made the directories with the libraries. The tests named `*_loads_what_we_write`
need modules on the path, and are skipped without: `dreamerv2` (2.2.0, from PyPI without its requirements),
`drqv2_replay_buffer` and `exorl_replay_buffer` (`replay_buffer.py` of facebookresearch/drqv2 at d6dbadce, and of
denisyarats/exorl at 4e6377d2).
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers.dataset import EpisodeDataset, IndividualFileDataset, RingBufferDataset
from buffers.interop import FormatError, import_episodes, npz
from buffers.interop.alignment import arrays_in, rows_on_arrival
from buffers.interop.npy import FileColumn
from tests.interop.logged import PLAYED, on_arrival, play
from tests.interop.made_up import killed_before
from tests.interop.npy_files import npy, pickled_objects
from tests.interop.npy_files import npz as archive_of

DATA = Path(__file__).parent.parent / "data" / "interop" / "npz"
FINISHED = PLAYED[:-1]
STREAMS = {0: PLAYED[:3], 10: [(1, "terminated"), (3, "truncated"), (2, "both"), (9, "cut")]}
ROWS_OF_A_STREAM = 13


def aligned(log: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rows of a log in Dreamer's names; where both flags are set, Dreamer keeps that it terminated."""
    terminated = on_arrival(log["terminated"])
    return {
        "obs/image": log["image"],
        "obs/vector": log["obs"].astype(np.float32),
        "action": on_arrival(log["action"]),
        "reward": on_arrival(log["reward"]),
        "terminated": terminated,
        "truncated": on_arrival(log["truncated"]) & ~terminated,
        "is_first": np.arange(len(terminated)) == 0,
    }


def assert_rows(found: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    found = {name: np.asarray(values) for name, values in arrays_in(found)}
    assert list(found) == list(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
        assert found[name].dtype == values.dtype, name


def by_episode(reader: npz.NpzReader) -> list[dict[str, Any]]:
    """Episodes in the order of their numbers: DreamerV2 names files of one second by a random id."""
    return sorted((rows for rows, _ in reader), key=lambda rows: rows["action"][-1][0])


# What the libraries write


def test_dreamerv2_gives_the_log():
    reader = npz.read(DATA / "dreamerv2_replay")
    assert reader.num_episodes == len(FINISHED) and reader.num_steps == sum(length + 1 for length, _ in FINISHED)
    assert reader.metadata == {"layout": "dreamer"} and not reader.notes.texts
    for rows, log in zip(by_episode(reader), play(FINISHED), strict=True):
        assert_rows(rows, aligned(log))


def logs_of_streams() -> list[dict[str, np.ndarray]]:
    """Those of two environments, each cut after its rows."""
    found = []
    for before, played in STREAMS.items():
        left = ROWS_OF_A_STREAM
        for log in play(played, before):
            if left:
                found.append({name: values[:left] for name, values in aligned(log).items()})
            left -= min(left, len(log["obs"]))
    return found


def test_dreamerv3_gives_the_log_although_its_actions_are_those_taken_next():
    reader = npz.read(DATA / "dreamerv3_replay")
    logs = logs_of_streams()
    assert reader.num_episodes == len(logs) == 7
    for number, ((rows, info), log) in enumerate(zip(reader, logs, strict=True)):
        assert_rows(rows, log)
        assert (DATA / "dreamerv3_replay" / info["file"]).exists()
        assert_rows(next(reader.episodes(number)).rows, log)
    # The last episode of each environment was being played.
    assert [not (log["terminated"] | log["truncated"]).any() for log in logs] == [False, False, True] + 3 * [False] + [
        True
    ]


def test_rows_that_dreamerv3_never_wrote_and_earlier_chunks_are_left_out():
    reader = npz.read(DATA / "dreamerv3_replay")
    assert reader.num_steps == 2 * ROWS_OF_A_STREAM
    assert len(list((DATA / "dreamerv3_replay").iterdir())) == 8
    assert "2 files are earlier versions of others, and are not read." in reader.notes.texts
    assert "`id` is of Dreamer's storage, and is not read." in reader.notes.texts


def test_drqv2_and_exorl_give_the_log():
    reader = npz.read(DATA / "drqv2_replay")
    assert reader.metadata == {"layout": "exorl"}
    for (rows, info), log, number in zip(reader, play(FINISHED), range(9), strict=False):
        found = aligned(log)
        terminated = found["terminated"]
        expected = {
            "obs": found["obs/vector"],
            **{name: found[name] for name in ("action", "reward", "terminated", "truncated", "is_first")},
            "discount": np.where(terminated, 0, 1).astype(np.float32),
            "physics": log["state"].astype(np.float64),
        }
        assert_rows(rows, expected)
        assert info["file"].split("_")[1] == str(number)
    assert any("DrQ-v2 itself" in note for note in reader.notes)


def original(path: Path, names: Sequence[str]) -> list[dict[str, np.ndarray]]:
    """A directory as `individual_file.py` of maltemosbach/buffers, commit 051cdcc, names and writes it."""
    found = []
    for number, name in enumerate(names):
        rows = {"obs": np.full((3, 2), number, np.float32), "action": np.arange(3) + 10 * number}
        np.savez_compressed(path / name, **rows)
        found.append(rows)
    return found


def test_the_original_project_is_read_by_time_then_id_with_rows_as_they_are(tmp_path: Path):
    names = [
        "0000000_3_20230930-120000.npz",
        "0000001_3_20230930-120000.npz",
        "0000009_3_20230930-120001.npz",
        "0000010_3_20230930-120001.npz",
        "10000000_3_20230930-120001.npz",
        "0000000_3_20231001-115959.npz",
    ]
    expected = original(tmp_path, names)
    reader = npz.read(tmp_path)
    assert reader.metadata == {"layout": "original"} and "Rows are as they were stored" in reader.notes.texts[0]
    assert [info["file"] for _, info in reader] == names
    for (rows, _), wanted in zip(reader, expected, strict=True):
        assert_rows(rows, wanted)


def test_pickles_of_the_original_project_are_refused_with_the_way_to_convert_them(tmp_path: Path):
    original(tmp_path, ["0000000_3_20230930-120000.npz"])
    torch.save({"a": torch.zeros(2)}, tmp_path / "0000001_2_20230930-120000.pt")
    with pytest.raises(FormatError, match=r"pickles\. Convert them: np\.savez.*weights_only=True"):
        npz.read(tmp_path)


# Which layout it is


def dreamer_episode(length: int = 3, **changes: Any) -> dict[str, np.ndarray]:
    positions = np.arange(length + 1)
    arrays = {
        "image": np.arange(length + 1, dtype=np.uint8).repeat(12).reshape(-1, 2, 2, 3),
        "action": np.arange(length + 1.0),
        "reward": np.arange(length + 1, dtype=np.float32),
        "is_first": positions == 0,
        "is_last": positions == length,
        "is_terminal": np.zeros(length + 1, bool),
    }
    return {name: value for name, value in {**arrays, **changes}.items() if value is not None}


def saved(path: Path, *episodes: dict[str, np.ndarray], names: Sequence[str] = ()) -> Path:
    path.mkdir(exist_ok=True)
    for number, arrays in enumerate(episodes):
        name = names[number] if names else f"20200101T00000{number}-abc{number}-3"
        np.savez(path / f"{name}.npz", **arrays)
    return path


def test_names_of_no_library_are_refused_with_what_rows_would_mean(tmp_path: Path):
    saved(tmp_path, dreamer_episode(), names=["episode7"])
    with pytest.raises(FormatError) as error:
        npz.read(tmp_path)
    for text in ("episode7.npz", "Say `layout=`", "taken there", "led to its observation", "rows as they are"):
        assert text in str(error.value)
    assert next(iter(npz.read(tmp_path, layout="dreamer"))).rows["action"].tolist() == [0, 1, 2, 3]
    assert list(next(iter(npz.read(tmp_path, layout="original"))).rows) == [*dreamer_episode()]


@pytest.mark.parametrize(
    ("names", "arrays"),
    [
        (["20200101T000000-abc-3", "episode_000000_3"], dreamer_episode()),
        (["episode_000000_3"], dreamer_episode()),
        (["20200101T000000-abc-3"], {"obs": np.zeros(3)}),
    ],
)
def test_names_and_arrays_must_agree(tmp_path: Path, names: list[str], arrays: dict[str, np.ndarray]):
    saved(tmp_path, *[arrays] * len(names), names=names)
    with pytest.raises(FormatError, match="of no library known here"):
        npz.read(tmp_path)


def test_a_layout_must_have_its_arrays_and_be_one(tmp_path: Path):
    saved(tmp_path, dreamer_episode())
    with pytest.raises(FormatError, match=r"have \['observation'\], found"):
        npz.read(tmp_path, layout="exorl")
    with pytest.raises(ValueError, match="`layout` must be one of"):
        npz.read(tmp_path, layout="dreamerv2")
    with pytest.raises(FormatError, match="is not <time>-<id>-<next>-<length>"):
        npz.read(tmp_path, layout="dreamerv3")
    with pytest.raises(ValueError, match="`obs` is for Dreamer's layouts"):
        npz.read(tmp_path, layout="original", obs="image")


# Flags and observations


def test_flags_are_those_that_the_file_has(tmp_path: Path):
    discount = np.array([1, 1, 1, 0], np.float32)
    none = {"is_first": None, "is_last": None, "is_terminal": None}
    cases: list[tuple[dict[str, Any], dict[str, list[int]], str]] = [
        ({}, {"terminated": [0, 0, 0, 0], "truncated": [0, 0, 0, 1]}, ""),
        ({"is_last": None}, {"terminated": [0, 0, 0, 0]}, "no `truncated`"),
        ({"is_terminal": None}, {"done": [0, 0, 0, 1]}, "`done` is `is_last`"),
        ({"is_last": np.zeros(4, bool)}, {"terminated": [0] * 4, "truncated": [0] * 4}, ""),
        (none, {}, "no `terminated` and `truncated`"),
        ({**none, "discount": discount}, {"terminated": [0, 0, 0, 1], "truncated": [0, 0, 0, 0]}, "`discount` is 0"),
        ({**none, "discount": discount + 1}, {"terminated": [0] * 4, "truncated": [0, 0, 0, 1]}, "`discount` is 0"),
    ]
    for number, (changes, expected, note) in enumerate(cases):
        path = saved(tmp_path / str(number), dreamer_episode(**changes))
        reader = npz.read(path)
        rows = next(iter(reader)).rows
        flags = {name: rows[name].tolist() for name in ("terminated", "truncated", "done") if name in rows}
        assert flags == {name: [bool(value) for value in values] for name, values in expected.items()}, changes
        assert rows["is_first"].tolist() == [True, False, False, False]
        assert note in " ".join(reader.notes)


def test_observations_can_be_named(tmp_path: Path):
    arrays = dreamer_episode(goal=np.arange(4), log_hint=np.arange(4), **{"deep/depth": np.arange(4)})
    saved(tmp_path, arrays)
    rows = next(iter(npz.read(tmp_path))).rows
    assert set(rows["obs"]) == {"image", "goal", "deep"} and rows["log_hint"].tolist() == [0, 1, 2, 3]
    rows = next(iter(npz.read(tmp_path, obs=["image", "deep/depth"]))).rows
    assert set(rows["obs"]) == {"image", "deep"} and rows["goal"].tolist() == [0, 1, 2, 3]
    with pytest.raises(FormatError, match=r"no arrays \['nose'\]"):
        npz.read(tmp_path, obs="nose")


def test_what_is_missing_is_said(tmp_path: Path):
    arrays = {**dreamer_episode(reward=None), "label": np.array(["a"] * 4)}
    saved(tmp_path, arrays)
    (tmp_path / "config.yaml").write_text("a: 1")
    notes = npz.read(tmp_path).notes.texts
    assert "There are no rewards." in notes and "`label` is text, and is not read." in notes
    assert "Files that are no .npz are not read: 'config.yaml' for example." in notes


def test_numbers_in_names_are_sorted_as_numbers(tmp_path: Path):
    names = [f"episode{number}" for number in (10, 9, 1, 100)]
    saved(tmp_path, *[dreamer_episode(action=np.full(4, number)) for number in (10, 9, 1, 100)], names=names)
    reader = npz.read(tmp_path, layout="dreamer")
    assert [int(rows["action"][0]) for rows, _ in reader] == [1, 9, 10, 100]
    assert npz.read(tmp_path / "episode9.npz", layout="dreamer").num_episodes == 1


def test_arrays_that_are_not_wanted_are_not_read(monkeypatch: pytest.MonkeyPatch):
    read = []
    rows_of = FileColumn.rows

    def spying(self: Any, start: int, stop: int) -> Any:
        read.append(self.name)
        return rows_of(self, start, stop)

    monkeypatch.setattr(FileColumn, "rows", spying)
    for name in ("dreamerv2_replay", "dreamerv3_replay", "drqv2_replay"):
        for rows, _ in npz.read(DATA / name, fields=["reward"]):
            assert list(rows) == ["reward"]
    assert not {"image", "vector", "observation", "physics", "action"} & {*read}


def test_an_import_gives_the_log_and_goes_on_after_a_kill(tmp_path: Path):
    for source, logs in (("drqv2_replay", play(FINISHED)[:4]), ("dreamerv3_replay", logs_of_streams()[:4])):
        with killed_before(2):
            import_episodes("npz", DATA / source, tmp_path / source, fields=["action", "truncated"], limit=4)
        summary = import_episodes("npz", DATA / source, tmp_path / source, fields=["action", "truncated"], limit=4)
        assert summary.num_episodes == 4 and summary.lost
        with IndividualFileDataset(directory=tmp_path / source, mode="r") as dataset:
            assert dataset.num_episodes == 4
            for number, log in enumerate(logs):
                wanted = log if "obs/image" in log else aligned(log)
                assert_rows(dataset.get_episode(number), {name: wanted[name] for name in ("action", "truncated")})


def test_names_of_fields_that_are_made_of_others_are_refused(tmp_path: Path):
    saved(tmp_path / "a", dreamer_episode(terminated=np.zeros(4)))
    assert "terminated" in next(iter(npz.read(tmp_path / "a"))).rows["obs"]
    with pytest.raises(FormatError, match=r"\['terminated'\] have the names of fields that are made of others"):
        npz.read(tmp_path / "a", obs="image")
    arrays = {"observation": np.zeros((4, 2)), "action": np.zeros(4), "obs/a": np.zeros(4)}
    saved(tmp_path / "b", arrays, names=["episode_000000_3"])
    with pytest.raises(FormatError, match=r"\['obs/a'\] have the names"):
        npz.read(tmp_path / "b")


def test_names_of_arrays_are_no_paths(tmp_path: Path):
    saved(tmp_path / "in", {"../../evil": np.arange(3), "a/../evil": np.arange(3)}, names=["1_3_20230930-120000"])
    import_episodes("npz", tmp_path / "in", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    with IndividualFileDataset(directory=tmp_path / "out", mode="r") as dataset:
        assert sorted(dataset.fields or ()) == ["../../evil", "a/../evil"]


# What is no such directory


def test_what_is_no_directory_of_episodes_is_refused(tmp_path: Path):
    (tmp_path / "text").write_text("a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.hdf5").write_text("a")
    for name, found in [
        ("none", "is not there"),
        ("text", "no directory"),
        ("empty", "nothing"),
        ("other", "no .npz files, but 1 others"),
    ]:
        with pytest.raises(FormatError, match=found) as error:
            npz.read(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)


def test_one_damaged_file_is_named(tmp_path: Path):
    saved(tmp_path, *[dreamer_episode()] * 3)
    path = tmp_path / "20200101T000001-abc1-3.npz"
    content = path.read_bytes()
    for size in (0, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(FormatError) as error:
            npz.read(tmp_path)
        assert error.value.path == str(path)
    changed = bytearray(content)
    changed[200] ^= 1
    path.write_bytes(changed)
    with pytest.raises(FormatError, match="cannot be read") as error:
        list(npz.read(tmp_path))
    assert error.value.path == str(path)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"reward": None}, "`reward` is missing, in"),
        ({"goal": np.zeros(4)}, r"`goal` is float64 \(\), in .* missing"),
        ({"reward": np.zeros(4)}, "`reward` is float64"),
        ({"image": np.zeros((4, 3, 3, 3), np.uint8)}, r"`image` is uint8 \(3, 3, 3\)"),
        ({"reward": np.zeros(5, np.float32)}, "Its arrays have"),
        ({name: value[:0] for name, value in dreamer_episode().items()}, "Its arrays have"),
    ],
)
def test_episodes_of_other_arrays_are_refused_with_both_names(tmp_path: Path, changes: dict[str, Any], found: str):
    saved(tmp_path, dreamer_episode(), dreamer_episode(**changes))
    with pytest.raises(FormatError, match=found) as error:
        npz.read(tmp_path)
    assert "abc1-3.npz" in str(error.value)
    assert "abc0-3.npz" in str(error.value) or "Its arrays" in found


@pytest.mark.parametrize("name", ["is_first", "is_last"])
def test_files_with_more_than_one_episode_are_refused(tmp_path: Path, name: str):
    saved(tmp_path, dreamer_episode(**{name: np.array([1, 0, 1, 1], bool)}))
    with pytest.raises(FormatError, match="more than one episode"):
        list(npz.read(tmp_path))


def test_pickles_and_lying_shapes_are_not_read(tmp_path: Path):
    name = tmp_path / "20200101T000001-abc1-3.npz"
    archive_of(name, {"action.npy": npy(np.zeros(2)), "x.npy": npy(np.zeros(2)), "image.npy": pickled_objects()})
    reader = npz.read(tmp_path)
    assert "`image` is pickled objects, and is not read." in reader.notes.texts
    archive_of(name, {"action.npy": npy(np.zeros(2), shape=(2, 10**12)), "x.npy": npy(np.zeros(2))})
    with pytest.raises(FormatError, match="says that it has the shape"):
        npz.read(tmp_path)


def chunks(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / "dreamerv3_replay", tmp_path / "chunks"))


def one_of(directory: Path, ending: str) -> Path:
    return sorted(directory.glob(f"*{ending}"))[0]


def test_a_missing_chunk_leaves_pieces_and_is_said(tmp_path: Path):
    directory = chunks(tmp_path)
    # The second chunk of the first stream, of both versions: an episode lies across each of its bounds.
    for path in directory.glob("*-2joVpqRd4myc1Qnwddb7Hf-*-?.npz"):
        if path.name.split("-")[1] == "2joVpqRd4myc1Qnwddb7Hf":
            path.unlink()
    reader = npz.read(directory)
    assert any("begin in their middle" in note for note in reader.notes)
    found = [rows for rows, _ in reader]
    piece = next(rows for rows in found if not rows["is_first"].any())
    assert piece["obs"]["vector"][0].tolist() == [3, 3, np.float32(0.3)] and piece["action"][0].tolist() == [0, 0]
    assert piece["action"][1:].tolist() == [[3, -4], [3, -5]] and piece["reward"][0] == 303.5


def test_chunks_that_follow_each_other_in_a_circle_are_refused(tmp_path: Path):
    directory = chunks(tmp_path)
    last = one_of(directory, "6ZMJZ13angbNL7fsaGMoEW-0000000000000000000000-3.npz")
    last.rename(last.with_name(last.name.replace("0" * 22, "6smgsAvnPHDZ6uV490SyKs")))
    with pytest.raises(FormatError, match="do not say which chunk follows"):
        npz.read(directory)


def test_a_chunk_of_fewer_rows_than_its_name_says_is_refused(tmp_path: Path):
    directory = chunks(tmp_path)
    last = one_of(directory, "6ZMJZ13angbNL7fsaGMoEW-0000000000000000000000-3.npz")
    last.rename(last.with_name(last.name.replace("-3.npz", "-7.npz")))
    with pytest.raises(FormatError, match="Its name says 7 rows"):
        npz.read(directory)


def test_a_stream_that_goes_on_behind_its_end_is_refused(tmp_path: Path):
    saved(tmp_path, dreamer_episode(is_last=np.array([0, 1, 0, 0], bool)), names=["20200101T000000F123-a1-00-4"])
    with pytest.raises(FormatError, match="behind that with `is_last` has no `is_first`"):
        npz.read(tmp_path)


# What we write


def a_dataset(**changes: Any) -> RingBufferDataset:
    """The games, all of them, as a recorder stores them."""
    ring = RingBufferDataset(1000)
    for log in play():
        steps = {name: log[name] for name in ("action", "reward", "terminated", "truncated")}
        ring.add_episode(rows_on_arrival({"image": log["image"], "vector": log["obs"]}, steps) | changes)
    return ring


def test_what_is_written_for_dreamer_is_read_back(tmp_path: Path):
    summary = npz.write(a_dataset(), tmp_path / "out")
    assert summary.num_episodes == len(PLAYED)
    assert summary.lost == ["Where an episode both terminated and was truncated, only the first is kept."]
    for (rows, _), log in zip(npz.read(tmp_path / "out"), play(), strict=True):
        assert_rows(rows, aligned(log) | {"obs/vector": log["obs"]})


def test_what_is_written_for_exorl_is_read_back(tmp_path: Path):
    ring = RingBufferDataset(1000)
    for log in play():
        steps = {name: log[name] for name in ("action", "reward", "terminated", "truncated")}
        ring.add_episode(rows_on_arrival(log["obs"], steps, more={"physics": log["state"]}), {"seed": 3})
    summary = npz.write(ring, tmp_path / "out", layout="exorl")
    assert summary.lost == [
        "`discount` is 0 where `terminated`, else 1.",
        "Infos of episodes are left out.",
        "Where an episode both terminated and was truncated, only the first is kept.",
        "An episode that neither terminated nor was truncated is read back as truncated.",
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir())[0] == "episode_000000_4.npz"
    for (rows, _), log, (_, end) in zip(npz.read(tmp_path / "out"), play(), PLAYED, strict=True):
        found = aligned(log)
        truncated = found["truncated"] if end != "cut" else np.arange(3) == 2
        wanted = {"obs": log["obs"], **{name: found[name] for name in ("action", "reward", "terminated")}}
        discount = np.where(found["terminated"], 0, 1).astype(np.float32)
        wanted |= {"truncated": truncated, "is_first": found["is_first"], "physics": log["state"], "discount": discount}
        assert_rows(rows, wanted)


def test_an_import_is_written_again_as_it_was(tmp_path: Path):
    for name, layout in (("dreamerv2_replay", "dreamer"), ("drqv2_replay", "exorl")):
        import_episodes("npz", DATA / name, tmp_path / name)
        with IndividualFileDataset(directory=tmp_path / name, mode="r") as dataset:
            summary = npz.write(dataset, tmp_path / f"{name}_out", layout=layout)
        assert summary.lost == ["Infos of episodes are left out."]
        for old, new in zip(npz.read(DATA / name), npz.read(tmp_path / f"{name}_out"), strict=True):
            old_path, new_path = DATA / name / old.info["file"], tmp_path / f"{name}_out" / new.info["file"]
            with np.load(old_path) as old_file, np.load(new_path) as new_file:
                assert {*old_file} == {*new_file}
                for array in old_file:
                    np.testing.assert_array_equal(old_file[array], new_file[array])
                    assert old_file[array].dtype == new_file[array].dtype


@settings(max_examples=12)
@given(data=st.data())
def test_a_round_trip_is_equal_where_the_layout_can_hold_it(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    layout = data.draw(st.sampled_from(["dreamer", "exorl"]))
    dtype, rng = data.draw(st.sampled_from(["uint8", "float64", "int32", "float16"])), np.random.default_rng(0)
    ends = ["terminated", "truncated", "cut"][: 3 if layout == "dreamer" else 2]
    has_missing, ring, expected = data.draw(st.booleans()), RingBufferDataset(1000), []
    for length, end in data.draw(st.lists(st.tuples(st.integers(1, 4), st.sampled_from(ends)), min_size=1, max_size=4)):
        is_last = np.arange(length) == length - 1
        steps = {
            "action": rng.integers(0, 9, (length, 2)).astype(dtype),
            "reward": rng.random(length),
            "terminated": is_last & (end == "terminated"),
            "truncated": is_last & (end == "truncated"),
        }
        is_missing = data.draw(st.booleans()) if has_missing else None
        images = rng.integers(0, 9, (length + (not is_missing), 2, 3)).astype(dtype)
        obs = images if layout == "exorl" else {"deep": {"depth": images}}
        rows = rows_on_arrival(obs, steps, more={"log_x/y": rng.random((length + 1, 2))}, final_missing=is_missing)
        rows["reward"][0] = 0.5  # These layouts have first rows.
        ring.add_episode(rows)
        expected.append(dict(arrays_in(rows)))
    path = tmp_path_factory.mktemp("round") / "out"
    npz.write(ring, path, layout=layout)
    for (rows, _), wanted in zip(npz.read(path), expected, strict=True):
        found = dict(arrays_in(rows))
        if layout == "exorl":
            np.testing.assert_array_equal(found.pop("discount"), 1 - wanted["terminated"])
        assert {*found} == {*wanted}
        for name in wanted:
            np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
            assert found[name].dtype == wanted[name].dtype


def test_an_observation_that_is_one_array_is_named_and_said(tmp_path: Path):
    ring = RingBufferDataset(100)
    ring.add_episode({"obs": np.zeros((3, 2, 2, 3), np.uint8), "action": np.zeros(3), "goal": np.zeros(3)})
    summary = npz.write(ring, tmp_path / "out")
    assert summary.lost == [
        "`obs` is named `image`, and is read back as `obs/image`.",
        "['goal'] are read back as observations, unless `obs=` names those.",
        "There are no rewards.",
        "`terminated` is missing, so files do not say why an episode ends.",
    ]
    rows = next(iter(npz.read(tmp_path / "out", obs="image"))).rows
    assert list(rows) == ["obs", "action", "is_first", "goal"]


@pytest.mark.parametrize(
    ("layout", "fields", "found"),
    [
        ("exorl", {"obs": {"a": 0}}, r"no nested fields there: leave \['obs/a'\]"),
        ("dreamer", {"obs": 0, "action": {"a": 0}}, r"no nested fields there: leave \['action/a'\]"),
        ("dreamer", {"obs": {"is_last": 0}}, r"names of its own: leave \['obs/is_last'\]"),
        ("dreamer", {"obs": {"a": 0}, "is_last": 0}, r"names of its own: leave \['is_last'\]"),
        ("dreamer", {"obs": {"a": 0}, "a": 0}, r"one name twice: leave \['obs/a', 'a'\]"),
        ("dreamer", {"obs": {"a\0b": 0}, "action": 0}, "no names with a NUL"),
        ("exorl", {"obs": 0, "observation": 0}, r"names of its own: leave \['observation'\]|one name twice"),
    ],
)
def test_fields_that_would_be_confused_are_refused(tmp_path: Path, layout: str, fields: dict[str, Any], found: str):
    def filled(tree: Any) -> Any:
        return {key: filled(value) for key, value in tree.items()} if isinstance(tree, dict) else np.zeros(3)

    ring = RingBufferDataset(100)
    ring.add_episode(filled(fields))
    with pytest.raises(ValueError, match=found):
        npz.write(ring, tmp_path / "out", layout=layout)
    assert not (tmp_path / "out").exists()


def test_what_a_layout_changes_or_lacks_is_said(tmp_path: Path):
    ring = RingBufferDataset(100)
    flags = {"terminated": np.zeros(3, np.uint8), "done": np.zeros(3, bool), "truncated": np.zeros(3, bool)}
    steps = {"action": np.zeros(3), "reward": np.zeros((3, 1))}
    ring.add_episode({"obs": np.zeros(3), "obstacle": np.zeros(3), **steps, **flags})
    lost = npz.write(ring, tmp_path / "a", layout="exorl", fields=["obs", *steps, "done", "truncated"]).lost
    assert lost == [
        "`reward` of shape (1,) is read back as a scalar.",
        "`terminated` is missing, so files do not say why an episode ends: ['truncated', 'done'] are left out.",
    ]
    assert list(next(iter(npz.read(tmp_path / "a", layout="original"))).rows) == ["observation", *steps]
    lost = npz.write(ring, tmp_path / "b", fields=["obs", "obstacle", "action", "terminated", "done"]).lost
    assert lost[1:] == [
        "['obstacle'] are read back as observations, unless `obs=` names those.",
        "There are no rewards.",
        "['terminated'] are read back as one bool for each row.",
        "`done` is left out.",
        "There is no `is_last`, as `truncated` is missing.",
    ]
    lost = npz.write(ring, tmp_path / "c", fields=["obs", *steps, "done", "truncated"]).lost
    assert lost[1:] == ["`truncated` is left out, as `terminated` is missing."]


@pytest.mark.parametrize("layout", ["dreamer", "exorl"])
def test_what_is_read_back_otherwise_is_said(layout: str, tmp_path: Path):
    ring = RingBufferDataset(100)
    flags = {"terminated": np.zeros(4, bool), "truncated": np.array([0, 1, 0, 1], bool)}
    obs = {"x": np.arange(4), "log_x": np.arange(4)} if layout == "dreamer" else np.arange(4)
    ring.add_episode({"obs": obs, "action": np.arange(4), **flags})
    lost = npz.write(ring, tmp_path / "out", layout=layout).lost
    assert any(text.startswith("`truncated` is left out where it is set before the last row") for text in lost)
    said = "['obs/log_x'] are read back without `obs/`, unless `obs=` names all observations."
    assert (said in lost) == (layout == "dreamer")
    rows = next(iter(npz.read(tmp_path / "out"))).rows
    assert rows["truncated"].tolist() == [False, False, False, True]
    assert ("log_x" in rows) == (layout == "dreamer")


@pytest.mark.parametrize("layout", ["dreamer", "exorl"])
def test_what_could_not_be_read_without_actions_is_refused(layout: str, tmp_path: Path):
    ring = RingBufferDataset(100)
    ring.add_episode({"obs": np.arange(4), "action": np.arange(4)})
    with pytest.raises(ValueError, match=r"needs the field `action`, found \['obs'\]"):
        npz.write(ring, tmp_path / "out", layout=layout, fields=["obs"])
    assert not [*tmp_path.iterdir()]


def test_flags_within_an_episode_that_a_layout_has_no_place_for_are_said(tmp_path: Path):
    ring, early = RingBufferDataset(100), np.array([0, 1, 1], bool)
    rows = {name: np.zeros(3) for name in ("obs", "action", "reward", "discount")}
    ring.add_episode({**rows, "done": early})
    said = "is left out where it is set before the last row: files say only how an episode ends."
    lost = npz.write(ring, tmp_path / "a", fields=["obs", "action", "reward", "done"]).lost
    assert f"`done` {said}" in lost
    assert next(iter(npz.read(tmp_path / "a"))).rows["done"].tolist() == [False, False, True]
    lost = npz.write(ring, tmp_path / "b", fields=["obs", "action", "reward", "done", "discount"]).lost
    assert "`done` is `is_last`, and is read back as `terminated` or `truncated`, by `discount`." in lost
    both = RingBufferDataset(100)
    both.add_episode({**rows, "terminated": early & False, "truncated": early})
    for layout in ("dreamer", "exorl"):
        assert f"`truncated` {said}" in npz.write(both, tmp_path / layout, layout=layout).lost


def test_a_target_that_exists_is_left_alone(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("mine")
    with pytest.raises(ValueError, match="exists"):
        npz.write(a_dataset(), tmp_path / "out")
    assert (tmp_path / "out" / "a").read_text() == "mine"


# What the libraries load


def module_or_skip(name: str, path: str = "") -> Any:
    """A module of a library, from its file alone."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        pytest.skip(f"{name} is not on the path")
    if path:
        assert spec.submodule_search_locations
        where = Path(spec.submodule_search_locations[0]) / path
        spec = importlib.util.spec_from_file_location(where.stem, where)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_dreamerv2_loads_what_we_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorflow", types.ModuleType("tensorflow"))
    replay_module = module_or_skip("dreamerv2", "common/replay.py")
    npz.write(a_dataset(), tmp_path / "out")
    replay = replay_module.Replay(tmp_path / "out", capacity=1000)
    assert replay.stats["loaded_episodes"] == len(PLAYED)
    assert replay.stats["loaded_steps"] == sum(length for length, _ in PLAYED)
    for episode, log, (_, end) in zip(replay._complete_eps.values(), play(), PLAYED, strict=True):
        np.testing.assert_array_equal(episode["image"], log["image"])
        np.testing.assert_array_equal(episode["action"][1:], log["action"])
        np.testing.assert_array_equal(episode["reward"][1:], log["reward"])
        np.testing.assert_array_equal(episode["is_terminal"], on_arrival(log["terminated"]))
        assert episode["is_last"][-1] == (end != "cut") and episode["is_first"].tolist()[:2] == [True, False]


def exorl_dataset() -> EpisodeDataset:
    ring = RingBufferDataset(1000)
    for log in play():
        steps = {name: log[name] for name in ("action", "reward", "terminated", "truncated")}
        ring.add_episode(rows_on_arrival(log["obs"].astype(np.float32), steps))
    return ring


def assert_transitions_of_the_log(samples: Iterator[Any]) -> None:
    """(obs, action, reward, discount, next_obs), for gamma 0.5: all of the log, and nothing else."""
    expected = set()
    for log in play():
        for t in range(len(log["action"])):
            discount = 0.5 * (not log["terminated"][t])
            obs = log["obs"].astype(np.float32)
            expected.add((*obs[t], *log["action"][t], log["reward"][t], discount, *obs[t + 1]))
    found = {(*obs, *action, *reward, *discount, *after) for obs, action, reward, discount, after in samples}
    assert found == expected


def test_drqv2_loads_what_we_write(tmp_path: Path):
    module = module_or_skip("drqv2_replay_buffer")
    npz.write(exorl_dataset(), tmp_path / "out", layout="exorl")
    assert len(module.ReplayBufferStorage([], tmp_path / "out")) == sum(length for length, _ in PLAYED)
    replay = module.ReplayBuffer(tmp_path / "out", 1000, 1, 1, 0.5, fetch_every=1000, save_snapshot=True)
    assert_transitions_of_the_log(replay._sample() for _ in range(1000))


def test_exorl_loads_what_we_write(tmp_path: Path):
    module = module_or_skip("exorl_replay_buffer")
    npz.write(exorl_dataset(), tmp_path / "out", layout="exorl")
    replay = module.OfflineReplayBuffer(None, tmp_path / "out", 1000, 1, 0.5)
    replay._load(relable=False)
    replay._loaded = True
    assert_transitions_of_the_log(replay._sample() for _ in range(1000))
