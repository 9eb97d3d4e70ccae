"""The late fields of a directory of episodes, in its folder `late`.

    late/latent.safetensors             what the field `latent` is
    late/latent-0000000003.safetensors  its values in the episodes whose first step id is in [3 * 65536, 4 * 65536)

Each is a file like that of an episode, whose rows are pairs of a step id and a value. The first row, of the step id -1,
holds the default; the `info` says the rest of what the field is. So a field is there as long as any file of it is.
"""

from __future__ import annotations

import hashlib
import io
import re
from typing import Any, NamedTuple

import numpy as np
import torch

from buffers.conversion import as_array
from buffers.dataset.episode_info import EpisodeInfo
from buffers.dataset.files.opening import report_damage
from buffers.dataset.files.safetensors_format import SafetensorsSerialization
from buffers.disk import TEMPORARY, DamagedEpisodeError, Directory, Files, UnknownVersionError, with_advice
from buffers.fields import Fields, Scalar, TensorType, as_tensor
from buffers.late import LARGEST_PRIORITY, PRIORITY, ChangedBlocks, LateField, LateFieldInfo, LateFields, PriorityField
from buffers.loading.include import INCLUDABLE
from buffers.table import EpisodeTable, Int64Array
from buffers.utils import ThreadLock

__all__ = ["LATE", "LateFiles"]

LATE = "late"
_SEGMENT_BITS = 16
_NAME = re.compile(r"([a-z0-9_%~]+)(?:-([0-9]{10,}))?\.safetensors")
_STEP, _VALUE = "step", "value"
_LARGEST_STEP = 10**15
_LONGEST_STEM = 200
_FORMAT = SafetensorsSerialization()


class _Found(NamedTuple):
    """What a file holds."""

    info: LateFieldInfo
    steps: Int64Array  # (n,), ascending.
    values: torch.Tensor  # (n, *shape)


