"""An export is there whole, or not at all, and says what it could not write."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from buffers import ReplayBuffer
from buffers.dataset import IndividualFileDataset, MixtureDataset, RingBufferDataset
from buffers.fields import Scalar
from buffers.interop import FORMATS, export_episodes, import_episodes, npz
from buffers.interop.alignment import FINAL_MISSING
from buffers.interop.exporting import Exporter, new_target
from buffers.interop.formats import module_of
from buffers.viewing.commands import main
from tests.interop.made_up import length_of, rows_of
from tests.tagged import assert_same_episode

NUM = 5


@pytest.fixture
def episodes(tmp_path: Path) -> Path:
    with IndividualFileDataset(1_000, directory=tmp_path / "episodes") as dataset:
        for number in range(NUM):
            dataset.add_episode(rows_of(number), {"number": number})
    return tmp_path / "episodes"


def test_an_export_is_imported_again_as_it_was(episodes: Path, tmp_path: Path) -> None:
    summary = export_episodes("npz", episodes, tmp_path / "out", limit=3)
    assert (summary.num_episodes, summary.num_steps) == (3, sum(length_of(number) + 1 for number in range(3)))
    import_episodes("npz", tmp_path / "out", tmp_path / "again", layout="dreamer", fields=["action", "reward"])
    with IndividualFileDataset(directory=tmp_path / "again", mode="r") as dataset:
        for number, found in enumerate(dataset.episodes()):
            assert_same_episode(found, {name: rows_of(number)[name] for name in ("action", "reward")})
    assert sorted(os.listdir(tmp_path)) == ["again", "episodes", "out"]


def test_the_command_exports(episodes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", "npz", str(episodes), str(tmp_path / "out"), "--limit", "2", "--option", "layout=exorl"]
    assert main(arguments) == 0
    assert "2 episodes" in capsys.readouterr().out and len(os.listdir(tmp_path / "out")) == 2
    assert main(arguments) == 1
    assert "exists. Choose another path" in capsys.readouterr().err
    assert main(["export", "npz", str(tmp_path / "nothing"), str(tmp_path / "else")]) == 1
    assert "nothing" in capsys.readouterr().err


def test_after_an_error_or_ctrl_c_nothing_is_left_and_a_killed_one_is_written_anew(tmp_path: Path) -> None:
    for error in (ValueError("no"), KeyboardInterrupt()):
        with pytest.raises(type(error)), new_target(tmp_path / "out") as work:
            os.makedirs(work)
            Path(work, "part").touch()
            raise error
        assert os.listdir(tmp_path) == []
    (tmp_path / "out.exporting" / "content").mkdir(parents=True)
    (tmp_path / "out.exporting" / "content" / "part").touch()  # Left by a kill.
    (tmp_path / "out.exporting" / ".lock").touch()
    with new_target(tmp_path / "out") as work:
        os.makedirs(work)
        Path(work, "whole").touch()
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["whole"]


def test_a_target_that_exists_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="exists. Choose another path"), new_target(tmp_path / "out"):
        raise AssertionError("not reached")
    assert (tmp_path / "out").read_text() == "mine"


def test_what_has_the_name_of_the_folder_of_an_export_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "out.exporting").mkdir()
    (tmp_path / "out.exporting" / "thesis").write_text("mine")
    with pytest.raises(ValueError, match="exists and is no export. Move it away"), new_target(tmp_path / "out"):
        raise AssertionError("not reached")
    assert (tmp_path / "out.exporting" / "thesis").read_text() == "mine"


def test_two_exports_to_one_target_do_not_meet(tmp_path: Path) -> None:
    with new_target(tmp_path / "out") as work:
        Path(work).write_text("first")
        with pytest.raises(RuntimeError, match="is being written to by"), new_target(tmp_path / "out"):
            raise AssertionError("not reached")
    assert (tmp_path / "out").read_text() == "first" and os.listdir(tmp_path) == ["out"]


def test_what_is_asked_for_must_be_there(episodes: Path, tmp_path: Path) -> None:
    dataset = IndividualFileDataset(directory=episodes, mode="r")
    with dataset, pytest.raises(ValueError, match=r"has no fields \['state'\]"):
        npz.write(dataset, tmp_path / "out", fields=["state"])
    with pytest.raises(TypeError, match="`fields` must be a sequence of names"):
        npz.write(dataset, tmp_path / "out", fields="obs")
    with pytest.raises(ValueError, match="There is no episode to write"):
        npz.write(RingBufferDataset(10), tmp_path / "out")
    ring = RingBufferDataset(10)
    ring.add_episode({"state": np.zeros(3), "action": np.zeros(3)})
    with pytest.raises(ValueError, match="Formats need the field `obs`"):
        npz.write(ring, tmp_path / "out")
    ring = RingBufferDataset(10)
    ring.add_episode({"obs": torch.zeros(3, dtype=torch.bfloat16), "action": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"\['obs'\] are bfloat16, which other formats do not have"):
        npz.write(ring, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_formats_that_can_be_written_are_offered(episodes: Path, tmp_path: Path) -> None:
    writable = [name for name in FORMATS if hasattr(module_of(name), "write")]
    for name in FORMATS:
        if name not in writable:
            with pytest.raises(ValueError, match=f"is only read. Write {', '.join(writable[:-1])} or {writable[-1]}"):
                export_episodes(name, episodes, tmp_path / "out")


def test_what_is_left_out_is_said() -> None:
    ring = RingBufferDataset(100)
    ring.add_episode({"obs": np.zeros(1), "action": np.zeros(1)})
    ring.add_episode({"obs": np.arange(3.0), "action": np.array([7.0, 1.0, 2.0])})
    exporter = Exporter(ring, "npz", "out")
    (found,) = exporter
    assert found.number == 0 and found.transitions.steps["action"].tolist() == [1, 2]
    assert [note.partition(",")[0] for note in exporter.notes] == ["Episodes of one row", "`action` of first rows"]
    assert exporter.summary().num_episodes == 1
    assert len([*exporter]) == 1 and exporter.summary().num_episodes == 1


def test_a_repeated_final_observation_is_not_exported_as_a_true_one_by_a_choice_of_fields(tmp_path: Path) -> None:
    ring, last = RingBufferDataset(100), np.array([False, False, True])
    ring.add_episode({"obs": np.zeros((3, 2)), "action": np.zeros(3), "final_obs_missing": last})
    npz.write(ring, tmp_path / "out", fields=["obs", "action"])
    (rows, _) = next(iter(npz.read(tmp_path / "out", layout="dreamer")))
    assert rows["final_obs_missing"].tolist() == last.tolist()


def test_pieces_of_a_stream_are_said() -> None:
    buffer = ReplayBuffer(RingBufferDataset(100), batch_size=1, num_envs=1, max_episode_length=4, overlap=1)
    for step in range(9):
        buffer.add_step({"obs": float(step), "action": 0.0}, False)
    assert "Pieces that `max_episode_length` cut" in Exporter(buffer.dataset, "npz", "out").notes.texts[0]


def test_each_transition_of_overlapping_pieces_is_written_once() -> None:
    for overlap in (1, 2, 3):
        buffer = ReplayBuffer(RingBufferDataset(100), batch_size=1, num_envs=1, max_episode_length=5, overlap=overlap)
        for step in range(12):
            buffer.add_step({"obs": float(step), "action": step}, step == 11)
        exporter = Exporter(buffer.dataset, "hdf5", "out")
        found = [episode.transitions for episode in exporter]
        assert len(found) > 2
        assert np.concatenate([one.steps["action"] for one in found]).tolist() == [*range(1, 12)]
        for one in found:
            assert one.observations[1:].tolist() == one.steps["action"].tolist()
            assert (one.observations[:-1] + 1).tolist() == one.steps["action"].tolist()
        assert any("are written once" in note for note in exporter.notes) == (overlap > 1)
        assert not any("first rows" in note for note in exporter.notes)
        assert exporter.summary().num_steps == 11 + len(found)


def test_marks_are_read_whatever_is_chosen() -> None:
    ring = RingBufferDataset(100)
    is_last = np.arange(4) == 3
    ring.add_episode({"obs": np.zeros(4), "action": np.arange(4), "is_first": is_last[::-1], FINAL_MISSING: is_last})
    (found,) = Exporter(ring, "npz", "out", fields=["obs", "action"])
    assert found.transitions.final_missing
    ring.add_episode({"obs": np.zeros(4), "action": np.arange(4), "is_first": is_last, FINAL_MISSING: is_last})
    with pytest.raises(ValueError, match="A row behind row 0 has `is_first`"):
        list(Exporter(ring, "npz", "out", fields=["obs", "action"]))


def test_a_missing_final_observation_stays_missing_without_its_mark_in_fields(tmp_path: Path) -> None:
    with IndividualFileDataset(100, directory=tmp_path / "episodes") as dataset:
        rows = rows_of(3)
        rows[FINAL_MISSING] = np.arange(len(rows["obs"])) == len(rows["obs"]) - 1
        dataset.add_episode(rows)
    for format, name in (("npz", "out"), ("hdf5", "out.hdf5")):
        export_episodes(format, tmp_path / "episodes", tmp_path / name, fields=["obs", "action", "reward"])
        with module_of(format).read(tmp_path / name) as reader:
            (found,) = reader
        assert found.rows[FINAL_MISSING].tolist() == rows[FINAL_MISSING].tolist()


def test_episodes_that_are_gone_are_counted(episodes: Path, tmp_path: Path) -> None:
    with IndividualFileDataset(directory=episodes, mode="r") as dataset:
        _, gone, damaged, *_ = sorted(episodes.glob("*.safetensors"))
        gone.unlink()
        damaged.write_bytes(damaged.read_bytes()[:-9])
        with pytest.warns(UserWarning, match="are no whole episodes"):
            summary = npz.write(dataset, tmp_path / "out")
    assert summary.num_episodes == NUM - 2
    assert any(text.startswith("2 of 5 episodes could not be read any more") for text in summary.lost)


def test_late_fields_are_said_to_be_left_out(episodes: Path, tmp_path: Path) -> None:
    with IndividualFileDataset(1_000, directory=episodes) as dataset:
        dataset.add_late_field("value", Scalar(), default=2.0)
    assert "The late fields ['value'] are left out." in export_episodes("npz", episodes, tmp_path / "out").lost
    with pytest.raises(ValueError, match=r"The late fields \['value'\] cannot be written"):
        export_episodes("npz", episodes, tmp_path / "other", fields=["obs", "value"])


def test_a_mixture_is_refused(episodes: Path, tmp_path: Path) -> None:
    with IndividualFileDataset(directory=episodes, mode="r") as dataset:
        mixture: Any = MixtureDataset([dataset, dataset], weights=[0.5, 0.5])
        with pytest.raises(TypeError, match="found a MixtureDataset. Write its members"):
            npz.write(mixture, tmp_path / "out")


def test_a_link_to_an_empty_directory_is_a_place_for_an_export(episodes: Path, tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "place")
    export_episodes("npz", episodes, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and len(os.listdir(tmp_path / "place")) == NUM
    assert sorted(os.listdir(tmp_path)) == ["episodes", "link", "place"]
