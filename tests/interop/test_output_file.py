"""A disk that is full while HDF5 is written is an error that says so, and leaves nothing."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from buffers.dataset import IndividualFileDataset, RingBufferDataset
from buffers.interop import hdf5, minari
from buffers.interop.output_file import OutputFile
from tests.interop.made_up import rows_of

NUM = 40
WRITES: dict[str, tuple[Any, dict[str, Any]]] = {
    "hdf5": (hdf5, {}),
    "gzip": (hdf5, {"compression": "gzip"}),
    "minari": (minari, {}),
}
# Run in a process of its own, which HDF5 may end. The limit stands for a disk that stays full.
EXPORT = """
import resource, sys
from buffers.interop import export_episodes
format, source, target, limit = sys.argv[1:]
export_episodes(format, source, target + ".first")  # Imports all that is needed.
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    export_episodes(format, source, target)
except OSError as error:
    print(error.errno, error)
"""


def ring() -> RingBufferDataset:
    found = RingBufferDataset(1_000)
    for number in range(NUM):
        found.add_episode(rows_of(number), {"number": number})
    return found


@pytest.fixture(scope="module")
def episodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("episodes") / "episodes"
    with IndividualFileDataset(1_000, directory=path) as dataset:
        for number in range(NUM):
            dataset.add_episode(rows_of(number), {"number": number})
    return path


class Disk:
    """A file on a disk on which there is room for so many bytes, and for all again behind `num_errors` errors."""

    def __init__(self, file: Any, room: int, num_errors: int) -> None:
        self.file, self.room, self.num_errors = file, room, num_errors
        self.num_bytes = 0  # Written.

    def write(self, data: Any) -> int:
        if not self.room and self.num_errors:
            self.num_errors -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        if self.num_errors:
            data = data[: self.room]
            self.room -= len(data)
        self.num_bytes += len(data)
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("kind", WRITES)
def test_an_error_of_the_disk_at_any_time_is_raised_and_leaves_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, options = WRITES[kind]
    dataset, disks = ring(), []
    disk = {"room": 1 << 30, "num_errors": 0}
    open_file = OutputFile.__init__

    def opened(self: OutputFile, path: str) -> None:
        open_file(self, path)
        disks.append(Disk(self._file, **disk))
        self._file = disks[-1]

    monkeypatch.setattr(OutputFile, "__init__", opened)
    module.write(dataset, tmp_path / "whole", **options)
    size = disks.pop().num_bytes
    assert not disks and size > 10_000
    for room, num_errors in product((0, 100, size // 3, size - 1000, size - 1), (1, 1 << 30)):
        disk.update(room=room, num_errors=num_errors)
        with pytest.raises(OSError, match="Make room, or choose another place") as found:
            module.write(dataset, tmp_path / "out", **options)
        assert found.value.errno == errno.ENOSPC and str(tmp_path / "out") in str(found.value)
        assert os.listdir(tmp_path) == ["whole"]


@pytest.mark.parametrize("format", ["hdf5", "minari"])
def test_a_disk_that_stays_full_does_not_end_the_process(format: str, episodes: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", EXPORT, format, str(episodes), str(tmp_path / "out"), str(20_000)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.split()[:1]) == (0, [str(errno.EFBIG)]), done
    assert "Make room, or choose another place" in done.stdout
    assert os.listdir(tmp_path) == ["out.first"]


def test_what_is_written_is_what_hdf5_writes_itself(tmp_path: Path) -> None:
    for name, target in (("a", OutputFile(str(tmp_path / "a"))), ("b", str(tmp_path / "b"))):
        with h5py.File(target, "w") as file:
            file["x"], file.attrs["y"] = np.arange(10_000), "text"
            file.create_dataset("z/z", data=np.zeros((300, 300)), compression="gzip")
        if name == "a":
            assert isinstance(target, OutputFile)
            target.__exit__(None, None, None)
    with h5py.File(tmp_path / "a") as one, h5py.File(tmp_path / "b") as other:
        for found, expected in ((one["x"], other["x"]), (one["z/z"], other["z/z"])):
            np.testing.assert_array_equal(found[()], expected[()])
        assert one.attrs["y"] == "text" and one["x"].id.get_offset() is not None


def test_an_interrupt_is_not_replaced_by_an_error_of_the_disk(tmp_path: Path) -> None:
    for error, raised in ((RuntimeError("of h5py"), OSError), (KeyboardInterrupt(), KeyboardInterrupt)):
        output = OutputFile(str(tmp_path / raised.__name__))
        with pytest.raises(raised), output:
            output._file = Disk(output._file, 0, 1)
            assert output.write(b"abc") == 3 and output.read(3) == b"\0\0\0"
            with pytest.raises(OSError, match="No space"):
                output.check()
            raise error
