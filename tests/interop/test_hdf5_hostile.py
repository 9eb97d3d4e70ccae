"""A file of HDF5 that is damaged, foreign or lying is a FormatError with its path, before anything is allocated."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from buffers.interop import FormatError, hdf5, import_episodes
from buffers.interop.hdf5.file import HDF5File
from tests.interop.hdf5_files import unpacked

NAMES = ["robomimic", "isaaclab", "d4rl"]
Changed = Callable[..., Path]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked(tmp_path_factory.mktemp("files"))


@pytest.fixture
def changed(files: Path, tmp_path: Path) -> Changed:
    """A function that copies one of the files, changes it, and returns its path."""

    def change(name: str, function: Callable[[Any], None]) -> Path:
        target = tmp_path / f"{name}.hdf5"
        target.write_bytes((files / f"{name}.hdf5").read_bytes())
        with h5py.File(target, "r+") as file:
            function(file)
        return target

    return change


def assert_refused(path: Path, match: str, **options: Any) -> None:
    for use in (hdf5.read, hdf5.open):
        with pytest.raises(FormatError, match=match) as found:
            use(path, **options)
        assert found.value.path == str(path) and found.value.advice


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_was_cut_off_is_refused(name: str, files: Path, tmp_path: Path) -> None:
    content, path = (files / f"{name}.hdf5").read_bytes(), tmp_path / "cut.hdf5"
    for size in [0, 1, 7, 8, 100, 800, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:size])
        assert_refused(path, "cut.hdf5: cannot be opened as HDF5 .*was cut off")
        with pytest.raises(FormatError):
            import_episodes("hdf5", path, tmp_path / "a")
    assert os.listdir(tmp_path) == ["cut.hdf5"]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_with_overwritten_parts_is_refused_or_read_but_never_another_error(
    name: str, files: Path, tmp_path: Path
) -> None:
    content, path, num_refused = (files / f"{name}.hdf5").read_bytes(), tmp_path / "torn.hdf5", 0
    # Zeros over whole blocks, as after a loss of power: harmless for the library.
    for start in range(0, min(len(content), 8192), 1024):
        path.write_bytes(content[:start] + bytes(512) + content[start + 512 :])
        try:
            for _ in hdf5.read(path):
                pass
        except FormatError as error:
            assert error.path == str(path)
            num_refused += 1
    assert num_refused


def test_what_is_no_file_of_these_layouts_is_refused(files: Path, tmp_path: Path) -> None:
    assert_refused(tmp_path / "none.hdf5", "none.hdf5: is not there")
    assert_refused(files / "robomimic.hdf5" / "below", "is not there")
    assert_refused(tmp_path, "is no file")
    (tmp_path / "text").write_text("observations, actions\n" * 100)
    assert_refused(tmp_path / "text", "cannot be opened as HDF5")
    with h5py.File(tmp_path / "empty", "w"):
        pass
    assert_refused(tmp_path / "empty", "has nothing. robomimic and Isaac Lab have a group `data`")
    with h5py.File(tmp_path / "minari", "w") as file:
        file["episode_0/observations"] = np.zeros(3)
    assert_refused(tmp_path / "minari", "has `episode_0`. .*`buffers.interop.minari` reads Minari's")
    with h5py.File(tmp_path / "group", "w") as file:
        file.create_group("data")
    assert_refused(tmp_path / "group", "has no demos in `data`")
    os.mkfifo(tmp_path / "pipe")
    assert_refused(tmp_path / "pipe", "is no file")


def lying(path: str, shape: tuple[int, ...], **options: Any) -> Callable[[Any], None]:
    """Put a dataset in place of another, whose shape no bytes stand behind."""

    def change(file: Any) -> None:
        dtype = file[path].dtype
        del file[path]
        file.create_dataset(path, shape, dtype, **options)

    return change


@pytest.mark.parametrize(
    ("name", "path", "shape"),
    [
        ("robomimic", "data/demo_1/obs/vector", (1, 3)),
        ("robomimic", "data/demo_1/actions", (10**12, 2)),
        ("robomimic", "data/demo_1/next_obs/image", (1, 10**6, 10**6, 3)),
        ("robomimic", "mask/train", (10**12,)),
        ("d4rl", "actions", (10**13, 2)),
        ("d4rl", "terminals", (10**13,)),
        ("d4rl", "observations", (17, 10**13)),
    ],
)
@pytest.mark.parametrize("options", [{}, {"chunks": True}, {"chunks": True, "compression": "gzip"}])
def test_a_shape_without_its_bytes_is_refused(
    name: str, path: str, shape: tuple[int, ...], options: dict[str, Any], changed: Changed, no_reads: None
) -> None:
    if path == "mask/train":
        options = {**options, "fillvalue": b"demo_0"}
    file = changed(name, lying(path, shape, **options))
    assert_refused(file, rf"`{path}` says that it has the shape .*{shape[0]}.* was not written to its end")


@pytest.fixture
def no_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be read, so that nothing is allocated, but D4RL's flags."""

    def read(self: HDF5File, stored: Any, *_: Any) -> None:
        assert stored.name in ("terminals", "timeouts") and stored.shape == (17,)

    monkeypatch.setattr(HDF5File, "read", read)


