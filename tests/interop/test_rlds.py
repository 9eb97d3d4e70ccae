"""RLDS: directories that tensorflow-datasets has written, against the game's own log and what the library reads."""

from __future__ import annotations

import io
import json
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers.dataset import IndividualFileDataset
from buffers.interop import FormatError, import_episodes, rlds
from buffers.interop.rlds.crc32c import masked_crc32c
from buffers.interop.rlds.example import parse_example
from tests.interop.logged import PLAYED, play
from tests.interop.made_up import killed_before
from tests.interop.written_rlds import FLAGS, PLAIN, example, feature, field, steps, tfrecord, write
from tests.tagged import assert_same_episode, flatten

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("array_record")

DATA = Path(__file__).parents[1] / "data" / "interop" / "rlds"
GAMES = ["game_tfrecord", "game_array_record"]
ENDS = [*PLAYED, (0, "reset")]
SHARD = "made-train.tfrecord-00000-of-00001"


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rlds")
    with zipfile.ZipFile(DATA / "datasets.zip") as archive:
        archive.extractall(path)
    return path


@pytest.fixture
def arm(datasets: Path) -> Path:
    return datasets / "arm" / "arm" / "0.1.0"


def game_rows(number: int) -> dict[str, Any]:
    """The rows that the game's own log makes of an episode."""
    log, (length, end) = play(ENDS)[number], ENDS[number]
    is_cut = end == "cut"
    done = log["terminated"].astype(bool)

    def arrived(values: np.ndarray, *shape: int) -> np.ndarray:
        return np.concatenate([np.zeros((1, *shape), values.dtype), values.reshape(length, *shape)])

    def known(values: np.ndarray) -> np.ndarray:
        return np.concatenate([values[:-1], values[-2:-1]]) if is_cut else values

    return {
        "obs": {name: known(log[name]) for name in ("image", "obs", "state")},
        "action": arrived(log["action"].astype(np.float32), 2),
        "reward": arrived(log["reward"].astype(np.float32)),
        "terminated": arrived(done),
        # RLDS has one flag for the end, which says terminated where the game says both.
        "truncated": arrived(log["truncated"].astype(bool) & ~done),
        "is_first": np.arange(length + 1) == 0,
        "final_obs_missing": (np.arange(length + 1) == length) & is_cut,
        "discount": arrived(np.where(done, 0, 0.5).astype(np.float32)),
    }


