"""Files that d3rlpy has dumped, against what the environments saw. `tests/data/interop/d3rlpy/make.py` made them."""

from __future__ import annotations

import fcntl
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from buffers.dataset import IndividualFileDataset
from buffers.interop import FormatError, d3rlpy, import_episodes
from tests.interop.logged import on_arrival
from tests.interop.made_up import killed_before
from tests.tagged import assert_same_episode, flatten

h5py = pytest.importorskip("h5py")

DATA = Path(__file__).parents[1] / "data" / "interop" / "d3rlpy"
#: d3rlpy drops an episode of one step that is not terminated: number 2 of `given`.
EPISODES = {"collected": [0, 1, 2, 3, 4], "frames": [0, 1], "given": [0, 1, 3]}


def expected(file: str, number: int) -> dict[str, Any]:
    """The rows that the environment's own log makes of an episode."""
    with np.load(DATA / "log.npz") as log:
        found = {key.split("/")[2]: log[key] for key in log if key.startswith(f"{file}/{number}/")}
    obs, length = found["observations"], len(found["actions"])
    parts = {"0": obs, "1": found["state"]} if file == "given" else {"": obs}
    known = {name: np.concatenate([part[:-1], part[-2:-1]]) for name, part in parts.items()}
    actions = {
        "collected": found["actions"][:, None],
        "frames": found["actions"][:, None].astype(np.int32),
        "given": found["actions"],
    }
    return {
        "obs": known.get("", known),
        "action": on_arrival(actions[file]),
        "reward": on_arrival(found["rewards"].astype(np.float32)),
        "terminated": on_arrival(found["ends"][:, 0]),
        "is_first": np.arange(length + 1) == 0,
        "final_obs_missing": np.arange(length + 1) == length,
    }


