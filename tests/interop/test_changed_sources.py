"""An import goes on, or is there already, only if the files of its source are those that they were."""

from __future__ import annotations

import os
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from buffers.interop import import_episodes
from buffers.interop.fingerprint import fingerprint
from tests.interop import lerobot_helpers
from tests.interop.made_up import killed_before

DATA = Path(__file__).parents[1] / "data" / "interop"


def flat(folder: Path) -> Path:
    folder.mkdir()
    for name in ("observations", "actions", "terminals"):
        np.save(folder / f"{name}.npy", (np.arange(12) % 6 == 5).astype(np.float32))
    return folder


def unzipped(archive: str, below: str, folder: Path) -> Path:
    with zipfile.ZipFile(DATA / archive) as file:
        file.extractall(folder)
    return folder / below


def torchrl(folder: Path) -> Path:
    with tarfile.open(DATA / "torchrl" / "cases.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "blocks"


#: Format and what makes a source of it, options, and the names of some files that are read.
SOURCES: list[tuple[str, Any, dict[str, Any], str]] = [
    ("flat", flat, {"convention": "transitions"}, "*.npy"),
    ("hdf5", lambda folder: unzipped("hdf5/files.zip", "robomimic.hdf5", folder), {}, ""),
    ("lerobot", lerobot_helpers.written, {}, "*/**/*.parquet"),
    ("minari", lambda folder: unzipped("minari/recorded.zip", "hdf5", folder), {}, "data/*"),
    ("minari", lambda folder: unzipped("minari/recorded.zip", "arrow", folder), {}, "data/**/*.arrow"),
    ("npz", lambda folder: Path(shutil.copytree(DATA / "npz" / "dreamerv2_replay", folder)), {}, "*.npz"),
    ("npz", lambda folder: Path(shutil.copytree(DATA / "npz" / "dreamerv3_replay", folder)), {}, "*-5.npz"),
    ("rlds", lambda folder: unzipped("rlds/datasets.zip", "arm/arm/0.1.0", folder), {}, "*"),
    ("torchrl", torchrl, {}, "storage/**/*.memmap"),
]


@pytest.fixture(params=SOURCES, ids=lambda case: f"{case[0]}-{case[3]}")
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, dict[str, Any], list[Path]]:
    name, make, options, pattern = request.param
    source = make(tmp_path / "source")
    return name, source, options, sorted(source.glob(pattern)) if pattern else [source]


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_file_that_has_changed_is_noticed_and_one_that_is_not_read_does_not_matter(
    is_finished: bool, case: Any, tmp_path: Path
) -> None:
    name, source, options, files = case
    if is_finished:
        import_episodes(name, source, tmp_path / "a", **options)
    else:
        with killed_before(1):
            import_episodes(name, source, tmp_path / "a", **options)
    (source.parent / ".state").touch()
    for path in files[:5]:
        before = path.stat()
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
        with pytest.raises(ValueError, match="has changed since .* was imported from it"):
            import_episodes(name, source, tmp_path / "a", **options)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert files and import_episodes(name, source, tmp_path / "a", **options).num_episodes > 1


def test_names_and_sizes_count_and_hidden_files_do_not(tmp_path: Path) -> None:
    def made(**files: str) -> str | None:
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        for name, text in files.items():
            path = tmp_path / "x" / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            os.utime(path, ns=(1, 1))
        return fingerprint([str(tmp_path / "x")])

    same = made(a="1", b__c="2")
    assert same is not None and made(b__c="2", a="1") == same
    (tmp_path / "x" / ".hidden").touch()
    (tmp_path / "x" / "gone").symlink_to("nothing")
    assert fingerprint([str(tmp_path / "x")]) == same
    others = [made(a="1", b__d="2"), made(a="1", b__c="22"), made(a="1", b="2"), made(a="1")]
    assert len({same, *others}) == 5 and fingerprint([str(tmp_path / "nothing")]) is None