def assert_same_rows(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert [*flatten(found)] == [*flatten(wanted)]
    for name, value in flatten(wanted).items():
        np.testing.assert_array_equal(flatten(found)[name], value, err_msg=name, strict=True)


# What tensorflow-datasets has written


@pytest.mark.parametrize("name", GAMES)
def test_rows_are_what_the_game_has_logged(name: str, datasets: Path) -> None:
    with rlds.read(datasets / name / "game" / "1.0.0") as reader:
        episodes = [*reader]
    assert reader.num_episodes == 7 and reader.num_steps is None
    numbers = [info["number"] for _, info in episodes]
    assert {*numbers[:5]} == {*range(5)} and {*numbers[5:]} == {5, 6}  # Shuffled within its split by the library.
    for number, (rows, info) in zip(numbers, episodes, strict=True):
        assert_same_rows(rows, game_rows(int(number)))
        assert info == {"split": "train" if number < 5 else "val", "end": ENDS[int(number)][1], "number": number}
    assert [*reader.notes] == []
    assert reader.metadata == {"name": "game", "version": "1.0.0"}


def test_ends_are_those_that_the_file_states(datasets: Path) -> None:
    expected = {
        "terminated": (True, False, False),
        "truncated": (False, True, False),
        "both": (True, False, False),
        "cut": (False, False, True),
        "reset": (False, False, False),
    }
    for rows, info in rlds.read(datasets / "game_tfrecord" / "game" / "1.0.0"):
        assert (
            tuple(bool(rows[name][-1]) for name in ("terminated", "truncated", "final_obs_missing"))
            == expected[str(info["end"])]
        )
        assert not any(rows[name][:-1].any() for name in ("terminated", "truncated", "final_obs_missing"))


@pytest.mark.parametrize("name", GAMES)
@pytest.mark.parametrize("first", [0, 1, 2, 3, 5, 6, 7])
def test_reading_begins_at_any_episode(name: str, first: int, datasets: Path) -> None:
    path = datasets / name / "game" / "1.0.0"
    numbers = [info["number"] for _, info in rlds.read(path)]
    found = [*rlds.read(path).episodes(first)]
    assert [info["number"] for _, info in found] == numbers[first:]
    for rows, info in found:
        assert_same_rows(rows, game_rows(int(info["number"])))


def test_one_split_is_read(datasets: Path) -> None:
    path = datasets / "game_tfrecord" / "game" / "1.0.0"
    reader = rlds.read(path, split="val")
    assert reader.num_episodes == 2 and {info["number"] for _, info in reader} == {5, 6}
    with pytest.raises(ValueError, match=r"has no split 'test'. It has \['train', 'val'\]"):
        rlds.read(path, split="test")
    with pytest.raises(ValueError, match="`last_action` must be one of"):
        rlds.read(path, last_action="none")


def test_every_feature_is_what_the_library_reads(arm: Path) -> None:
    names = set()
    with np.load(DATA / "arm.npz") as log:
        for rows, info in rlds.read(arm, last_action="valid"):
            found = flatten({"observation": rows.pop("obs"), **rows})
            wanted = {key.partition("/")[2]: log[key] for key in log if key.startswith(f"{info['number']}/")}
            for name, value in wanted.items():
                if name in ("is_first", "is_last", "is_terminal"):
                    continue
                names.add(name)
                by_arrival = name.startswith(("action", "reward"))
                rows_of = found[name][1:] if by_arrival else found[name][:-1]
                np.testing.assert_array_equal(rows_of, value, err_msg=name, strict=True)
                assert not by_arrival or not found[name][0].any()
                assert by_arrival or np.array_equal(found[name][-1], found[name][-2])
            length = len(wanted["reward"])
            assert found["final_obs_missing"].tolist() == [False] * length + [True]
            assert found["terminated"].tolist() == [False] * length + [bool(wanted["is_terminal"][-1])]
            assert found["truncated"].tolist() == [False] * length + [not wanted["is_terminal"][-1]]
    assert len(names) == 19


def test_a_valid_last_action_is_dropped_only_with_a_note(arm: Path) -> None:
    reader = rlds.read(arm)
    found = {info["number"]: rows for rows, info in reader}
    assert found[0]["action"]["world_vector"].tolist() == [[0, 0, 0], [0, 0, 0.5], [0, 1, 0.5]]
    assert found[0]["reward"].tolist() == [0, 0, 0] and found[0]["obs"]["state"][:, 0, 0].tolist() == [0, 1, 2]
    assert found[1]["reward"].tolist() == [0] and not found[1]["final_obs_missing"].any()
    dropped = [note for note in reader.notes if "is dropped" in note]
    assert [note.split()[0] for note in dropped] == ["`action`", "`reward`"]
    assert all('`last_action="valid"`' in note for note in dropped)
    assert "Episodes of one step, which have no transition, lose their `is_terminal`." in [*reader.notes]
    reader = rlds.read(arm, last_action="valid")
    rewards = {info["number"]: rows["reward"].tolist() for rows, info in reader}
    assert rewards == {0: [0, 0, 0, 1], 1: [0, 1], 2: [0, 0, 1]}
    assert not any("dropped" in note for note in reader.notes)


def test_texts_and_metadata_are_in_the_info(arm: Path) -> None:
    infos = {info["number"]: info for _, info in rlds.read(arm)}
    for number in range(3):
        expected = {
            "split": "train",
            "task": f"pick up block {number}",
            "file_path": f"/data/{number}.npy",
            "number": number,
            "success": number == 1,
            "seed": str(2**64 - 1 - number),
            "score": number / 4,
            "episode_metadata/split": f"split of {number}",
        }
        expected |= {} if number == 1 else {"rating": 5 - number}
        expected |= {} if number == 2 else {"long": "short"}
        expected |= {"subtask": "part 0"} if number == 1 else {}  # It changes in the others, which have more steps.
        assert infos[number] == expected


def test_what_is_not_read_is_said(arm: Path) -> None:
    reader = rlds.read(arm, last_action="valid")
    assert [*reader.notes] == [
        "`steps/observation/clip` is of the kind 'Video', and is not read.",
        "`steps/observation/points` is of the kind 'Sequence', and is not read.",
        "`steps/observation/shapes` has no fixed shape (-1, -1), and is not read.",
        "`steps/observation/time` is float64, of which the files hold float32 only.",
        "`episode_metadata/home` is no number or text, and is left out of the info of episodes.",
    ]
    assert len([*reader]) == 3
    assert [*reader.notes][5:] == [
        "`steps/subtask` changes within some episodes, whose info does not have it.",
        "`episode_metadata/blob` has bytes that are no text, and is left out of the info of episodes.",
        "`long` does not fit into the info of some episodes, which does not have it.",
    ]
    assert reader.metadata == {"name": "arm", "version": "0.1.0", "description": "An arm.", "citation": "@misc{arm}"}


@pytest.mark.parametrize("fields", [["reward"], ["obs/state", "action"], ["language_embedding", "terminated"]])
def test_only_chosen_fields_are_decoded(fields: list[str], arm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [flatten(rows) for rows, _ in rlds.read(arm)]
    monkeypatch.setattr("buffers.interop.rlds.values.decode_images", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    for (rows, _), wanted in zip(rlds.read(arm, fields=fields), whole, strict=True):
        chosen = [*fields, *["final_obs_missing"] * any(f.startswith("obs") for f in fields)]
        assert {*flatten(rows)} == {name for name in wanted if any(f"{name}/".startswith(f"{f}/") for f in chosen)}
        for name, value in flatten(rows).items():
            np.testing.assert_array_equal(value, wanted[name], strict=True)


@pytest.mark.parametrize("name", GAMES)
def test_an_import_gives_the_log_and_goes_on_after_a_kill(name: str, datasets: Path, tmp_path: Path) -> None:
    path = datasets / name / "game" / "1.0.0"
    with killed_before(3):
        import_episodes("rlds", path, tmp_path / "a")
    summary = import_episodes("rlds", path, tmp_path / "a")
    assert summary.num_episodes == 7 and summary.lost == []
    with IndividualFileDataset(directory=tmp_path / "a", mode="r") as dataset:
        numbers = [dataset.episode_info(each)["number"] for each in dataset.table.ids.tolist()]
        assert sorted(numbers) == [*range(7)]
        for number, found in zip(numbers, dataset.episodes(), strict=True):
            assert_same_episode(found, game_rows(int(number)))


def test_an_import_of_chosen_fields(arm: Path, tmp_path: Path) -> None:
    summary = import_episodes("rlds", arm, tmp_path / "a", fields=["obs/image", "reward"], limit=2, last_action="valid")
    kinds = {"obs/image": "uint8 (16, 24, 3)", "reward": "float32 ()", "final_obs_missing": "bool ()"}
    assert summary.num_episodes == 2 and summary.fields == kinds


def test_a_missing_library_is_named_with_its_extra(arm: Path, datasets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    monkeypatch.setitem(sys.modules, "array_record", None)
    with pytest.raises(ImportError, match=r"needs PIL.Image .*\[rlds\]"):
        rlds.read(arm)
    with pytest.raises(ImportError, match=r"needs array_record .*\[rlds\]"):
        rlds.read(datasets / "game_array_record" / "game" / "1.0.0", fields=["reward"])


# What may be in a directory, by hand


def rows_of(path: Path, number: int = 0, **options: Any) -> dict[str, Any]:
    return [*rlds.read(path, **options)][number].rows


def png(pixels: np.ndarray, mode: str | None = None, format: str = "PNG") -> bytes:
    content = io.BytesIO()
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(content, format)
    return content.getvalue()


def test_a_dataset_without_rewards_actions_and_ends_makes_none_up(tmp_path: Path) -> None:
    kinds = {"is_last": "bool", "observation": ("float32", 2)}
    reader = rlds.read(write(tmp_path / "a", [{k: v for k, v in steps(1, 3).items()}], kinds))
    (rows, _) = next(iter(reader))
    assert [*rows] == ["obs", "is_first", "final_obs_missing"] and len(rows["obs"]) == 3
    assert [*reader.notes] == [
        "There is no `action` with numbers.",
        "There is no `reward` with numbers.",
        "There is no `is_terminal`, so that there is neither `terminated` nor `truncated`.",
    ]


def test_a_dataset_without_observations_is_read(tmp_path: Path) -> None:
    kinds = {name: kind for name, kind in PLAIN.items() if name != "observation"}
    reader = rlds.read(write(tmp_path / "a", [steps(1, 3)], kinds))
    assert "There is no `observation` with numbers." in [*reader.notes]
    rows = next(iter(reader)).rows
    assert "obs" not in rows and rows["action"].tolist() == [0, 10, 11]


def test_features_of_steps_stay_at_their_step(tmp_path: Path) -> None:
    values = {**steps(1, 3), "steps/extra/one": np.array([7, 8, 9])}
    path = write(tmp_path / "a", [values], {**PLAIN, "extra": {"one": "int32"}})
    assert rows_of(path)["extra"]["one"].tolist() == [7, 8, 9]
    assert rows_of(path, last_action="valid")["extra"]["one"].tolist() == [7, 8, 9, 9]


def test_features_whose_names_have_another_meaning_here_are_left_out(tmp_path: Path) -> None:
    kinds = {**PLAIN, "truncated": "bool", "obs": "float32"}
    values = {"steps/truncated": np.ones(3, bool), "steps/obs": np.zeros(3)}
    path = write(tmp_path / "a", [{**steps(1, 3), **values}], kinds)
    reader = rlds.read(path)
    assert next(iter(reader)).rows["truncated"].tolist() == [False, False, True]
    left_out = [note for note in reader.notes if "has the name of a field with another meaning" in note]
    assert [note.split()[0] for note in left_out] == ["`steps/truncated`", "`steps/obs`"]


def test_the_first_step_need_not_be_marked_and_that_is_said(tmp_path: Path) -> None:
    reader = rlds.read(write(tmp_path / "a", [{**steps(1, 3), "steps/is_first": np.zeros(3, bool)}]))
    assert next(iter(reader)).rows["is_first"].tolist() == [True, False, False]
    assert [*reader.notes] == ["Some episodes do not begin with `is_first`. They are taken for whole ones."]


@pytest.mark.parametrize("name", ["is_first", "is_last", "is_terminal"])
def test_two_episodes_in_one_record_are_refused(name: str, tmp_path: Path) -> None:
    flags = np.arange(4) == 1
    reader = rlds.read(write(tmp_path / "a", [steps(0, 2), {**steps(1, 4), f"steps/{name}": flags}]))
    with pytest.raises(FormatError, match=f"record 1: `{name}` is set at step 1 of 4, within the episode. Write one"):
        list(reader)


@pytest.mark.parametrize(
    ("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 4), ("L", 3), ("RGBA", 3), ("P", 3), ("LA", 1)]
)
def test_images_have_the_channels_that_are_stated(mode: str, channels: int, tmp_path: Path) -> None:
    # Colors that a palette has.
    pixels = (np.arange(24) % 6 * 51).reshape(2, 4, 3).astype(np.uint8)
    wanted = np.asarray(Image.fromarray(pixels).convert("L" if mode in ("L", "LA") else "RGB"))
    wanted = np.repeat(wanted[..., None], channels, 2) if wanted.ndim == 2 else wanted
    wanted = np.concatenate([wanted, np.full((2, 4, 1), 255, np.uint8)], 2) if channels == 4 else wanted
    kinds = {**FLAGS, "observation": {"image": {"shape": {"dimensions": ["2", "4", str(channels)]}, "dtype": "uint8"}}}
    path = write(tmp_path / "a", [{**steps(1, 1), "steps/observation": [png(pixels, mode)]}], kinds)
    assert np.array_equal(rows_of(path)["obs"], wanted[None])


def test_images_of_two_sizes_are_refused(tmp_path: Path) -> None:
    kinds = {**FLAGS, "observation": {"image": {"shape": {"dimensions": ["-1", "-1", "1"]}, "dtype": "uint8"}}}
    small, large = png(np.zeros((2, 3), np.uint8)), png(np.zeros((4, 3), np.uint8))
    path = write(tmp_path / "a", [{**steps(1, 2), "steps/observation": [small, large]}], kinds)
    with pytest.raises(FormatError, match=r"record 0: `steps/observation` cannot be read \(image 1 has \(4, 3\)"):
        rows_of(path)
    two = [{**steps(1, 1), "steps/observation": [image]} for image in (small, large)]
    with pytest.raises(
        FormatError, match=r"`steps/observation` is \(4, 3, 1\) in record 1 of .* and \(2, 3, 1\) in rec"
    ):
        list(rlds.read(write(tmp_path / "b", two, kinds)))


@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20),
    st.lists(st.floats(width=32, allow_nan=False), max_size=9),
    st.lists(st.binary(max_size=200), max_size=5),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_examples_are_parsed(integers: list[int], floats: list[float], texts: list[bytes], packed: bool) -> None:
    values = {"i": np.array(integers, np.int64), "f": np.array(floats, np.float32)}
    parts = {name: feature(value, packed) for name, value in values.items()}
    found = parse_example(example({**parts, "b": texts, "empty": b""}) + field(7, b"of a later version"))
    np.testing.assert_array_equal(found["i"].integers(), values["i"], strict=True)
    np.testing.assert_array_equal(found["f"].floats(), values["f"], strict=True)
    assert [bytes(text) for text in found["b"].strings()] == texts
    assert found["empty"].integers().tolist() == found["empty"].floats().tolist() == found["empty"].strings() == []


def slow_checksum(data: bytes) -> int:
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    crc = register ^ 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


@pytest.mark.parametrize("size", [*range(20), 63, 64, 65, 255, 4095, 4096, 4097])
def test_checksums_are_those_of_the_definition(size: int) -> None:
    data = bytes(np.random.default_rng(size).integers(0, 256, size, np.uint8))
    assert masked_crc32c(data) == slow_checksum(data)


# Directories that are not whole


def edit(name: str, change: Callable[[Any], object]) -> Callable[[Path], object]:
    def edited(path: Path) -> None:
        content = json.loads((path / name).read_text())
        change(content)
        (path / name).write_text(json.dumps(content))

    return edited


def overwrite(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes(content)


def of_info(**values: Any) -> Callable[[Path], object]:
    return edit("dataset_info.json", lambda info: info.update(values))


def of_split(**values: Any) -> Callable[[Path], object]:
    return edit("dataset_info.json", lambda info: info["splits"][0].update(values))


def of_features(**values: Any) -> Callable[[Path], object]:
    return edit("features.json", lambda found: found.update(values))


def of_step(name: str, kind: Any) -> Callable[[Path], object]:
    def change(found: Any) -> None:
        features = found["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
        features[name] = kind

    return edit("features.json", change)


def deep(levels: int) -> dict[str, Any]:
    found: dict[str, Any] = {"tensor": {"dtype": "float32"}}
    for _ in range(levels):
        found = {"featuresDict": {"features": {"x": found}}}
    return found


BROKEN_DIRECTORIES = {
    "no info": (lambda path: (path / "dataset_info.json").unlink(), "dataset_info.json: is not there"),
    "no features": (lambda path: (path / "features.json").unlink(), "features.json: is not there"),
    "no file": (lambda path: (path / SHARD).unlink(), f"{SHARD}: is not there"),
    "an empty info": (overwrite("dataset_info.json", b""), "dataset_info.json: cannot be read (JSONDecodeError"),
    "half an info": (overwrite("dataset_info.json", b'{"name": "ma'), "dataset_info.json: cannot be read"),
    "an info that is no dict": (overwrite("dataset_info.json", b"[1]"), "dataset_info.json: is no dict"),
    "an info that nests": (overwrite("dataset_info.json", b"[" * 10**5), "dataset_info.json: nests too deeply"),
    "no text": (overwrite("features.json", b"\xff\xfe"), "features.json: cannot be read (UnicodeDecodeError"),
    "no splits": (of_info(splits=[]), "dataset_info.json: has no episodes"),
    "splits of another kind": (of_info(splits=3), "dataset_info.json: cannot be read (TypeError"),
    "a split without files": (of_split(shardLengths=[]), "dataset_info.json: has no episodes"),
    "a split of no episodes": (of_split(shardLengths=["0"]), "dataset_info.json: has no episodes"),
    "another format": (of_info(fileFormat="parquet"), "has files of the format 'parquet'. Convert them to tfrecord"),
    "too many records": (of_split(shardLengths=["1000000000000"]), f"{SHARD}: is too short for 1000000000000 records"),
    "fewer than none": (of_split(shardLengths=["-1"]), f"{SHARD}: is too short for -1 records"),
    "a length that is none": (of_split(shardLengths=["a"]), "dataset_info.json: cannot be read (ValueError"),
    "a file elsewhere": (of_split(filepathTemplate="../{DATASET}"), "dataset_info.json: names the file '../made'"),
    "a file of the system": (of_split(filepathTemplate="/etc/passwd"), "names the file '/etc/passwd'"),
    "a dataset elsewhere": (of_info(name="../../made"), "names the file '../../made-train.tfrecord-00000-of-00001'"),
    "a template that asks": (of_split(filepathTemplate="{DATASET.__class__}"), "names the file '{DATASET.__class__}'"),
    "a layout of old": (of_features(type="FeaturesDict", content={}), "has the layout of old versions"),
    "no dict of features": (of_features(featuresDict=3), "features.json: cannot be read (TypeError"),
    "no steps": (of_features(featuresDict={"features": {"a": {}}}), "has the features ['a'] and no `steps`"),
    "steps that are numbers": (
        of_features(featuresDict={"features": {"steps": {"tensor": {}}}}),
        "has `steps` that are no dataset of dicts",
    ),
    "features that nest": (of_step("deep", deep(60)), "features.json: nests too deeply"),
    "a name of a path": (of_step("a", {"featuresDict": {"features": {"b/c": {}}}}), "a feature of the name 'b/c'"),
    "a negative shape": (
        of_step("a", {"tensor": {"dtype": "int8", "shape": {"dimensions": ["-5"]}}}),
        "has a feature of shape (-5,)",
    ),
    "no end": (of_step("is_last", {"sequence": {}}), "steps have no `is_last`"),
    "ends with a shape": (
        of_step("is_last", {"tensor": {"dtype": "bool", "shape": {"dimensions": ["2"]}}}),
        "`is_last` has the shape (2,), expected one flag for each step",
    ),
}


@pytest.mark.parametrize("name", BROKEN_DIRECTORIES)
def test_a_broken_directory_is_named_before_anything_is_read(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "source", [steps(0, 2), steps(1, 3)])
    change, text = BROKEN_DIRECTORIES[name]
    change(path)
    with pytest.raises(FormatError) as caught:
        rlds.read(path)
    assert text in str(caught.value) and caught.value.path.startswith(str(path))


def test_no_directory_and_the_one_above_are_named(datasets: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="none: is no directory"):
        rlds.read(tmp_path / "none")
    with pytest.raises(FormatError, match=r"dataset_info.json: is not there. Get a whole copy"):
        rlds.read(tmp_path)
    with pytest.raises(FormatError, match=r"Give the directory of a version: 1\.0\.0"):
        rlds.read(datasets / "game_tfrecord" / "game")
    with pytest.raises(FormatError, match=r"Give the directory of a version: game/1\.0\.0"):
        rlds.read(datasets / "game_tfrecord")


def with_shape(*sizes: int) -> Callable[[Path], object]:
    dimensions = [str(size) for size in sizes]
    return of_step("observation", {"tensor": {"dtype": "float32", "shape": {"dimensions": dimensions}}})


def with_features(**values: Any) -> Callable[[Path], object]:
    """Overwrite the file with the features of the second record replaced."""
    second = steps(1, 3)
    for name, value in values.items():
        if value is None:
            del second[f"steps/{name}"]
        else:
            second[f"steps/{name}"] = value
    return overwrite(SHARD, tfrecord([example(steps(0, 2)), example(second)]))


def of_kind(kind: dict[str, Any], values: Any) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        of_step("more", kind)(path)
        first = {**steps(0, 2), "steps/more": values}
        overwrite(SHARD, tfrecord([example(first), example(steps(1, 3))]))(path)

    return change


def of_image(content: bytes, *sizes: int) -> Callable[[Path], object]:
    shape = {"dimensions": [str(size) for size in sizes]}
    return of_kind({"image": {"dtype": "uint8", "shape": shape}}, [content, content])


WHOLE = tfrecord([example(steps(0, 2)), example(steps(1, 3))])
FIRST = len(tfrecord([example(steps(0, 2))]))
GRAY = png(np.zeros((2, 3), np.uint8))
PACKED = {"tensor": {"dtype": "uint8", "encoding": "zlib", "shape": {"dimensions": ["4"]}}}
RAW = {"tensor": {"dtype": "bool", "encoding": "bytes", "shape": {"dimensions": ["2"]}}}
LARGE = {"tensor": {"dtype": "uint8", "encoding": "bytes", "shape": {"dimensions": [str(2**30), str(2**30)]}}}
BROKEN_RECORDS = {
    "cut within a header": (overwrite(SHARD, WHOLE[: FIRST + 5]), "ends within the header of record 1"),
    "cut within a record": (overwrite(SHARD, WHOLE[:-20]), "ends within record 1"),
    "cut within a checksum": (overwrite(SHARD, WHOLE[:-1]), "ends within record 1"),
    "cut between records": (overwrite(SHARD, WHOLE[:FIRST]), "has 2 records by dataset_info.json, and fewer in fact"),
    "one record more": (overwrite(SHARD, WHOLE + WHOLE[:FIRST]), "has more than 2 records"),
    "text": (overwrite(SHARD, b"no records at all, but text. " * 9), "has no length of record 0 where it belongs"),
    "a changed byte": (
        overwrite(SHARD, WHOLE[: FIRST + 40] + bytes([WHOLE[FIRST + 40] ^ 1]) + WHOLE[FIRST + 41 :]),
        "has a record 1 that does not match its checksum",
    ),
    "a changed length": (
        overwrite(SHARD, WHOLE[:FIRST] + bytes([WHOLE[FIRST] ^ 1]) + WHOLE[FIRST + 1 :]),
        "has no length of record 1 where it belongs",
    ),
    "an enormous length": (
        overwrite(SHARD, struct.pack("<QI", 2**62, masked_crc32c(struct.pack("<Q", 2**62))) + b"x" * 99),
        "ends within record 0",
    ),
    "no message": (overwrite(SHARD, tfrecord([b"\xff" * 20, b""])), "record 0: the Example cannot be read (a number"),
    "a group": (overwrite(SHARD, tfrecord([b"\x0b\x0c", b""])), "the unknown wire type 3"),
    "a field that is too long": (overwrite(SHARD, tfrecord([b"\x0a\x7f", b""])), "a field is longer than its message"),
    "a number for a message": (overwrite(SHARD, tfrecord([b"\x08\x01", b""])), "a number where bytes belong"),
    "an empty message": (overwrite(SHARD, tfrecord([b"", b""])), "record 0: `steps/is_last` cannot be read (it is not"),
    "no steps": (with_features(is_last=np.zeros(0, bool)), "record 1: has no steps"),
    "a feature is missing": (with_features(action=None), "record 1: `steps/action` cannot be read (it is not there)"),
    "a feature is short": (with_features(action=np.zeros(2)), "2 numbers, expected 3: () for each of 3 steps"),
    "a feature is long": (with_features(observation=np.zeros(8)), "8 numbers, expected 6: (2,) for each of 3 steps"),
    "another kind": (with_features(action=np.zeros(3, int)), "a list of integers where features.json has floats"),
    "bytes for numbers": (with_features(reward=[b"a", b"b", b"c"]), "a list of bytes where features.json has floats"),
    "two for a flag": (with_features(is_first=np.array([2, 0, 0])), "values from 0 to 2, which bool cannot hold"),
    "half a float": (with_features(reward=field(2, field(1, b"12345"))), "a list of floats ends within one"),
    "half an integer": (
        with_features(is_first=field(3, field(1, b"\x01\x00\x80"))),
        "a list of integers ends within one",
    ),
    "an endless integer": (
        with_features(is_first=field(3, field(1, b"\x80" * 10 + b"\x01"))),
        "a number does not end",
    ),
    "a lying shape": (with_shape(2**30, 2**30), "`steps/observation` cannot be read (4 numbers, expected"),
    "too large for its dtype": (
        of_kind({"tensor": {"dtype": "int8"}}, np.array([1, 300])),
        "values from 1 to 300, which int8 cannot hold",
    ),
    "arrays of another size": (of_kind(RAW, [b"\0\1", b"\0"]), "arrays of [1, 2] bytes, expected 2"),
    "no bools": (of_kind(RAW, [b"\0\1", b"\0\7"]), "bytes that are no bools"),
    "an enormous array": (of_kind(LARGE, [b"12", b"34"]), "arrays of [2] bytes, expected 1152921504606846976"),
    "packed to more": (of_kind(PACKED, [zlib.compress(bytes(9))] * 2), "arrays of [5] bytes, expected 4"),
    "not packed": (of_kind(PACKED, [b"1234"] * 2), "`steps/more` cannot be read (Error -3"),
    "values for fewer steps": (of_kind(PACKED, [zlib.compress(bytes(4))]), "1 values for 2 steps"),
    "no image": (of_image(b"no image", 2, 3, 1), "`steps/more` cannot be read (an image that is neither PNG nor JPEG)"),
    "half an image": (of_image(GRAY[:-25], 2, 3, 1), "`steps/more` cannot be read ("),
    "a bitmap": (of_image(png(np.zeros((2, 3), np.uint8), format="BMP"), 2, 3, 1), "that is neither PNG nor JPEG"),
    "an image and nothing": (
        of_kind({"image": {"shape": {"dimensions": ["-1", "-1", "1"]}}}, [png(np.zeros((999, 999), np.uint8)), b""]),
        "2 images of 998001 bytes are in ",
    ),
    "an image of another size": (of_image(GRAY, 3, 2, 1), "image 0 has (2, 3) pixels, expected (3, 2)"),
    "colors for gray": (
        of_image(png(np.zeros((2, 3, 3), np.uint8)), 2, 3, 1),
        "an image of the mode 'RGB' where features.json has 1 channels",
    ),
    "an image of 8 bits for 16": (
        of_kind({"image": {"dtype": "uint16", "shape": {"dimensions": ["2", "3", "1"]}}}, [GRAY, GRAY]),
        "an image of the mode 'L' where features.json has uint16",
    ),
    "an image that says to be large": (
        # The size is in the header of the image: width, then height.
        of_image(
            GRAY[:16]
            + (size := struct.pack(">II", 2**13, 2**12))
            + GRAY[24:29]
            + struct.pack(">I", zlib.crc32(b"IHDR" + size + GRAY[24:29]))
            + GRAY[33:],
            -1,
            -1,
            1,
        ),
        "image 0 has (4096, 8192) pixels in ",
    ),
    "another number of texts": (of_kind({"text": {}}, [b"one"]), "`steps/more` cannot be read (1 texts, expected 2)"),
}


@pytest.mark.parametrize("name", BROKEN_RECORDS)
def test_a_broken_record_is_named_and_nothing_is_imported(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "source", [steps(0, 2), steps(1, 3)])
    change, text = BROKEN_RECORDS[name]
    change(path)
    with pytest.raises(FormatError) as caught:
        list(rlds.read(path))
    assert text in str(caught.value) and caught.value.path == str(path / SHARD)
    with pytest.raises(FormatError):
        import_episodes("rlds", path, tmp_path / "imported")
    assert not (tmp_path / "imported").exists() and not (tmp_path / "imported.importing").exists()


def test_skipped_records_are_counted_too(tmp_path: Path) -> None:
    path = write(tmp_path / "source", [steps(0, 2), steps(1, 3)])
    (path / SHARD).write_bytes(WHOLE[: FIRST + 30])
    with pytest.raises(FormatError, match="ends within record 1"):
        list(rlds.read(path).episodes(1))
    (path / SHARD).write_bytes(WHOLE[:FIRST])
    with pytest.raises(FormatError, match="and fewer in fact"):
        list(rlds.read(path).episodes(1))


def test_metadata_that_is_missing_is_damage_unless_it_is_optional(tmp_path: Path) -> None:
    optional = {"tensor": {"dtype": "int32", "optional": True}}
    assert len([*rlds.read(write(tmp_path / "a", [steps(0, 2)], PLAIN, {"seed": optional}))]) == 1
    reader = rlds.read(write(tmp_path / "b", [steps(0, 2)], PLAIN, {"seed": "int32"}))
    with pytest.raises(FormatError, match=r"record 0: `seed` cannot be read \(it is not there\)"):
        list(reader)


@pytest.mark.parametrize("size", [0, 1000, 65536, 100_000, 131_071])
def test_an_array_record_file_that_ends_early_is_named(size: int, datasets: Path, tmp_path: Path) -> None:
    source = datasets / "game_array_record" / "game" / "1.0.0"
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    name = "game-train.array_record-00001-of-00002"
    (tmp_path / name).write_bytes((source / name).read_bytes()[:size])
    with pytest.raises(FormatError, match=f"{name}: "):
        list(rlds.read(tmp_path))


def test_an_array_record_file_with_a_changed_byte_or_other_counts_is_named(datasets: Path, tmp_path: Path) -> None:
    source = datasets / "game_array_record" / "game" / "1.0.0"
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    name = "game-train.array_record-00000-of-00002"
    content = bytearray((source / name).read_bytes())
    content[300] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=f"{name}: Corrupted"):
        list(rlds.read(tmp_path))
    (tmp_path / name).write_bytes((source / name).read_bytes())
    lengths = json.loads((source / "dataset_info.json").read_text())["splits"][0]["shardLengths"]
    for change, text in ((1, "and fewer in fact"), (-1, "has more than")):
        of_split(shardLengths=[str(int(lengths[0]) + change), lengths[1]])(tmp_path)
        with pytest.raises(FormatError, match=f"{name}: .*{text}"):
            list(rlds.read(tmp_path))