def test_headers_that_point_beyond_their_rows_are_refused(files: Path, tmp_path: Path) -> None:
    content, path = (files / "d4rl.hdf5").read_bytes(), tmp_path / "patched.hdf5"
    with h5py.File(files / "d4rl.hdf5") as file:
        place, size = file["actions"].id.get_offset(), file["actions"].id.get_storage_size()
    header, shape = struct.pack("<QQ", place, size), struct.pack("<QQ", 17, 2)
    assert content.count(header) == 1 and shape in content
    for old, new in [
        (header, struct.pack("<QQ", place, size - 8)),  # Fewer bytes than the shape needs, which HDF5 does not mind.
        (header, struct.pack("<QQ", place + 10**6, size)),
        (header, struct.pack("<QQ", len(content) - 8, size)),
        (shape, struct.pack("<QQ", 1700, 2)),
    ]:
        path.write_bytes(content.replace(old, new))
        assert_refused(path, "patched.hdf5: `.*(and 128 are there|cannot be read)")


def test_rows_that_were_not_written_yet_are_not_read_as_zeros(changed: Changed, no_reads: None) -> None:
    def half(file: Any) -> None:
        values = file.pop("observations")[()]
        dataset = file.create_dataset("observations", values.shape, values.dtype, chunks=(4, 3), compression="gzip")
        dataset[:9] = values[:9]

    assert_refused(changed("d4rl", half), "`observations` says that it has the shape .* was not written to its end")


def test_a_chunk_larger_than_its_compressed_bytes_can_be_is_refused(changed: Changed, no_reads: None) -> None:
    def swell(file: Any) -> None:
        values = file.pop("rewards")[()]
        file.create_dataset(
            "rewards", values.shape, values.dtype, chunks=(2**20,), maxshape=(None,), compression="gzip"
        )
        # As a chunk of a few bytes, which no library has inflated.
        file["rewards"].id.write_direct_chunk((0,), b"few bytes")

    assert_refused(changed("d4rl", swell), "`rewards` says that it has the shape .* 9 are there")


def test_datasets_that_claim_the_same_bytes_many_times_are_refused(changed: Changed) -> None:
    def alias(file: Any) -> None:
        file.create_dataset("infos/big", data=np.zeros((17, 2000), np.float32))
        for number in range(3):
            file[f"infos/big{number}"] = file["infos/big"]  # A hard link.

    assert_refused(changed("d4rl", alias), "`infos/big.*says that it has the shape")


def test_links_are_not_followed(changed: Changed, files: Path) -> None:
    def external(file: Any) -> None:
        del file["data/demo_1/obs/vector"]
        file["data/demo_1/obs/vector"] = h5py.ExternalLink(str(files / "robomimic.hdf5"), "data/demo_1/obs/vector")

    def soft(file: Any) -> None:
        del file["data/demo_1/actions"]
        file["data/demo_1/actions"] = h5py.SoftLink("/data/demo_3/actions")

    def whole(file: Any) -> None:
        del file["data"]
        file["data"] = h5py.ExternalLink(str(files / "robomimic.hdf5"), "data")

    def masks(file: Any) -> None:
        file["mask/more"] = h5py.SoftLink("/mask/train")

    for change, name in [
        (external, "data/demo_1/obs/vector"),
        (soft, "data/demo_1/actions"),
        (whole, "data"),
        (masks, "mask/more"),
    ]:
        assert_refused(changed("robomimic", change), f"`{name}` is a link, which is not followed. Copy what it names")


def test_rows_in_other_files_are_not_read(changed: Changed, files: Path, tmp_path: Path) -> None:
    def external(file: Any) -> None:
        del file["data/demo_1/actions"]
        place = [(str(tmp_path / "secret"), 0, 8)]
        file.create_dataset("data/demo_1/actions", (1, 2), np.float32, external=place)

    def virtual(file: Any) -> None:
        del file["data/demo_1/actions"]
        plan = h5py.VirtualLayout((1, 2), np.float32)
        plan[:] = h5py.VirtualSource(str(files / "robomimic.hdf5"), "data/demo_1/actions", (1, 2))
        file.create_virtual_dataset("data/demo_1/actions", plan)

    (tmp_path / "secret").write_bytes(bytes(8))
    for change in (external, virtual):
        path = changed("robomimic", change)
        assert_refused(path, "`data/demo_1/actions` has its rows in other files, which are not opened")


