"""What is known about a dataset before its first episode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from buffers.compression import Compress, checked_choice
from buffers.dataset.verification import VerificationMode
from buffers.fields import Fields, TensorType

__all__ = ["EpisodeDatasetInfo"]


@dataclass(frozen=True)
class EpisodeDatasetInfo:
    """The fields of a dataset's episodes, and how they are checked.

        >>> from buffers.dataset import RingBufferDataset
        >>> from buffers.fields import Scalar, Vector
        >>> info = EpisodeDatasetInfo(Fields(obs=Vector(4), reward=Scalar()), VerificationMode.ALL_CHECKS)
        >>> RingBufferDataset(capacity=1_000, info=info).fields
        Fields(obs: float32 (4,), reward: float32 ())

    Attributes:
        fields: If given, room is made at construction and every episode must match; else the first episode decides.
        verification_mode: What is checked in added data.
        late_fields: Name and type of fields that are added as by `add_late_field`, with the default 0.
        compress: As for `RingBufferDataset` and `IndividualFileDataset`.
    """

    fields: Fields | None = None
    verification_mode: VerificationMode = VerificationMode.BASIC_CHECKS
    late_fields: Mapping[str, TensorType] | None = None
    compress: Compress | None = None

    def __post_init__(self) -> None:
        if self.fields is not None and not isinstance(self.fields, Fields):
            raise TypeError(f"`fields` must be a Fields, found {type(self.fields).__name__}.")
        if not isinstance(self.verification_mode, VerificationMode):
            raise TypeError(f"`verification_mode` must be a VerificationMode, found {self.verification_mode!r}.")
        if self.late_fields is not None and not isinstance(self.late_fields, Mapping):
            raise TypeError(f"`late_fields` must be a dict of types, found {type(self.late_fields).__name__}.")
        if self.compress is not None:
            checked_choice(self.compress)
