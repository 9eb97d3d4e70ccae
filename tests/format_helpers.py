"""What the tests of formats share."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from buffers.dataset.fields import ColorImage, Fields, Scalar, Vector
from buffers.dataset.individual_file import (
    EpisodeSerializationStrategy,
    NumpyCompressedSerialization,
    SafetensorsSerialization,
    TorchSerialization,
)

STRATEGIES = [SafetensorsSerialization(), NumpyCompressedSerialization(), TorchSerialization()]
each_strategy = pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.suffix)
FIELDS = Fields(obs={"image": ColorImage((4, 4, 3)), "speed": Scalar()}, action=Vector(2, torch.float64))


def made(fields: Fields, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """An episode of random bytes."""
    generator = torch.Generator().manual_seed(seed)
    episode = {}
    for name, field in fields.items():
        size = (length, *field.shape, field.dtype.itemsize)
        data = torch.randint(0, 2 if field.dtype == torch.bool else 256, size, generator=generator, dtype=torch.uint8)
        episode[name] = data.view(-1).view(field.dtype).view(length, *field.shape)
    return episode


def saved(strategy: EpisodeSerializationStrategy, episode: dict[str, torch.Tensor], fields: Fields = FIELDS) -> bytes:
    class Kept(io.BytesIO):
        def close(self) -> None:
            pass

    file = Kept()
    strategy.save(episode, fields, file)  # type: ignore[arg-type]
    return file.getvalue()


def same(one: Any, other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name].view(-1).view(torch.uint8), other[name].view(-1).view(torch.uint8)) for name in other
    )
