"""PriorityField: the late field by which `PrioritizedSampler` draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from buffers.fields import Scalar
from buffers.late.changes import ChangeLog
from buffers.late.late_field import PADDING, LateField
from buffers.sharing import SharedArrays
from buffers.table import Int64Array
from buffers.utils import number

__all__ = ["LARGEST_PRIORITY", "PRIORITY", "PriorityField"]

#: The name of the field.
PRIORITY = "priority"
_FIRST = 1.0  # Of rows that are stored before any priority is given.
#: So that sums of float32 stay finite.
LARGEST_PRIORITY = float(np.finfo(np.float32).max) / 2


def _least(values: np.ndarray) -> Any:
    return np.minimum.reduce(values, axis=None, initial=0)


def _most(values: np.ndarray) -> Any:
    return np.maximum.reduce(values, axis=None, initial=0)


class PriorityField(LateField):
    """One float32 a row, finite and not negative. A log tells readers which rows have changed.

    Attributes:
        initial: The priority of new rows: a number, or "max" for the largest so far, at first 1.
        is_restored: Whether `initial` is that of an earlier run; the next sampler's replaces it.
    """

    extra = {**ChangeLog.layout, "largest": ((1,), np.dtype(np.float32))}

    def __init__(self, initial: float | str, capacity: int, is_circular: bool) -> None:
        self.initial = initial if initial == "max" else number("initial", initial, 0.0, LARGEST_PRIORITY)
        self.is_restored = False
        # Samplers read priorities on the CPU, wherever the rows are.
        super().__init__(PRIORITY, Scalar(), 0.0, capacity, is_circular, torch.device("cpu"))
        self._largest[0] = _FIRST
        self._is_zero = False  # New rows hold `new_value`, not the default.

    def _open(self, memory: SharedArrays | None) -> None:
        super()._open(memory)
        assert memory is not None  # It is on the CPU.
        self.log = ChangeLog(memory["log/entries"], memory["log/num"])
        self._largest = memory["largest"]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name not in ("log", "_largest")}

    @property
    def largest(self) -> float:
        """The largest priority so far."""
        return float(self._largest[0])

    def set_largest(self, largest: float) -> None:
        """Take a larger value of an earlier run into account."""
        self._largest[0] = max(self._largest[0], largest)

    def restore_largest(self, largest: float) -> None:
        """Go on with the largest priority of an earlier run."""
        self._largest[0] = largest

    @property
    def new_value(self) -> float:
        """What new rows hold."""
        return self.largest if self.initial == "max" else float(self.initial)

    def checked(self, value: Any, ids: Int64Array) -> Any:
        """As `LateField.checked`; ValueError for a priority that is negative or not finite."""
        found = super().checked(value, ids)
        # Comparisons with NaN are false.
        if not (_least(found) >= 0 and _most(found) <= LARGEST_PRIORITY):
            bad = found[~((found >= 0) & (found <= LARGEST_PRIORITY)) & (ids != PADDING)]
            if len(bad):
                most = f"{LARGEST_PRIORITY:.3g}"
                raise ValueError(
                    f"Priorities must be finite, not negative and at most {most}, found {bad[0]} among {found.size}."
                )
        return found

    def fill(self, start: int, length: int) -> None:
        """As `LateField.fill`."""
        if self.changed is not None:
            # The largest so far will be another one when this is read from disk.
            self.changed.mark_all(start, start + length)
        super().fill(start, length)

    def write(self, starts: Int64Array, values: Any) -> None:
        """As `LateField.write`."""
        if len(values):
            self.set_largest(_most(values))  # First, so that no row holds a larger one.
        super().write(starts, values)

    def note(self, episode_ids: Int64Array, steps: Int64Array, num: int | Int64Array) -> None:
        """As `LateField.note`."""
        changes = np.empty((len(steps), 3), np.int64)
        changes[:, 0], changes[:, 1], changes[:, 2] = episode_ids, steps, num
        self.log.append(changes)

    def note_all(self) -> None:
        """As `LateField.note_all`."""
        self.log.skip()
