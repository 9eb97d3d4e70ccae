"""Sources that are no whole dataset of Minari: each a FormatError that says where and what."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pytest
from gymnasium import spaces
from PIL import Image

from buffers.interop import FormatError, import_episodes, minari
from buffers.interop.minari import images
from tests.interop.minari_files import FORMATS, STATE, assert_same, buffer, change_json, create, expected

each_format = pytest.mark.parametrize("data_format", FORMATS)
DICT = spaces.Dict({"a": STATE, "b": STATE})


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The local store of Minari."""
    path = tmp_path / "store"
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(path))
    monkeypatch.setattr(os, "sync", lambda: None)  # It waits for what all other programs write.
    return path


def refused(path: Path, message: str, names: str | None = None) -> None:
    """Reading all of it is a FormatError that names the path."""
    with pytest.raises(FormatError, match=message) as caught, minari.read(str(path)) as reader:
        list(reader)
    assert caught.value.path.startswith(names or str(path))


def two(path: Path, data_format: str = "hdf5", **others: Any) -> Path:
    return create(path, [buffer(0, 2, **others), buffer(1, 3, **others)], data_format)


def file_of(path: Path, data_format: str, episode: int = 1) -> Path:
    """The file with the rows of an episode."""
    if data_format == "hdf5":
        return path / "data" / "main_data.hdf5"
    return path / "data" / str(episode) / f"part-0.{data_format}"


def test_a_path_that_is_not_there(tmp_path: Path):
    refused(tmp_path / "nothing", "is not there. Give the directory that holds `data/`")


@pytest.mark.parametrize(
    "name", ["../outside-v0", "/etc/passwd-v0", "a/../b-v0", "a-v0/../../b", "a-v0\n", "", "x.y-v1"]
)
def test_names_never_lead_out_of_the_store(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(minari.reading, "read_json", lambda path: pytest.fail(f"{path} was opened"))
    with pytest.raises(FormatError, match="is not there. Give the directory that holds"):
        minari.read(name)


def test_other_directories_and_files(tmp_path: Path):
    refused(tmp_path, "has no data/metadata.json, so it is no dataset of Minari 0.5 or later")
    (tmp_path / "file").write_bytes(b"x" * 100)
    refused(tmp_path / "file", "has no data/metadata.json")
    (tmp_path / "data").mkdir()
    refused(tmp_path, "has no data/metadata.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read"),
        ('{"data_format": "hdf5"', "cannot be read"),
        ("[" * 5_000, "cannot be read"),
        ("[1]", "holds a list, expected an object"),
        ("{}", "has the data_format None"),
        ('{"data_format": "zarr"}', "has the data_format 'zarr'. Known ones are hdf5, arrow and parquet"),
        ('{"data_format": "hdf5"}', "main_data.hdf5: is not there"),
        ('{"data_format": "arrow"}', "has no observation_space and no action_space, which tell"),
    ],
)
def test_metadata_that_are_none(content: str, message: str, tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "metadata.json").write_text(content)
    refused(tmp_path, message)


@pytest.mark.parametrize(
    "space",
    [
        "no json",
        "[]",
        '{"type": "Sequence"}',
        '{"type": "Box", "dtype": "float32", "shape": [2]}',
        '{"type": "Box", "dtype": "no dtype", "shape": [2], "low": 0, "high": 1}',
        '{"type": "Box", "dtype": "float32", "shape": [-2], "low": 0, "high": 1}',
        '{"type": "Box", "dtype": "float32", "shape": [2.5], "low": 0, "high": 1}',
        '{"type": "Box", "dtype": "float32", "shape": [1000000000, 1000000000], "low": 0, "high": 1}',
        '{"type": "Dict", "subspaces": []}',
        '{"type": "Tuple", "subspaces": [1]}',
        '{"type": "MultiDiscrete", "dtype": "int64", "nvec": [[1], [2, 3]]}',
        '{"type": "MultiBinary", "n": "x"}',
        '{"type": "Dict", "subspaces": {"a": ' * 40 + '{"type": "Text"}' + "}}" * 40,
    ],
)
def test_spaces_that_are_none(space: str, tmp_path: Path):
    path = two(tmp_path / "space")
    change_json(path / "data" / "metadata.json", observation_space=space)
    refused(path, "`observation_space` is no space")


