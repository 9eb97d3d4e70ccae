"""EpisodeSink: what a writer passes complete episodes to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from buffers.compression import Codec
from buffers.dataset.episode_info import EpisodeInfo
from buffers.dataset.verification import VerificationMode
from buffers.fields import Fields

__all__ = ["EpisodeSink"]


class EpisodeSink(Protocol):
    """What takes complete episodes: a dataset, or something that sends them to one."""

    @property
    def fields(self) -> Fields | None:
        """The fields, None before they are settled."""

    @property
    def episode_capacity(self) -> int:
        """Steps of the longest episode that it takes."""

    @property
    def codecs(self) -> Mapping[str, Codec]:
        """How it compresses fields, by name: whoever has rows of open episodes can compress them as they come."""

    @property
    def verification_mode(self) -> VerificationMode:
        """How closely rows are checked."""

    @property
    def refuses_values(self) -> bool:
        """Whether `check` may refuse values; then it is shown every row before its episode ends."""

    def settle_fields(self, fields: Fields) -> None:
        """Lay out storage. The same fields again are no error; ValueError for others."""

    def check_writable(self) -> None:
        """RuntimeError if no episode can be added."""

    def check(self, rows: dict[str, np.ndarray]) -> None:
        """ValueError for values that it could not give back."""

    def check_info(self, info: EpisodeInfo) -> None:
        """ValueError for an info that it cannot keep."""

    def add(self, episode: dict[str, np.ndarray], cut: int = 0, info: EpisodeInfo | None = None) -> int:
        """Copy and store `name -> (L, *shape)` of the settled fields, and return its id; or raise and be as before.

        `cut` says which piece of a longer stream it is, see `table/cut.py`; 0 for a whole episode. `info`, if there is
        one, has passed `check_info`.
        """
