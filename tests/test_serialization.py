"""The formats: what other tools read, and what damaged and hostile files do."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers.dataset import IndividualFileDataset
from buffers.dataset.fields import ColorImage, Fields, PaddedPointcloud, Scalar, TensorType, Vector
from buffers.dataset.files import archives, serialization
from buffers.dataset.individual_file import (
    DamagedEpisodeError,
    EpisodeSerializationStrategy,
    NumpyCompressedSerialization,
    SafetensorsSerialization,
    TorchSerialization,
    UnknownVersionError,
)
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.disk import DTYPES
from tests import tagged
from tests.file_helpers import add, files, numbers
from tests.format_helpers import FIELDS, STRATEGIES, each_strategy, made, same, saved

SHAPES = st.lists(st.integers(0, 12), max_size=3).map(tuple)
DTYPES = st.sampled_from(sorted(DTYPES))
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8)
TYPES = st.builds(lambda shape, dtype: TensorType(shape, getattr(torch, dtype)), SHAPES, DTYPES)
ALL_FIELDS = st.dictionaries(NAMES, TYPES, min_size=1, max_size=5).map(Fields)


@each_strategy
@given(fields=ALL_FIELDS, length=st.integers(1, 120))
@settings(max_examples=60, deadline=None)
def test_whatever_can_be_a_field_comes_back(strategy, fields, length) -> None:
    episode = made(fields, length)
    with os.fdopen(os.memfd_create("episode"), "w+b", buffering=0) as file:
        file.write(saved(strategy, episode, fields))
        for action in (strategy.check, strategy.verify):
            file.seek(0)
            action(file, fields, length)
        file.seek(0)
        found = strategy.load(file, fields, length)
        file.seek(0)
        stated = strategy.load_fields(file)
    assert same(found, episode)
    assert stated is not None
    assert list(stated.items()) == list(fields.items()) and stated.paths == fields.paths


@given(fields=ALL_FIELDS, length=st.one_of(st.integers(1, 9), st.integers(9_990, 10_010)))
@settings(max_examples=60, deadline=None)
def test_the_size_of_a_safetensors_file_is_within_its_bounds(fields, length) -> None:
    strategy = SafetensorsSerialization()
    least, most = strategy.overhead(fields)
    assert least <= len(saved(strategy, made(fields, length), fields)) - length * fields.nbytes <= most


def test_a_library_with_other_headers_is_read_all_the_same(tmp_path, monkeypatch) -> None:
    real = safetensors.torch.save

    def spaced(tensors: Any, metadata: Any) -> bytes:
        content = real(tensors, metadata)
        size = int.from_bytes(content[:8], "little")
        header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, indent=50).encode()
        return len(header).to_bytes(8, "little") + header + content[8 + size :]

    with IndividualFileDataset(30, directory=tmp_path) as dataset:
        dataset.add_episode(tagged.episode(4, 0))
    monkeypatch.setattr(safetensors.torch, "save", spaced)
    for number in (1, 2):
        with IndividualFileDataset(30, directory=tmp_path) as dataset:
            dataset.add_episode(tagged.episode(5, number))
            found = numbers(dataset)
            assert found == [(0, 4), (1, 5), (2, 5)][: number + 1]


def test_a_torch_that_writes_something_else_is_found_out_when_adding(tmp_path, monkeypatch) -> None:
    def in_another_order(content: Any, file: Any) -> None:
        real({**content, "episode": dict(reversed(content["episode"].items()))}, file)

    real = torch.save
    monkeypatch.setattr(torch, "save", in_another_order)
    with IndividualFileDataset(30, None, None, tmp_path, TorchSerialization()) as dataset:
        for episode, message in (({"a": np.zeros(4), "b": np.ones(4)}, "belongs"), (tagged.episode(4, 0), "4 rows in")):
            with pytest.raises(ValueError, match=message):
                dataset.add_episode(episode)
        assert files(tmp_path) == []


def test_other_tools_read_the_files(tmp_path) -> None:
    episode = made(FIELDS, 7)
    contents = {strategy.suffix: saved(strategy, episode) for strategy in STRATEGIES}
    for suffix, content in contents.items():
        (tmp_path / f"episode{suffix}").write_bytes(content)
    assert same(safetensors.torch.load_file(tmp_path / "episode.safetensors"), episode)
    with np.load(tmp_path / "episode.npz") as found:
        assert same({name: torch.from_numpy(found[name]) for name in FIELDS}, episode)
    assert same(torch.load(tmp_path / "episode.pt")["episode"], episode)


def test_a_users_own_types_become_their_base() -> None:
    class Lidar(Vector):
        pass

    fields = Fields(a={"b": PaddedPointcloud((5, 4)), "c": ColorImage((3, 8, 8))}, d=Lidar((3,)), e=Scalar())
    found, _ = serialization.parse_schema(serialization.schema_text(fields))
    assert [type(field) for field in found.values()] == [PaddedPointcloud, ColorImage, Vector, Scalar]


# Damage.


def served(strategy: EpisodeSerializationStrategy, file: io.FileIO, length: int, is_verified: bool) -> Any:
    """What a reader gets of a file; None if it is refused."""
    try:
        strategy.check(file, FIELDS, length)
        if is_verified:
            file.seek(0)
            strategy.verify(file, FIELDS, length)
        file.seek(0)
        return strategy.load(file, FIELDS, length)
    except DamagedEpisodeError:
        return None


@each_strategy
def test_a_file_cut_short_at_any_length_is_refused(strategy, opened) -> None:
    content = saved(strategy, made(FIELDS, 5))
    for size in range(len(content)):
        assert served(strategy, opened(content[:size]), 5, is_verified=False) is None, size
    assert served(strategy, opened(content + b"\0"), 5, is_verified=False) is None or strategy.suffix != ".safetensors"
    assert same(served(strategy, opened(content), 5, is_verified=True), made(FIELDS, 5))


def wrong_flips(
    strategy: EpisodeSerializationStrategy, opened: Any, bits: Iterator[tuple[int, int]], is_verified: bool
) -> list[tuple[int, int]]:
    """The bits that, flipped, let something else be served than what was written."""
    episode = made(FIELDS, 3)
    content = bytearray(saved(strategy, episode))
    wrong = []
    for position, bit in bits:
        if position < len(content):
            content[position] ^= 1 << bit
            found = served(strategy, opened(bytes(content)), 3, is_verified)
            if found is not None and not same(found, episode):
                wrong.append((position, bit))
            content[position] ^= 1 << bit
    return wrong


def test_every_bit_of_a_header_may_flip(opened) -> None:
    strategy = SafetensorsSerialization()
    size = 8 + int.from_bytes(saved(strategy, made(FIELDS, 3))[:8], "little")
    assert wrong_flips(strategy, opened, itertools.product(range(size), range(8)), is_verified=False) == []


@each_strategy
def test_a_flipped_bit_anywhere_is_found_by_the_checksum(strategy, opened) -> None:
    bits = [(position, position % 8) for position in range(0, 20_000, 3)]
    assert wrong_flips(strategy, opened, iter(bits), is_verified=True) == []
    if isinstance(strategy, SafetensorsSerialization):  # In archives, loading alone finds it.
        assert wrong_flips(strategy, opened, iter(bits), is_verified=False) != []


@each_strategy
def test_lies_about_shapes_dtypes_and_fields_are_refused(strategy, opened, monkeypatch) -> None:
    def refused(content: bytes, length: int = 4, fields: Fields = FIELDS) -> None:
        for action in (strategy.load, strategy.verify):
            with pytest.raises(DamagedEpisodeError):
                action(opened(content), fields, length)

    good = made(FIELDS, 4)
    refused(saved(strategy, good), length=5)
    refused(saved(strategy, good), length=3)
    others = [
        Fields(obs={"image": ColorImage((4, 4, 3)), "speed": Scalar()}),
        Fields(obs={"image": ColorImage((4, 4, 3)), "speed": Scalar()}, action=Vector(2, torch.int64)),
        Fields(obs={"image": ColorImage((4, 4, 3)), "speed": Scalar()}, action=Vector(3, torch.float64)),
        Fields(obs={"image": TensorType((3, 16)), "speed": Scalar()}, action=Vector(2, torch.float64)),
    ]
    for fields in others:
        refused(saved(strategy, made(fields, 4), fields))
        if strategy.suffix == ".pt" and fields.nbytes == FIELDS.nbytes:
            continue  # Only sizes are compared with the schema there.
        # A schema that says what is expected, over rows that are something else.
        with monkeypatch.context() as patch:
            patch.setattr(
                archives.TorchSerialization, "_find_members", lambda *_: {}
            )  # Writing such a file is refused, too.
            lie = saved(strategy, made(fields, 4), FIELDS)
        refused(lie)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b", "file", "C:\\x", ".", "x.npy", "buffers", 'é\n"'])
@each_strategy
def test_names_of_fields_never_become_paths(strategy, name, tmp_path) -> None:
    path = tmp_path / "outer" / "episodes"
    episode = {name: np.arange(4), "b": np.ones(4)}
    with IndividualFileDataset(9, None, None, path, strategy) as dataset:
        dataset.add_episode(episode)
    with IndividualFileDataset(9, None, None, path, strategy, verify="full") as dataset:
        assert dataset.get_episode(0)[name].tolist() == [0, 1, 2, 3]
    assert os.listdir(tmp_path) == ["outer"] and os.listdir(tmp_path / "outer") == ["episodes"]
    assert sorted(os.listdir(path)) == [".lock", f"0000000000-000000000000-4{strategy.suffix}"]


@pytest.mark.parametrize(
    ("strategy", "name", "message"),
    [
        (SafetensorsSerialization(), "__metadata__", "a name that safetensors keeps for itself"),
        (NumpyCompressedSerialization(), "a\0b", "NUL in its name"),
        (NumpyCompressedSerialization(), "\ud800", "surrogates not allowed"),
        (SafetensorsSerialization(), "\ud800", "surrogates not allowed"),
    ],
)
def test_a_name_that_a_format_cannot_hold_is_refused(strategy, name, message, tmp_path) -> None:
    with IndividualFileDataset(9, None, None, tmp_path, strategy) as dataset:
        with pytest.raises(ValueError, match=message):
            dataset.add_episode({name: np.arange(4)})
        assert os.listdir(tmp_path) == [".lock"] and dataset.fields is None
        dataset.add_episode({"b": np.arange(4)})


# Versions.


def as_version(content: bytes, version: int) -> bytes:
    return content.replace(b'{\\"version\\":1,', b'{\\"version\\":%d,' % version)


def test_a_directory_of_a_later_version_is_an_error(tmp_path) -> None:
    with IndividualFileDataset(90, directory=tmp_path) as dataset:
        add(dataset, [4, 4])
    names = files(tmp_path)
    contents = [(tmp_path / name).read_bytes() for name in names]
    for name, content in zip(names, contents, strict=True):
        (tmp_path / name).write_bytes(as_version(content, 2))
    with pytest.raises(ValueError, match="No episode of .* can be read: .* is of version 2 of the format; .* knows 1"):
        IndividualFileDataset(90, directory=tmp_path)
    assert sorted(name for name in os.listdir(tmp_path) if name.startswith("0")) == names
    (tmp_path / names[0]).write_bytes(contents[0])
    with pytest.raises(ValueError, match="/0000000001-.* is of version 2 of the format; .* Nothing was changed"):
        IndividualFileDataset(90, directory=tmp_path, verify="header")
    assert sorted(name for name in os.listdir(tmp_path) if name.startswith("0")) == names
    with pytest.raises(UnknownVersionError, match="version 7"):
        serialization.parse_schema('{"version":7}')


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
@pytest.mark.parametrize(
    ("strategy", "library", "old", "least"),
    [(STRATEGIES[0], safetensors, "0.5.3", "0.6.1"), (STRATEGIES[2], torch, "2.5.1+cpu", "2.6")],
)
def test_a_dtype_that_needs_a_later_library_is_refused_beforehand(
    tmp_path, monkeypatch, strategy, library, old, least, dtype
) -> None:
    info, episode = EpisodeDatasetInfo(Fields(x=Scalar(dtype=dtype))), {"x": torch.arange(4).to(dtype)}
    with IndividualFileDataset(90, None, None, tmp_path / "full", strategy) as dataset:
        dataset.add_episode(episode)
    monkeypatch.setattr(library, "__version__", old)
    name = library.__name__
    message = rf"`x` has dtype {dtype}, which {name} {re.escape(old)} cannot store: install `{name}>={least}`"
    for path, stated, mode in (("full", None, "a"), ("full", None, "r"), ("new", info, "a")):
        with pytest.raises(ValueError, match=message):
            IndividualFileDataset(90, stated, None, tmp_path / path, strategy, mode=mode)
    with IndividualFileDataset(90, None, None, tmp_path / "new", strategy) as dataset:
        with pytest.raises(ValueError, match=message):
            dataset.add_episode(episode)
        dataset.add_episode({"x": np.arange(4)})
    assert len(os.listdir(tmp_path / "full")) == 2  # The lock, too.