@each_format
@pytest.mark.parametrize("part", [0, 1, 100, 0.5, 0.9, -1])
def test_files_that_were_cut(data_format: str, part: float, tmp_path: Path):
    path = two(tmp_path / "cut", data_format)
    content = file_of(path, data_format).read_bytes()
    size = part if isinstance(part, int) else int(part * len(content))
    file_of(path, data_format).write_bytes(content[:size])
    refused(path, "cannot be read|bytes")


@each_format
def test_files_of_another_kind(data_format: str, tmp_path: Path):
    path = two(tmp_path / "other", data_format)
    file_of(path, data_format).write_bytes(np.random.default_rng(0).bytes(5_000))
    refused(path, "cannot be read")


@each_format
def test_files_that_are_missing(data_format: str, tmp_path: Path):
    path = two(tmp_path / "missing", data_format)
    file_of(path, data_format).unlink()
    refused(path, "is not there" if data_format == "hdf5" else f"has no part-0.{data_format}")


@each_format
def test_nothing_is_left_of_a_damaged_import(data_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = two(tmp_path / "damaged", data_format)
    whole = minari.MinariReader._aligned

    def damaged(self: Any, known: Any, values: Any) -> Any:
        if known.episode_id == 1:
            raise self.damaged("cannot be read")
        return whole(self, known, values)

    monkeypatch.setattr(minari.MinariReader, "_aligned", damaged)
    with pytest.raises(FormatError):
        import_episodes("minari", path, tmp_path / "target")
    assert not [name for name in os.listdir(tmp_path) if name.startswith("target")]


@each_format
def test_a_dataset_that_was_not_written_to_its_end(data_format: str, tmp_path: Path):
    path = two(tmp_path / "half", data_format)
    for counted, message in ((1, "0 to 1, and metadata.json counts 1"), (3, "counts 3"), (None, "counts None")):
        change_json(path / "data" / "metadata.json", total_episodes=counted)
        refused(path, f"{message}. It was not written to its end. `episode_indices=")
    [(rows, _)] = minari.read(str(path), episode_indices=[1])
    assert_same(rows, expected(1, 3))


@each_format
def test_numbers_with_a_gap(data_format: str, tmp_path: Path):
    path = create(tmp_path / "gap", [buffer(i, 1) for i in range(3)], data_format)
    if data_format == "hdf5":
        with h5py.File(path / "data" / "main_data.hdf5", "a") as file:
            del file["episode_1"]
    else:
        shutil.rmtree(path / "data" / "1")
    refused(path, "holds 2 episodes, 0 to 2, and metadata.json counts 3")
    change_json(path / "data" / "metadata.json", total_episodes=2)
    refused(path, "holds 2 episodes, 0 to 2, and metadata.json counts 2")


@each_format
def test_a_dataset_without_episodes(data_format: str, tmp_path: Path):
    path = create(tmp_path / "none", [], data_format)
    refused(path, "cannot be read|holds no episode")


def test_steps_that_the_metadata_count_otherwise_are_said(tmp_path: Path):
    path = two(tmp_path / "count")
    change_json(path / "data" / "metadata.json", total_steps=9)
    assert "The metadata count 9 steps, the episodes have 5." in minari.read(str(path)).notes.texts


def test_episodes_that_minari_has_glued_together(tmp_path: Path):
    path = create(tmp_path / "glued", [buffer(0, 2), buffer(1, 3, id=0)])
    refused(path, "episode_0 has 5 rewards, and its total_steps is 3. Minari glues")


@pytest.mark.parametrize("data_format", ["arrow", "parquet"])
def test_rows_are_checked_against_the_steps_of_an_episode(data_format: str, tmp_path: Path):
    path = two(tmp_path / "rows", data_format)
    for steps, message in (
        (5, "has 4 rows, expected 6"),
        (2, "has 4 rows, expected 3"),
        ("3", "has '3' as total_steps"),
    ):
        change_json(path / "data" / "1" / "metadata.json", total_steps=steps)
        refused(path, message)
    (path / "data" / "1" / "metadata.json").unlink()
    refused(path, "1/metadata.json: is not there")


def changed(path: Path, change: Callable[[h5py.Group], None], episode: int = 1) -> None:
    with h5py.File(path / "data" / "main_data.hdf5", "a") as file:
        change(file[f"episode_{episode}"])


def replace(group: h5py.Group, name: str, **how: Any) -> None:
    del group[name]
    group.create_dataset(name, **how)


def empty(group: h5py.Group) -> None:
    for name in list(group):
        replace(group, name, data=group[name][:0])
    group.attrs["total_steps"] = 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (empty, r"Episode 1 has 0 steps, and \[0\] rows of observations, expected 1"),
        (lambda group: group.pop("rewards"), "its total_steps is 3"),
        (lambda group: group.pop("observations"), "Episode 1 has no observations"),
        (lambda group: group.pop("terminations"), "Episode 1 has no terminations"),
        (lambda group: replace(group, "actions", data=[1, 2]), r"has 3 steps, and \[2\] rows of actions"),
        (
            lambda group: replace(group, "observations", data=np.zeros((9, 2))),
            r"\[9\] rows of observations, expected 4",
        ),
        (lambda group: replace(group, "truncations", data=[0, 1, 2]), "truncations that are neither 0 nor 1"),
        (lambda group: replace(group, "rewards", data=np.zeros((3, 2))), "rewards that are no number for each step"),
        (lambda group: replace(group, "rewards", data=["a", "b", "c"]), "rewards that are no number for each step"),
        (lambda group: replace(group, "rewards", data=7.0), "total_steps|rewards"),
        (lambda group: replace(group, "observations", data=["a"] * 4), "shape|no observations of numbers"),
        (
            lambda group: replace(group, "observations", data=np.zeros((4, 3))),
            r"of shape \(3,\) in episode 1, of \(2,\)",
        ),
    ],
)
def test_hdf5_whose_parts_do_not_go_together(change: Any, message: str, tmp_path: Path):
    path = two(tmp_path / "parts")
    changed(path, change)
    refused(path, message)


