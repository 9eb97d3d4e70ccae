"""Which files of a directory are whole episodes: by name and size, and as closely as `verify` asks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from buffers.dataset.episode_dataset import EpisodeDataset
from buffers.dataset.files.archives import NumpyCompressedSerialization, TorchSerialization
from buffers.dataset.files.directory import EpisodeDirectory, EpisodeFiles
from buffers.dataset.files.safetensors_format import SafetensorsSerialization
from buffers.dataset.files.serialization import EpisodeSerializationStrategy, has_offsets
from buffers.disk import DAMAGED, DamagedEpisodeError, Directory, Files, UnknownVersionError
from buffers.fields import Fields

__all__ = ["Durability", "FORMATS", "Inspection", "Mode", "Verify", "check_capacity", "report_damage"]

Durability = Literal["fsync", "rename"]
Mode = Literal["a", "r"]
Verify = Literal["size", "header", "full"]
FORMATS = {kind.suffix: kind for kind in (SafetensorsSerialization, NumpyCompressedSerialization, TorchSerialization)}


def report_damage(
    directory: Files, damaged: list[tuple[str, str]], moves: bool, what: str = "episodes"
) -> list[tuple[str, str]]:
    """Warn of files (name, what is wrong) that are not whole; `moves`: after setting them aside."""
    if not damaged:
        return []
    what_happened = f"moved into the folder `{DAMAGED}`" if moves else "left out"
    if moves:
        assert isinstance(directory, Directory)  # Others are only read.
        damaged = [
            (name, reason if directory.set_aside(name) else f"{reason} (and it could not be moved)")
            for name, reason in damaged
        ]
    named = [f"{name}: {reason}" for name, reason in damaged[:5]]
    if len(damaged) > 5:
        named.append(f"and {len(damaged) - 5} more")
    where = f"{len(damaged)} files in {directory.path}"
    warnings.warn(f"{where} are no whole {what} and were {what_happened}: {'; '.join(named)}.", stacklevel=5)
    return damaged


def check_capacity(dataset: EpisodeDataset, directory: EpisodeDirectory) -> None:
    """ValueError if episodes would leave, other than those that a killed writer has not yet evicted."""
    table = dataset.table
    ids, num_steps = table.ids.tolist(), table.num_steps
    # With the same capacity, a power loss may have brought back what had left. If none is known, the newest episode
    # may be left by an addition that was cut off.
    if dataset.capacity >= (directory.last_capacity or num_steps - int(table.lengths[-1])):
        return
    # To ask the evictor which ones, without deleting any.
    dataset._erase = lambda *_: None  # type: ignore[method-assign]
    dataset.make_room(table.next_start, 0)
    gone = sorted({*ids} - {*table.ids.tolist()})
    named = f"{gone[:9]}"[:-1] + (", ...]" if len(gone) > 9 else "]")
    raise ValueError(
        f"{directory.path} holds {num_steps} steps, more than `capacity`={dataset.capacity}: {len(gone)} of its "
        f"{len(ids)} episodes would be deleted ({num_steps - table.num_steps} steps, ids {named}). Raise it, "
        "pass shrink=True to delete them, or open with mode='r' to read."
    )


# So many files are opened one behind the other.
_NUM_EXPECTED = 64


class Inspection:
    """Tells whole episodes from other files, without moving any. Names that were `seen` are passed over.

    Without a `strategy`, the format is that of the files. ValueError if the directory holds episodes in another format;
    a backup, whose suffix is that of no format, is ignored.
    """

    def __init__(
        self, directory: EpisodeFiles, seen: Collection[str], strategy: EpisodeSerializationStrategy | None
    ) -> None:
        listing = directory.list(seen)
        known = [suffix for suffix in FORMATS if suffix in listing.other_suffixes]
        if strategy is None and known and not listing.names:
            directory.suffix = known.pop(0)
            listing = directory.list(seen)
        if not seen and (known or (listing.other_suffixes and not listing.names)):
            raise ValueError(
                f"{directory.path} holds episodes in the format {sorted(listing.other_suffixes)}, not only in "
                f"`{directory.suffix}`. Give the `serialization_strategy` they were written with, or choose another "
                "`directory`."
            )
        self.listing = listing
        self.strategy = FORMATS[directory.suffix]() if strategy is None else strategy
        self._directory = directory
        self._errors: dict[str, Exception] = {}

    @property
    def damaged(self) -> list[tuple[str, str]]:
        """(file name, what is wrong) of files that are not whole episodes, as far as they were looked at."""
        errors = self._errors.items()
        return [(name, f"it {error}") for name, error in errors if not isinstance(error, FileNotFoundError)]

    def warn_of_strangers(self) -> None:
        """Warn of files that look like data, and are not episodes by their names."""
        if strangers := self.listing.strangers:
            warnings.warn(
                f"{len(strangers)} files in {self._directory.path} look like data ({min(strangers)}, for example), but "
                "do not have the names of episodes and are not read. To bring them in, load each and pass its arrays "
                "to `add_episode` of a dataset in a new directory; docs/coming-from.md has the loop.",
                stacklevel=5,
            )

    def find_fields(self, stated: Fields | None) -> Fields | None:
        """The fields of the oldest whole file; None if there is none.

        Args:
            stated: The fields that the user expects; taken where the format does not store them.

        Raises:
            ValueError: The fields, or the version, of the files are not known, or the fields are not those stated.
        """
        if self.listing.fields is not None:
            return self._agree(self.listing.fields, stated)
        for name, length in zip(self.listing.names, self.listing.rows[:, 1].tolist(), strict=True):
            found = self._try(name, self.strategy.load_fields)
            if name not in self._errors:
                fields = self._agree(found, stated)
                self._try(name, self.strategy.check, fields, length)
                if name not in self._errors:
                    return fields
        if unknown := self._later_versions():
            raise ValueError(f"No episode of {self._directory.path} can be read: {unknown[0]}.")
        return None

    def refuse_later_versions(self) -> None:
        """ValueError if there are files of an unknown version, which a writer would set aside."""
        if unknown := self._later_versions():
            raise ValueError(f"{self._directory.path}/{unknown[0]}. Nothing was changed.")

    def _later_versions(self) -> list[str]:
        """What is wrong with files of an unknown version: a later version of the library is likelier than damage."""
        return [f"{name} {error}" for name, error in self._errors.items() if isinstance(error, UnknownVersionError)]

    def whole_episodes(self, fields: Fields, verify: Verify) -> npt.NDArray[np.int64]:
        """Table rows of whole episodes, int64 `(n, 4)`, after looking as closely as `verify` says."""
        names, rows = self.listing.names, self.listing.rows
        method = self.strategy.verify if verify == "full" else self.strategy.check
        is_whole = verify == "full" or not has_offsets(self.strategy)
        looked_at = self._suspects(fields) if verify == "size" else list(range(len(names)))
        for first in range(0, len(looked_at), _NUM_EXPECTED):
            some = [i for i in looked_at[first : first + _NUM_EXPECTED] if names[i] not in self._errors]
            lengths = rows[some, 1].tolist()
            self._directory.expect([names[i] for i in some], lengths, fields, is_whole)
            for i, length in zip(some, lengths, strict=True):
                self._try(names[i], method, fields, length)
        # Rows of two files with the same numbers could not be told apart in a batch: the first file stays.
        last_id, end = -1, 0
        for name, (start, length, episode_id, _) in zip(names, rows.tolist(), strict=True):
            if name in self._errors:
                continue
            if episode_id == last_id or start < end:
                self._errors[name] = DamagedEpisodeError(f"has numbers that episode {last_id} has")
            else:
                last_id, end = episode_id, start + length
        return rows[[name not in self._errors for name in names]]

    def _try(self, name: str, method: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return self._directory.read(name, method, *arguments)
        except (DamagedEpisodeError, FileNotFoundError) as error:
            self._errors[name] = error

    def _agree(self, found: Fields | None, stated: Fields | None) -> Fields:
        path, fields = self._directory.path, found if stated is None else stated
        if fields is None:
            raise ValueError(
                f"{path} holds episodes in the format `{self.strategy.suffix}`, which does not keep their fields. "
                "State them with `info=EpisodeDatasetInfo(fields)`."
            )
        self.strategy.check_dtypes(fields)
        conflict = None if found is None else found.conflict_with(fields)
        if conflict is not None:
            raise ValueError(
                f"The fields of {path} differ from those of `info`: {conflict}. The directory has {found}, "
                f"`info` has {stated}. Choose another `directory`, or leave them out of `info`."
            )
        return fields

    def _suspects(self, fields: Fields) -> list[int]:
        """Positions of files with an unlikely size; of all files, if two have the same numbers."""
        rows = self.listing.rows
        if self.listing.fields is not None:
            return []
        bounds = self.strategy.overhead(fields) if len(rows) else None
        starts, lengths, ids, _ = rows.T
        has_same_numbers = (ids[1:] == ids[:-1]) | (starts[1:] < np.maximum.accumulate(starts + lengths)[:-1])
        if bounds is None or has_same_numbers.any():
            return list(range(len(rows)))
        overhead = self.listing.sizes - lengths * fields.nbytes
        return np.flatnonzero((overhead < bounds[0]) | (overhead > bounds[1])).tolist()
