"""An import is there whole, once, or not at all, whatever ends it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from buffers.dataset import IndividualFileDataset
from buffers.interop import Episode, FormatError, import_episodes, importing
from buffers.interop.origin import read_origin
from buffers.viewing.commands import main
from tests.interop.made_up import Reader, length_of, rows_of
from tests.tagged import assert_same_episode


@pytest.fixture(autouse=True)
def format_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """`flat` stands for the made-up format."""
    module = types.ModuleType("buffers.interop.flat")
    module.read = Reader
    monkeypatch.setitem(sys.modules, "buffers.interop.flat", module)
    return module


def numbers(path: Path) -> list[int]:
    """The numbers of the episodes in a directory, each compared with what the source has."""
    with IndividualFileDataset(directory=path, mode="r", verify="full") as dataset:
        infos = [dataset.episode_info(episode_id)["number"] for episode_id in dataset.table.ids.tolist()]
        for number, found in zip(infos, dataset.episodes(), strict=True):
            assert_same_episode(found, rows_of(int(number)))
        return [int(number) for number in infos]


def test_an_import_holds_each_episode_once_and_says_where_it_came_from(tmp_path: Path) -> None:
    summary = import_episodes("flat", "source", tmp_path / "a")
    assert numbers(tmp_path / "a") == [*range(9)]
    assert (summary.num_episodes, summary.num_steps) == (9, sum(length_of(n) + 1 for n in range(9)))
    assert summary.fields["obs"] == "float32 (2,)" and summary.num_bytes == summary.num_steps * (8 + 8 + 8 + 3)
    assert summary.lost == ["There is no seed.", "Episode 4 is odd."]
    origin = read_origin(str(tmp_path / "a"))
    assert origin is not None and origin.is_finished and origin.metadata == {"made": "up"}
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("fails_at", [0, 1, 4, 5, 8])
def test_an_import_that_was_cut_off_goes_on_and_is_as_one_that_was_not(
    fails_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = import_episodes("flat", "source", tmp_path / "whole")
    monkeypatch.setattr(Reader, "fails_at", fails_at)
    with pytest.raises(KeyboardInterrupt):
        import_episodes("flat", "source", tmp_path / "a")
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr(Reader, "fails_at", -1)
    read: list[int] = []
    read_from = Reader.read_from
    monkeypatch.setattr(Reader, "read_from", lambda self, n: (read.append(n), read_from(self, n))[1])
    found = import_episodes("flat", "source", tmp_path / "a")
    assert read == [fails_at] and numbers(tmp_path / "a") == [*range(9)]
    assert (found.lost, found.num_steps, found.fields) == (expected.lost, expected.num_steps, expected.fields)
    assert sorted(os.listdir(tmp_path)) == ["a", "whole"]


KILLED = """
import os, signal, sys
from tests.interop import test_importing
from tests.interop.made_up import Reader
import types
module = types.ModuleType("buffers.interop.flat"); module.read = Reader; sys.modules["buffers.interop.flat"] = module
from buffers.interop import import_episodes
class Killer(Exception):
    pass
read_from = Reader.read_from
def killed(self, number):
    for position, episode in enumerate(read_from(self, number), number):
        if position == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        yield episode