def test_episodes_with_other_observations_name_both(tmp_path: Path):
    values = buffer(0, 2).observations
    path = create(
        tmp_path / "keys", [buffer(i, 2, observations={"a": values, "b": values}) for i in range(2)], "hdf5", DICT
    )
    changed(path, lambda group: group["observations"].move("b", "c"))
    refused(path, r"Episode 1 lacks \['obs/b'\] and has \['obs/c'\] besides, compared with episode 0")


@pytest.mark.parametrize(
    "link", [h5py.ExternalLink("other.hdf5", "/x"), h5py.SoftLink("/episode_0/rewards"), h5py.SoftLink("/episode_1")]
)
def test_hdf5_does_not_lead_elsewhere(link: Any, tmp_path: Path):
    path = two(tmp_path / "links")
    with h5py.File(path / "data" / "other.hdf5", "w") as file:
        file["x"] = np.zeros(3)
    for name in ("rewards", "observations"):
        changed(path, lambda group, name=name: group.pop(name) and None)
        with h5py.File(path / "data" / "main_data.hdf5", "a") as file:
            file["episode_1"][name] = link
    refused(path, "is no group and no dataset, but a link or a type")


def test_hdf5_whose_rows_lie_in_other_files(tmp_path: Path):
    path = two(tmp_path / "external")
    (path / "data" / "rows").write_bytes(bytes(24))
    changed(path, lambda group: replace(group, "rewards", shape=(3,), dtype="f8", external=[("rows", 0, 24)]))
    refused(path, "rewards lies in other files")
    layout = h5py.VirtualLayout((3,), "f8")
    layout[:] = h5py.VirtualSource("rows", "x", (3,))
    changed(path, lambda group: group.pop("rewards") and None)
    changed(path, lambda group: group.create_virtual_dataset("rewards", layout) and None)
    refused(path, "rewards lies in other files")


def test_hdf5_groups_that_hold_themselves(tmp_path: Path):
    path = two(tmp_path / "loop")

    def loop(group: h5py.Group) -> None:
        infos = group.create_group("infos")
        infos["infos"] = infos

    changed(path, loop)
    refused(path, "nests too deeply")


