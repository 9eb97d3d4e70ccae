"""Files made to do harm: refused, or set aside; no code runs, nothing outside is touched, memory is bounded."""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import os
import pickle
import re
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from buffers.dataset import IndividualFileDataset
from buffers.dataset.fields import Fields
from buffers.dataset.files import serialization
from buffers.dataset.individual_file import (
    DamagedEpisodeError,
    SafetensorsSerialization,
    TorchSerialization,
)
from tests.format_helpers import FIELDS, STRATEGIES, made, same, saved


class Exploit:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return builtins.open, (str(self.path), "w")


def torch_archive(content: bytes) -> bytes:
    """What looks like a file of torch.save, with this pickle."""
    return zip_of({"archive/data.pkl": content, "archive/version": b"3\n"})


def zip_of(members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def hostile_npz(tmp_path: Path) -> dict[str, bytes]:
    schema = {"buffers.json": serialization.schema_text(FIELDS).encode()}
    episode = {f"{name}.npy": npy(value.numpy()) for name, value in made(FIELDS, 4).items()}
    header = npy(np.zeros((4, 4, 4, 3), np.uint8))[:128]
    objects = np.array([Exploit(tmp_path / "ran")] * 4, object)
    return {
        "objects": zip_of({**schema, **episode, "obs/speed.npy": npy(objects)}),
        "a bomb": zip_of({**schema, **episode, "obs/image.npy": header + bytes(100_000_000)}),
        "a bomb beside": zip_of({**schema, **episode, "more.npy": header + bytes(100_000_000)}),
        "a bomb as schema": zip_of({"buffers.json": bytes(100_000_000), **episode}),
        "a shape too large": zip_of({**schema, **episode, "obs/image.npy": npy(np.zeros((4, 2**20), np.uint8))[:300]}),
        "a table before the beginning": zip_of({**schema, **episode})[:-10] + b"\xff\xff\xff\x0f" + bytes(6),
        "a path": zip_of({**schema, **episode, "../../ran": b"x"}),
        "a pickle": pickle.dumps(Exploit(tmp_path / "ran")),
        "another compression": zip_of({**schema, **episode}, zipfile.ZIP_BZIP2),
        "a huge header": zip_of({**schema, **episode, "obs/speed.npy": b"\x93NUMPY\x02\0" + b"\xff" * 4 + bytes(10)}),
    }


def hostile_pt(tmp_path: Path) -> dict[str, bytes]:
    good = saved(TorchSerialization(), made(FIELDS, 4))
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (root,) = {name.split("/")[0] for name in members}
    bytearray_bomb = b"\x80\x02c__builtin__\nbytearray\nJ" + struct.pack("<i", 2**31 - 1) + b"\x85R."
    expanded = torch.zeros(1).expand(2**40)
    huge = io.BytesIO()
    torch.save({"buffers": serialization.schema_text(FIELDS), "episode": dict.fromkeys(FIELDS, expanded)}, huge)
    legacy = io.BytesIO()
    torch.save(made(FIELDS, 4), legacy, _use_new_zipfile_serialization=False)
    return {
        "a pickle": pickle.dumps(Exploit(tmp_path / "ran")),
        "a pickle inside": torch_archive(pickle.dumps({"buffers": Exploit(tmp_path / "ran")}, protocol=2)),
        "a later pickle inside": torch_archive(pickle.dumps({"buffers": Exploit(tmp_path / "ran")}, protocol=5)),
        "a bytearray": torch_archive(bytearray_bomb),
        "a large memo": torch_archive(b"\x80\x02}r" + struct.pack("<I", 2**32 - 1) + b"."),
        "encrypted": re.sub(rb"(?s)(PK\x01\x02....).", lambda match: match[1] + b"\1", good),
        "an expanded tensor": huge.getvalue(),
        "a legacy file": legacy.getvalue(),
        "a bomb": zip_of({**members, f"{root}/data/0": bytes(100_000_000)}),
        "a bomb, stored": zip_of({**members, f"{root}/data/0": bytes(10_000_000)}, zipfile.ZIP_STORED),
        "a tensor more": zip_of({**members, f"{root}/data/9": b"x"}, zipfile.ZIP_STORED),
        "another byte order": zip_of({**members, f"{root}/byteorder": b"big"}, zipfile.ZIP_STORED),
        "nothing": b"",
        "no episode": torch_archive(pickle.dumps({"a": 1}, protocol=2)),
    }


def hostile_safetensors(tmp_path: Path) -> dict[str, bytes]:
    good = saved(SafetensorsSerialization(), made(FIELDS, 4))
    size = int.from_bytes(good[:8], "little")
    header, rows = json.loads(good[8 : 8 + size]), good[8 + size :]

    def with_header(change: Callable[[Any], Any], raw: bytes | None = None) -> bytes:
        changed = json.loads(json.dumps(header))
        change(changed)
        data = json.dumps(changed).encode() if raw is None else raw
        return len(data).to_bytes(8, "little") + data + rows

    def of_speed(**values: Any) -> Callable[[Any], Any]:
        return lambda changed: changed["obs/speed"].update(values)

    schema = json.loads(header["__metadata__"]["buffers"])

    def with_schema(text: str | None = None, **values: Any) -> bytes:
        found = json.dumps({**schema, **values}) if text is None else text
        return with_header(lambda changed: changed["__metadata__"].update(buffers=found))

    image = {**schema["fields"][0], "shape": [2**40, 2**40]}
    return {
        "a pickle": pickle.dumps(Exploit(tmp_path / "ran")),
        "a huge header": (2**63).to_bytes(8, "little") + good[8:],
        "a header beyond the file": (2**20).to_bytes(8, "little") + good[8:],
        "no header": (0).to_bytes(8, "little") + good[8:],
        "a deep header": with_header(lambda _: None, b"[" * 1_000_000),
        "no JSON": with_header(lambda _: None, b"\xff" * size),
        "a key twice": with_header(lambda _: None, json.dumps(header)[:-1].encode() + b',"action":{}}'),
        "a schema that is deep": with_schema("[" * 100_000),
        "a path that is deep": with_schema(fields=[{**schema["fields"][0], "path": ["a"] * 5000}]),
        "a dtype that numpy deprecates": with_schema(fields=[{**schema["fields"][0], "dtype": "a4"}]),
        "a large shape": with_header(of_speed(shape=[2**62])),
        "a negative shape": with_header(of_speed(shape=[-4])),
        "a shape of strings": with_header(of_speed(shape=["4"])),
        "an offset outside": with_header(of_speed(data_offsets=[2**40, 2**40 + 16])),
        "an offset before": with_header(of_speed(data_offsets=[-16, 0])),
        "an overlap": with_header(of_speed(data_offsets=[0, 16])),
        "another dtype": with_header(of_speed(dtype="I32")),
        "no schema": with_header(lambda changed: changed.pop("__metadata__")),
        "a schema of no fields": with_schema(fields=[]),
        "a schema of huge fields": with_schema(fields=[image]),
    }


each_hostile = pytest.mark.parametrize(
    ("strategy", "make"), list(zip(STRATEGIES, (hostile_safetensors, hostile_npz, hostile_pt), strict=True))
)


@each_hostile
def test_hostile_files_run_nothing_and_take_no_memory(strategy, make, tmp_path, opened) -> None:
    for kind, content in make(tmp_path).items():
        file = opened(content)
        tracemalloc.start()
        for action in (strategy.check, strategy.load, strategy.verify):
            if action == strategy.check and strategy.suffix == ".npz":
                continue  # What is compressed is looked at when it is loaded.
            file.seek(0)
            with pytest.raises(DamagedEpisodeError):
                print(kind, action.__name__)
                action(file, FIELDS, 4)
        file.seek(0)
        with contextlib.suppress(DamagedEpisodeError):
            strategy.load_fields(file)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 60_000_000, (kind, peak)
        assert not (tmp_path / "ran").exists(), kind


@each_hostile
def test_hostile_files_are_set_aside_and_the_rest_is_served(strategy, make, tmp_path) -> None:
    path = tmp_path / "episodes"
    fields = Fields(FIELDS.unflatten(FIELDS))
    with IndividualFileDataset(90, None, None, path, strategy) as dataset:
        dataset.add_episode(FIELDS.unflatten(made(FIELDS, 4)))
    hostile = list(make(tmp_path).values())
    for number, content in enumerate(hostile, 1):
        (path / f"{number:010d}-{4 * number:012d}-4{strategy.suffix}").write_bytes(content)
    before = set(os.listdir(tmp_path))
    with pytest.warns(
        UserWarning, match=f"{len(hostile)} files in .* moved into the folder `damaged`: 00.*; and .* more"
    ):
        dataset = IndividualFileDataset(90, None, None, path, strategy, verify="full")
    assert dataset.fields is not None and dataset.fields.conflict_with(fields) is None
    assert dataset.num_episodes == 1 and len(os.listdir(path / "damaged")) == len(hostile)
    found = dict(zip(FIELDS, FIELDS.flatten(dataset.get_episode(0)), strict=True))
    assert same(found, made(FIELDS, 4))
    assert dataset.add_episode(FIELDS.unflatten(made(FIELDS, 2))) == len(hostile) + 1
    dataset.close()
    assert set(os.listdir(tmp_path)) == before and not (tmp_path / "ran").exists()
    IndividualFileDataset(90, None, None, path, strategy, verify="full").close()  # Warns no more.
