"""Late fields of a directory: after `sync` or `close` they are there again, and what harms a file harms no other."""

from __future__ import annotations

import copy
import errno
import itertools
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers.dataset import IndividualFileDataset, RingBufferDataset
from buffers.dataset.files import late_files
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.fields import Fields, Scalar, TensorType, Vector
from buffers.late import changes
from buffers.sampler import PrioritizedSampler
from buffers.viewing.commands import main
from tests import tagged
from tests.faults import failing_calls, in_child, killed_before_call, small_disk, status_of, watched_calls
from tests.file_helpers import open_files
from tests.reading import handle_of, reader_of

CAPACITY = 60
LABEL = Vector(2, torch.int64)
DTYPES = [torch.bfloat16, torch.uint16, torch.uint64, torch.bool, torch.complex64, torch.float16, torch.int8]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of 8 step ids, and blocks of 4 of which every sixteenth shares a flag."""
    monkeypatch.setattr(late_files, "_SEGMENT_BITS", 3)
    monkeypatch.setattr(changes, "_BLOCK_BITS", 2)
    monkeypatch.setattr(changes, "_NUM_FLAGS", 16)


def opened(path: Path, **options: Any) -> IndividualFileDataset:
    return IndividualFileDataset(None if options.get("mode") == "r" else CAPACITY, directory=path, **options)


def kill(dataset: IndividualFileDataset) -> None:
    """What the death of its process does to a directory."""
    dataset._directory.close()


def steps_of(dataset: IndividualFileDataset, episode_id: int) -> np.ndarray:
    start, length, *_ = dataset.table.row_of(episode_id)
    return np.arange(start, start + length)


def values(dataset: IndividualFileDataset, name: str) -> dict[int, list[Any]]:
    """By episode id."""
    return {
        number: dataset.late[name].rows(steps_of(dataset, number)).tolist() for number in dataset.table.ids.tolist()
    }


def late_names(path: Path) -> list[str]:
    return sorted(os.listdir(path / "late"))


def times(path: Path) -> dict[str, tuple[int, int]]:
    """What every write changes in the folder."""
    found = {name: os.stat(path / "late" / name) for name in late_names(path)}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()}


# The model.


class Model:
    """Values by field and episode id: those of now, and those that a killed writer leaves."""

    def __init__(self) -> None:
        self.lengths: dict[int, int] = {}
        self.now: dict[str, dict[int, Any]] = {"label": {}, "priority": {}}
        self.largest = 1.0
        self.saved = copy.deepcopy((self.now, self.largest))

    def add(self, episode_id: int, length: int) -> None:
        while sum(self.lengths.values()) + length > CAPACITY:
            self.evict(min(self.lengths))
        self.lengths[episode_id] = length
        self.fill(episode_id)

    def fill(self, episode_id: int) -> None:
        length = self.lengths[episode_id]
        self.now["label"].setdefault(episode_id, np.full((length, 2), -1))
        self.now["priority"].setdefault(episode_id, np.full(length, self.largest, np.float32))

    def evict(self, episode_id: int) -> None:
        for found in (self.lengths, *self.now.values()):
            del found[episode_id]

    def save(self) -> None:
        self.saved = copy.deepcopy((self.now, self.largest))

    def kill(self) -> None:
        self.now, self.largest = copy.deepcopy(self.saved)
        for found in self.now.values():
            for episode_id in set(found) - set(self.lengths):
                del found[episode_id]
        for episode_id in self.lengths:
            self.fill(episode_id)


def reopened(path: Path) -> IndividualFileDataset:
    dataset = opened(path, durability="rename")
    dataset.add_late_field("label", LABEL, -1)
    dataset.add_priorities("max")
    return dataset


operations = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "update", "update", "annotate", "evict", "sync", "close", "kill"]),
        st.integers(0, 10**6),
    ),
    max_size=40,
)


@settings(max_examples=150)
@given(operations)
def test_after_reopening_every_row_has_the_value_of_the_last_sync(tmp_path_factory, done) -> None:
    path, model = tmp_path_factory.mktemp("late"), Model()
    dataset = reopened(path)
    for operation, seed in done:
        rng = np.random.default_rng(seed)
        ids = list(model.lengths)
        if operation == "add":
            length = int(rng.integers(1, 25))
            model.add(dataset.add_episode({"obs": np.zeros(length)}), length)
        elif operation in ("sync", "close", "kill"):
            if operation == "kill":
                kill(dataset)
                model.kill()
            else:
                dataset.sync() if operation == "sync" else dataset.close()
                model.save()
            dataset = dataset if operation == "sync" else reopened(path)
        elif ids and operation == "evict":
            position = int(rng.integers(len(ids)))
            dataset.evict_episode(position)
            model.evict(ids[position])
        elif ids:
            episode_id, name = ids[rng.integers(len(ids))], ["label", "priority"][rng.integers(2)]
            length = model.lengths[episode_id]
            begin = int(rng.integers(length)) if operation == "update" else 0
            end = int(rng.integers(begin, length)) + 1 if operation == "update" else length
            given_values = rng.integers(0, 9, (end - begin, 2) if name == "label" else end - begin)
            if operation == "annotate":
                dataset.annotate(episode_id, {name: given_values})
            else:
                assert dataset.update(steps_of(dataset, episode_id)[begin:end][None], {name: given_values[None]}) == 0
            model.now[name][episode_id][begin:end] = given_values
            if name == "priority":
                model.largest = max(model.largest, float(given_values.max()))
        for name, expected in model.now.items():
            assert values(dataset, name) == {number: rows.tolist() for number, rows in expected.items()}, operation
    kill(dataset)


# A script.


def labelled(path: Path, numbers: tuple[int, ...] = (0, 1, 2, 3)) -> None:
    """Episodes of 6 rows with the number as label and priority."""
    with opened(path) as dataset:
        dataset.add_late_field("label", LABEL, -1)
        dataset.add_priorities("max")
        for number in numbers:
            episode_id = dataset.add_episode(tagged.episode(6, number))
            dataset.annotate(episode_id, {"label": np.full((6, 2), number), "priority": np.full(6, float(number))})


def test_a_script_can_be_run_twice(tmp_path) -> None:
    found = []
    for _ in range(2):
        with opened(tmp_path) as dataset:
            dataset.add_late_field("label", Scalar(dtype=torch.int32), 5)
            dataset.add_late_field("label", Scalar(dtype=torch.int32), 5)
            loader = dataset.get_loader(8, 2, sampler=PrioritizedSampler(), include=("index",), seed=0)
            dataset.add_episode(tagged.episode(6, len(found)))
            batch = next(iter(loader))
            found.append(sorted(set(batch["label"].flatten().tolist())))
            dataset.update(batch["index"], {"label": torch.full((8, 2), 7, dtype=torch.int32)})
    assert found[0] == [5] and 7 in found[1]


@pytest.mark.parametrize("kind", [Scalar(dtype=torch.int64), Vector(1, torch.int32)])
def test_another_type_or_default_is_an_error_and_the_values_stay(tmp_path, kind) -> None:
    labelled(tmp_path)
    with opened(tmp_path) as dataset:
        for other, default in ((kind, -1), (LABEL, 0)):
            with pytest.raises(ValueError, match=r"`label` already: int64 \(2,\) with the default"):
                dataset.add_late_field("label", other, default)
        assert values(dataset, "label")[3] == [[3, 3]] * 6


def test_adding_the_same_field_again_changes_nothing_in_any_dataset() -> None:
    ring = RingBufferDataset(100)
    episode_id = ring.add_episode({"obs": np.zeros(3)})
    ring.add_late_field("x", LABEL, [1, 2])
    ring.annotate(episode_id, {"x": np.zeros((3, 2), np.int64)})
    ring.add_late_field("x", TensorType((2,), torch.int64), torch.tensor([1, 2]))
    assert ring.late["x"].rows(np.arange(3)).tolist() == [[0, 0]] * 3
    ring.add_late_field("priority", Scalar(), 2.0)
    ring.add_late_field("priority", Scalar(), 2.0)
    with pytest.raises(ValueError, match="already"):
        ring.add_late_field("priority", Scalar(), 3.0)


@pytest.mark.parametrize("default", [-1.0, float("nan"), float("inf"), 3e38])
def test_the_default_of_priorities_is_one_that_priorities_may_have(default) -> None:
    with pytest.raises(ValueError, match="initial"):
        RingBufferDataset(10).add_late_field("priority", Scalar(), default)


def test_the_next_sampler_says_what_new_priorities_are_and_an_added_field_keeps_it(tmp_path) -> None:
    for initial, expected in (("max", 1.0), (3.0, 3.0)):
        with opened(tmp_path) as dataset:
            dataset.get_loader(1, 1, sampler=PrioritizedSampler(initial=initial))
            episode_id = dataset.add_episode({"obs": np.zeros(1)})
            assert values(dataset, "priority")[episode_id] == [expected] and dataset.late_fields is None
    with opened(tmp_path) as dataset:
        dataset.add_late_field("priority", Scalar(), 5.0)
    with opened(tmp_path) as dataset:
        assert dataset.late["priority"].initial == 5.0 and list(dataset.late_fields or ()) == ["priority"]
        dataset.get_loader(1, 1, sampler=PrioritizedSampler(initial=7.0))
        assert dataset.late["priority"].initial == 5.0


def test_all_that_a_field_can_be_comes_back(tmp_path) -> None:
    names = [*map(str, DTYPES), "", "Label", "label", "../up", "a" * 255, "\ud800é-\0.", "CON"]
    names = [name for name in names if name and "/" not in name]
    kinds = {name: Vector(3, dtype) for name, dtype in zip(names, itertools.cycle(DTYPES), strict=False)}
    with opened(tmp_path) as dataset:
        dataset.add_late_field("nothing", Vector(0))
        episode_id = dataset.add_episode({"obs": np.zeros(10)})
        for n, (name, kind) in enumerate(kinds.items()):
            dataset.add_late_field(name, kind, n % 2)
            dataset.annotate(episode_id, {name: torch.full((10, 3), n % 3).to(kind.dtype)})
    assert all(name.islower() and len(name) < 250 for name in late_names(tmp_path))
    with opened(tmp_path) as dataset:
        assert set(dataset.late_fields or ()) == {*kinds, "nothing"}
        for n, (name, kind) in enumerate(kinds.items()):
            assert dataset.late[name].kind == kind
            found = dataset.late[name].rows(np.array([0, 9, 10]))
            assert torch.equal(found[:2], torch.full((2, 3), n % 3).to(kind.dtype))
            new = dataset.add_episode({"obs": np.zeros(1)})
            assert torch.equal(
                dataset.late[name].rows(steps_of(dataset, new))[0], torch.full((3,), n % 2).to(kind.dtype)
            )


@given(st.lists(st.text(st.characters(), min_size=1, max_size=255), max_size=5, unique=True))
def test_no_two_names_have_one_file_and_none_leads_elsewhere(names) -> None:
    stems = [late_files._stem(name) for name in names]
    assert len({stem.lower() for stem in stems}) == len(names)
    assert all(0 < len(stem) <= 200 and late_files._NAME.fullmatch(f"{stem}.safetensors") for stem in stems)
    assert not any({*stem} & {"/", ".", "-", "\0"} for stem in stems)


def test_a_name_that_no_file_holds_is_refused() -> None:
    for name in ("a" * 256, "a/b", "index"):
        with pytest.raises(ValueError, match="cannot name a late field"):
            RingBufferDataset(10).add_late_field(name, Scalar())


def test_late_fields_in_info_are_added_given_back_and_keep_their_values(tmp_path) -> None:
    info = EpisodeDatasetInfo(Fields(obs=Scalar()), late_fields={"label": LABEL})
    assert RingBufferDataset(10, info).info.late_fields == {"label": LABEL}
    for expected in (0, 4):
        with opened(tmp_path, info=info) as dataset:
            assert dataset.info.late_fields == {"label": LABEL}
            if not expected:
                dataset.add_episode({"obs": np.zeros(1, np.float32)})
            assert values(dataset, "label")[0] == [[expected] * 2]
            dataset.annotate(0, {"label": np.full((1, 2), 4)})
    with pytest.raises(TypeError, match="late_fields"):
        EpisodeDatasetInfo(late_fields=["label"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="TensorType"):
        RingBufferDataset(10, EpisodeDatasetInfo(late_fields={"label": 3}))  # type: ignore[dict-item]


# What is written.


def test_nothing_is_written_without_late_fields_and_only_what_has_changed_with_them(tmp_path) -> None:
    with opened(tmp_path) as dataset:
        for number in range(4):
            dataset.add_episode(tagged.episode(8, number))
        dataset.sync()
        assert not (tmp_path / "late").exists()
        dataset.add_late_field("label", LABEL, -1)
        assert not (tmp_path / "late").exists()
        dataset.sync()
        assert late_names(tmp_path) == ["label.safetensors"]
        dataset.annotate(1, {"label": np.zeros((8, 2), np.int64)})
        dataset.annotate(3, {"label": np.zeros((8, 2), np.int64)})
        dataset.sync()
        segments = ["label-0000000001.safetensors", "label-0000000003.safetensors"]
        assert late_names(tmp_path) == [*segments, "label.safetensors"]
        before = times(tmp_path)
        dataset.annotate(3, {"label": np.ones((8, 2), np.int64)})
        dataset.sync()
        changed = [name for name, time in times(tmp_path).items() if before[name] != time]
        assert changed == segments[1:]
    before = times(tmp_path)
    with opened(tmp_path) as dataset:
        dataset.sync()
        dataset.add_late_field("label", LABEL, -1)
    assert times(tmp_path) == before


def test_a_segment_goes_with_its_last_episode_and_is_packed_when_most_have_left(tmp_path) -> None:
    with opened(tmp_path) as dataset:
        dataset.add_late_field("label", LABEL, -1)
        for number in range(8):
            dataset.annotate(dataset.add_episode(tagged.episode(2, number)), {"label": np.full((2, 2), number)})
        dataset.sync()
        first, second = (f"label-000000000{n}.safetensors" for n in (0, 1))
        before = times(tmp_path)
        dataset.evict_episode(0)
        dataset.evict_episode(3)
        dataset.evict_episode(3)
        dataset.sync()
        assert times(tmp_path) == before
        dataset.evict_episode(3)
        dataset.sync()
        assert times(tmp_path)[first] == before[first] and times(tmp_path)[second] != before[second]
        for _ in range(3):
            dataset.evict_episode(0)
        dataset.sync()
        assert late_names(tmp_path) == [second, "label.safetensors"]
    with opened(tmp_path) as dataset:
        assert values(dataset, "label") == {7: [[7, 7]] * 2}


def test_others_add_and_update_while_it_syncs(tmp_path) -> None:
    labelled(tmp_path)
    with opened(tmp_path) as dataset:
        dataset.annotate(0, {"label": np.full((6, 2), 8)})
        seen = []

        def add(kind: str, *_: Any) -> None:
            if kind == "rename" and not seen:
                seen.append(kind)
                new = dataset.add_episode(tagged.episode(6, 4))
                dataset.annotate(new, {"label": np.full((6, 2), 4)})
                dataset.annotate(0, {"label": np.full((6, 2), 9)})

        with watched_calls(after=add):
            dataset.sync()
    with opened(tmp_path) as dataset:
        assert values(dataset, "label")[0] == [[9, 9]] * 6 and values(dataset, "label")[4] == [[4, 4]] * 6


def test_a_sync_beside_an_addition_misses_none_of_its_priorities(tmp_path) -> None:
    labelled(tmp_path)
    dataset = opened(tmp_path)
    append, threads = dataset.table.append, [threading.Thread(target=dataset.sync)]

    def late(*arguments: Any) -> int:
        """In the middle of an addition."""
        threads[0].start()
        threads[0].join(0.2)
        return append(*arguments)

    dataset.table.append = late  # type: ignore[method-assign]
    new = dataset.add_episode(tagged.episode(6, 4))
    threads[0].join()
    dataset.annotate(0, {"priority": np.full(6, 9.0)})
    dataset.sync()
    kill(dataset)
    with opened(tmp_path) as dataset:
        assert values(dataset, "priority")[new] == [3.0] * 6


# Crashes.


def test_killed_before_each_call_of_a_sync_it_leaves_each_episode_old_or_new(tmp_path) -> None:
    for num_calls in itertools.count():
        path = tmp_path / str(num_calls)
        labelled(path, (0, 1, 2))

        def change(path: Path = path) -> None:
            dataset = opened(path)
            for number in dataset.table.ids.tolist():
                new = {"label": np.full((6, 2), 10 + number), "priority": np.full(6, 10.0 + number)}
                dataset.annotate(number, new)
            dataset.add_late_field("more", Scalar())
            dataset.close()

        was_killed = killed_before_call(num_calls, change)
        with opened(path) as dataset:
            assert not [name for name in late_names(path) if name.startswith(".tmp")]
            found = values(dataset, "label"), values(dataset, "priority")
            for number in range(3):
                assert found[0][number] in ([[number] * 2] * 6, [[number + 10] * 2] * 6)
                assert found[1][number] in ([number] * 6, [number + 10] * 6)
        if not was_killed:
            assert found[0][0] == [[10, 10]] * 6 and num_calls > 30
            return


def test_every_file_is_synced_before_its_name_and_then_the_folder(tmp_path) -> None:
    labelled(tmp_path)
    calls: list[str] = []

    def before(kind: str, *arguments: Any) -> None:
        if kind in ("rename", "unlink", "mkdir"):
            calls.append(f"{kind} {arguments[-1]}")
        elif kind == "fsync":
            calls.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{arguments[0]}')).name}")

    with opened(tmp_path) as dataset:
        dataset.annotate(0, {"label": np.zeros((6, 2), np.int64)})
        with watched_calls(before):
            dataset.sync()
    name = "label-0000000000.safetensors"
    assert calls == [f"unlink .tmp-{name}", f"fsync .tmp-{name}", f"rename {name}", "fsync late"]
    with opened(tmp_path / "new") as dataset:
        dataset.add_late_field("label", LABEL)
        calls.clear()
        with watched_calls(before):
            dataset.sync()
        assert calls[:2] == ["mkdir late", "fsync new"]


@pytest.mark.parametrize("call", ["open", "fsync", "rename", "mkdir"])
def test_after_each_call_that_fails_the_error_is_told_nothing_is_lost_and_closing_again_tries_again(
    tmp_path, call
) -> None:
    for num_fine in itertools.count():
        path = tmp_path / str(num_fine)
        if call != "mkdir":
            labelled(path)
        dataset = opened(path)
        if call == "mkdir":
            dataset.add_late_field("label", LABEL, -1)
            dataset.add_episode(tagged.episode(6, 0))
        dataset.annotate(0, {"label": np.full((6, 2), 9)})
        left = itertools.count(num_fine, -1)
        full = OSError(errno.ENOSPC, "No space left")
        with failing_calls(call, full, lambda *_, left=left: next(left) == 0) as failed:
            try:
                dataset.close()
            except OSError as error:
                assert "late field `label`" in str(error)
        full.__traceback__ = None  # It refers to what was open.
        if not any(failed):
            assert num_fine > 0
            return
        shutil.copytree(path, tmp_path / "killed", ignore=shutil.ignore_patterns(".lock"))
        with opened(tmp_path / "killed") as other:
            if call != "mkdir":
                assert values(other, "label")[0] in ([[0, 0]] * 6, [[9, 9]] * 6)
                assert values(other, "label")[3] == [[3, 3]] * 6
        shutil.rmtree(tmp_path / "killed")
        dataset.close()
        dataset.close()
        assert open_files(path) == []
        with opened(path) as dataset:
            assert values(dataset, "label")[0] == [[9, 9]] * 6


def test_a_full_disk_keeps_the_last_version(tmp_path) -> None:
    with small_disk(tmp_path / "disk") as path:
        dataset = IndividualFileDataset(10**5, directory=path)
        dataset.add_late_field("x", Scalar(dtype=torch.float64))
        for n in range(2):
            dataset.annotate(dataset.add_episode({"obs": np.zeros(1000, np.int8)}), {"x": np.full(1000, float(n))})
        dataset.sync()
        (path / "filler").write_bytes(bytes(2**17 + 2**15))
        for n in range(2):
            dataset.annotate(n, {"x": np.full(1000, 5.0)})
        with pytest.raises(OSError, match="late field `x` could not be written"):
            for _ in range(50):
                dataset.annotate(dataset.add_episode({"obs": np.zeros(1, np.int8)}), {"x": np.ones(1)})
                dataset.sync()
                (path / f"filler{os.urandom(4).hex()}").write_bytes(bytes(2**14))
        for filler in path.glob("filler*"):
            filler.unlink()
        dataset.close()
        with IndividualFileDataset(10**5, directory=path) as dataset:
            assert values(dataset, "x")[0] == [5.0] * 1000


def test_values_of_episodes_that_a_power_loss_took_are_not_given_to_new_ones(tmp_path) -> None:
    labelled(tmp_path)
    for name in sorted(os.listdir(tmp_path)):
        if name.startswith("0000000003"):
            os.unlink(tmp_path / name)
    with opened(tmp_path) as dataset:
        new = dataset.add_episode(tagged.episode(6, 9))
        kill(dataset)
    with opened(tmp_path) as dataset:
        assert values(dataset, "label")[new] == [[-1, -1]] * 6


# Damage.

SEGMENT = "label-0000000001.safetensors"


def made(name: str, steps: Any, rows: Any, info: dict[str, Any], fields: Any = None, path: Path = Path()) -> None:
    """A file with a right checksum."""
    kind = TensorType(np.asarray(rows).shape[1:], torch.from_numpy(np.asarray(rows)).dtype)
    fields = Fields({"step": Scalar(dtype=torch.int64), "value": kind}) if fields is None else fields
    tensors = dict(zip(fields, (torch.as_tensor(steps), torch.as_tensor(rows)), strict=True))
    with open(path / "late" / name, "wb") as file:
        late_files._FORMAT.save_with_info(tensors, fields, file, info)


INFO = {"name": "label", "in_batches": True}
ROWS = np.full((3, 2), 77)
PRIORITY = {"name": "priority", "in_batches": False, "initial": "max", "largest": 1.0}
STEP, OTHER = Scalar(dtype=torch.int64), Scalar(dtype=torch.int32)
HOSTILE: dict[str, Callable[[Path], None]] = {
    "steps that descend": lambda path: made(SEGMENT, [-1, 9, 8], ROWS, INFO, path=path),
    "a step twice": lambda path: made(SEGMENT, [-1, 8, 8], ROWS, INFO, path=path),
    "a step below the first": lambda path: made(SEGMENT, [-(2**63), 8, 9], ROWS, INFO, path=path),
    "no default": lambda path: made(SEGMENT, [8, 9, 10], ROWS, INFO, path=path),
    "a step that would take all numbers": lambda path: made(SEGMENT, [-1, 8, 2**62], ROWS, INFO, path=path),
    "another type": lambda path: made(SEGMENT, [-1, 8, 9], ROWS.astype(np.int32), INFO, path=path),
    "another shape": lambda path: made(SEGMENT, [-1, 8, 9], ROWS[:, :1].copy(), INFO, path=path),
    "another field": lambda path: made(SEGMENT, [-1, 8, 9], ROWS, {**INFO, "name": "other"}, path=path),
    "no info": lambda path: made(SEGMENT, [-1, 8, 9], ROWS, {}, path=path),
    "an info of other types": lambda path: made(SEGMENT, [-1, 8, 9], ROWS, {**INFO, "in_batches": 1}, path=path),
    "other tensors": lambda path: made(
        SEGMENT, [-1, 8, 9], ROWS, INFO, Fields({"steps": STEP, "value": LABEL}), path=path
    ),
    "steps of another type": lambda path: made(
        SEGMENT, np.array([-1, 8, 9], np.int32), ROWS, INFO, Fields({"step": OTHER, "value": LABEL}), path=path
    ),
    "cut short": lambda path: os.truncate(path / "late" / SEGMENT, 500),
    "empty": lambda path: os.truncate(path / "late" / SEGMENT, 0),
    "longer": lambda path: os.truncate(path / "late" / SEGMENT, 2**40),
    "a changed byte": lambda path: change_last_byte(path / "late" / SEGMENT),
    "no header": lambda path: (path / "late" / SEGMENT).write_bytes(b"\xff" * 1000) and None,
}


def change_last_byte(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("what", HOSTILE)
def test_a_damaged_segment_is_set_aside_and_its_rows_alone_hold_the_default(tmp_path, what) -> None:
    labelled(tmp_path)
    HOSTILE[what](tmp_path)
    # Episode 2 begins at step id 12, in the segment of 8 to 15.
    expected = {0: [[0, 0]] * 6, 1: [[1, 1]] * 6, 2: [[-1, -1]] * 6, 3: [[3, 3]] * 6}
    for mode, does in (("r", "left out"), ("a", "moved into the folder `damaged`")):
        with pytest.warns(UserWarning, match=f"1 files in .*/late are no whole late fields and were {does}"):
            dataset = opened(tmp_path, mode=mode)
        assert [name for name, _ in dataset.damaged_files] == [f"late/{SEGMENT}"]
        assert values(dataset, "label") == expected
        assert values(dataset, "priority")[2] == [2.0] * 6
        dataset.close()
    assert os.listdir(tmp_path / "late/damaged") == [SEGMENT]
    with opened(tmp_path) as dataset:
        assert values(dataset, "label") == expected


@pytest.mark.parametrize(
    "changed",
    [
        {"initial": "min"},
        {"initial": -1.0},
        {"initial": float("inf")},
        {"initial": 1e39},
        {"initial": True},
        {"largest": float("nan")},
        {"largest": "1"},
    ],
)
def test_priorities_that_cannot_be_are_damage(tmp_path, changed) -> None:
    labelled(tmp_path)
    rows = np.ones(1, np.float32)
    made("priority.safetensors", [-1], rows, {**PRIORITY, **changed}, path=tmp_path)
    made("priority-0000000001.safetensors", [-1, 12], -np.ones(2, np.float32), PRIORITY, path=tmp_path)
    with pytest.warns(UserWarning, match="2 files"), opened(tmp_path) as dataset:
        found = values(dataset, "priority")
        # The rest still says what the field is.
        assert (found[1], found[2], found[3]) == ([1.0] * 6, [3.0] * 6, [3.0] * 6)
        dataset.update([0], {"priority": [9.0]})
    with opened(tmp_path) as dataset:
        assert values(dataset, "priority")[2] == [3.0] * 6 and dataset.late["priority"].largest == 9.0


def test_a_field_is_there_as_long_as_any_file_of_it(tmp_path) -> None:
    labelled(tmp_path)
    os.unlink(tmp_path / "late/label.safetensors")
    (tmp_path / "late/label-notes.safetensors").write_bytes(b"no file of ours")
    with opened(tmp_path) as dataset:
        assert values(dataset, "label")[2] == [[2, 2]] * 6
    assert "label.safetensors" in late_names(tmp_path)
    shutil.rmtree(tmp_path / "late")
    with opened(tmp_path) as dataset:
        assert not dataset.late and dataset.num_episodes == 4


def test_a_later_version_is_an_error_that_names_the_file_and_changes_nothing(tmp_path) -> None:
    labelled(tmp_path)
    path = tmp_path / "late" / SEGMENT
    path.write_bytes(path.read_bytes().replace(rb"{\"version\":1,", rb"{\"version\":2,"))
    (tmp_path / "late/.tmp-label.safetensors").write_bytes(b"")
    before = times(tmp_path)
    for mode in ("a", "r"):
        with pytest.raises(ValueError, match=f"{SEGMENT} is of version 2 of the format"):
            opened(tmp_path, mode=mode)
    assert times(tmp_path) == before


@pytest.mark.parametrize("kind", ["a file", "a link"])
def test_what_is_no_folder_is_left_alone(tmp_path, kind) -> None:
    elsewhere = tmp_path / "elsewhere"
    labelled(elsewhere)
    before = times(elsewhere)
    path = tmp_path / "episodes"
    path.mkdir()
    (path / "late").write_bytes(b"") if kind == "a file" else (path / "late").symlink_to(elsewhere / "late")
    dataset = opened(path)
    assert not dataset.late
    dataset.add_late_field("label", LABEL)
    with pytest.raises(OSError, match="late field `label` could not be written"):
        dataset.close()
    kill(dataset)
    assert times(elsewhere) == before


# Readers, and copies.


@pytest.mark.parametrize(("method", "num_workers"), [("fork", 0), ("fork", 1), ("spawn", 1)])
@pytest.mark.parametrize("mode", ["a", "r"])
def test_workers_have_the_values_and_those_that_are_given_later(tmp_path, mode, method, num_workers) -> None:
    labelled(tmp_path)
    before = times(tmp_path)
    dataset = opened(tmp_path, mode=mode)
    options: dict[str, Any] = {"multiprocessing_context": method, "persistent_workers": True} if num_workers else {}
    loader = dataset.get_loader(16, 2, include=("episode", "index"), num_workers=num_workers, seed=0, **options)
    batches = iter(loader)
    batch = next(batches)
    assert (batch["label"] == batch["episode"][:, None, None]).all()
    for number in dataset.table.ids.tolist():
        dataset.annotate(number, {"label": np.full((6, 2), number + 10)})
    *_, batch = itertools.islice(batches, 2 * num_workers + 2)
    assert (batch["label"] == batch["episode"][:, None, None] + 10).all()
    if mode == "r":
        with pytest.raises(RuntimeError, match="only reads"):
            dataset.sync()
        dataset.close()
        assert times(tmp_path) == before


def test_a_copy_reads_the_shared_values_or_the_directory_and_writes_neither(tmp_path) -> None:
    labelled(tmp_path)
    dataset = opened(tmp_path)
    dataset.annotate(0, {"label": np.full((6, 2), 8)})
    handle = handle_of(dataset)
    other = reader_of(dataset)
    dataset.annotate(1, {"label": np.full((6, 2), 9)})
    assert values(other, "label")[0] == [[8, 8]] * 6 and values(other, "label")[1] == [[9, 9]] * 6
    assert list(other.late_fields or ()) == ["label"]
    with pytest.raises(RuntimeError, match="Only the process"):
        other.annotate(0, {"label": np.full((6, 2), 7)})
    with pytest.raises(RuntimeError, match="only reads"):
        other.sync()
    assert status_of(in_child(dataset.sync)) != 0, "nor does a forked child"
    other.close()
    kill(dataset)
    del dataset, other

    def read() -> None:
        assert values(pickle.loads(handle), "label")[0] == [[0, 0]] * 6

    assert status_of(in_child(read)) == 0


def test_a_reader_that_opens_while_the_writer_syncs_finds_whole_files(tmp_path) -> None:
    labelled(tmp_path)
    with opened(tmp_path) as dataset:
        dataset.annotate(0, {"label": np.full((6, 2), 8)})
        dataset.evict_episode(3)
        found = []

        def look(*_: Any) -> None:
            if not found or found[-1] is not None:
                found.append(None)
                with opened(tmp_path, mode="r") as other:
                    found[-1] = values(other, "label")[0]

        with watched_calls(after=look):
            dataset.sync()
    assert all(rows in ([[0, 0]] * 6, [[8, 8]] * 6) for rows in found if rows is not None)


def test_a_copy_of_a_ring_has_late_fields_of_its_own_and_spawned_readers_those_of_the_ring() -> None:
    ring = RingBufferDataset(20)
    ring.add_late_field("label", LABEL, [-1, -2])
    ring.add_priorities("max")
    for number in range(5):
        episode_id = ring.add_episode(tagged.episode(6, number))
        ring.annotate(episode_id, {"label": np.full((6, 2), number), "priority": np.full(6, float(number))})
    other, reader = copy.deepcopy(ring), reader_of(ring)
    expected = {number: dict.fromkeys(["label"], [[number, number]] * 6) for number in ring.table.ids.tolist()}
    ring.annotate(4, {"label": np.full((6, 2), 9)})
    for number, rows in expected.items():
        steps = np.arange(*np.cumsum(other.table.row_of(number)[:2]))
        assert other.late["label"].rows(steps).tolist() == rows["label"]
        assert other.late["priority"].rows(steps).tolist() == [float(number)] * 6
    assert reader.late["label"].rows(steps).tolist() == [[9, 9]] * 6
    assert list(other.late_fields or ()) == ["label"] and other.late["priority"].largest == 4.0
    new = other.add_episode(tagged.episode(6, 5))
    steps = np.arange(*np.cumsum(other.table.row_of(new)[:2]))
    assert other.late["label"].rows(steps).tolist() == [[-1, -2]] * 6
    assert other.late["priority"].rows(steps).tolist() == [4.0] * 6


def test_inspect_lists_late_fields(tmp_path, capsys) -> None:
    labelled(tmp_path)
    HOSTILE["empty"](tmp_path)
    before = times(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "Late fields: label: int64 (2,), priority: float32 ()" in out and f"  late/{SEGMENT}: it has no whole" in out
    assert times(tmp_path) == before