def test_a_block_before_the_file_changes_nothing(files: Path, tmp_path: Path) -> None:
    # h5py then gives an offset also for a dataset that has no bytes.
    path = tmp_path / "block.hdf5"
    with h5py.File(path, "w", userblock_size=512) as target, h5py.File(files / "d4rl.hdf5") as source:
        for name in [name for name in source if name != "actions"]:
            source.copy(name, target)
        target.create_dataset("actions", (17, 2), np.float32)
    assert_refused(path, "`actions` says that it has the shape .* 136 bytes, and 0 are there")


def test_other_filters_are_not_loaded(changed: Changed) -> None:
    def scale(file: Any) -> None:
        values = file.pop("rewards")[()].astype(np.int32)
        file.create_dataset("rewards", data=values, scaleoffset=0)

    assert_refused(
        changed("d4rl", scale), r"`rewards` is compressed by the filters \[6\], which are not read. .*h5repack"
    )

    def usual(file: Any) -> None:
        for name, options in {
            "rewards": {"compression": "lzf", "shuffle": True, "fletcher32": True},
            "actions": {"compression": "gzip", "shuffle": True},
        }.items():
            values = file.pop(name)[()]
            file.create_dataset(name, data=values, chunks=(4, *values.shape[1:]), **options)

    assert [len(rows["reward"]) for rows, _ in hdf5.read(changed("d4rl", usual))] == [5, 2, 7, 2, 4, 3]


def test_a_damaged_chunk_is_an_error_with_the_path(changed: Changed) -> None:
    def damage(file: Any) -> None:
        values = file.pop("rewards")[()]
        file.create_dataset("rewards", data=values, chunks=(17,), fletcher32=True, compression="gzip")
        content = bytearray(file["rewards"].id.read_direct_chunk((0,))[1])
        content[-1] ^= 1
        file["rewards"].id.write_direct_chunk((0,), bytes(content))

    path = changed("d4rl", damage)
    with pytest.raises(FormatError, match="`rewards` cannot be read") as found:
        list(hdf5.read(path))
    assert found.value.path == str(path)
    with pytest.raises(FormatError, match="`rewards` cannot be read"):
        next(hdf5.open(path).episodes())


def test_groups_that_contain_themselves_are_refused(changed: Changed) -> None:
    def circle(file: Any) -> None:
        file["data/demo_0/obs/again"] = file["data/demo_0/obs"]

    assert_refused(changed("robomimic", circle), "nests too deeply", layout="robomimic")


def replaced(path: str, values: Any) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        if path in file:
            del file[path]
        if values is not None:
            file[path] = values

    return change


def test_demos_that_contradict_themselves_or_each_other_are_refused(changed: Changed) -> None:
    def attribute(name: str, key: str, value: Any) -> Callable[[Any], None]:
        return lambda file: file[name].attrs.__setitem__(key, value)

    for change, match in [
        (
            replaced("data/demo_2/obs/vector", np.zeros((7, 3))),
            r"`data/demo_2/obs/vector` has the shape \(7, 3\), beside 6",
        ),
        (
            replaced("data/demo_2/obs/vector", np.zeros((6, 4))),
            r"`data/demo_2/next_obs/vector` is float64 \(6, 3\), `obs",
        ),
        (replaced("data/demo_2/rewards", np.zeros(5)), r"`data/demo_2/rewards` has the shape \(5,\), beside 6 actions"),
        (
            replaced("data/demo_2/rewards", np.zeros(6, np.float32)),
            r"`reward` is float64 \(\) in demo_0, and float32 \(\)",
        ),
        (
            replaced("data/demo_2/rewards", None),
            "`reward` is float64 .* in demo_0, and missing in demo_2. All demos need",
        ),
        (replaced("data/demo_2/actions", None), "`data/demo_2` has no array `actions`"),
        (replaced("data/demo_2/actions", 3.0), "`data/demo_2` has no array `actions`"),
        (replaced("data/demo_2/actions", ["x"] * 6), r"`data/demo_2/actions` has the shape \(6,\) of no numbers"),
        (replaced("data/demo_2/states", h5py.Empty("f4")), r"`data/demo_2/states` has the shape \(\) of no numbers"),
        (replaced("data/demo_02/actions", np.zeros((3, 2))), "has the demos demo_02 and demo_2, of one number"),
        (
            attribute("data/demo_2", "num_samples", 5),
            "has 6 rows of `actions`; its `num_samples` says 5. The demo was not",
        ),
        (replaced("mask/bad", np.array([b"demo_77"])), "`mask/bad` names `demo_77`, which are not there"),
        (replaced("mask/bad", np.arange(3)), "`mask/bad` is no list of texts"),
    ]:
        assert_refused(changed("robomimic", change), match)


