"""Compressed fields in a save: the bytes of one episode behind the other, as they lay in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from buffers.fields import TensorType
from buffers.table import Int64Array

__all__ = ["BYTE", "REGIONS", "REGION_UNIT", "Regions"]

BYTE = TensorType((), torch.uint8)
#: Beside the names of fields, none of which is empty.
REGIONS = ""
#: Regions are multiples of so many bytes.
REGION_UNIT = 64


class Regions(NamedTuple):
    """The compressed fields of some episodes.

    Attributes:
        memory: uint8.
        num_bytes: Of each episode, `(n,)`.
        codecs: By field, as codecs describe themselves.
    """

    memory: np.ndarray
    num_bytes: Int64Array
    codecs: Mapping[str, Any]

    def parts(self) -> list[np.ndarray]:
        """Those of each episode."""
        return np.split(self.memory, self.num_bytes.cumsum()[:-1])
