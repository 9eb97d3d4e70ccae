"""What is not as it was saved is refused by name, and changes nothing; with `newest_whole`, the save before is loaded.

Each test has a directory of two saves; the second needs the file of the first.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers.dataset import IndividualFileDataset, RingBufferDataset
from buffers.fields import Scalar
from buffers.saving import DamagedSaveError, packed_file, save_directory
from tests import tagged
from tests.saving_helpers import close, contents

SAVES = "save-0000000000.safetensors", "save-0000000001.safetensors"


def ring() -> RingBufferDataset:
    return RingBufferDataset(60)


def two_saves(dataset: Any, directory: Path, first: int = 0) -> list[list[Any]]:
    """Make them; what was in the dataset at each."""
    saved = []
    for number, lengths in enumerate(((5, 3, 4), (4, 6))):
        for length in lengths:
            dataset.add_episode(tagged.episode(length, first + dataset.table.next_id), {"number": number})
        if not number:
            dataset.add_late_field("value", Scalar())
        dataset.annotate(0, {"value": np.arange(5) + number})
        dataset.save(directory, keep=2)
        saved.append(contents(dataset))
    return saved


class Saves:
    """A directory with two saves, and what is in them."""

    def __init__(self, path: Path, saved: list[list[Any]]) -> None:
        self.path, self.saved = path, saved

    @contextlib.contextmanager
    def spoilt(self, folder: Path, name: str, spoil: Callable[[Path], object]) -> Iterator[Path]:
        """A copy in which a file is spoilt."""
        copy = folder / "spoilt"
        shutil.copytree(self.path, copy)
        spoil(copy / name)
        yield copy
        shutil.rmtree(copy)


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> Saves:
    path = tmp_path_factory.mktemp("ring")
    return Saves(path, two_saves(ring(), path))


@pytest.fixture(scope="module")
def other_run(tmp_path_factory: pytest.TempPathFactory) -> Saves:
    """Of the same lengths."""
    path = tmp_path_factory.mktemp("other")
    return Saves(path, two_saves(ring(), path, 100))


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory) -> Saves:
    """Of a dataset of files."""
    path = tmp_path_factory.mktemp("linked")
    with files(path / "episodes") as dataset:
        return Saves(path / "saves", two_saves(dataset, path / "saves"))


def files(path: Path) -> IndividualFileDataset:
    return IndividualFileDataset(60, directory=path, durability="rename")


def found_in(path: Path, dataset: Any, passed_over: str | None = None) -> list[Any]:
    """What loads; with `passed_over`, by `newest_whole` and after a warning that names that."""
    with pytest.warns(UserWarning, match=passed_over) if passed_over else contextlib.nullcontext():
        type(dataset).load(path, dataset, newest_whole=passed_over is not None)
    return contents(dataset)


# Spoiling a file.


def cut(at: int) -> Callable[[Path], None]:
    """From the beginning, or from the end."""
    return lambda path: os.truncate(path, at if at >= 0 else path.stat().st_size + at)


def flip(bit: int) -> Callable[[Path], None]:
    """A bit of the file, or from its end."""

    def spoil(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)

    return spoil


def put(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content + path.read_bytes()[len(content) :])


def move_to_link(path: Path) -> None:
    path.rename(path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")


def replace_by(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        path.unlink()
        make(path)

    return spoil


def copy_other(path: Path) -> None:
    (other,) = {*SAVES} - {path.name}
    shutil.copy(path.parent / other, path)


def say(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Let the header say something else, and describe itself and be summed up as it should."""

    def spoil(path: Path) -> None:
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        entries = json.loads(content[8:end])
        about = json.loads(entries["__metadata__"]["buffers"])
        change(about)
        entries["__metadata__"]["buffers"] = json.dumps(about)
        text = json.dumps(entries).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])

    return spoil


ROWS = "0/rows/reward"
DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": cut(0),
    "cut in the length of the header": cut(4),
    "cut in the header": cut(100),
    "cut in the rows": cut(-300),
    "without the last byte": cut(-1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a directory": replace_by(os.mkdir),
    "a pipe": replace_by(os.mkfifo),
    "a link": move_to_link,
    "the other save": copy_other,
    "no header": put(bytes(8)),
    "a huge header": put(b"\xff" * 8),
    "a header of 64 MiB": put((64 * 2**20).to_bytes(8, "little")),
    "no JSON": lambda path: put(path.read_bytes()[:8] + b"{" * 200)(path),
    "too deep": lambda path: put(path.read_bytes()[:8] + b"[" * 1000)(path),
    "a flipped bit in the header": flip(8 * 1000),
    "a flipped bit in the rows": flip(-20),
    "another version": say(lambda about: about.update(version=3)),
    "rows that are not a number": say(lambda about: about["arrays"][ROWS].__setitem__(2, float("nan"))),
    "rows below zero": say(lambda about: about["arrays"][ROWS].__setitem__(2, -1)),
    "rows beyond memory": say(lambda about: about["arrays"][ROWS].__setitem__(2, 2**47)),
    "a shape beyond memory": say(lambda about: about["arrays"][ROWS].__setitem__(1, [2**47])),
    "pieces beyond memory": say(lambda about: about.update(num_pieces=2**47)),
    "pieces below zero": say(lambda about: about.update(num_pieces=-1)),
    "an unknown dtype": say(lambda about: about["arrays"][ROWS].__setitem__(0, "object")),
    "nothing said": say(lambda about: about.pop("said")),
}