def test_arrays_of_d4rl_that_contradict_each_other_are_refused(changed: Changed) -> None:
    for change, match in [
        (
            replaced("observations", np.zeros((16, 3))),
            r"`observations` has the shape \(16, 3\), of numbers; `actions` has 17",
        ),
        (replaced("observations", None), "has no `observations`. Choose `fields`"),
        (replaced("actions", None), "has no array `actions`, but `infos`"),
        (replaced("actions", np.zeros((0, 2))), "has no transitions"),
        (replaced("terminals", None), "has no `terminals`"),
        (replaced("terminals", np.arange(17)), "`terminals` has other values than 0 and 1"),
        (replaced("terminals", np.full(17, np.nan)), "`terminals` has other values than 0 and 1"),
        (replaced("timeouts", np.zeros((17, 2))), r"`timeouts` has the shape \(17, 2\)"),
        (
            replaced("next_observations", np.zeros((16, 3), np.float32)),
            r"`next_observations` is float32 \(16, 3\), `obs",
        ),
        (replaced("rewards", ["x"] * 17), r"`rewards` has the shape \(17,\), of no numbers"),
    ]:
        assert_refused(changed("d4rl", change), match)


def test_a_byte_that_is_no_bool_is_true(changed: Changed) -> None:
    def odd(file: Any) -> None:
        for name, demo in file["data"].items():
            flags = np.zeros(len(demo["actions"]), np.uint8)
            flags[-1] = 7
            kind = h5py.h5t.py_create(np.dtype(bool), logical=True)
            space = h5py.h5s.create_simple(flags.shape)
            dataset = h5py.h5d.create(demo.id, b"contact", kind, space)
            dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, flags.view(bool))
            assert name in file["data"]

    for rows, _ in hdf5.read(changed("robomimic", odd)):
        assert rows["contact"].view(np.uint8).tolist() == [0] * (len(rows["contact"]) - 1) + [1]


def test_names_never_leave_the_file(changed: Changed, tmp_path: Path) -> None:
    def add(file: Any) -> None:
        for demo in file["data"].values():
            demo[".."] = np.zeros(len(demo["actions"]))
            demo["%2e%2e"] = np.zeros(len(demo["actions"]))

    import_episodes("hdf5", changed("robomimic", add), tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == ["a", "robomimic.hdf5"]


def test_attributes_of_other_types_are_said_and_not_read(changed: Changed) -> None:
    def add(file: Any) -> None:
        file["data"].attrs["list"] = [1, 2]
        file["data"].attrs["env_args"] = "{no JSON"
        file["data"].attrs["pair"] = np.array((1, 2), [("a", int), ("b", int)])
        file["data/demo_0"].attrs["empty"] = h5py.Empty("f4")
        file["data/demo_0"].attrs["number"] = np.float32(0.5)
        file["data/demo_0"].attrs["one"] = np.array([3])
        file["data/demo_0"].attrs["huge"] = np.uint64(2**63)
        file["data/demo_0"].attrs["longer"] = "as long as an attribute that fits"
        file["data/demo_0"].attrs["reference"] = file["data"].ref
        file["data/extra"] = 1

    with hdf5.read(changed("robomimic", add)) as reader:
        assert reader.metadata["env_args"] == "{no JSON" and "list" not in reader.metadata["data_attributes"]
        info = next(iter(reader)).info
        assert info["number"] == 0.5 and info["one"] == 3
        assert info["huge"] == str(2**63) and info["longer"] == "as long as an attribute that fits"
        text = " ".join(reader.notes)
        assert "The attributes `list`, `pair` are not read." in text and "`empty`, `reference` are not read" in text
        assert (
            "The attribute `huge` of demos is beyond int64 in some" in text and "`huge` of demos does not" not in text
        )
        assert "`data/extra`: no demos, and not read." in text


def test_counts_that_differ_are_said(changed: Changed) -> None:
    def count(file: Any) -> None:
        file["data"].attrs["total"] = 99

    assert "`total` of `data` says 99 transitions; the demos have 17." in hdf5.read(changed("robomimic", count)).notes