class LateFiles:
    """Brings late fields from the disk, and back to it. Nothing is written where there are none."""

    def __init__(self, directory: Files) -> None:
        self._directory, self._folder = directory, directory.folder(LATE)
        self._lock = ThreadLock()
        # What is known to be on the disk: the info by the stem of a field, and how many rows a segment's file has.
        self._infos: dict[str, EpisodeInfo] = {}
        self._num_rows: dict[str, int] = {}

    # Reading.

    def load(self, late: LateFields, table: EpisodeTable, writes: bool) -> list[tuple[str, str]]:
        """Restore all fields, with the rows of live episodes; one that `writes` also tidies up.

        Returns:
            (name, what is wrong) of damaged files, after a warning. Their rows hold the default.

        Raises:
            ValueError: A file is of another version of the format.
        """
        late.marks_changes = writes
        damaged: list[tuple[str, str]] = []
        end = 0
        # By table position, which episodes have their values, for each field.
        has_values: dict[str, np.ndarray] = {}
        for stem, segment, name in self._list():
            assert self._folder is not None  # It has files.
            try:
                found = self._folder.read(name, _read, stem)
                self._restore(found, late, table, has_values)
            except UnknownVersionError as error:
                raise ValueError(f"{self._folder.path}/{name} {error}. Nothing was changed.") from None
            except DamagedEpisodeError as error:
                damaged.append((name, f"it {error}"))
            except FileNotFoundError:
                continue  # The writer has removed it.
            else:
                end = max(end, int(found.steps.max(initial=-1)) + 1)
                if segment is None:
                    self._infos[stem] = _as_info(found.info)
                else:
                    self._num_rows[name] = len(found.steps)
        for field, has in has_values.items():
            self._restart(late[field], table.rows[~has])
        if writes:
            self._remove_temporaries()
            # After a loss of power, episodes may be gone that had values. Theirs are not for those that come.
            table.skip_to(0, end)
        if self._folder is not None:
            damaged = report_damage(self._folder, damaged, writes, "late fields")
        return [(f"{LATE}/{name}", what) for name, what in damaged]

    def _list(self) -> list[tuple[str, int | None, str]]:
        """The stem of the field, the number of the segment, and the name of all files; a field before its segments."""
        names = [] if self._folder is None else self._folder.names()
        found = [(match[1], match[2], name) for name in names if (match := _NAME.fullmatch(name))]
        return sorted(
            ((stem, None if number is None else int(number), name) for stem, number, name in found),
            key=lambda item: (item[0], -1 if item[1] is None else item[1]),
        )

    def _restore(self, found: _Found, late: LateFields, table: EpisodeTable, has_values: dict[str, np.ndarray]) -> None:
        name, kind = found.info.name, found.info.kind
        if name not in has_values:
            late.restore(found.info, table)
            has_values[name] = np.zeros(len(table), np.bool_)
        field = late[name]
        if (field.kind.shape, field.kind.dtype) != (kind.shape, kind.dtype):
            raise DamagedEpisodeError(f"has rows of the type {kind}, other files of this field {field.kind}")
        number, step = table.numbers_of(found.steps)
        lives = step >= 0
        try:
            living = as_tensor(as_array(_VALUE, found.values)[lives], kind)
            values = field.checked(living, found.steps[lives])
        except ValueError as error:
            raise DamagedEpisodeError(f"holds other values: {error}") from None
        field.write(found.steps[lives], values[:, None])
        has_values[name][number[lives] - table.state.first] = True

    def _restart(self, field: LateField, missing: Int64Array) -> None:
        """Forget the changes so far. Priorities of episodes that no file has are not the default: they are kept."""
        if field.changed is not None:
            field.changed.take()
            if isinstance(field, PriorityField):
                field.changed.mark(missing[:, 0])

    def _remove_temporaries(self) -> None:
        folder = self._folder
        for name in [] if folder is None else folder.names():
            if isinstance(folder, Directory) and name.startswith(TEMPORARY) and _NAME.fullmatch(name[len(TEMPORARY) :]):
                folder.remove(name)

    # Writing.

    def save(self, late: LateFields, table: EpisodeTable, lock: ThreadLock) -> None:
        """Write what has changed since the last time. After an error, all of it still counts as changed.

        Args:
            late: The fields.
            table: The live episodes.
            lock: Keeps others from adding episodes. It is held for a moment only.

        Raises:
            OSError: A file could not be written. Each is whole, some in their old versions.
        """
        shown = EpisodeTable()
        with self._lock:
            with lock:
                changes = late.take_changes()
                shown.show(table)
            try:
                for name in changes:
                    self._save_field(late.info_of(name), late[name], changes[name], shown)
            except BaseException:
                late.put_back_changes(changes)
                raise

    def _save_field(self, info: LateFieldInfo, field: LateField, changed: ChangedBlocks, table: EpisodeTable) -> None:
        stem = _stem(info.name)
        if self._infos.get(stem) != _as_info(info):
            self._commit(f"{stem}.safetensors", info, np.empty(0, np.int64), info.default[None][:0])
            self._infos[stem] = _as_info(info)
        names = {name for name in self._num_rows if name.startswith(f"{stem}-")}
        segments, firsts = np.unique(table.starts >> _SEGMENT_BITS, return_index=True)
        for segment, rows in zip(segments.tolist(), np.split(table.rows, firsts[1:]), strict=False):
            name, num_rows = f"{stem}-{segment:010d}.safetensors", int(rows[:, 1].sum())
            names.discard(name)
            # Of episodes that have left, a file may keep as many rows as it has of others.
            if changed.has(int(rows[0, 0]), int(rows[-1, :2].sum())) or self._num_rows.get(name, 0) > 2 * num_rows:
                steps = np.repeat(rows[:, 0] + rows[:, 1] - rows[:, 1].cumsum(), rows[:, 1]) + np.arange(num_rows)
                self._commit(name, info, steps, field.rows(steps))
                self._num_rows[name] = num_rows
        for name in names:
            self._folder_to_write().remove(name)
            del self._num_rows[name]

    def _commit(self, name: str, info: LateFieldInfo, steps: Int64Array, values: torch.Tensor) -> None:
        # Not by torch, which lacks functions for some dtypes.
        default = as_array(_VALUE, info.default)[None]
        rows = {
            _STEP: torch.from_numpy(np.concatenate([np.full(1, -1, np.int64), steps])),
            _VALUE: as_tensor(np.concatenate([default, as_array(_VALUE, values)]), info.kind),
        }
        fields = Fields({_STEP: Scalar((), torch.int64), _VALUE: info.kind})
        try:
            self._folder_to_write().commit(
                name, lambda file: _FORMAT.save_with_info(rows, fields, file, _as_info(info)), replaces=True
            )
        except OSError as error:
            what = f"The late field `{info.name}` could not be written, what was there before is kept"
            raise with_advice(error, self._directory.path, what) from error

    def _folder_to_write(self) -> Directory:
        assert isinstance(self._directory, Directory)  # Others are only read.
        if self._folder is None:
            self._folder = self._directory.folder(LATE, create=True)
        assert isinstance(self._folder, Directory)  # It was created.
        return self._folder


