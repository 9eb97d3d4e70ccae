"""How an episode becomes a file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from buffers.compression import chosen_codecs
from buffers.dataset.episode_info import EpisodeInfo
from buffers.dataset.files.compressed import stored_blocks
from buffers.dataset.files.safetensors_format import SafetensorsSerialization
from buffers.dataset.files.saving import LinkedDataset
from buffers.dataset.files.serialization import as_saved
from buffers.disk import DamagedEpisodeError, with_advice
from buffers.fields import Fields
from buffers.utils import format_bytes

__all__ = ["WrittenDataset"]


class WrittenDataset(LinkedDataset):
    """What a dataset of files does to add an episode."""

    def _compress_as_before(self) -> None:
        """Choose the codecs of the newest episode."""
        if len(self.table):
            name = str(self._directory.name_of(*self.table.episode(len(self.table) - 1)))
            with contextlib.suppress(DamagedEpisodeError, FileNotFoundError):
                places = self._directory.read(name, self.serialization_strategy.block_places)
                self.compress = {field: blocks.codec.name for field, blocks in places.items()}
                self.codecs = chosen_codecs(self.compress, self._fields) if self._fields is not None else {}

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
