"""`python -m buffers inspect`: what it says, that it changes nothing, and how it fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from buffers.__main__ import main
from buffers.dataset import IndividualFileDataset
from buffers.dataset.individual_file import NumpyCompressedSerialization, TorchSerialization
from buffers.viewing import inspection
from tests.file_helpers import add, files

ROOT = Path(__file__).parent.parent


def state(path: Path) -> dict[str, tuple[int, int, int, int]]:
    """Everything that a write would change, of the directory and of all in it."""
    found = {}
    for item in [path, *path.rglob("*")]:
        status = item.lstat()
        found[str(item)] = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return found


@pytest.fixture
def episodes(tmp_path: Path) -> Path:
    """Ids 2 to 9, of 3, 4, ... 10 steps."""
    path = tmp_path / "episodes"
    with IndividualFileDataset(1000, directory=path) as dataset:
        add(dataset, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
        dataset.evict_episode(0)
        dataset.evict_episode(0)
    return path


def line_of(text: str, start: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return line


def test_it_prints_the_table_without_a_capacity_and_a_histogram(
    episodes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(episodes)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "8 episodes, 52 steps, ids 2 to 9, length 3 to 10, mean 6.5" in out.splitlines()
    with IndividualFileDataset(1000, directory=episodes, mode="r") as dataset:
        assert repr(dataset).partition("\n")[2] in out
    assert "%" not in out
    assert " of " not in out.splitlines()[1]
    assert re.search(r"^10 +1 +#{40}$", out, re.MULTILINE)
    assert line_of(out, "Format") == "Format: .safetensors"
    assert [line_of(out, name) for name in ("Temporaries", "Damaged", "Set aside")] == [
        "Temporaries: none",
        "Damaged: none",
        "Set aside: none",
    ]


def test_bars_of_the_histogram_count_every_episode() -> None:
    lengths = np.array([1] * 400 + [2] * 10 + [95] * 1)
    lines = inspection._histogram(lengths)
    assert lines[2].split() == ["1-10", "410", "#" * 40]
    assert lines[-1].split() == ["91-95", "1", "#"]
    assert sum(int(line.split()[1]) for line in lines[2:]) == len(lengths)


@pytest.mark.parametrize("strategy", [NumpyCompressedSerialization(), TorchSerialization()])
def test_it_finds_out_the_format(strategy: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with IndividualFileDataset(100, directory=tmp_path, serialization_strategy=strategy) as dataset:  # type: ignore[arg-type]
        add(dataset, [3, 4])
    assert main(["inspect", str(tmp_path)]) == 0
    assert line_of(capsys.readouterr().out, "Format") == f"Format: {strategy.suffix}"  # type: ignore[attr-defined]


def damage(episodes: Path) -> tuple[str, str]:
    """Cut one file short, change bytes within another, and leave other things about."""
    short, changed = files(episodes)[1], files(episodes)[3]
    os.truncate(episodes / short, 100)
    with open(episodes / changed, "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\xff\xff\xff")
    (episodes / ".tmp-0000000010-000000000055-4.safetensors").write_bytes(b"abc")
    for folder in ("damaged", "damaged-1"):
        (episodes / folder).mkdir()
        (episodes / folder / "0000000000-000000000000-1.safetensors").write_bytes(b"x" * 1500)
    return short, changed


def test_it_lists_what_is_damaged_set_aside_and_unfinished(episodes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short, changed = damage(episodes)
    assert main(["inspect", str(episodes)]) == 0
    out = capsys.readouterr().out
    assert line_of(out, "Damaged") == "Damaged: 1 (left out)"
    assert line_of(out, f"  {short}") == f"  {short}: it ends within its header"
    assert line_of(out, "Temporaries").startswith("Temporaries: 1 ")
    assert "  .tmp-0000000010-000000000055-4.safetensors: 3 B" in out.splitlines()
    assert line_of(out, "Set aside").startswith("Set aside: 2 ")
    assert "  damaged-1/0000000000-000000000000-1.safetensors: 1.5 kB" in out.splitlines()
    assert "7 episodes," in out
    assert main(["inspect", str(episodes), "--verify", "full"]) == 0
    out = capsys.readouterr().out
    assert line_of(out, "Damaged") == "Damaged: 2 (left out)"
    assert "checksum" in line_of(out, f"  {changed}")
    assert "6 episodes," in out


def test_of_very_many_the_first_are_named(episodes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (episodes / "damaged").mkdir()
    for i in range(25):
        (episodes / "damaged" / f"file-{i:02d}").touch()
    main(["inspect", str(episodes)])
    out = capsys.readouterr().out
    assert "damaged/file-19: 0 B" in out and "file-20" not in out
    assert "  and 5 more" in out.splitlines()


def test_nothing_in_the_directory_changes(episodes: Path, tmp_path: Path) -> None:
    damage(episodes)
    before = state(episodes)
    for options in ([], ["--verify", "full"], ["--episode", "7"], ["--episode", "7", "--output", "film.png"]):
        options = [str(tmp_path / option) if option.endswith(".png") else option for option in options]
        assert main(["inspect", str(episodes), *options]) == 0
    assert main(["inspect", str(episodes), "--episode", "0"]) == 1
    assert main(["inspect", str(episodes), "--output", str(episodes / "film.png")]) == 1
    assert state(episodes) == before


@pytest.mark.parametrize("has_list_of_locks", [True, False])
def test_it_says_who_writes_and_does_not_disturb_them(
    episodes: Path, has_list_of_locks: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_list_of_locks:
        monkeypatch.setattr(inspection, "_LOCKS", "/nowhere")
    elif not os.path.exists("/proc/locks"):
        pytest.skip("no list of locks here")
    main(["inspect", str(episodes)])
    last = f"process {os.getpid()} on "
    assert line_of(capsys.readouterr().out, "Writer").startswith(f"Writer: none seen (the last was {last}")
    with IndividualFileDataset(1000, directory=episodes) as dataset:
        before = state(episodes)
        assert main(["inspect", str(episodes)]) == 0
        assert line_of(capsys.readouterr().out, "Writer").startswith(f"Writer: {last}")
        assert state(episodes) == before
        add(dataset, [5], first=10)
        main(["inspect", str(episodes)])
        assert "9 episodes, 57 steps, ids 2 to 10" in capsys.readouterr().out


def test_a_directory_that_nobody_has_locked_has_had_no_writer(
    episodes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (episodes / ".lock").unlink()
    main(["inspect", str(episodes)])
    assert line_of(capsys.readouterr().out, "Writer") == "Writer: none so far"


# One episode.


def test_an_episode_is_summed_up_by_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with IndividualFileDataset(100, directory=tmp_path) as dataset:
        dataset.add_episode(
            {"code": [0], "half": torch.zeros(1, dtype=torch.bfloat16), "obs": {"x": [0.0]}, "on": [True]}
        )
        dataset.add_episode(
            {
                "code": [7, 2**62, -3],
                "half": torch.tensor([1.0, 2.0, 6.0], dtype=torch.bfloat16),
                "obs": {"x": [np.nan, 2.5, np.inf]},
                "on": [True, False, False],
            }
        )
    assert main(["inspect", str(tmp_path), "--episode", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Episode 1: 3 steps, ")
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert rows["code"] == ["code", "Scalar", "int64", "()", "-3", str(2**62), f"{(2.0**62 + 4) / 3:.6g}"]
    assert rows["half"] == ["half", "Scalar", "bfloat16", "()", "1", "6", "3"]
    assert rows["obs/x"] == ["obs/x", "Scalar", "float32", "()", "2.5", "2.5", "2.5", "2"]
    assert rows["on"] == ["on", "Scalar", "bool", "()", "False", "True", "0.333333"]


def test_episodes_go_by_their_ids(episodes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(episodes), "--episode", "9"]) == 0
    assert capsys.readouterr().out.startswith("Episode 9: 10 steps, ")
    for missing in ("0", "10", "-1"):
        assert main(["inspect", str(episodes), "--episode", missing]) == 1
        assert capsys.readouterr().err == f"There is no episode {missing}: 8 have ids from 2 to 9.\n"


def test_a_damaged_episode_is_an_error_that_says_why(episodes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(episodes / files(episodes)[2], "r+b") as file:
        file.seek(20)
        file.write(b"\0\0\0")
    assert main(["inspect", str(episodes), "--episode", "4"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Episode 4 cannot be read: 1 files in ") and err.count("\n") == 1


@pytest.mark.parametrize(("name", "magic"), [("film.png", b"\x89PNG"), ("film.pdf", b"%PDF"), ("film", b"\x89PNG")])
def test_a_picture_is_drawn_into_the_file_that_was_named(
    name: str, magic: bytes, episodes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / name
    assert main(["inspect", str(episodes), "--episode", "5", "--output", str(output)]) == 0
    assert output.read_bytes().startswith(magic)
    assert capsys.readouterr().out.endswith(f"Drawn: {output}\n")
    output.unlink()
    assert main(["inspect", str(episodes), "--output", str(output)]) == 0
    assert output.read_bytes().startswith(magic)


def test_no_picture_is_written_into_the_directory_by_whatever_way(
    episodes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (episodes / "damaged").mkdir()
    (tmp_path / "link").symlink_to(episodes)
    (tmp_path / "link.png").symlink_to(episodes / "film.png")
    before = state(episodes)
    outputs = [episodes / "film.png", episodes / "damaged" / "a.png", tmp_path / "link" / "a.png"]
    for output in [*outputs, tmp_path / "link.png", episodes / ".." / "episodes" / "a.png"]:
        assert main(["inspect", str(tmp_path / "link"), "--episode", "5", "--output", str(output)]) == 1
        assert capsys.readouterr().err == f"{output} is in the inspected directory, which must not change.\n"
    assert state(episodes) == before
    # A neighbour whose name begins alike is another directory.
    (tmp_path / "episodes-2").mkdir()
    assert main(["inspect", str(episodes), "--output", str(tmp_path / "episodes-2" / "a.png")]) == 0


# Failures.


def test_what_cannot_be_inspected_is_status_1_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "0000000000-000000000000-5.hdf5").touch()
    (tmp_path / "file").touch()
    expected = {
        "nowhere": "There is no directory ",
        "empty": "holds no whole episode of a known format",
        "others": "holds episodes in the format ['.hdf5']",
        "file": "Not a directory",
    }
    for name, message in expected.items():
        assert main(["inspect", str(tmp_path / name)]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert message in err and err.count("\n") == 1 and str(tmp_path / name) in err
    assert not (tmp_path / "nowhere").exists()


def test_where_all_episodes_are_damaged_they_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "0000000000-000000000000-5.safetensors").write_bytes(b"x" * 50)
    assert main(["inspect", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "  0000000000-000000000000-5.safetensors: it " in out
    assert err == f"{tmp_path} holds no whole episode of a known format.\n"


@pytest.mark.parametrize(
    ("name", "message"), [("a.xyz", "Format 'xyz' is not supported"), ("none/a.png", "No such file or directory")]
)
def test_a_picture_that_cannot_be_written_is_one_line(
    name: str, message: str, episodes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(episodes), "--episode", "3", "--output", str(tmp_path / name)]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_names_from_files_cannot_command_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with IndividualFileDataset(100, directory=tmp_path) as dataset:
        dataset.add_episode({"\x1b[31mred": [1.0], "größe": [2.0]})
    for options in ([], ["--episode", "0"]):
        assert main(["inspect", str(tmp_path), *options]) == 0
        out = capsys.readouterr().out
        assert "\x1b" not in out and r"\x1b[31mred" in out and "größe" in out


def test_a_reader_that_goes_away_is_no_traceback(episodes: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "buffers", "inspect", str(episodes)]
    found = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (found.returncode, found.stderr) == (1, "")


def test_looking_needs_no_matplotlib_and_drawing_says_so(episodes: Path, tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["matplotlib"] = None
from buffers.__main__ import main
assert main(["inspect", {str(episodes)!r}]) == 0
sys.exit(main(["inspect", {str(episodes)!r}, "--output", {str(tmp_path / "a.png")!r}]))
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert found.returncode == 1
    assert "pip install 'buffers[extras]'" in found.stderr and found.stderr.count("\n") == 1
