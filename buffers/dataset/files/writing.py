"""How an episode becomes a file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from buffers.compression import chosen_codecs
from buffers.dataset.episode_info import EpisodeInfo
from buffers.dataset.files.compressed import FieldBlocks, stored_blocks
from buffers.dataset.files.safetensors_format import SafetensorsSerialization
from buffers.dataset.files.saving import LinkedDataset
from buffers.dataset.files.serialization import as_saved
from buffers.disk import DamagedEpisodeError, with_advice
from buffers.fields import Fields
from buffers.table import Int64Array
from buffers.utils import format_bytes

__all__ = ["WrittenDataset"]

_NUM_SAMPLED = 16


class WrittenDataset(LinkedDataset):
    """What a dataset of files does to add an episode, and what it knows of fields that are compressed."""

    # Episodes when files were last looked at, and what they said.
    _sample: tuple[int, dict[str, float]] = (0, {})
    _is_closed: bool

    def _check_format(self) -> None:
        """ValueError if fields are to be compressed in a format that cannot: one that was given, or is in the files."""
        strategy = self.serialization_strategy
        if self.compress and not isinstance(strategy, SafetensorsSerialization):
            raise ValueError(f"Only the default format has compressed fields, found {type(strategy).__name__}.")

    def _compress_as_before(self) -> None:
        """Choose the codecs of the newest episode, where none were chosen by the caller."""
        if self._goes_on_compressing and len(self.table):
            with contextlib.suppress(DamagedEpisodeError, FileNotFoundError):
                places = self._places_in(self.table.episode(len(self.table) - 1))
                self.compress = {field: blocks.codec.name for field, blocks in places.items()}
                self.codecs = chosen_codecs(self.compress, self._fields) if self._fields is not None else {}

    def _replace(self, rows: Int64Array) -> None:
        super()._replace(rows)
        self._compress_as_before()

    def _allocate(self, fields: Fields) -> None:
        self.serialization_strategy.check_dtypes(fields)
        self.codecs = chosen_codecs(self.compress, fields)

    def _write(self, episode: dict[str, np.ndarray], start: int, episode_id: int) -> None:
        fields, strategy = self._fields, self.serialization_strategy
        assert fields is not None  # Settled before anything is written.
        self._own.remove_uncounted(self.table.next_id)
        self._own.newest = name = self._directory.name_of(
            start, len(next(iter(episode.values()))), episode_id, self.cut
        )
        plain = {field: kind for field, kind in fields.items() if field not in self.codecs}
        tensors, info = as_saved(episode, plain, name.length), self._info_to_write
        if self.codecs:
            assert isinstance(strategy, SafetensorsSerialization)  # Others were refused.
            blocks, codecs = stored_blocks(episode, self.codecs), self.codecs
            save: Callable[..., Any] = partial(
                strategy.save_blocks, tensors, blocks, codecs, fields, name.length, info=info
            )
        else:
            save = partial(strategy.save_with_info, tensors, fields, info=info)
        try:
            self._own.commit(str(name), save)
        except OSError as error:
            size = format_bytes(fields.nbytes * name.length)
            what = f"An episode of {name.length} steps ({size}) could not be written, those before it are kept"
            raise with_advice(error, self._directory.path, what) from error
        self._is_bound = True

    def _keep_info(self, episode_id: int, info: EpisodeInfo | None) -> None:
        self._info_to_write = info or {}

    def store(self, episode: dict[str, np.ndarray], cut: int = 0, info: EpisodeInfo | None = None) -> int:
        """`EpisodeDataset.store`; after an error, neither the episode nor its file is there."""
        try:
            return super().store(episode, cut, info)
        except Exception:
            with contextlib.suppress(OSError):
                self._own.remove_uncounted(self.table.next_id)
            raise

    def compressed_bytes(self) -> dict[str, int]:
        """As `EpisodeReader.compressed_bytes`, by some of the files: others once an eighth of the episodes is new."""
        num_looked_at, sizes = self._sample
        if abs(len(self.table) - num_looked_at) > num_looked_at // 8 and not self._is_closed:
            self._sample = len(self.table), (sizes := self._sampled_sizes())
        return {field: int(size * self.num_timesteps) for field, size in sizes.items()}

    def _sampled_sizes(self) -> dict[str, float]:
        """Bytes of a step, of the fields that some of the files have compressed."""
        rows, compressed = self.table.rows, set[str]()
        sizes, num_steps = dict.fromkeys(self._fields or (), 0), 0
        for row in rows[np.linspace(0, len(rows) - 1, min(_NUM_SAMPLED, len(rows))).astype(int)].tolist():
            with contextlib.suppress(DamagedEpisodeError, FileNotFoundError):
                places = self._places_in(row)
                for field, kind in (self._fields or {}).items():
                    sizes[field] += places[field].num_bytes if field in places else row[1] * kind.nbytes
                compressed |= places.keys()
                num_steps += row[1]
        return {field: sizes[field] / num_steps for field in sizes if field in compressed}

    def _places_in(self, row: Sequence[int]) -> dict[str, FieldBlocks]:
        """Where the file of an episode has compressed fields."""
        return self._directory.read(str(self._directory.name_of(*row)), self.serialization_strategy.block_places)
