"""Which files of a directory are whole episodes: told by names and sizes, and by as much more as is asked for."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from buffers.dataset.archives import NumpyCompressedSerialization, TorchSerialization
from buffers.dataset.directory import EpisodeDirectory, Listing
from buffers.dataset.safetensors_format import SafetensorsSerialization
from buffers.dataset.serialization import DamagedEpisodeError, EpisodeSerializationStrategy, UnknownVersionError
from buffers.dataset.window_reader import as_damage
from buffers.fields import Fields
from buffers.table import EpisodeTable

__all__ = [
    "Inspection",
    "Verify",
    "check_capacity",
    "check_format",
    "check_stated_fields",
    "damage_message",
    "inspect",
    "list_episodes",
    "set_aside",
]

Verify = Literal["size", "header", "full"]

_FORMATS = (SafetensorsSerialization, NumpyCompressedSerialization, TorchSerialization)

Int64Array = npt.NDArray[np.int64]


@dataclass
class Inspection:
    """What was found.

    Attributes:
        fields: Those of the episodes; None if there is no episode.
        texts: Names of files that are whole episodes, ascending.
        numbers: int64 `(3, n)`, their ids, starts and lengths.
        damaged: (file name, what is wrong) of all else.
    """

    fields: Fields | None
    texts: list[str]
    numbers: Int64Array
    damaged: list[tuple[str, str]]


def list_episodes(
    directory: EpisodeDirectory, seen: Collection[str], is_format_open: bool
) -> tuple[Listing, type[EpisodeSerializationStrategy] | None]:
    """What a directory holds besides what has been seen; if the format is open, in the one that is found, if any is."""
    listing = directory.list(seen)
    if is_format_open and not listing.texts:
        for kind in _FORMATS:
            if kind.suffix in listing.other_suffixes:
                directory.suffix = kind.suffix
                return directory.list(seen), kind
    return listing, None


def check_format(directory: EpisodeDirectory, listing: Listing) -> None:
    """Refuse a directory of another format; single files that merely look like it (a backup) are no matter."""
    others = listing.other_suffixes
    if others and (not listing.texts or any(kind.suffix in others for kind in _FORMATS)):
        raise ValueError(
            f"{directory.path} holds episodes in the format {sorted(others)}, not only in `{directory.suffix}`. Give "
            "the `serialization_strategy` they were written with, or choose another `directory`."
        )


def check_stated_fields(directory: EpisodeDirectory, fields: Fields, stated_fields: Fields | None) -> None:
    """Refuse a directory of other fields than those that the user has stated."""
    conflict = None if stated_fields is None else fields.conflict_with(stated_fields)
    if conflict is not None:
        raise ValueError(
            f"The fields of {directory.path} differ from those of `info`: {conflict}. The directory has {fields}, "
            f"`info` has {stated_fields}. Choose another `directory`, or leave them out of `info`."
        )


def check_capacity(directory: EpisodeDirectory, index: EpisodeTable, capacity: int) -> None:
    """Refuse, by a ValueError, a capacity for which all that is stored would have to be deleted."""
    length = int(index.lengths[-1]) if len(index) else 0
    if length > capacity:
        raise ValueError(
            f"The newest episode in {directory.path} has {length} steps, and `capacity`={capacity}: all episodes would "
            "be deleted. Raise it, or open with mode='r' to read."
        )


def inspect(
    directory: EpisodeDirectory,
    listing: Listing,
    strategy: EpisodeSerializationStrategy,
    fields: Fields | None,
    stated_fields: Fields | None,
    verify: Verify,
) -> Inspection:
    """Tell whole episodes from the rest; nothing is moved.

    Args:
        directory: Where they are.
        listing: What it holds.
        strategy: The format.
        fields: Those of the directory, if they are known already.
        stated_fields: What the user says they are; taken where the format does not keep them.
        verify: How closely to look.

    Raises:
        ValueError: There are episodes, but their fields, or their version, are not known.
        OSError: A file cannot be read.
    """
    numbers = np.array([listing.ids, listing.starts, listing.lengths], np.int64)
    order = np.lexsort((numbers[1], numbers[0]))
    numbers, sizes = numbers[:, order], np.array(listing.sizes, np.int64)[order]
    texts = [listing.texts[i] for i in order.tolist()]
    damaged = list(listing.misfits)
    if fields is None:
        fields = _find_fields(directory, texts, numbers[2], strategy, stated_fields, damaged)
    if fields is None:
        return Inspection(None, [], numbers[:, :0], damaged)
    is_good = np.ones(len(texts), np.bool_)
    reasons = dict(damaged)
    if reasons:
        is_good[[i for i, text in enumerate(texts) if text in reasons]] = False
    suspects = _suspects(strategy, fields, numbers, sizes) if verify == "size" else is_good
    for i in np.flatnonzero(suspects & is_good).tolist():
        error = _overlap(numbers, is_good, i)
        if error is None:
            error = _error_of(directory, texts[i], int(numbers[2, i]), strategy, fields, verify == "full")
        if error is not None:
            is_good[i] = False
            if not isinstance(error, FileNotFoundError):
                damaged.append((texts[i], f"it {error}"))
    if not is_good.all():
        texts, numbers = [texts[i] for i in np.flatnonzero(is_good).tolist()], numbers[:, is_good]
    return Inspection(fields, texts, numbers, damaged)


def _suspects(
    strategy: EpisodeSerializationStrategy, fields: Fields, numbers: Int64Array, sizes: Int64Array
) -> npt.NDArray[np.bool_]:
    """Which files are to be looked at: those of another size than expected, and those whose numbers others have."""
    ids, starts, lengths = numbers
    expected = strategy.sizes(fields, lengths)
    if expected is None:
        return np.ones(len(sizes), np.bool_)
    suspects = expected != sizes
    suspects[1:] |= (ids[1:] == ids[:-1]) | (starts[1:] < np.maximum.accumulate(starts + lengths)[:-1])
    return suspects


def _overlap(numbers: Int64Array, is_good: npt.NDArray[np.bool_], i: int) -> Exception | None:
    """Files of one id, or of step ids that another has, could not be told apart in a batch: the first stays."""
    before = i - 1
    while before >= 0 and not is_good[before]:
        before -= 1
    if before < 0:
        return None
    (last_id, last_start, last_length), (episode_id, start, _) = numbers[:, before], numbers[:, i]
    if episode_id > last_id and start >= last_start + last_length:
        return None
    return DamagedEpisodeError(f"has numbers that episode {last_id} has")


def set_aside(directory: EpisodeDirectory, listing: Listing, damaged: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Move damaged files away, and return them, those that could not be moved with a word on it."""
    if directory.is_new and not listing.texts and not listing.markers:
        # No episode in a directory that nobody has written episodes to: other people's files stay where they are.
        return []
    return [
        (name, reason if directory.set_aside(name) else f"{reason} (and it could not be moved)")
        for name, reason in damaged
    ]