@pytest.mark.parametrize("how", [{}, {"chunks": (1, 2**20)}, {"chunks": (1, 2**20), "compression": "gzip"}])
def test_a_shape_without_the_bytes_is_not_allocated(
    how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = two(tmp_path / "lie")
    # No byte of it is in the file.
    changed(path, lambda group: replace(group, "observations", shape=(4, 2**40), dtype="f4", **how))
    monkeypatch.setattr(h5py.Dataset, "__getitem__", lambda *_: pytest.fail("rows were read"))
    refused(path, r"episode_1/observations is said to have shape \(4, 1099511627776\), but has 0 bytes")


def ragged(group: h5py.Group) -> None:
    group.create_dataset("ragged", (4,), h5py.vlen_dtype(np.float32))[:] = [np.ones(i) for i in range(1, 5)]


def test_what_is_unknown_is_said(tmp_path: Path):
    path = two(tmp_path / "more", infos={"k": [1, 2, 3]})
    changed(path, lambda group: group.create_group("environment_states") and None)
    changed(path, lambda group: group["infos"].create_dataset("mixed", data=np.zeros(4, [("x", "f4")])) and None)
    changed(path, lambda group: ragged(group["infos"]))
    changed(path, lambda group: group["infos"].create_dataset("single", data=3) and None)
    with h5py.File(path / "data" / "main_data.hdf5", "a") as file:
        file["notes"] = 1
    notes = minari.read(str(path)).notes.texts
    assert "'environment_states' is unknown, and is not read." in notes
    assert "'notes' is unknown, and is not read." in notes
    assert {note.split("`")[1] for note in notes if "`" in note} == {
        "infos/mixed",
        "infos/ragged",
        "infos/single",
        "infos/k",
    }


def test_episode_metadata_that_no_info_holds_are_said(tmp_path: Path):
    path = two(tmp_path / "attributes")

    def change(group: h5py.Group) -> None:
        group.attrs.update({"array": np.arange(3), "task": "pick", "long": "x" * 5_000, "ok": True})
        group.attrs["empty"] = h5py.Empty("f4")

    changed(path, change)
    reader = minari.read(str(path))
    assert [info for _, info in reader] == [{"id": 0}, {"id": 1, "ok": True, "task": "pick"}]
    assert "`array` of episodes is a ndarray, and is not in their info." in reader.notes.texts
    assert "`long` of some episodes is too long for their info, and is left out." in reader.notes.texts


def rewrite(path: Path, change: Callable[[pa.RecordBatch], pa.RecordBatch], episode: int = 1) -> None:
    """Replace the rows of an episode in Arrow storage."""
    file = path / "data" / str(episode) / "part-0.arrow"
    batch = change(pa.ipc.open_file(io.BytesIO(file.read_bytes())).get_batch(0))
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def with_column(batch: pa.RecordBatch, name: str, values: Any) -> pa.RecordBatch:
    return batch.set_column(batch.schema.get_field_index(name), name, values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: batch.drop_columns(["rewards"]), "Episode 1 has no rewards"),
        (lambda batch: batch.drop_columns(["observations"]), "Episode 1 has no observations"),
        (lambda batch: batch.slice(0, 2), "has 2 rows, expected 4"),
        (lambda batch: with_column(batch, "rewards", pa.array(["a"] * 4)), "rewards that are no number"),
        (lambda batch: with_column(batch, "rewards", pa.array([1.0, None, 2.0, 3.0])), "has 1 rows without a value"),
        (lambda batch: with_column(batch, "observations", pa.array([1.0] * 4)), "has the Arrow type double, expected"),
        (
            lambda batch: with_column(batch, "observations", pa.array([[1.0] * 3] * 4, pa.list_(pa.float32(), 3))),
            r"expected that of a Box of shape \(2,\)",
        ),
        (
            lambda batch: with_column(batch, "observations", pa.array([[1.0, None]] * 4, pa.list_(pa.float32(), 2))),
            "has 4 rows without a value",
        ),
        (lambda batch: with_column(batch, "actions", pa.array([[1.0]] * 4)), r"`action` has the Arrow type list"),
    ],
)
def test_arrow_whose_columns_do_not_go_together(change: Any, message: str, tmp_path: Path):
    path = two(tmp_path / "columns", "arrow")
    rewrite(path, change)
    refused(path, message)


def test_arrow_lists_of_no_values(tmp_path: Path):
    """Arrow divides by the size of its lists, in C++: it must not come to that."""
    path = two(tmp_path / "empty", "arrow")
    schema = pa.schema([("observations", pa.list_(pa.float32(), 0))])
    with pa.OSFile(str(file_of(path, "arrow")), "wb") as sink, pa.ipc.new_file(sink, schema):
        pass
    refused(path, "has lists of 0 values")


def test_arrow_structs_without_a_part_of_the_space(tmp_path: Path):
    values = buffer(0, 2).observations
    path = create(tmp_path / "struct", [buffer(0, 2, observations={"a": values, "b": values})], "arrow", DICT)

    def without_b(batch: pa.RecordBatch) -> pa.RecordBatch:
        part = batch.column("observations").field("a")
        return with_column(batch, "observations", pa.StructArray.from_arrays([part, part], ["a", "c"]))

    rewrite(path, without_b, 0)
    refused(path, r"`obs` lacks \['b'\], which its space has")


