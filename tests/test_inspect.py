"""`python -m buffers inspect`: what it prints, that it changes nothing, and how it fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from buffers.dataset import IndividualFileDataset
from buffers.dataset.individual_file import NumpyCompressedSerialization, TorchSerialization
from buffers.table import Windows
from buffers.viewing import inspection
from buffers.viewing.commands import main
from tests.file_helpers import add, files

ROOT = Path(__file__).parent.parent
# Arguments of the command to its exit status, output and errors.
Inspect = Callable[..., tuple[int, str, str]]


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Inspect:
    def run(*arguments: object) -> tuple[int, str, str]:
        status = main(["inspect", *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def episodes(tmp_path: Path) -> Path:
    """Ids 2 to 9, of 3, 4, ... 10 steps."""
    path = tmp_path / "episodes"
    with IndividualFileDataset(1000, directory=path) as dataset:
        add(dataset, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
        dataset.evict_episode(0)
        dataset.evict_episode(0)
    return path


def state(path: Path) -> dict[str, tuple[int, int, int, int]]:
    """Everything that a write would change in a directory."""
    found = {}
    for item in [path, *path.rglob("*")]:
        status = item.lstat()
        found[str(item)] = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return found


def line_of(text: str, start: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return line


def test_it_prints_fields_and_lengths_but_no_capacity(episodes: Path, inspect: Inspect) -> None:
    status, out, err = inspect(episodes)
    assert (status, err) == (0, "")
    assert "8 episodes, 52 steps, ids 2 to 9, length 3 to 10, mean 6.5" in out.splitlines()
    with IndividualFileDataset(1000, directory=episodes, mode="r") as dataset:
        assert repr(dataset).partition("\n")[2] in out
    assert "%" not in out and " of " not in out.splitlines()[1]
    assert re.search(r"^10 +1 +#{40}$", out, re.MULTILINE)
    assert line_of(out, "Format") == "Format: .safetensors"
    for name in ("Temporaries", "Damaged", "Set aside"):
        assert line_of(out, name) == f"{name}: none"


@pytest.mark.parametrize("strategy", [NumpyCompressedSerialization(), TorchSerialization()])
def test_it_finds_the_format_of_the_files(strategy, tmp_path: Path, inspect: Inspect) -> None:
    with IndividualFileDataset(100, directory=tmp_path, serialization_strategy=strategy) as dataset:
        add(dataset, [3, 40])
    out = inspect(tmp_path)[1]
    assert line_of(out, "Format") == f"Format: {strategy.suffix}"
    assert re.search(r"^3-6 +1 +#{40}$", out, re.MULTILINE), "of lengths far apart, one bar stands for several"


def damage(episodes: Path) -> tuple[str, str]:
    """Cut one file short, change bytes of another, and leave a temporary and 2 folders of set aside files."""
    short, changed = files(episodes)[1], files(episodes)[3]
    os.truncate(episodes / short, 100)
    with open(episodes / changed, "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\xff\xff\xff")
    (episodes / ".tmp-0000000010-000000000055-4.safetensors").write_bytes(b"abc")
    for folder, num in (("damaged", 25), ("damaged-1", 1)):
        (episodes / folder).mkdir()
        for i in range(num):
            (episodes / folder / f"{i:02d}").write_bytes(b"x" * 1500)
    return short, changed


def test_it_lists_damaged_unfinished_and_set_aside_files(episodes: Path, inspect: Inspect) -> None:
    short, changed = damage(episodes)
    status, out, _ = inspect(episodes)
    assert status == 0 and "7 episodes," in out
    assert line_of(out, "Damaged") == "Damaged: 1 (left out)"
    assert line_of(out, f"  {short}") == f"  {short}: it has no whole safetensors header"
    assert line_of(out, "Temporaries").startswith("Temporaries: 1 ")
    assert "  .tmp-0000000010-000000000055-4.safetensors: 3 B" in out.splitlines()
    assert line_of(out, "Set aside").startswith("Set aside: 26 ")
    assert "  damaged-1/00: 1.5 kB" in out.splitlines()
    # Of very many, the first 20 are named.
    assert "damaged/18: 1.5 kB" in out and "damaged/19" not in out and "  and 6 more" in out.splitlines()
    out = inspect("--verify", episodes)[1]
    assert "6 episodes," in out
    assert line_of(out, "Damaged") == "Damaged: 2 (left out)"
    assert "checksum" in line_of(out, f"  {changed}")


def test_nothing_in_the_directory_changes(episodes: Path, tmp_path: Path, inspect: Inspect) -> None:
    damage(episodes)
    before = state(episodes)
    assert inspect(episodes, "--episode", "7", "--output", tmp_path / "film.png")[0] == 0
    # The answer of a check is its exit status.
    status, out, error = inspect(episodes, "--verify")
    assert status == 1 and "Verified: " in out and error.endswith(" files are damaged.\n")
    assert inspect(episodes, "--episode", "0")[0] == 1
    assert state(episodes) == before


@pytest.mark.parametrize("has_list_of_locks", [True, False])
def test_it_names_the_writer_without_disturbing_it(
    episodes: Path, has_list_of_locks: bool, inspect: Inspect, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_list_of_locks:
        monkeypatch.setattr(inspection, "_LOCKS", "/nowhere")
    elif not os.path.exists("/proc/locks"):
        pytest.skip("no list of locks here")
    last = f"process {os.getpid()} on "
    assert line_of(inspect(episodes)[1], "Writer").startswith(f"Writer: none seen (the last was {last}")
    with IndividualFileDataset(1000, directory=episodes) as dataset:
        before = state(episodes)
        status, out, _ = inspect(episodes)
        assert status == 0 and line_of(out, "Writer").startswith(f"Writer: {last}")
        assert state(episodes) == before
        add(dataset, [5], first=10)
        assert "9 episodes, 57 steps, ids 2 to 10" in inspect(episodes)[1]
    (episodes / ".lock").unlink()
    assert line_of(inspect(episodes)[1], "Writer") == "Writer: none so far"


# One episode.


def test_an_episode_is_summed_up_by_field(tmp_path: Path, inspect: Inspect) -> None:
    half = torch.tensor([1.0, 2.0, 6.0], dtype=torch.bfloat16)
    episode = {"code": [7, 2**62, -3], "half": half, "x": {"y": [np.nan, 2.5, np.inf]}, "on": [True, False, False]}
    with IndividualFileDataset(100, directory=tmp_path) as dataset:
        dataset.add_episode(episode)
    status, out, _ = inspect(tmp_path, "--episode", "0")
    assert status == 0 and out.startswith("Episode 0: 3 steps, ")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    assert rows["code"] == ["Scalar", "int64", "()", "-3", str(2**62), f"{(2.0**62 + 4) / 3:.6g}"]
    assert rows["half"] == ["Scalar", "bfloat16", "()", "1", "6", "3"]
    assert rows["x/y"] == ["Scalar", "float32", "()", "2.5", "2.5", "2.5", "2"]
    assert rows["on"] == ["Scalar", "bool", "()", "False", "True", "0.333333"]


def test_episodes_are_found_by_their_ids(episodes: Path, inspect: Inspect) -> None:
    assert inspect(episodes, "--episode", "9")[1].startswith("Episode 9: 10 steps, ")
    for missing in ("0", "10", "-1"):
        message = f"There is no episode {missing}: 8 have ids from 2 to 9.\n"
        assert inspect(episodes, "--episode", missing) == (1, "", message)


def test_the_episode_is_the_named_one_while_others_leave(
    episodes: Path, inspect: Inspect, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = IndividualFileDataset.read

    def lose_the_oldest(dataset: IndividualFileDataset, windows: Windows, *rest: Any) -> Any:
        dataset.table.remove(0)
        return read(dataset, windows, *rest)

    monkeypatch.setattr(IndividualFileDataset, "read", lose_the_oldest)
    assert inspect(episodes, "--episode", "5")[1].startswith("Episode 5: 6 steps, ")


def test_a_damaged_episode_is_an_error_with_its_reason(episodes: Path, inspect: Inspect) -> None:
    with open(episodes / files(episodes)[2], "r+b") as file:
        file.seek(20)
        file.write(b"\0\0\0")
    status, _, err = inspect(episodes, "--episode", "4")
    assert status == 1 and err.startswith("Episode 4 cannot be read: 1 files in ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "name", "magic"), [([], "film", b"\x89PNG"), (["--episode", "5"], "film.pdf", b"%PDF")]
)
def test_pictures_are_drawn_into_the_named_file(
    options: list[str], name: str, magic: bytes, episodes: Path, tmp_path: Path, inspect: Inspect
) -> None:
    status, out, _ = inspect(episodes, *options, "--output", tmp_path / name)
    assert status == 0 and out.endswith(f"Drawn: {tmp_path / name}\n")
    assert (tmp_path / name).read_bytes().startswith(magic)


def test_no_picture_is_written_into_the_directory(episodes: Path, tmp_path: Path, inspect: Inspect) -> None:
    (episodes / "damaged").mkdir()
    (tmp_path / "link").symlink_to(episodes)
    (tmp_path / "link.png").symlink_to(episodes / "film.png")
    before = state(episodes)
    outputs = [episodes / "film.png", episodes / "damaged" / "a.png", tmp_path / "link" / "a.png"]
    for output in [*outputs, tmp_path / "link.png", episodes / ".." / "episodes" / "a.png"]:
        message = f"{output} is in the inspected directory, which must not change.\n"
        assert inspect(tmp_path / "link", "--episode", "5", "--output", output) == (1, "", message)
    assert state(episodes) == before
    # A folder beside it whose name begins alike is another directory.
    (tmp_path / "episodes-2").mkdir()
    assert inspect(episodes, "--output", tmp_path / "episodes-2" / "a.png")[0] == 0


# Failures.


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "There is no directory "),
        ("empty", "holds no whole episode of a known format"),
        ("others", "holds episodes in the format ['.hdf5']"),
        ("file", "is no directory. Give one of episodes"),
    ],
)
def test_what_cannot_be_inspected_fails_in_one_line(name: str, message: str, tmp_path: Path, inspect: Inspect) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "0000000000-000000000000-5.hdf5").touch()
    (tmp_path / "file").touch()
    status, out, err = inspect(tmp_path / name)
    assert (status, out) == (1, "")
    assert message in err and err.count("\n") == 1 and str(tmp_path / name) in err
    assert not (tmp_path / "nowhere").exists()


def test_damaged_files_are_listed_if_all_are(tmp_path: Path, inspect: Inspect) -> None:
    (tmp_path / "0000000000-000000000000-5.safetensors").write_bytes(b"x" * 50)
    status, out, err = inspect(tmp_path)
    assert status == 1 and "  0000000000-000000000000-5.safetensors: it " in out
    assert err == f"{tmp_path} holds no whole episode of a known format.\n"


def test_a_picture_that_cannot_be_written_is_an_error(episodes: Path, tmp_path: Path, inspect: Inspect) -> None:
    for name, message in (("a.xyz", "Format 'xyz' is not supported"), ("none/a.png", "No such file or directory")):
        status, _, err = inspect(episodes, "--episode", "3", "--output", tmp_path / name)
        assert status == 1 and message in err and err.count("\n") == 1


def test_names_from_files_cannot_control_the_terminal(tmp_path: Path, inspect: Inspect) -> None:
    with IndividualFileDataset(100, directory=tmp_path) as dataset:
        dataset.add_episode({"\x1b[31mred": [1.0], "größe": [2.0]})
    for options in ([], ["--episode", "0"]):
        status, out, _ = inspect(tmp_path, *options)
        assert status == 0 and "\x1b" not in out and r"\x1b[31mred" in out and "größe" in out


def test_a_closed_pipe_gives_no_traceback(episodes: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "buffers", "inspect", str(episodes)]
    found = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (found.returncode, found.stderr) == (1, "")


def test_only_pictures_need_matplotlib(episodes: Path, tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["matplotlib"] = None
from buffers.viewing.commands import main
assert main(["inspect", {str(episodes)!r}]) == 0
sys.exit(main(["inspect", {str(episodes)!r}, "--output", {str(tmp_path / "a.png")!r}]))
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert found.returncode == 1
    assert "pip install 'episode-buffers[extras]'" in found.stderr and found.stderr.count("\n") == 1
