"""The info of episodes: it comes back as it was given, from every dataset, and never with another episode."""

from __future__ import annotations

import contextlib
import enum
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers import ReplayBuffer
from buffers.dataset import EpisodeDataset, IndividualFileDataset, MixtureDataset, RingBufferDataset
from buffers.dataset.fields import Fields
from buffers.dataset.files import serialization
from buffers.dataset.files.safetensors_format import SafetensorsSerialization
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.writer import EpisodeWriter
from tests import tagged
from tests.faults import in_child, status_of
from tests.file_helpers import files
from tests.format_helpers import FIELDS, STRATEGIES, each_strategy, made, saved
from tests.list_dataset import ListDataset
from tests.logged_game import FlakyRing
from tests.reading import handle_of, reader_of
from tests.test_individual_file import Raw
from tests.test_writer import Reference

INFO = {"task": "open drawer", "success": True, "seed": -(2**63), "return": 0.1}

infos = st.dictionaries(
    st.text(st.characters(), min_size=1, max_size=8),
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(st.characters(), max_size=20),
    max_size=4,
)


def row(number: int, length: int = 1) -> dict[str, Any]:
    return {"number": np.full(length, number)}


def exactly(info: Mapping[str, Any]) -> list[tuple[str, type, str]]:
    """To be compared: true is not 1, and NaN is NaN."""
    return [(key, type(value), repr(value)) for key, value in info.items()]


def assert_infos(dataset: EpisodeDataset, given: Mapping[int, Mapping[str, Any]]) -> None:
    """Every episode has the info that was given for its number."""
    for episode_id, episode in zip(dataset.table.ids.tolist(), dataset.episodes(), strict=True):
        found = dataset.episode_info(episode_id)
        assert exactly(found) == exactly(given[int(episode["number"][0])])
        found["more"] = 1
        assert "more" not in dataset.episode_info(episode_id), "it is a copy"


def file_dataset(path: Path, strategy: Any = None, capacity: int = 12, **options: Any) -> IndividualFileDataset:
    return IndividualFileDataset(capacity, None, None, path, strategy, durability="rename", **options)


def extended(small: EpisodeDataset, large: EpisodeDataset) -> EpisodeDataset:
    small.extend(large, other_batch_size=3, seed=0)
    return small


