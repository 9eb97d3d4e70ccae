"""What a dataset can be told before its first episode."""

from __future__ import annotations

from dataclasses import dataclass

from buffers.dataset.verification import VerificationMode
from buffers.fields import Fields

__all__ = ["EpisodeDatasetInfo"]


@dataclass(frozen=True)
class EpisodeDatasetInfo:
    """What is known of a dataset's episodes.

        >>> from buffers.dataset import RingBufferDataset
        >>> from buffers.fields import Scalar, Vector
        >>> info = EpisodeDatasetInfo(Fields(obs=Vector(4), reward=Scalar()), VerificationMode.ALL_CHECKS)
        >>> RingBufferDataset(capacity=1_000, info=info).fields
        Fields(obs: float32 (4,), reward: float32 ())

    Attributes:
        fields: With it, storage is laid out at construction and every episode must match; without it, the
            first episode decides.
        verification_mode: How closely added data is checked.
    """

    fields: Fields | None = None
    verification_mode: VerificationMode = VerificationMode.BASIC_CHECKS

    def __post_init__(self) -> None:
        if self.fields is not None and not isinstance(self.fields, Fields):
            raise TypeError(f"`fields` must be a Fields, found {type(self.fields).__name__}.")
        if not isinstance(self.verification_mode, VerificationMode):
            raise TypeError(f"`verification_mode` must be a VerificationMode, found {self.verification_mode!r}.")
