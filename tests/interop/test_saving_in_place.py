"""A save of what is read in place holds no rows: loading opens the path again, as before, and restores late values."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from buffers import ReplayBuffer
from buffers.dataset import MixtureDataset, RingBufferDataset
from buffers.dataset.episode_source import EpisodeSource
from buffers.fields import Scalar
from buffers.interop import InPlaceDataset, hdf5, lerobot, ogbench, torchrl
from buffers.sampler import PrioritizedSampler
from buffers.saving import DamagedSaveError
from tests.interop import hdf5_files, lerobot_helpers, test_ogbench, test_torchrl
from tests.saving_helpers import contents


def open_hdf5(folder: Path) -> InPlaceDataset:
    path = hdf5_files.unpacked(folder) / "robomimic.hdf5"
    return hdf5.open(path, layout="robomimic", mask="two", fields=["obs/image", "action"])


def open_lerobot(folder: Path) -> InPlaceDataset:
    return lerobot.open(lerobot_helpers.written(folder), fields=("action", "obs"), cache_bytes=1 << 16)


def open_ogbench(folder: Path) -> InPlaceDataset:
    return ogbench.open(test_ogbench.stored(folder, "raw"), fields=["obs", "is_first"])


def open_torchrl(folder: Path) -> InPlaceDataset:
    with tarfile.open(test_torchrl.MADE) as archive:
        archive.extractall(folder, filter="data")
    return torchrl.open(folder / "blocks", fields=["obs", "action"], gaps="split")


OPENERS = [open_hdf5, open_lerobot, open_ogbench, open_torchrl]
each_format = pytest.mark.parametrize("opener", OPENERS)


def same(one: Any, other: Any) -> bool:
    return all(map(torch.equal, tree_leaves(one), tree_leaves(other)))


@each_format
def test_a_save_opens_the_same_path_with_the_same_options(
    opener: Callable[[Path], InPlaceDataset], tmp_path: Path
) -> None:
    with opener(tmp_path) as opened:
        opened.save(tmp_path / "saves")
        loaded = type(opened).load(tmp_path / "saves")
        assert loaded.fields == opened.fields and contents(loaded) == contents(opened)
        assert loaded.describe_store() == opened.describe_store()
        ring = RingBufferDataset(1000)
        for episode in opened.episodes():
            ring.add_episode(episode)
        buffer = ReplayBuffer(MixtureDataset([opened, ring], [0.5, 0.5]), 8, 2, seed=0)
        buffer.save(tmp_path / "mixture")
        resumed = ReplayBuffer.load(tmp_path / "mixture")
        assert all(same(buffer.sample(), resumed.sample()) for _ in range(3))
        loaded.close()
        resumed.dataset.datasets[0].close()


def test_a_process_that_has_imported_no_format_loads_it(tmp_path: Path) -> None:
    with open_ogbench(tmp_path) as opened:
        ReplayBuffer(opened, 2).save(tmp_path / "saves")
    code = (
        "import sys; from buffers import ReplayBuffer; assert 'buffers.interop' not in sys.modules; "
        f"print(type(ReplayBuffer.load({str(tmp_path / 'saves')!r}).dataset).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "OGBenchDataset"


def test_a_source_that_has_moved_is_passed_and_the_error_says_so(tmp_path: Path) -> None:
    with open_ogbench(tmp_path) as opened:
        ReplayBuffer(opened, 2, seed=0).save(tmp_path / "saves")
        expected = [episode["obs"].tolist() for episode in opened.episodes()]
    (tmp_path / "raw.npz").rename(tmp_path / "moved.npz")
    with pytest.raises(ValueError, match="raw.npz.* cannot be opened again .* pass that as `dataset=`") as caught:
        ReplayBuffer.load(tmp_path / "saves")
    assert not isinstance(caught.value, DamagedSaveError)
    with ogbench.open(tmp_path / "moved.npz", fields=["obs", "is_first"]) as moved:
        ReplayBuffer.load(tmp_path / "saves", moved)
        assert [episode["obs"].tolist() for episode in moved.episodes()] == expected


def test_a_save_that_names_another_module_is_answered_by_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stranger(ogbench.OGBenchDataset):
        """Not of the package."""

    for module in ("buffers.interop.nothing", "os", "buffers.__main__"):
        monkeypatch.setattr(Stranger, "__module__", module)
        with open_ogbench(tmp_path) as opened:
            opened.__class__ = Stranger
            opened.save(tmp_path / module)
        with pytest.raises(
            ValueError, match="The save is of a Stranger, .*: open .*raw.npz again, as before, and pass it"
        ):
            EpisodeSource.load(tmp_path / module)


def prioritized(opened: InPlaceDataset) -> ReplayBuffer:
    buffer = ReplayBuffer(opened, 8, 2, sampler=PrioritizedSampler(), include=("index", "weight"), seed=0)
    opened.add_late_field("value", Scalar(), 7)
    index = buffer.sample()["index"]
    buffer.update_priorities(index, torch.arange(1, 17).reshape(8, 2).float())
    opened.update(index, {"value": index.float()})
    return buffer


@each_format
def test_priorities_and_late_fields_are_as_they_were(opener: Callable[[Path], InPlaceDataset], tmp_path: Path) -> None:
    with opener(tmp_path) as opened:
        buffer = prioritized(opened)
        buffer.save(tmp_path / "saves")
        resumed = ReplayBuffer.load(tmp_path / "saves", sampler=PrioritizedSampler())
        assert contents(resumed.dataset) == contents(opened)
        assert all(same(buffer.sample(), resumed.sample()) for _ in range(3))
        resumed.dataset.close()


def test_values_that_are_updated_while_a_save_is_written_are_saved_as_they_were(tmp_path: Path) -> None:
    with open_ogbench(tmp_path) as opened:
        buffer = prioritized(opened)
        expected = contents(opened)
        begin = type(opened).begin_save

        def update_at_once(unsaved: Any) -> None:
            begin(opened, unsaved)
            unsaved.late.begin = lambda begin=unsaved.late.begin: (
                begin(),
                opened.update([0, 1], {"value": [1.0, 2.0]}),
            )

        opened.begin_save = update_at_once  # type: ignore[method-assign]
        buffer.save(tmp_path / "saves")
        with ReplayBuffer.load(tmp_path / "saves", sampler=None).dataset as loaded:
            assert contents(loaded) == expected != contents(opened)


@pytest.mark.parametrize("has_late", [False, True])
def test_other_lengths_under_the_same_ids_are_noticed_and_late_values_stay_with_their_episodes(
    has_late: bool, tmp_path: Path
) -> None:
    def stored(*lengths: int) -> InPlaceDataset:
        ends = np.cumsum(lengths)
        flags = np.isin(np.arange(ends[-1]), ends - 1)
        rows = np.arange(ends[-1], dtype=np.float32)[:, None]
        np.savez(tmp_path / "file.npz", observations=rows, actions=rows, terminals=flags)
        return ogbench.open(tmp_path / "file.npz")

    with stored(4, 5, 6) as opened:
        if has_late:
            opened.add_late_field("value", Scalar(), -1)
            opened.update(np.arange(15), {"value": np.arange(15, dtype=np.float32)})
        opened.save(tmp_path / "saves")
    stored(4, 3, 6).close()
    dropped = "Late fields of those that are gone, or have another length, are dropped" if has_late else "have come\\.$"
    with pytest.warns(UserWarning, match=f"of 3, 2 are there with the same id and length, and 1 others.*{dropped}"):
        loaded = type(opened).load(tmp_path / "saves")
    if has_late:
        values = loaded.late["value"].rows(np.arange(13)).tolist()
        assert values == [0, 1, 2, 3, -1, -1, -1, 9, 10, 11, 12, 13, 14]