KINDS: dict[str, Callable[[Path], EpisodeDataset]] = {
    "ring": lambda path: RingBufferDataset(12),
    "a user's": lambda path: ListDataset(12),
    **{strategy.suffix: lambda path, strategy=strategy: file_dataset(path, strategy) for strategy in STRATEGIES},
    "ring over files": lambda path: extended(RingBufferDataset(12), file_dataset(path, capacity=40)),
    "a user's over a ring": lambda path: extended(ListDataset(12), RingBufferDataset(40)),
    "three": lambda path: extended(RingBufferDataset(6), extended(RingBufferDataset(12), file_dataset(path, None, 40))),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_info_stays_with_its_episode(kind: str, tmp_path_factory: Any, data: Any) -> None:
    path = tmp_path_factory.mktemp("episodes")
    dataset, given_infos = KINDS[kind](path), {}
    for number in range(data.draw(st.integers(1, 20))):
        info = data.draw(st.none() | infos)
        dataset.add_episode(row(number, data.draw(st.integers(1, 5))), info)
        given_infos[number] = info or {}
        if dataset.num_episodes > 1 and data.draw(st.integers(0, 5)) == 0:
            dataset.evict_episode(0)
        behind: Any = dataset
        while behind is not None:
            assert_infos(behind, given_infos)
            behind = behind.extension and behind.extension.other
    if isinstance(dataset, IndividualFileDataset):
        assert_infos(reader_of(dataset), given_infos)
        for verify in ("size", "header", "full"):
            assert_infos(IndividualFileDataset(directory=path, mode="r", verify=verify), given_infos)
        dataset.close()
        with file_dataset(path) as reopened:
            assert_infos(reopened, given_infos)


def test_a_refilled_dataset_has_the_infos_of_the_larger_one(tmp_path: Path) -> None:
    with file_dataset(tmp_path, capacity=40) as large:
        for number in range(8):
            large.add_episode(row(number, 4), {"number": number})
        small = extended(RingBufferDataset(12), large)
        assert small.refill() == 3
        assert_infos(small, {number: {"number": number} for number in range(8)})


def test_a_larger_dataset_gets_the_infos_of_what_it_is_put_behind() -> None:
    small, large = RingBufferDataset(12), ListDataset(40)
    for number in range(3):
        small.add_episode(row(number), {"number": number})
    small.extend(large)
    assert_infos(large, {number: {"number": number} for number in range(3)})


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("is_on_disk", [False, True])
def test_episodes_that_workers_bring_back_have_their_infos(tmp_path: Path, is_on_disk: bool, num_workers: int) -> None:
    given_infos, small = {number: {"number": number} for number in range(60)}, RingBufferDataset(12)
    large = file_dataset(tmp_path, capacity=200) if is_on_disk else RingBufferDataset(200)
    small.extend(large, other_batch_size=2, other_num_workers=num_workers, seed=0)
    was_brought = False
    for number in given_infos:
        small.add_episode(row(number, 3), given_infos[number])
        assert_infos(small, given_infos)
        was_brought |= len(numbers_of(small)) > 0 and numbers_of(small) != sorted(numbers_of(small))
    small.end_workers()
    assert was_brought


def numbers_of(dataset: EpisodeDataset) -> list[int]:
    return [int(episode["number"][0]) for episode in dataset.episodes()]


# What an info may be.


class Task(str, enum.Enum):
    DRAWER = "open drawer"


@each_kind
def test_scalars_of_numpy_become_numbers_and_nothing_is_nothing(kind: str, tmp_path: Path) -> None:
    dataset = KINDS[kind](tmp_path)
    given_info = {"a": np.float32(0.5), "b": np.int8(-3), "c": np.bool_(True), "d": np.str_("x"), "e": Task.DRAWER}
    episode_id = dataset.add_episode(row(0), given_info)
    expected = {"a": 0.5, "b": -3, "c": True, "d": "x", "e": "open drawer"}
    assert exactly(dataset.episode_info(episode_id)) == exactly(expected)
    for nothing in (None, {}):
        assert dataset.episode_info(dataset.add_episode(row(1), nothing)) == {}


BAD_INFOS = [
    (["a"], TypeError, "`info` of an episode must be a dict, found list"),
    ({1: 2}, TypeError, "`info` has the key 1, expected a string"),
    ({"": 2}, ValueError, "`info` has an empty key"),
    ({"a": None}, TypeError, "`info` has a NoneType under `a`, expected a number, a bool or a string"),
    ({"a": {"b": 1}}, TypeError, "`info` has a dict under `a`"),
    ({"a": np.zeros(1)}, TypeError, "`info` has a ndarray under `a`"),
    ({"a": torch.zeros(())}, TypeError, "`info` has a Tensor under `a`"),
    ({"a": 1j}, TypeError, "`info` has a complex under `a`"),
    ({"a": 2**63}, ValueError, "`info` has 0x8000000000000000 under `a`, which int64 cannot hold"),
    ({"a": -(2**63) - 1}, ValueError, "which int64 cannot hold"),
    ({"a": 10**5000}, ValueError, "which int64 cannot hold"),
    ({"a": "x" * 4089}, ValueError, "`info` takes 4097 bytes as JSON, more than 4096"),
    ({"a": "\u00e9" * 683}, ValueError, "`info` takes 4106 bytes"),
]


@each_kind
@pytest.mark.parametrize(("info", "error", "message"), BAD_INFOS, ids=range(len(BAD_INFOS)))
def test_a_refused_info_changes_nothing(kind: str, tmp_path: Path, info: Any, error: Any, message: str) -> None:
    dataset = KINDS[kind](tmp_path)
    with pytest.raises(error, match=message):
        dataset.add_episode(row(0), info)
    assert dataset.fields is None
    dataset.add_episode(row(0, 6), {"a": "x" * 4088})
    dataset.add_episode(row(1, 6))
    with pytest.raises(error, match=message):
        dataset.add_episode(row(2, 6), info)
    assert 2 not in numbers_of(dataset) and dataset.table.next_id == 2


@each_kind
def test_an_episode_that_is_not_there_has_no_info(kind: str, tmp_path: Path) -> None:
    dataset = KINDS[kind](tmp_path)
    with pytest.raises(ValueError, match="`episode_id`=0 is not there: none live"):
        dataset.episode_info(0)
    for number in range(4):
        dataset.add_episode(row(number), INFO)
    dataset.evict_episode(0)
    for episode_id in (0, -1, 4, 2**70, -(2**40)):
        with pytest.raises(ValueError, match=f"`episode_id`={episode_id} is not there: 3 episodes live, .* 1 to 3"):
            dataset.episode_info(episode_id)
    with pytest.raises(TypeError, match="`episode_id` must be an integer, found float"):
        dataset.episode_info(1.0)  # type: ignore[arg-type]
    assert dataset.episode_info(np.int64(1)) == dataset.episode_info(torch.tensor(1)) == INFO  # type: ignore[arg-type]


def test_the_info_of_an_episode_that_failed_is_not_that_of_the_next() -> None:
    class Failing(ListDataset):
        fails = False

        def _write(self, *arguments: Any) -> None:
            if self.fails:
                raise OSError("disk full")
            super()._write(*arguments)

    dataset = Failing(12)
    dataset.add_episode(row(0))
    dataset.fails = True
    with pytest.raises(OSError, match="disk full"):
        dataset.add_episode(row(1), INFO)
    dataset.fails = False
    assert dataset.episode_info(dataset.add_episode(row(2))) == {}


@each_kind
def test_the_info_of_episodes_that_left_takes_no_memory(kind: str, tmp_path: Path) -> None:
    dataset = KINDS[kind](tmp_path)
    for number in range(20):
        dataset.add_episode(row(number, 3), INFO)
    is_on_disk = isinstance(dataset, IndividualFileDataset)
    assert len(dataset._infos) == (0 if is_on_disk else dataset.num_episodes)


def test_an_episode_that_leaves_meanwhile_is_not_there() -> None:
    class Busy(ListDataset):
        def _find_info(self, found: Any) -> Any:
            self.evict_episode(0)
            return super()._find_info(found)

    dataset = Busy(12)
    dataset.add_episode(row(0), INFO)
    with pytest.raises(ValueError, match="`episode_id`=0 is not there"):
        dataset.episode_info(0)


# Who can ask.


def test_a_ring_in_another_process_says_that_it_does_not_know() -> None:
    ring = RingBufferDataset(12)
    ring.add_episode(row(0), {"long": "x" * 4000})
    assert len(handle_of(ring)) < 4000

    def ask(reader: RingBufferDataset) -> None:
        with pytest.raises(RuntimeError, match="stays in the process that made a RingBufferDataset"):
            reader.episode_info(0)

    ask(reader_of(ring))
    ask(reader_of(ring).__deepcopy__({}))
    assert status_of(in_child(lambda: ask(ring))) == 0
    copied = ring.__deepcopy__({})
    assert copied.episode_info(0) == ring.episode_info(0)


def test_files_tell_the_info_in_another_process(tmp_path: Path) -> None:
    with file_dataset(tmp_path) as dataset:
        dataset.add_episode(row(0), INFO)

        def ask() -> None:
            assert dataset.episode_info(0) == INFO

        assert status_of(in_child(ask)) == 0
    with pytest.raises(RuntimeError, match="closed"):
        dataset.episode_info(0)


def test_a_mixture_says_whom_to_ask() -> None:
    members = RingBufferDataset(12), RingBufferDataset(12)
    for member in members:
        member.add_episode(row(0), INFO)
    with pytest.raises(RuntimeError, match="Ask the member: `mixture.datasets"):
        MixtureDataset(members, [1, 1]).episode_info(0)


# In files.


@each_strategy
def test_a_file_without_info_is_as_it_was(strategy: Any) -> None:
    episode = made(FIELDS, 4)
    content = saved(strategy, episode)
    assert b"info" not in content
    assert saved(WithInfo(strategy, {}), episode) == content != saved(WithInfo(strategy, INFO), episode)


class WithInfo:
    """`save` of a format, with an info."""

    def __init__(self, strategy: Any, info: Any) -> None:
        self.strategy, self.info = strategy, info

    def save(self, episode: Any, fields: Fields, file: Any) -> None:
        self.strategy.save_with_info(episode, fields, file, self.info)


def test_only_files_with_info_are_looked_into_on_opening(tmp_path: Path, monkeypatch: Any) -> None:
    with file_dataset(tmp_path, capacity=100) as dataset:
        for number in range(6):
            dataset.add_episode(row(number, 4), INFO if number in (2, 3) else None)
    looked: list[int] = []
    check = SafetensorsSerialization.check

    def counted(self: Any, file: Any, fields: Fields, length: int) -> None:
        looked.append(os.fstat(file.fileno()).st_size)
        check(self, file, fields, length)

    monkeypatch.setattr(SafetensorsSerialization, "check", counted)
    file_dataset(tmp_path, capacity=100).close()
    assert len(looked) == 3, "and the oldest, for its fields"


@pytest.mark.parametrize("info", [None, {"a": 1}, {"a": "x" * 4000}])
@pytest.mark.parametrize("change", [-4096, -512, -1, 1, 512, 4096])
def test_a_file_of_another_size_is_set_aside_on_opening(tmp_path: Path, info: Any, change: int) -> None:
    with file_dataset(tmp_path, capacity=2000) as dataset:
        for number in range(2):
            dataset.add_episode(row(number, 800), info)
    name = tmp_path / files(tmp_path)[1]
    content = name.read_bytes()
    name.write_bytes(content[:change] if change < 0 else content + bytes(change))
    overhead = dataset.serialization_strategy.overhead(dataset.fields)
    # A file that lost as many bytes as its info has is found when it is first read.
    is_hidden = overhead[0] <= len(content) + change - 6400 <= overhead[1]
    assert is_hidden <= (abs(change) == 1 and info is None)
    if not is_hidden:
        with pytest.warns(UserWarning, match="1 files in .* are no whole episodes"), file_dataset(tmp_path, None, 2000):
            pass


HOSTILE: dict[str, Any] = {
    "a list": [1],
    "a text": "info",
    "a number": 1,
    "nested": {"a": {"b": 1}},
    "a list within": {"a": [1]},
    "null within": {"a": None},
    "no name": {"": 1},
    "beyond int64": {"a": 2**63},
    "too long": {"a": "x" * 5000},
    "deep": {"a": eval("[" * 60 + "]" * 60)},
}


def put_hostile_file(path: Path, strategy: Any, info: Any) -> None:
    """A directory of a good episode, and one whose info is not what it may be, with the right checksum."""
    with file_dataset(path, strategy) as dataset:
        dataset.add_episode(made(FIELDS, 4), INFO)
        name = f"0000000001-000000000004-4{strategy.suffix}"
        fields = dataset.fields
        assert fields is not None
        # `.pt` reads what it has written.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(serialization, "checked_info", lambda info: info)
            dataset._directory.commit(name, lambda f: strategy.save_with_info(made(FIELDS, 4, 1), fields, f, info))


@each_strategy
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_info_is_damage(tmp_path: Path, strategy: Any, name: str) -> None:
    put_hostile_file(tmp_path, strategy, HOSTILE[name])
    with pytest.warns(UserWarning, match="1 files in .* are no whole episodes"):
        dataset = file_dataset(tmp_path)
        if 1 in dataset.table.ids:
            with pytest.raises(RuntimeError, match="Episode 1 is gone"):
                dataset.episode_info(1)
    assert dataset.episode_info(0) == INFO and dataset.table.ids.tolist() == [0]
    assert len(os.listdir(tmp_path / "damaged")) == 1


@each_strategy
def test_verify_full_finds_an_info_that_has_changed(tmp_path: Path, strategy: Any) -> None:
    put_hostile_file(tmp_path, strategy, INFO)
    name = tmp_path / files(tmp_path)[1]
    content = name.read_bytes()
    assert b"open drawer" in content
    name.write_bytes(content.replace(b"open drawer", b"shut drawer"))
    with pytest.warns(UserWarning, match="0000000001-.* it "), file_dataset(tmp_path, verify="full") as dataset:
        assert dataset.table.ids.tolist() == [0]


def test_an_info_whose_file_is_gone_is_an_error(tmp_path: Path) -> None:
    with file_dataset(tmp_path) as dataset:
        dataset.add_episode(row(0), INFO)
        (tmp_path / files(tmp_path)[0]).unlink()
        with pytest.raises(RuntimeError, match="Episode 0 is gone from the store"):
            dataset.episode_info(0)
        assert dataset.num_episodes == 0


def test_a_format_of_ones_own_refuses_info_and_nothing_else(tmp_path: Path) -> None:
    with file_dataset(tmp_path, Raw()) as dataset:
        buffer = ReplayBuffer(dataset, 1, num_envs=1)
        for add in (
            lambda: dataset.add_episode(row(0), INFO),
            lambda: buffer.add_step({"number": 0}, True, INFO),
            lambda: extended(RingBufferDataset(12), dataset).add_episode(row(0), INFO),
        ):
            with pytest.raises(ValueError, match="The format `.raw` does not keep `info` of episodes"):
                add()
            assert dataset.fields is None and files(tmp_path) == [] and len(buffer.writer.sink.table) == 0
        assert dataset.episode_info(dataset.add_episode(row(0), {})) == {}


def test_what_has_info_is_not_brought_back_to_a_format_without(tmp_path: Path) -> None:
    small, large = file_dataset(tmp_path, Raw()), RingBufferDataset(100)
    large.add_episode(row(0, 4), INFO)
    extended(small, large)
    with pytest.warns(UserWarning, match="cannot all be brought back: The format `.raw` does not keep"):
        assert small.refill() == 0
    filled = RingBufferDataset(12)
    filled.add_episode(row(0), INFO)
    with file_dataset(tmp_path / "other", Raw()) as empty, pytest.raises(ValueError, match="does not keep"):
        filled.extend(empty)
    assert empty.is_empty and filled.extension is None


class RawWithInfo(Raw):
    """A user's own format that keeps info, in front of its rows."""

    keeps_info = True

    def save_with_info(self, episode: Any, fields: Any, file: Any, info: Any) -> None:
        file.write(repr(info).encode() + b"\n")
        self.save(episode, fields, file)

    def load_info(self, file: Any) -> Any:
        return eval(file.readline())

    def load(self, file: Any, fields: Any, length: int) -> Any:
        file.readline()
        return super().load(file, fields, length)


def test_a_format_of_ones_own_may_keep_info(tmp_path: Path) -> None:
    with file_dataset(tmp_path, RawWithInfo()) as dataset:
        for number in range(3):
            dataset.add_episode(row(number, 2), {"number": number} if number else None)
        fields, given_infos = dataset.fields, {0: {}, 1: {"number": 1}, 2: {"number": 2}}
        assert_infos(dataset, given_infos)
    with IndividualFileDataset(12, EpisodeDatasetInfo(fields), None, tmp_path, RawWithInfo()) as dataset:
        assert_infos(dataset, given_infos)


# Through a writer.


class ReferenceWithInfo(Reference):
    """Which also keeps the info of episodes."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.info: list[dict[str, Any] | None] = [None] * len(self.open)
        self.infos: list[dict[str, Any]] = []

    def close(self, env: int, goes_on: bool = False) -> None:
        if self.open[env]:
            self.infos.append({} if goes_on else self.info[env] or {})
        super().close(env, goes_on)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_info_comes_with_the_episodes_that_a_call_completes(data: Any) -> None:
    num_envs, cut_after = data.draw(st.integers(1, 5)), data.draw(st.none() | st.integers(2, 5))
    overlap = data.draw(st.integers(0, 1)) if cut_after else 0
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    ring = FlakyRing(20_000, rng, data.draw(st.sampled_from([0.0, 0.5])))
    writer, reference = (
        EpisodeWriter(ring, num_envs, cut_after, overlap),
        ReferenceWithInfo(num_envs, cut_after, overlap),
    )
    for call in range(data.draw(st.integers(1, 40))):
        is_first, is_last, not_mask = (rng.random(num_envs) < 0.3 for _ in range(3))
        reference.info = [{"call": call, "env": env} if rng.random() < 0.6 else None for env in range(num_envs)]
        given_infos = None if all(info is None for info in reference.info) else reference.info
        rows = reference.add(is_first, is_last, ~not_mask)
        with contextlib.suppress(OSError):
            writer.add(rows, is_first=is_first, is_last=is_last, mask=~not_mask, info=given_infos)
        reference.info = [None] * num_envs
        if rng.random() < 0.1:
            for env in range(num_envs):
                reference.close(env)
            with contextlib.suppress(OSError):
                writer.flush()
    ring.rate = 0.0
    writer.close()
    for env in range(num_envs):
        reference.close(env)
    assert [ring.episode_info(episode_id) for episode_id in ring.table.ids.tolist()] == reference.infos


def test_a_step_of_a_single_environment_brings_the_info_of_its_episode() -> None:
    buffer = ReplayBuffer(RingBufferDataset(100), 1, num_envs=1)
    for step in range(6):
        buffer.add_step({"x": 1.0}, step % 3 == 2, {"step": step})
    buffer.add_episode({"x": [1.0]}, INFO)
    assert infos_of(buffer) == [{"step": 2}, {"step": 5}, INFO]


def test_a_vectorized_step_brings_the_info_of_the_episodes_before_it() -> None:
    buffer = ReplayBuffer(RingBufferDataset(100), 1, num_envs=2)
    for step in range(4):
        info = [{"step": step, "env": env} for env in range(2)]
        buffer.add_step({"x": np.zeros(2)}, np.array([step == 2, step == 3]), info if step != 3 else [None, info[1]])
    buffer.flush()
    assert infos_of(buffer) == [{"step": 2, "env": 0}, {"step": 3, "env": 1}, {}, {}]


def infos_of(buffer: ReplayBuffer) -> list[dict[str, Any]]:
    dataset = buffer.dataset
    assert isinstance(dataset, EpisodeDataset)
    return [dataset.episode_info(episode_id) for episode_id in dataset.table.ids.tolist()]


class Untouchable(Mapping):
    """An info of a step that must not be looked at."""

    def __getitem__(self, key: str) -> Any:
        raise AssertionError

    def __iter__(self) -> Iterator[str]:
        raise AssertionError

    def __len__(self) -> int:
        raise AssertionError


def test_the_info_of_a_step_that_ends_nothing_is_not_looked_at() -> None:
    single, two = (ReplayBuffer(RingBufferDataset(100), 1, num_envs=num_envs) for num_envs in (1, 2))
    single.add_step({"x": 1.0}, False, Untouchable())
    single.add({"x": 1.0}, is_last=True, mask=False, info=Untouchable())
    # Nothing is open yet that `done` could end.
    two.add_step({"x": np.zeros(2)}, np.array([True, False]), [Untouchable(), {"a": [1]}])
    two.add_step({"x": np.zeros(2)}, np.array([True, False]), [INFO, Untouchable()])
    two.add({"x": np.zeros(2)}, is_last=[True, True], mask=[True, False], info=[INFO, Untouchable()])
    assert infos_of(two) == [INFO, INFO] and infos_of(single) == []


BAD_STEPS = [
    ({"a": 1}, TypeError, "`info` must be a sequence of 2 dicts or None, one for each environment, found dict"),
    ("ab", TypeError, "found str"),
    ([None], ValueError, "`info` has length 1, expected 2"),
    ([{}, {"a": [1]}], TypeError, "`info` has a list under `a`"),
    ([{}, 3], TypeError, "must be a dict, found int"),
    ([{}, {"a": 2**70}], ValueError, "int64"),
]


@pytest.mark.parametrize(("info", "error", "message"), BAD_STEPS, ids=range(len(BAD_STEPS)))
def test_a_step_with_a_refused_info_changes_nothing(info: Any, error: Any, message: str) -> None:
    buffer = ReplayBuffer(RingBufferDataset(100), 1)
    is_last = np.array([False, True])
    with pytest.raises(error, match=message):
        buffer.add({"x": np.zeros(2)}, is_last=is_last, info=info)
    assert buffer.fields is None and buffer.writer.num_open_rows == 0
    buffer.add({"y": np.zeros(2, np.int64)}, mask=[True, True])
    with pytest.raises(error, match=message):
        buffer.add({"y": np.zeros(2, np.int64)}, is_last=is_last, info=info)
    with pytest.raises(error, match=message):
        buffer.add_step({"y": np.zeros(2, np.int64)}, is_last, info)
    assert buffer.num_episodes == 0 and buffer.writer.num_open_rows == 2
    buffer.flush()
    assert infos_of(buffer) == [{}, {}]


def test_an_error_of_a_step_leaves_no_info_for_the_next() -> None:
    buffer = ReplayBuffer(RingBufferDataset(3), 1, num_envs=1)
    for _ in range(3):
        buffer.add_step({"x": 1.0}, False)
    with pytest.raises(ValueError, match="An open episode has reached 3 steps"):
        buffer.add_step({"x": 1.0}, True, INFO)
    buffer.flush()
    assert infos_of(buffer) == [{}]


def test_the_last_piece_of_a_stream_gets_its_info() -> None:
    buffer = ReplayBuffer(RingBufferDataset(100), 1, num_envs=1, max_episode_length=3, overlap=1)
    for step in range(8):
        buffer.add_step({"x": 1.0}, step == 7, {"step": step})
    assert infos_of(buffer) == [{}, {}, {}, {"step": 7}]


def test_tagged_rows_and_infos_go_through_files_by_a_writer(tmp_path: Path) -> None:
    with file_dataset(tmp_path, capacity=100) as dataset, ReplayBuffer(dataset, 1, num_envs=2) as buffer:
        for step in range(5):
            rows = tagged.rows(np.arange(2), 0, step)
            buffer.add(rows, is_last=[step == 4] * 2, info=[{"env": env, "nan": math.nan} for env in range(2)])
    with IndividualFileDataset(directory=tmp_path, mode="r") as reader:
        assert reader.num_episodes == 2
        for env in range(2):
            assert exactly(reader.episode_info(env)) == exactly({"env": env, "nan": math.nan})