# DamagedEpisodeError; and for what is no regular file: a DamagedEpisodeError that names nothing.
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_save_is_refused_by_name_and_the_one_before_loads(tmp_path, saves, damage) -> None:
    given = ring()
    with saves.spoilt(tmp_path, SAVES[1], DAMAGES[damage]) as path:
        tracemalloc.start()
        with pytest.raises(DamagedSaveError, match=f"^{path}/{SAVES[1]}"):
            RingBufferDataset.load(path, given)
        assert tracemalloc.get_traced_memory()[1] < 2**22
        tracemalloc.stop()
        assert given.num_episodes == 0 and contents(given) == contents(ring())
        assert found_in(path, given, f"Save 1 is passed over: {path}/{SAVES[1]}") == saves.saved[0]


@pytest.mark.parametrize("newest_whole", [False, True])
@pytest.mark.parametrize("damage", [*DAMAGES, "missing"])
def test_a_damaged_file_that_both_saves_need_is_refused_by_name(tmp_path, saves, damage, newest_whole) -> None:
    spoil, given = {**DAMAGES, "missing": os.unlink}[damage], ring()
    with saves.spoilt(tmp_path, SAVES[0], spoil) as path, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(DamagedSaveError, match=f"^{path}/{SAVES[0]}"):
            RingBufferDataset.load(path, given, newest_whole=newest_whole)
        assert given.num_episodes == 0 and contents(given) == contents(ring())