def _stem(name: str) -> str:
    """A name of a file for the name of a field: in small letters, because some file systems make no difference."""
    data = name.encode(errors="surrogatepass")
    stem = re.sub(rb"[^a-z0-9_]", lambda match: b"%%%02x" % match[0][0], data).decode()
    return stem if len(stem) <= _LONGEST_STEM else f"{stem[:120]}~{hashlib.sha256(data).hexdigest()}"


def _as_info(info: LateFieldInfo) -> EpisodeInfo:
    """What a file's header says of a field, besides its type."""
    found: EpisodeInfo = {"name": info.name, "in_batches": info.in_batches}
    return found if info.initial is None else {**found, "initial": info.initial, "largest": info.largest}


def _read(file: io.FileIO, stem: str) -> _Found:
    """All of a file; DamagedEpisodeError if it is not one of the field with this stem."""
    fields, rows, said = _FORMAT.load_all(file)
    if list(fields) != [_STEP, _VALUE] or (fields[_STEP].shape, fields[_STEP].dtype) != ((), torch.int64):
        raise DamagedEpisodeError(f"holds {fields!r:.200}, not steps and values")
    steps = rows[_STEP].numpy()
    if steps[0] != -1 or not (np.diff(steps) > 0).all() or steps[-1] >= _LARGEST_STEP:
        raise DamagedEpisodeError("has step ids that are not those of a late field")
    return _Found(_parse_info(said, fields[_VALUE], rows[_VALUE][0], stem), steps[1:], rows[_VALUE][1:])


def _parse_info(said: dict[str, Any], kind: TensorType, default: torch.Tensor, stem: str) -> LateFieldInfo:
    name, in_batches = said.get("name"), said.get("in_batches")
    is_named = isinstance(name, str) and 0 < len(name) < 256 and "/" not in name and name not in INCLUDABLE
    if not is_named or _stem(str(name)) != stem or type(in_batches) is not bool:
        raise DamagedEpisodeError(f"is of a late field that cannot be: {said!r:.200}")
    if name != PRIORITY:
        return LateFieldInfo(str(name), kind, default, True)
    initial, largest = said.get("initial"), said.get("largest")
    is_initial = initial == "max" or (type(initial) is float and 0 <= initial <= LARGEST_PRIORITY)
    if not is_initial or not (type(largest) is float and 0 <= largest <= LARGEST_PRIORITY) or kind != Scalar():
        raise DamagedEpisodeError(f"is of priorities that cannot be: {said!r:.200}")
    return LateFieldInfo(PRIORITY, kind, default, in_batches, initial, largest)