def assert_same_rows(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in flatten(wanted).items():
        np.testing.assert_array_equal(flatten(found)[name], value, err_msg=name, strict=True)
    assert [*flatten(found)] == [*flatten(wanted)]


@pytest.mark.parametrize("file", EPISODES)
def test_rows_are_what_the_environment_saw(file: str) -> None:
    with d3rlpy.read(DATA / f"{file}.h5") as reader:
        episodes = [*reader]
    assert len(episodes) == reader.num_episodes == len(EPISODES[file])
    assert sum(len(rows["reward"]) for rows, _ in episodes) == reader.num_steps
    for number, (rows, info) in zip(EPISODES[file], episodes, strict=True):
        assert_same_rows(rows, expected(file, number))
        assert info == {}
    assert reader.metadata == {"version": "2.1"}


def test_terminated_is_of_terminated_episodes_only_and_truncated_is_not_made_up() -> None:
    reader = d3rlpy.read(DATA / "collected.h5")
    # terminated, truncated, both, terminated, cut off.
    assert [bool(rows["terminated"].any()) for rows, _ in reader] == [True, False, True, True, False]
    assert all("truncated" not in rows for rows, _ in reader)
    assert any("no `truncated`" in note for note in reader.notes)


def test_the_final_observation_is_not_made_up() -> None:
    for rows, _ in d3rlpy.read(DATA / "collected.h5"):
        assert rows["final_obs_missing"].tolist() == [False] * (len(rows["reward"]) - 1) + [True]
        assert rows["obs"][-1].tolist() == rows["obs"][-2].tolist() != [0, 0, 0]


@pytest.mark.parametrize("first", [0, 1, 3, 4, 5])
def test_reading_begins_at_any_episode(first: int) -> None:
    episodes = [*d3rlpy.read(DATA / "collected.h5").episodes(first)]
    for number, (rows, _) in zip(range(first, 5), episodes, strict=True):
        assert_same_rows(rows, expected("collected", number))


@pytest.mark.parametrize("fields", [["reward"], ["obs/1", "action"], ["obs", "terminated"], ["final_obs_missing"]])
def test_only_chosen_fields_are_read(fields: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    reader, names = d3rlpy.read(DATA / "given.h5", fields=fields), set()
    original = d3rlpy.D3rlpyReader._dataset

    def spied(self: Any, file: Any, name: str, of_text: bool = False) -> Any:
        names.add(name.split("_")[0] + name[-2:] * name.startswith("observations"))
        return original(self, file, name, of_text)

    monkeypatch.setattr(d3rlpy.D3rlpyReader, "_dataset", spied)
    for number, (rows, _) in zip(EPISODES["given"], reader, strict=True):
        wanted = flatten(expected("given", number))
        chosen = [*fields, *["final_obs_missing"] * any(f.startswith("obs") for f in fields)]
        assert {*flatten(rows)} == {name for name in wanted if any(f"{name}/".startswith(f"{f}/") for f in chosen)}
        for name, value in flatten(rows).items():
            np.testing.assert_array_equal(value, wanted[name], strict=True)
    columns = {"obs/1": {"observations_1"}, "obs": {"observations_0", "observations_1"}}
    asked = {"reward": {"rewards"}, "action": {"actions"}, **columns}
    assert names == {"terminated"}.union(*(asked.get(name, set()) for name in fields))


def test_an_import_gives_the_log_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    with killed_before(3):
        import_episodes("d3rlpy", DATA / "collected.h5", tmp_path / "a")
    summary = import_episodes("d3rlpy", DATA / "collected.h5", tmp_path / "a")
    assert (summary.num_episodes, summary.num_steps) == (5, 31) and len(summary.lost) == 2
    with IndividualFileDataset(directory=tmp_path / "a", mode="r") as dataset:
        for number, found in enumerate(dataset.episodes()):
            assert_same_episode(found, expected("collected", number))
    summary = import_episodes("d3rlpy", DATA / "given.h5", tmp_path / "b", fields=["obs/1", "reward"], limit=2)
    assert summary.num_episodes == 2 and [*summary.fields] == ["obs/1", "reward", "final_obs_missing"]


def test_other_columns_are_named(tmp_path: Path) -> None:
    def add(file: Any) -> None:
        file["costs_0"] = file["infos_1_0"] = np.zeros(3)
        file["written by"] = 1

    notes = [*d3rlpy.read(changed(tmp_path, add)).notes]
    assert {"`costs` is not read.", "`infos` is not read.", "`written by` is not read."} <= {*notes}


# Files that are not whole


def changed(tmp_path: Path, change: Callable[[Any], object], name: str = "collected") -> Path:
    path = tmp_path / "changed.h5"
    shutil.copy(DATA / f"{name}.h5", path)
    with h5py.File(path, "r+") as file:
        change(file)
    return path


def replace(name: str, *args: Any, **options: Any) -> Callable[[Any], object]:
    def change(file: Any) -> None:
        if name in file:
            del file[name]
        file.create_dataset(name, *args, **options)

    return change


def delete(name: str) -> Callable[[Any], object]:
    return lambda file: file.__delitem__(name)


def link(name: str, target: Any) -> Callable[[Any], object]:
    def change(file: Any) -> None:
        del file[name]
        file[name] = target

    return change


def virtual(file: Any) -> None:
    del file["rewards_1"]
    layout = h5py.VirtualLayout((3, 1), np.float32)
    layout[:] = h5py.VirtualSource(file.filename + ".other", "x", (3, 1))
    file.create_virtual_dataset("rewards_1", layout)


def half_written(file: Any) -> None:
    """One of three chunks is there; HDF5 makes zeros of the others."""
    replace("rewards_1", shape=(3, 1), dtype=np.float32, chunks=(1, 1), compression="gzip")(file)
    file["rewards_1"][0] = 1


TEXT = h5py.string_dtype()
HUGE = {"shape": (2**40, 1), "dtype": np.float32, "maxshape": (None, 1), "chunks": (2**20, 1)}
BROKEN = {
    "no version": (delete("version"), "no dataset `version`"),
    "another version": (replace("version", data="2.0"), "is of version '2.0', expected '2.1'"),
    "a version that is no text": (replace("version", data=2.1), "`version` is float64, expected text"),
    "no number": (delete("num_episodes"), "no dataset `num_episodes`"),
    "no episode": (replace("num_episodes", data=0), "`num_episodes` is 0"),
    "too many episodes": (replace("num_episodes", data=2**60), "and there are datasets for 5 episodes"),
    "too few episodes": (replace("num_episodes", data=4), "There is an episode 4, and `num_episodes` is 4"),
    "a number with a part": (replace("num_episodes", data=5.0), "expected one integer"),
    "no observations": (delete("observations_0"), "There is no dataset `observations_0`"),
    "no observations of one": (delete("observations_2"), "There is no dataset `observations_2`"),
    "no rewards": (delete("rewards_3"), "There is no dataset `rewards_3`"),
    "no end": (delete("terminated_4"), "There is no dataset `terminated_4`"),
    "another shape": (replace("observations_1", data=np.zeros((3, 4), np.float32)), "float32 (4,), that of episode 0"),
    "another dtype": (replace("actions_2", data=np.zeros((4, 1))), "float64 (1,), that of episode 0 is int64 (1,)"),
    "another length": (replace("actions_1", data=np.zeros((4, 1), np.int64)), "`actions` of episode 1 has 4 rows"),
    "no rows": (replace("rewards_0", data=np.float32(1)), "`rewards` of episode 0 has no rows"),
    "no steps": (replace("observations_1", shape=(0, 3), dtype=np.float32), "has 0 rows"),
    "an empty space": (replace("rewards_1", data=h5py.Empty(np.float32)), "no dataset with values"),
    "a lying shape": (replace("rewards_1", **HUGE), "of which the file does not hold the values"),
    "a lying shape, packed": (replace("rewards_1", **HUGE, compression="gzip"), "does not hold the values"),
    "never written": (replace("rewards_1", shape=(3, 1), dtype=np.float32), "does not hold the values"),
    "half written, packed": (half_written, "does not hold the values"),
    "a filter of others": (
        replace("rewards_1", data=np.zeros((3, 1), np.float32), scaleoffset=2, chunks=(3, 1)),
        "packed by the filters [6]",
    ),
    "objects": (replace("actions_1", data=["a", "b", "c"], dtype=TEXT), "`actions_1` is object"),
    "a record": (replace("actions_1", data=np.zeros((3, 1), "i4,f4")), "`actions_1` is [("),
    "a group": (lambda file: (file.__delitem__("rewards_1"), file.create_group("rewards_1")), "no dataset"),
    "a soft link": (link("rewards_1", h5py.SoftLink("/rewards_2")), "`rewards_1` is a link"),
    "a link elsewhere": (link("rewards_1", h5py.ExternalLink("other.h5", "/x")), "`rewards_1` is a link"),
    "a virtual dataset": (virtual, "`rewards_1` has its values in other files"),
    "values elsewhere": (
        replace("rewards_1", shape=(3, 1), dtype=np.float32, external=[("other.bin", 0, 12)]),
        "`rewards_1` has its values in other files",
    ),
    "d3rlpy 1": (lambda file: [replace(name, data=[0])(file) for name in ("observations", "terminals")], "of d3rlpy 1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_and_nothing_is_imported(name: str, tmp_path: Path) -> None:
    change, text = BROKEN[name]
    path = changed(tmp_path, change)
    with pytest.raises(FormatError) as caught:
        d3rlpy.read(path)
    assert text in str(caught.value) and caught.value.path == str(path)
    with pytest.raises(FormatError):
        import_episodes("d3rlpy", path, tmp_path / "imported")
    assert not (tmp_path / "imported").exists() and not (tmp_path / "imported.importing").exists()


def test_an_end_that_is_no_flag_is_refused_when_it_is_read(tmp_path: Path) -> None:
    reader = d3rlpy.read(changed(tmp_path, replace("terminated_1", data=np.zeros(2, bool))))
    with pytest.raises(FormatError, match=r"`terminated_1` is bool \(2,\), expected one bool"):
        list(reader)


def test_a_packed_file_is_read(tmp_path: Path) -> None:
    def repack(file: Any) -> None:
        for name in [name for name in file if "s_" in name]:
            replace(name, data=file[name][()], compression="gzip", shuffle=True)(file)

    for number, (rows, _) in enumerate(d3rlpy.read(changed(tmp_path, repack))):
        assert_same_rows(rows, expected("collected", number))


@pytest.mark.parametrize("size", [0, 7, 500, 3000, 14000, 14412])
def test_a_file_that_ends_early_is_named(size: int, tmp_path: Path) -> None:
    path = tmp_path / "short.h5"
    path.write_bytes((DATA / "collected.h5").read_bytes()[:size])
    with pytest.raises(FormatError, match="short.h5: cannot be read as HDF5"):
        d3rlpy.read(path)


def test_a_packed_value_that_cannot_be_as_large_as_its_shape_is_refused(tmp_path: Path) -> None:
    def pack(file: Any) -> None:
        replace("rewards_1", shape=(2**28, 1), dtype=np.float32, chunks=(2**28, 1), compression="gzip")(file)
        file["rewards_1"].id.write_direct_chunk((0, 0), b"ten bytes!")

    path = changed(tmp_path, pack)
    refused = r"`rewards_1` has the shape \(268435456, 1\), of which the file does not hold the values"
    with pytest.raises(FormatError, match=refused):
        d3rlpy.read(path)
    # The index of chunks says that there are more bytes than the file has.
    content, key = path.read_bytes(), struct.pack("<II24x", 10, 0)
    assert content.count(key) == 1
    path.write_bytes(content.replace(key, struct.pack("<II24x", 2**21, 0)))
    with pytest.raises(FormatError, match=refused):
        d3rlpy.read(path)


def test_a_file_that_is_being_written_is_named(tmp_path: Path) -> None:
    path = changed(tmp_path, lambda file: None)
    with open(path, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(FormatError, match="is open elsewhere .* Close it there first"):
            d3rlpy.read(path)


def test_other_files_and_no_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("no HDF5 " * 1000)
    with pytest.raises(FormatError, match=r"text\.h5: cannot be read as HDF5"):
        d3rlpy.read(tmp_path / "text.h5")
    with pytest.raises(FormatError, match="is a directory. Give the file"):
        d3rlpy.read(tmp_path)
    with pytest.raises(FormatError, match=r"none\.h5: is not there"):
        d3rlpy.read(tmp_path / "none.h5")
    with h5py.File(tmp_path / "empty.h5", "w"):
        pass
    with pytest.raises(FormatError, match="There is no dataset `version`"):
        d3rlpy.read(tmp_path / "empty.h5")


def test_a_file_that_is_damaged_within_is_named_when_it_is_read(tmp_path: Path) -> None:
    reader = d3rlpy.read(changed(tmp_path, lambda file: None))
    content = bytearray(Path(reader.path).read_bytes())
    at = content.find(b"TREE")
    content[at : at + 4] = b"EERT"
    Path(reader.path).write_bytes(content)
    with pytest.raises(FormatError, match=r"changed\.h5: "):
        list(reader)
