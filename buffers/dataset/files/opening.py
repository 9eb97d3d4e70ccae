"""Which files of a directory are whole episodes: told by names and sizes, and by as much more as is asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from buffers.dataset.files.archives import NumpyCompressedSerialization, TorchSerialization
from buffers.dataset.files.directory import EpisodeDirectory, Listing
from buffers.dataset.files.safetensors_format import SafetensorsSerialization
from buffers.dataset.files.serialization import (
    DamagedEpisodeError,
    EpisodeSerializationStrategy,
    UnknownVersionError,
)
from buffers.fields import Fields

__all__ = ["Verify", "inspect", "list_episodes"]

Verify = Literal["size", "header", "full"]
_FORMATS = {kind.suffix: kind for kind in (SafetensorsSerialization, NumpyCompressedSerialization, TorchSerialization)}


def list_episodes(
    directory: EpisodeDirectory, seen: Collection[str], strategy: EpisodeSerializationStrategy | None
) -> tuple[Listing, EpisodeSerializationStrategy]:
    """What a directory holds besides what has been seen, and its format: by default that of the files in it.

    Raises:
        ValueError: It holds episodes of another format. Files that merely look like it (a backup) are no matter.
    """
    listing = directory.list(seen)
    known = [suffix for suffix in _FORMATS if suffix in listing.other_suffixes]
    if strategy is None and known and not listing.names:
        directory.suffix = known.pop(0)
        listing = directory.list(seen)
    if not seen and (known or (listing.other_suffixes and not listing.names)):
        raise ValueError(
            f"{directory.path} holds episodes in the format {sorted(listing.other_suffixes)}, not only in "
            f"`{directory.suffix}`. Give the `serialization_strategy` they were written with, or choose another "
            "`directory`."
        )
    return listing, _FORMATS[directory.suffix]() if strategy is None else strategy


def inspect(
    directory: EpisodeDirectory,
    listing: Listing,
    strategy: EpisodeSerializationStrategy,
    fields: Fields | None,
    stated_fields: Fields | None,
    verify: Verify,
) -> tuple[Fields | None, npt.NDArray[np.int64], list[tuple[str, str]]]:
    """Tell whole episodes from the rest; nothing is moved.

    Args:
        directory: Where they are.
        listing: What it holds.
        strategy: The format.
        fields: Those of the directory, if they are known already.
        stated_fields: What the user says they are; taken where the format does not keep them.
        verify: How closely to look.

    Returns:
        The fields, rows int64 `(n, 3)` of start, length and id of whole episodes, and (file name, what is wrong).

    Raises:
        ValueError: There are episodes, but their fields, or their version, are not known, or are not those stated.
    """
    errors: dict[str, Exception] = {}
    if fields is None:
        fields = _find_fields(directory, listing, strategy, stated_fields, errors)
    rows = listing.rows[:0]
    if fields is not None:
        method = strategy.verify if verify == "full" else strategy.check
        for i in _suspects(listing, strategy, fields) if verify == "size" else range(len(listing.names)):
            if listing.names[i] not in errors:
                _try(directory, listing.names[i], errors, method, fields, int(listing.rows[i, 1]))
        _find_overlaps(listing, errors)
        rows = listing.rows[[name not in errors for name in listing.names]]
    errors = {name: error for name, error in errors.items() if not isinstance(error, FileNotFoundError)}
    return fields, rows, [(name, f"it {error}") for name, error in errors.items()]


def _try(
    directory: EpisodeDirectory, name: str, errors: dict[str, Exception], method: Callable[..., Any], *arguments: Any
) -> Any:
    try:
        with directory.open(name) as file:
            return method(file, *arguments)
    except (DamagedEpisodeError, FileNotFoundError) as error:
        errors[name] = error


def _find_fields(
    directory: EpisodeDirectory,
    listing: Listing,
    strategy: EpisodeSerializationStrategy,
    stated: Fields | None,
    errors: dict[str, Exception],
) -> Fields | None:
    """The fields that the oldest good file states."""
    for name, length in zip(listing.names, listing.rows[:, 1].tolist(), strict=True):
        fields = _try(directory, name, errors, strategy.load_fields)
        if name not in errors:
            fields = _agreed(directory, strategy, fields, stated)
            _try(directory, name, errors, strategy.check, fields, length)
        if name not in errors:
            return fields
    unknown = [error for error in errors.values() if isinstance(error, UnknownVersionError)]
    if unknown:
        # Not a good file among them: a directory that a later version has written, more likely than damage.
        raise ValueError(f"No episode of {directory.path} can be read: {next(iter(errors))} {unknown[0]}.")
    return None


def _agreed(
    directory: EpisodeDirectory, strategy: EpisodeSerializationStrategy, found: Fields | None, stated: Fields | None
) -> Fields:
    fields = found if stated is None else stated
    if fields is None:
        raise ValueError(
            f"{directory.path} holds episodes in the format `{strategy.suffix}`, which does not keep their fields. "
            "State them with `info=EpisodeDatasetInfo(fields)`."
        )
    conflict = None if found is None else found.conflict_with(fields)
    if conflict is not None:
        raise ValueError(
            f"The fields of {directory.path} differ from those of `info`: {conflict}. The directory has {found}, "
            f"`info` has {stated}. Choose another `directory`, or leave them out of `info`."
        )
    return fields


def _suspects(listing: Listing, strategy: EpisodeSerializationStrategy, fields: Fields) -> list[int]:
    """The files to look into: those of an unlikely size, and those with numbers that others have."""
    bounds = strategy.overhead(fields)
    if bounds is None:
        return list(range(len(listing.names)))
    overhead = listing.sizes - listing.rows[:, 1] * fields.nbytes
    is_suspect = (overhead < bounds[0]) | (overhead > bounds[1])
    clashes = _find_clashes(listing)
    is_suspect[1:] |= clashes
    is_suspect[:-1] |= clashes
    return np.flatnonzero(is_suspect).tolist()


def _find_clashes(listing: Listing) -> npt.NDArray[np.bool_]:
    """Whether a file has the id of the file before it, or step ids of any before it; bool `(n - 1,)`."""
    starts, lengths, ids = listing.rows.T
    return (ids[1:] == ids[:-1]) | (starts[1:] < np.maximum.accumulate(starts + lengths)[:-1])


def _find_overlaps(listing: Listing, errors: dict[str, Exception]) -> None:
    """Files of one id, or of step ids that another has, could not be told apart in a batch: the first stays."""
    if not _find_clashes(listing).any():
        return
    last_id, end = -1, 0
    for name, (start, length, episode_id) in zip(listing.names, listing.rows.tolist(), strict=True):
        if name in errors:
            continue
        if episode_id == last_id or start < end:
            errors[name] = DamagedEpisodeError(f"has numbers that episode {last_id} has")
        else:
            last_id, end = episode_id, start + length