def damage_message(path: str, damaged: list[tuple[str, str]], what_happened: str) -> str:
    """A warning that names the first few."""
    named = "; ".join(f"{name}: {reason}" for name, reason in damaged[:5])
    more = f"; and {len(damaged) - 5} more" if len(damaged) > 5 else ""
    return f"{len(damaged)} files in {path} are no whole episodes and were {what_happened}: {named}{more}."


def _find_fields(
    directory: EpisodeDirectory,
    texts: list[str],
    lengths: Int64Array,
    strategy: EpisodeSerializationStrategy,
    stated_fields: Fields | None,
    damaged: list[tuple[str, str]],
) -> Fields | None:
    """The fields that the oldest good file states, as the first episode binds the rest.

    Those that are not good are noted as damaged.
    """
    unknown_version = None
    for text, length in zip(texts, lengths.tolist(), strict=True):
        try:
            with directory.open(text) as file, as_damage():
                fields = strategy.load_fields(file)
                if fields is None and stated_fields is None:
                    break
                fields = stated_fields if fields is None else fields
                assert fields is not None  # One of the two is there.
                file.seek(0)
                strategy.check(file, fields, length)
                return fields
        except FileNotFoundError:
            continue
        except PermissionError:
            damaged.append((text, "it must not be read"))
        except DamagedEpisodeError as error:
            unknown_version = error if isinstance(error, UnknownVersionError) else unknown_version
            damaged.append((text, f"it {error}"))
    else:
        if unknown_version is not None:
            # Not a good file among them: a directory that a later version has written, more likely than damage.
            raise ValueError(f"No episode of {directory.path} can be read: {damaged[0][0]} {unknown_version}.")
        return None
    raise ValueError(
        f"{directory.path} holds episodes in the format `{strategy.suffix}`, which does not keep their fields. State "
        "them with `info=EpisodeDatasetInfo(fields)`."
    )


def _error_of(
    directory: EpisodeDirectory,
    text: str,
    length: int,
    strategy: EpisodeSerializationStrategy,
    fields: Fields,
    is_full: bool,
) -> Exception | None:
    try:
        with directory.open(text) as file, as_damage():
            (strategy.verify if is_full else strategy.check)(file, fields, length)
    except (DamagedEpisodeError, FileNotFoundError) as error:
        return error
    except PermissionError:
        return DamagedEpisodeError("must not be read")
    return None