Reader.read_from = killed
import_episodes("flat", "source", sys.argv[1])
"""


def test_after_a_real_kill_nothing_is_there_twice(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "a"), "5"]
    found = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert found.returncode == -9, found.stderr
    assert sorted(os.listdir(tmp_path)) == ["a.importing"]
    import_episodes("flat", "source", tmp_path / "a")
    assert numbers(tmp_path / "a") == [*range(9)]


@pytest.mark.parametrize("error", [FormatError("source", "is torn", "Get another"), ValueError("lengths differ")])
def test_after_an_error_of_the_source_nothing_is_left(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reader, "fails_at", 5)
    monkeypatch.setattr(Reader, "error", error)
    with pytest.raises(type(error), match=str(error)):
        import_episodes("flat", "source", tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_after_an_error_of_the_disk_what_is_imported_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reader, "fails_at", 5)
    monkeypatch.setattr(Reader, "error", OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        import_episodes("flat", "source", tmp_path / "a")
    monkeypatch.setattr(Reader, "fails_at", -1)
    import_episodes("flat", "source", tmp_path / "a")
    assert numbers(tmp_path / "a") == [*range(9)]


def test_an_episode_that_does_not_fit_the_others_names_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_from = Reader.read_from

    def other(self: Reader, number: int) -> Any:
        for position, (rows, info) in enumerate(read_from(self, number), number):
            dtype = np.int32 if position == 3 else np.int64
            yield Episode({**rows, "action": rows["action"].astype(dtype)}, info)

    monkeypatch.setattr(Reader, "read_from", other)
    with pytest.raises(FormatError, match="Episode 3 cannot be stored: .*`action`.*--limit 3"):
        import_episodes("flat", "source", tmp_path / "a")
    assert os.listdir(tmp_path) == []
    assert import_episodes("flat", "source", tmp_path / "a", limit=3).num_episodes == 3


def test_after_a_loss_of_power_an_import_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reader, "fails_at", 5)
    with pytest.raises(KeyboardInterrupt):
        import_episodes("flat", "source", tmp_path / "a")
    victim = sorted((tmp_path / "a.importing").glob("0000000002-*"))[0]
    victim.write_bytes(b"\0" * victim.stat().st_size)  # The name was on the disk, the content was not.
    monkeypatch.setattr(Reader, "fails_at", -1)
    import_episodes("flat", "source", tmp_path / "a")
    assert numbers(tmp_path / "a") == [*range(9)] and os.listdir(tmp_path) == ["a"]


def test_nothing_is_evicted_while_the_number_of_steps_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "_LEAST_CAPACITY", 4)
    monkeypatch.setattr(Reader, "num_steps", property(lambda self: None, lambda self, value: None), raising=False)
    import_episodes("flat", "source", tmp_path / "a")
    assert numbers(tmp_path / "a") == [*range(9)]


def test_the_same_import_again_does_nothing_and_another_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = import_episodes("flat", "source", tmp_path / "a")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "a").iterdir())
    assert import_episodes("flat", "source", tmp_path / "a") == expected
    with pytest.raises(ValueError, match="holds an import of source .flat. with .*, not of other"):
        import_episodes("flat", "other", tmp_path / "a")
    with pytest.raises(ValueError, match="Ask for the same of a source that has not changed"):
        import_episodes("flat", "source", tmp_path / "a", limit=3)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "a").iterdir()) == before


def test_a_source_that_has_changed_is_not_mixed_with_what_was_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.write_text("one")
    monkeypatch.setattr(Reader, "fails_at", 5)
    with pytest.raises(KeyboardInterrupt):
        import_episodes("flat", source, tmp_path / "a")
    os.utime(source, ns=(1, 1))
    with pytest.raises(ValueError, match="Ask for the same"):
        import_episodes("flat", source, tmp_path / "a")
    with pytest.raises(ValueError, match="Ask for the same"):
        import_episodes("flat", source, tmp_path / "a", num=8)


def test_a_long_import_of_unknown_size_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "_LEAST_CAPACITY", 4)
    monkeypatch.setattr(Reader, "num_steps", property(lambda self: None, lambda self, value: None), raising=False)
    monkeypatch.setattr(Reader, "fails_at", 6)
    with pytest.raises(KeyboardInterrupt):
        import_episodes("flat", "source", tmp_path / "a")
    monkeypatch.setattr(Reader, "fails_at", -1)
    import_episodes("flat", "source", tmp_path / "a")
    assert numbers(tmp_path / "a") == [*range(9)]


def test_a_kill_while_the_folder_is_made_or_removed_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "a.importing").mkdir()
    (tmp_path / "a.importing" / ".tmp-origin.json").write_text("{")
    (tmp_path / "a.importing" / ".lock").touch()
    import_episodes("flat", "source", tmp_path / "a")
    assert numbers(tmp_path / "a") == [*range(9)] and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [ValueError("torn"), KeyError("torn")])
def test_a_file_that_was_put_into_the_folder_is_not_removed(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reader, "fails_at", 5)
    monkeypatch.setattr(Reader, "error", error)
    read_from = Reader.read_from

    def read(self: Reader, number: int) -> Any:
        for episode in read_from(self, number):
            (tmp_path / "a.importing" / "thesis.txt").write_text("mine")
            yield episode

    monkeypatch.setattr(Reader, "read_from", read)
    with pytest.raises(type(error)):
        import_episodes("flat", "source", tmp_path / "a")
    assert (tmp_path / "a.importing" / "thesis.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="holds thesis.txt, which no import has put there"):
        import_episodes("flat", "source", tmp_path / "a")


def test_what_is_found_while_reading_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_from = Reader.read_from

    def read(self: Reader, number: int) -> Any:
        notes = self.notes
        for position, episode in enumerate(read_from(self, number), number):
            if position == 1:
                notes.add("Seen at 1.")
                self.metadata["seen"] = 1
            yield episode
        notes.add("Seen at the end.")

    monkeypatch.setattr(Reader, "read_from", read)
    monkeypatch.setattr(Reader, "fails_at", 5)
    with pytest.raises(KeyboardInterrupt):
        import_episodes("flat", "source", tmp_path / "a")
    monkeypatch.setattr(Reader, "fails_at", -1)
    found = import_episodes("flat", "source", tmp_path / "a")
    assert found.lost == ["There is no seed.", "Seen at 1.", "Episode 4 is odd.", "Seen at the end."]
    origin = read_origin(str(tmp_path / "a"))
    assert origin is not None and origin.metadata == {"made": "up", "seen": 1}


def test_a_link_to_an_empty_directory_is_a_place(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "a").symlink_to(tmp_path / "disk")
    import_episodes("flat", "source", tmp_path / "a")
    assert numbers(tmp_path / "disk") == [*range(9)] and sorted(os.listdir(tmp_path)) == ["a", "disk"]


def test_the_same_options_are_told_by_their_values(tmp_path: Path) -> None:
    import_episodes("flat", "source", tmp_path / "a", dtypes={"reward": np.float32})
    import_episodes("flat", "source", tmp_path / "a", dtypes={"reward": "float32"})
    one, other = np.zeros(2_000), np.zeros(2_000)
    other[1_000] = 1
    plain = [importing._plain({"x": values}) for values in ((one, 1), (other, 1), [other, 1])]
    assert plain[0] != plain[1] == plain[2]


def test_a_part_that_was_renamed_by_hand_is_no_finished_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reader, "fails_at", 5)
    with pytest.raises(KeyboardInterrupt):
        import_episodes("flat", "source", tmp_path / "a")
    os.rename(tmp_path / "a.importing", tmp_path / "a")
    with pytest.raises(ValueError, match="is a part of an import: rename it to"):
        import_episodes("flat", "source", tmp_path / "a")


def test_too_much_metadata_is_left_out_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("buffers.interop.origin._MOST_BYTES", 2_000)
    init = Reader.__init__

    def more(self: Reader, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        self.metadata["text"] = "x" * 2_000

    monkeypatch.setattr(Reader, "__init__", more)
    assert "too long, and is left out" in import_episodes("flat", "source", tmp_path / "a").lost[-1]
    assert import_episodes("flat", "source", tmp_path / "a").num_episodes == 9


def test_what_is_not_ours_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b.importing"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and was not imported"):
        import_episodes("flat", "source", tmp_path / "a")
    with pytest.raises(ValueError, match="holds notes.txt, which no import has put there"):
        import_episodes("flat", "source", tmp_path / "b")
    (tmp_path / "c").mkdir()  # Empty: it is taken.
    import_episodes("flat", "source", tmp_path / "c")
    assert [(tmp_path / name / "notes.txt").read_text() for name in ("a", "b.importing")] == ["mine", "mine"]


def test_fields_limit_and_dtypes_are_as_asked(tmp_path: Path) -> None:
    import_episodes("flat", "source", tmp_path / "a", fields=["obs", "reward"], limit=2, dtypes={"reward": "float32"})
    with IndividualFileDataset(directory=tmp_path / "a", mode="r") as dataset:
        assert dataset.num_episodes == 2 and list(dataset.fields) == ["obs", "reward"]
        assert dataset.get_episode(0)["reward"].numpy().dtype == np.float32
    with pytest.raises(ValueError, match=r"has no fields \['state'\]\. It has \['obs', "):
        import_episodes("flat", "source", tmp_path / "b", fields=["state"])
    with pytest.raises(ValueError, match="`action` of episode 1 of source has values that uint8 cannot hold"):
        import_episodes("flat", "source", tmp_path / "b", dtypes={"action": "uint8"})
    with pytest.raises(ValueError, match="`format` must be one of"):
        import_episodes("pickle", "source", tmp_path / "b")
    with pytest.raises(TypeError, match="`dtypes` cannot ask for bfloat16"):
        import_episodes("flat", "source", tmp_path / "b", dtypes={"reward": torch.bfloat16})
    with pytest.raises(TypeError, match="`fields` must be a sequence of names"):
        import_episodes("flat", "source", tmp_path / "b", fields="obs")
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("values", "dtype", "is_held"),
    [
        (np.array([200], np.uint8), "int8", False),
        (np.array([100], np.uint8), "int8", True),
        (np.array([2**63 + 5], np.uint64), "int64", False),
        (np.array([-1], np.int64), "uint64", False),
        (np.array([-1], np.int8), "uint8", False),
        (np.array([2], np.int64), "bool", False),
        (np.array([0, 1], np.int64), "bool", True),
        (np.array([True]), "int8", True),
        (np.array([2**53 + 1], np.int64), "float64", False),
        (np.array([2**63 - 1], np.int64), "float64", False),
        (np.array([2**64 - 1], np.uint64), "float64", False),
        (np.array([2.0**63]), "int64", False),
        (np.array([2.0**64]), "uint64", False),
        (np.array([np.nan]), "int64", False),
        (np.array([1.5]), "int64", False),
        (np.array([1e300, np.inf]), "float32", False),
        (np.array([0.1, np.nan, np.inf]), "float32", True),
    ],
)
def test_numbers_that_another_dtype_cannot_hold_are_refused(
    values: np.ndarray, dtype: str, is_held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.interop.made_up.rows_of", lambda number: {"obs": values})
    reader = Reader("source", dtypes={"obs": dtype})
    if is_held:
        found = next(iter(reader)).rows["obs"]
        np.testing.assert_array_equal(found, values.astype(dtype), strict=True)
    else:
        with pytest.raises(ValueError, match=f"has values that {dtype} cannot hold"):
            next(iter(reader))


def test_a_name_that_stands_for_several_fields_changes_floats_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_from = Reader.read_from

    def nested(self: Reader, number: int) -> Any:
        for rows, info in read_from(self, number):
            images = np.zeros((len(rows["obs"]), 2, 2, 3), np.uint8)
            yield Episode({**rows, "obs": {"image": images, "state": rows["obs"]}}, info)

    monkeypatch.setattr(Reader, "read_from", nested)
    for dtypes, image in (({"obs": "float64"}, "uint8"), ({"obs/image": "float32", "obs": "float64"}, "float32")):
        fields = import_episodes("flat", "source", tmp_path / image, dtypes=dtypes).fields
        assert (fields["obs/image"].split()[0], fields["obs/state"]) == (image, "float64 (2,)")


def test_fields_and_options_that_are_not_there_are_answered_by_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"source has no fields \['actoin'\]. It has \['obs', 'action', .*mean \['action'\]"
    ):
        import_episodes("flat", "source", tmp_path / "a", fields=["actoin"])
    with pytest.raises(TypeError, match=r"'flat' has no option `nmu` here. It has \['num', 'dtypes'\]. .*mean `num`\?"):
        import_episodes("flat", "source", tmp_path / "a", nmu=3)
    assert os.listdir(tmp_path) == []


def test_a_second_import_while_the_first_runs_says_that_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read_from, said = Reader.read_from, []

    def read(self: Reader, number: int) -> Any:
        for position, episode in enumerate(read_from(self, number), number):
            if position == 3 and not said:
                said.append(main(["import", "flat", "source", str(tmp_path / "a")]))
                said.append(capsys.readouterr().err)
            yield episode

    monkeypatch.setattr(Reader, "read_from", read)
    assert main(["import", "flat", "source", str(tmp_path / "a")]) == 0
    assert said[0] == 1 and "is being imported by another process: wait for it" in said[1]
    assert numbers(tmp_path / "a") == [*range(9)]


def test_the_command_says_after_ctrl_c_that_it_goes_on_and_again_that_all_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Reader, "fails_at", 5)
    command = ["import", "flat", "source", str(tmp_path / "a")]
    assert main(command) == 130
    assert "Stopped. The same command goes on where it stopped." in capsys.readouterr().err
    monkeypatch.setattr(Reader, "fails_at", -1)
    assert main(command) == 0 and "It was there already" not in capsys.readouterr().out
    assert main(command) == 0 and "It was there already" in capsys.readouterr().out
    assert import_episodes("flat", "source", tmp_path / "a").was_there
    assert numbers(tmp_path / "a") == [*range(9)]


def test_options_of_the_command_that_are_written_otherwise_are_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["import", "flat", "source", str(tmp_path / "a"), "--option"]
    assert main([*command, "fields=obs"]) == 1
    assert "Use --fields FIELD" in capsys.readouterr().err
    assert main([*command, "num=4,5"]) == 1
    assert "Lists are written as JSON: --option 'NAME=[4, 5, 6]'" in capsys.readouterr().err


def test_inspect_shows_the_info_of_an_episode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import_episodes("flat", "source", tmp_path / "a")
    assert main(["inspect", str(tmp_path / "a"), "--episode", "3"]) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == ["info    value", "-------------", "number  3"]


def test_what_is_no_directory_is_said_to_be_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for name, said in (("file", "is no directory"), ("nothing", "is not there")):
        assert main(["export", "npz", str(tmp_path / name), str(tmp_path / "out")]) == 1
        assert f"{name} {said}. Give a directory of episodes" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err == f"{tmp_path / 'file'} is no directory. Give one of episodes, or of saves.\n"


def test_an_origin_that_is_damaged_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import_episodes("flat", "source", tmp_path / "a", limit=2)
    (tmp_path / "a" / "origin.json").write_text(json.dumps({"format": "flat"}))
    with pytest.raises(FormatError, match="origin.json: is damaged"):
        import_episodes("flat", "source", tmp_path / "a", limit=2)
    assert main(["inspect", str(tmp_path / "a")]) == 0
    assert "origin.json: is damaged" in capsys.readouterr().out


def test_the_command_imports_and_inspect_says_from_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["import", "flat", "source", str(tmp_path / "a"), "--limit", "3", "--fields", "obs", "action"]
    assert main([*arguments, "--option", "num=5", "--option", "dtypes.obs=float64"]) == 0
    assert "3 episodes" in capsys.readouterr().out
    with IndividualFileDataset(directory=tmp_path / "a", mode="r") as dataset:
        assert list(dataset.fields) == ["obs", "action"] and dataset.get_episode(0)["obs"].numpy().dtype == np.float64
    assert main(["inspect", str(tmp_path / "a")]) == 0
    assert "Imported from: source (flat)\n- There is no seed." in capsys.readouterr().out
    assert main([*arguments[:4], "--option", "num"]) == 1
    assert "--option takes NAME=VALUE" in capsys.readouterr().err
    assert main(["export", "flat", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "is only read" in capsys.readouterr().err


def test_inspect_names_an_unfinished_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Reader, "fails_at", 5)
    with pytest.raises(KeyboardInterrupt):
        import_episodes("flat", "source", tmp_path / "a")
    assert main(["inspect", str(tmp_path / "a.importing")]) == 0
    assert "Part of an unfinished import from: source (flat)" in capsys.readouterr().out
