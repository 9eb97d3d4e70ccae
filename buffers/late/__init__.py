"""Late fields: values that are given after their rows were stored, such as priorities and latents."""

from buffers.late.changes import ChangedBlocks, ChangeLog
from buffers.late.late_field import LateField
from buffers.late.late_fields import LateFieldInfo, LateFields
from buffers.late.priorities import LARGEST_PRIORITY, PRIORITY, PriorityField

__all__ = [
    "ChangeLog",
    "ChangedBlocks",
    "LARGEST_PRIORITY",
    "LateField",
    "LateFieldInfo",
    "LateFields",
    "PRIORITY",
    "PriorityField",
]
