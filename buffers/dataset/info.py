"""What is known about a dataset before its first episode."""

from __future__ import annotations

from dataclasses import dataclass

from buffers.dataset.verification import VerificationMode
from buffers.fields import Fields

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
    """

    fields: Fields | None = None
    verification_mode: VerificationMode = VerificationMode.BASIC_CHECKS

    def __post_init__(self) -> None:
        if self.fields is not None and not isinstance(self.fields, Fields):
            raise TypeError(f"`fields` must be a Fields, found {type(self.fields).__name__}.")
        if not isinstance(self.verification_mode, VerificationMode):
            raise TypeError(f"`verification_mode` must be a VerificationMode, found {self.verification_mode!r}.")
