"""The reference model of late fields: a dict from step ids to rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from buffers.dataset import MixtureDataset
from buffers.fields import TensorType
from tests import samplers_model

#: Every kind of row: one number, several words, three pages, nothing.
TYPES: dict[str, TensorType] = {
    "number": TensorType((), torch.float32),
    "half": TensorType((3,), torch.bfloat16),
    "complex": TensorType((), torch.complex64),
    "flags": TensorType((2, 3), torch.bool),
    "flag": TensorType((), torch.bool),
    "nothing": TensorType((2, 0), torch.int32),
    "pages": TensorType((1600,), torch.float64),
    "words": TensorType((2,), torch.uint16),
    "byte": TensorType((), torch.int8),
}
DEFAULTS: dict[str, Any] = {"number": 0.5, "half": 2, "flag": True, "words": np.array([3, 4], np.uint16), "byte": -1}


def random_rows(kind: TensorType, leading: tuple[int, ...], rng: np.random.Generator) -> torch.Tensor:
    """Any bits, so NaN too."""
    size = (*leading, *kind.shape)
    if not math.prod(size):
        return torch.zeros(size, dtype=kind.dtype)
    high = 2 if kind.dtype == torch.bool else 256
    bits = torch.from_numpy(rng.integers(0, high, math.prod(size) * kind.dtype.itemsize, np.uint8))
    return bits.view(kind.dtype).view(size)


def bits(rows: torch.Tensor) -> bytes:
    if not rows.numel():
        return b""
    return rows.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


class LateModel:
    """Adds, evicts and updates, and knows what each row must hold."""

    def __init__(self, source: Any, names: list[str], seed: int) -> None:
        self.source, self.rng = source, np.random.default_rng(seed)
        self.members = source.datasets if isinstance(source, MixtureDataset) else [source]
        self.types = {name: TYPES[name] for name in names}
        #: Of each member, by name and step id: the rows that it may hold, several if one update has an id twice.
        self.rows: list[dict[str, dict[int, set[bytes]]]] = [{name: {} for name in names} for _ in self.members]
        for name, kind in self.types.items():
            source.add_late_field(name, kind, DEFAULTS.get(name, 0))
            default = torch.zeros(kind.shape, dtype=kind.dtype)
            value = DEFAULTS.get(name, 0)
            default[...] = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            for member, rows in zip(self.members, self.rows, strict=True):
                rows[name] |= dict.fromkeys(live(member), {bits(default)})
        self.defaults = {name: next(iter(rows.values())) for name, rows in self.rows[0].items()}

    def add(self, length: int) -> None:
        n = int(self.rng.integers(len(self.members)))
        samplers_model.add(self.members[n], length)
        start, length, *_ = self.members[n].table.rows[-1].tolist()
        for name, rows in self.rows[n].items():
            rows |= dict.fromkeys(range(start, start + length), self.defaults[name])

    def evict(self) -> None:
        member = self.members[int(self.rng.integers(len(self.members)))]
        if member.num_episodes:
            position = int(self.rng.integers(member.num_episodes))
            member.evict_episode(0 if member.has_circular_ids else position)

    def annotate(self) -> None:
        n = int(self.rng.integers(len(self.members)))
        if self.members[n].num_episodes:
            start, length, episode_id, _ = self.rng.choice(self.members[n].table.rows).tolist()
            ids = np.arange(start, start + length)
            values = self._values((length,), ids, np.full(length, n))
            self.members[n].annotate(episode_id, values)

    def update(self) -> None:
        """For ids of any shape, of several episodes, some gone, some to come, some twice, some padding."""
        kind = int(self.rng.integers(5))
        size = tuple(self.rng.integers(1, 7, 2).tolist())
        if kind == 0:
            size = size[:1]
        elif kind == 1:
            size = (*size, 2)
        n = self.rng.integers(len(self.members), size=size[0])
        shown = n.reshape(-1, *(1 for _ in size[1:]))
        first = np.array([member.table.oldest_start for member in self.members])[n].reshape(shown.shape)
        last = np.array([member.table.next_start for member in self.members])[n].reshape(shown.shape)
        ids = first + self.rng.integers(-3, 1 + (last - first).max() + 3, size)
        if kind > 2 and len(size) == 2:
            ids = ids[:, :1] + np.arange(size[1])  # Runs, as windows have them.
        ids = np.maximum(np.where(self.rng.random(size) < 0.1 * (kind != 4), -1, ids), -1)
        owners = np.broadcast_to(shown, size)
        values = self._values(size, ids.ravel(), owners.ravel())
        gone = sum(id != -1 and id not in self.alive[n] for id, n in zip(ids.ravel(), owners.ravel(), strict=True))
        index = torch.from_numpy(ids) if self.rng.random() < 0.5 else ids
        source = {"source": torch.from_numpy(n)} if isinstance(self.source, MixtureDataset) else {}
        assert self.source.update(index, values, **source) == gone

    def _values(self, size: tuple[int, ...], ids: np.ndarray, owners: np.ndarray) -> dict[str, torch.Tensor]:
        names = [name for name in self.types if self.rng.random() < 0.6] or list(self.types)
        self.alive = [set(live(member)) for member in self.members]
        found = {name: random_rows(self.types[name], size, self.rng) for name in names}
        for name, values in found.items():
            flat, new = values.view(len(ids), *self.types[name].shape), dict[tuple[int, int], set[bytes]]()
            for n, id, row in zip(owners.tolist(), ids.tolist(), flat, strict=True):
                if id in self.alive[n]:
                    new.setdefault((n, id), set()).add(bits(row))
            for (n, id), rows in new.items():
                self.rows[n][name][id] = rows
        return found

    def check(self, batch: dict[str, torch.Tensor], is_edge: bool = False) -> None:
        """A batch with `index` holds the rows of the model, and its padding is zero or the nearest row."""
        index = batch["index"].numpy()
        sources = batch["source"].tolist() if "source" in batch else [0] * len(index)
        for name in self.types:
            values = batch[name]
            assert values.dtype == self.types[name].dtype and tuple(values.shape) == (
                *index.shape,
                *self.types[name].shape,
            )
            for b, n in enumerate(sources):
                real = np.flatnonzero(index[b] >= 0)
                for t, id in enumerate(index[b].tolist()):
                    row = bits(values[b, t])
                    if id >= 0:
                        assert row in self.rows[n][name][id], (name, n, id)
                    elif is_edge:
                        assert row == bits(values[b, min(max(t, real[0]), real[-1])]), (name, "edge")
                    else:
                        assert not row.strip(b"\0"), (name, "padding")

    def check_all(self) -> None:
        """Every row."""
        include = ("index", "source") if isinstance(self.source, MixtureDataset) else ("index",)
        if self.source.num_episodes and self.source.fields is not None:
            for batch in self.source.get_loader(16, 1, epochs=1, include=include, seed=0):
                self.check(batch)


def live(dataset: Any) -> list[int]:
    """The step ids that are stored."""
    return [start + t for start, length, *_ in dataset.table.rows.tolist() for t in range(length)]