def test_arrow_rows_without_bytes_are_not_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = two(tmp_path / "lie", "arrow")
    monkeypatch.setattr(minari.arrow_storage.IpcPart, "__init__", _lying(minari.arrow_storage.IpcPart.__init__))
    refused(path, r"is said to have 1099511627776 rows, but has \d+ bytes")


def _lying(honest: Callable[..., None]) -> Callable[..., None]:
    def opened(self: Any, path: str) -> None:
        honest(self, path)
        self.num_rows = 2**40

    return opened


def test_arrow_lists_that_are_too_short(tmp_path: Path):
    path = two(tmp_path / "short", "arrow")
    content = file_of(path, "arrow").read_bytes()
    # Lengths and numbers of nulls of the observations of 4 rows, and of their 8 numbers.
    nodes = struct.pack("<4q", 4, 0, 8, 0)
    assert content.count(nodes) == 1
    file_of(path, "arrow").write_bytes(content.replace(nodes, struct.pack("<4q", 4, 0, 7, 0)))
    refused(path, r"cannot be read \(ArrowInvalid: .*Values length \(7\) is less")


def split(path: Path, change: Callable[[int, pa.RecordBatch], pa.RecordBatch] = lambda _, batch: batch) -> None:
    """Put each row of episode 1 into a file of its own."""
    file = file_of(path, "arrow")
    whole = pa.ipc.open_file(io.BytesIO(file.read_bytes())).get_batch(0)
    for row in range(whole.num_rows):
        batch = change(row, whole.slice(row, 1))
        name = str(file.with_name(f"part-{row}.arrow"))
        with pa.OSFile(name, "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)


def test_files_of_one_episode_are_read_in_the_order_of_their_numbers(tmp_path: Path):
    path = create(tmp_path / "parts", [buffer(0, 1), buffer(1, 12)], "arrow")
    split(path)
    _, (rows, _) = minari.read(str(path))
    assert_same(rows, expected(1, 12))


def test_files_of_one_episode_have_the_same_columns(tmp_path: Path):
    path = create(tmp_path / "parts", [buffer(0, 1), buffer(1, 3)], "arrow")
    split(path, lambda row, batch: batch.drop_columns(["rewards"]) if row == 2 else batch)
    refused(path, "1: has files with different columns")


def encoded(size: tuple[int, int], mode: str = "RGB", kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (encoded((40, 33)), r"a frame of 33 x 40 \(RGB\), expected \(32, 40, 3\)"),
        (encoded((40, 32), "L"), r"a frame of 32 x 40 \(L\)"),
        (encoded((40, 32))[:-200], "no whole JPEG image"),
        (b"\xff\xd8\xff" + bytes(1_000), "no whole JPEG image"),
        (encoded((40, 32), kind="PNG"), "no whole JPEG image"),
        (b"", r"0 bytes for 2 images of shape \(32, 40, 3\)"),
    ],
)
@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
def test_images_that_are_none(data_format: str, frame: bytes, message: str, tmp_path: Path):
    space = spaces.Box(0, 255, (32, 40, 3), np.uint8)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 40, 3), np.uint8)
    path = create(tmp_path / "image", [buffer(0, 1, observations=pixels)], data_format, space, jpeg_encoding=True)
    frames = [frame, frame]
    if data_format == "arrow":
        rewrite(path, lambda batch: with_column(batch, "observations", pa.array(frames, pa.binary())), 0)
    else:
        rows = np.array([np.frombuffer(one, np.uint8) for one in frames])
        changed(path, lambda group: replace(group, "observations", data=rows), 0)
    refused(path, message)


def test_large_images_are_not_allocated_for_a_few_bytes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(images.np, "empty", lambda *_: pytest.fail("allocated"))
    with pytest.raises(FormatError, match="bytes for 2 images"):
        images.decoded("path", "obs", [encoded((32, 32))] * 2, (2**20, 2**20, 3))


def test_metadata_are_not_read_without_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = two(tmp_path / "bound")
    monkeypatch.setattr(minari.files, "_MOST_BYTES", 100)
    refused(path, "has more than 100 bytes")


def test_space_and_json_are_those_of_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An env_spec names code that Gymnasium would import."""
    path = two(tmp_path / "spec")
    spec = json.dumps({"id": "Evil-v0", "entry_point": "evil_module:Env"})
    change_json(path / "data" / "metadata.json", env_spec=spec, observation_space=None, action_space=None)
    monkeypatch.setattr("gymnasium.make", lambda *_, **__: pytest.fail("an environment was made"))
    assert len(list(minari.read(str(path)))) == 2