def test_a_directory_without_saves_is_not_damaged(tmp_path) -> None:
    (tmp_path / ".tmp-save-0000000000.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="is no directory of saves"):
        RingBufferDataset.load(tmp_path)


def test_a_damaged_save_does_not_count_among_those_that_are_kept(tmp_path, saves) -> None:
    with saves.spoilt(tmp_path, SAVES[1], cut(-1)) as path:
        given = ring()
        found_in(path, given, "Save 1 is passed over")
        while given.num_episodes:
            given.evict_episode(0)
        given.add_episode(tagged.episode(4, 3))
        newest = given.save(path, keep=2).result()
        cut(-1)(Path(newest))
        assert found_in(path, ring(), "Save 2 is passed over") == saves.saved[0]


def refuses_files_of_another_run(folder: Path, saves: Saves, other_run: Saves, name: str) -> bool:
    with saves.spoilt(folder, name, lambda path: shutil.copy(other_run.path / name, path)) as path:
        try:
            found = found_in(path, ring())
        except DamagedSaveError as error:
            assert "is not the file that save 1 was made with" in str(error) and str(path) in str(error)
            return True
    assert found not in saves.saved
    return False


@pytest.mark.parametrize("name", SAVES)
def test_a_file_of_another_run_is_refused(tmp_path, saves, other_run, name) -> None:
    assert refuses_files_of_another_run(tmp_path, saves, other_run, name)


def test_without_stamps_a_file_of_another_run_is_loaded(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(save_directory.secrets, "token_hex", lambda num_bytes: "0" * (2 * num_bytes))
    one, other = (Saves(path, two_saves(ring(), path, n)) for n, path in ((0, tmp_path / "a"), (50, tmp_path / "b")))
    assert not refuses_files_of_another_run(tmp_path, one, other, SAVES[0])


# Any bit.


def assert_a_flipped_bit_costs_no_row(path: Path, name: str, bit: int, saved: list[list[Any]], dataset: Any) -> None:
    """Whatever loads is what was saved, or nothing."""
    file = path / name
    content = file.read_bytes()
    flip(bit)(file)
    try:
        for newest_whole in (False, True):
            given = dataset()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                try:
                    type(given).load(path, given, newest_whole=newest_whole)
                except DamagedSaveError as error:
                    assert str(path) in str(error)
                    assert given.num_episodes == 0 and (name == SAVES[0] or not newest_whole)
                else:
                    assert contents(given) in (saved if newest_whole else saved[1:])
    finally:
        file.write_bytes(content)


@settings(max_examples=150)
@given(data=st.data())
@pytest.mark.parametrize("name", SAVES)
def test_whichever_bit_is_flipped_no_other_row_is_loaded(saves, tmp_path_factory, name, data) -> None:
    path = tmp_path_factory.getbasetemp() / f"bits-{name}"
    shutil.copytree(saves.path, path, dirs_exist_ok=True)
    bit = data.draw(st.integers(0, 8 * (path / name).stat().st_size - 1))
    assert_a_flipped_bit_costs_no_row(path, name, bit, saves.saved, ring)


@pytest.mark.parametrize("name", SAVES)
def test_wherever_a_bit_is_flipped_no_other_row_is_loaded(tmp_path, saves, name) -> None:
    shutil.copytree(saves.path, tmp_path / "saves")
    for bit in range(0, 8 * (saves.path / name).stat().st_size, 61):
        assert_a_flipped_bit_costs_no_row(tmp_path / "saves", name, bit, saves.saved, ring)


def test_without_checksums_a_flipped_bit_would_cost_rows(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(packed_file, "checksum", lambda memory: 0)
    saved = two_saves(ring(), tmp_path)
    for name in SAVES:
        with pytest.raises(AssertionError):
            for bit in range(8 * (tmp_path / name).stat().st_size - 1, 0, -157):
                assert_a_flipped_bit_costs_no_row(tmp_path, name, bit, saved, ring)


@given(
    num_bytes=st.sampled_from([1, 7, 8, 1000, 65_535, 65_536, 65_537, 69_631, 69_632, 100_003]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_flipped_bit_changes_the_checksum(num_bytes, seed) -> None:
    rng = np.random.default_rng(seed)
    memory = rng.integers(0, 256, num_bytes, np.uint8)
    before = packed_file.checksum(memory)
    memory[rng.integers(num_bytes)] ^= 1 << rng.integers(8)
    assert packed_file.checksum(memory) != before


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", SAVES)
def test_nothing_is_unpickled(tmp_path, saves, name) -> None:
    evil = pickle.dumps(Evil(tmp_path / "marker"))
    with saves.spoilt(tmp_path, name, lambda path: path.write_bytes(evil)) as path, pytest.raises(DamagedSaveError):
        RingBufferDataset.load(path)
    assert not (tmp_path / "marker").exists()


# Links.

LINKS: dict[str, Callable[[Path], object]] = {
    "missing": os.unlink,
    "empty": cut(0),
    "cut in the header": cut(300),
    "without the last byte": cut(-1),
    "a flipped bit in the header": flip(8 * 40),
    "a flipped bit in the rows": flip(-20),
    "a directory": replace_by(os.mkdir),
    "a pipe": replace_by(os.mkfifo),
    "a link": move_to_link,
    "another episode": lambda path: shutil.copy(sorted(path.parent.parent.glob("*0-0.episodes/*"))[0], path),
}
LINK = "save-0000000001-0.episodes/0000000003-000000000012-4.safetensors"


def named(damage: str) -> str:
    """What an error names: of a link that is missing, only the save is known."""
    return "save-0000000001" if damage == "missing" else LINK


@pytest.mark.parametrize("into", [ring, lambda: files(Path("files"))], ids=["ring", "files"])
@pytest.mark.parametrize("damage", LINKS)
def test_with_a_damaged_link_the_save_before_is_the_newest_whole(tmp_path, monkeypatch, linked, damage, into) -> None:
    monkeypatch.chdir(tmp_path)
    with linked.spoilt(tmp_path, LINK, LINKS[damage]) as path:
        given = into()
        assert found_in(path, given, f"Save 1 is passed over: {path}/{named(damage)}") == linked.saved[0]
        close(given)


@pytest.mark.parametrize("damage", LINKS)
def test_a_damaged_link_is_refused_by_name_where_its_rows_are_read(tmp_path, linked, damage) -> None:
    given = ring()
    with linked.spoilt(tmp_path, LINK, LINKS[damage]) as path:
        with pytest.raises(DamagedSaveError, match=f"^{path}/{named(damage)}"):
            RingBufferDataset.load(path, given)
        assert given.num_episodes == 0 and contents(given) == contents(ring())


def test_a_damaged_save_leaves_a_dataset_of_files_as_it_is(tmp_path, linked) -> None:
    with files(tmp_path / "files") as given, linked.spoilt(tmp_path, SAVES[1], flip(-20)) as path:
        given.add_episode(tagged.episode(4, 70))
        before, names = contents(given), sorted(os.listdir(tmp_path / "files"))
        with pytest.raises(DamagedSaveError, match=f"^{path}/{SAVES[1]}"):
            IndividualFileDataset.load(path, given)
        assert contents(given) == before and sorted(os.listdir(tmp_path / "files")) == names


def test_a_strange_file_among_links_is_left_alone(tmp_path) -> None:
    with files(tmp_path / "episodes") as dataset:
        two_saves(dataset, tmp_path / "saves")
        strange = tmp_path / "saves" / "save-0000000001-0.episodes" / ".nfs0001"
        strange.write_bytes(b"mine")
        dataset.add_episode(tagged.episode(4, 70))
        dataset.save(tmp_path / "saves")
        with files(tmp_path / "other") as other:
            assert found_in(tmp_path / "saves", other) == contents(dataset)
        assert strange.exists()
