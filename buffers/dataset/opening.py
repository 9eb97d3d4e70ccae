"""Which files of a directory are whole episodes: told by names and sizes, and by as much more as is asked for."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from buffers.dataset.directory import EpisodeDirectory, FileName, Listing
from buffers.dataset.fields import Fields
from buffers.dataset.serialization import DamagedEpisodeError, EpisodeSerializationStrategy, UnknownVersionError
from buffers.dataset.window_reader import as_damage

__all__ = ["Inspection", "Verify", "inspect"]

Verify = Literal["size", "header", "full"]


@dataclass
class Inspection:
    """What was found.

    Attributes:
        fields: Those of the episodes; None if there is no episode.
        episodes: (name, file name) of whole episodes, ascending.
        damaged: (file name, what is wrong) of all else.
    """

    fields: Fields | None
    episodes: list[tuple[FileName, str]]
    damaged: list[tuple[str, str]] = field(default_factory=list)


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
    files = sorted(listing.episodes)
    inspection = Inspection(fields, [], list(listing.misfits))
    if fields is None:
        inspection.fields = _find_fields(directory, files, strategy, stated_fields, inspection.damaged)
    if inspection.fields is None:
        return inspection
    is_bad = dict(inspection.damaged)
    last = None
    for (name, text, size), expected in zip(files, _expected_sizes(strategy, inspection.fields, files), strict=True):
        if text in is_bad:
            continue
        # Files of one id, or of step ids that another has, would be told apart nowhere.
        error = _overlap(last, name)
        if error is None and (verify != "size" or size != expected):
            error = _error_of(directory, text, name.length, strategy, inspection.fields, verify == "full")
        if error is None:
            inspection.episodes.append((name, text))
            last = name
        elif not isinstance(error, FileNotFoundError):
            inspection.damaged.append((text, f"it {error}"))
    return inspection


def _overlap(last: FileName | None, name: FileName) -> Exception | None:
    if last is None or (name.id > last.id and name.start >= last.start + last.length):
        return None
    return DamagedEpisodeError(f"has numbers that episode {last.id} has")


def _expected_sizes(
    strategy: EpisodeSerializationStrategy, fields: Fields, files: list[tuple[FileName, str, int]]
) -> list[int] | list[None]:
    sizes = strategy.sizes(fields, np.array([name.length for name, _, _ in files], np.int64))
    return [None] * len(files) if sizes is None else sizes.tolist()


def _find_fields(
    directory: EpisodeDirectory,
    files: list[tuple[FileName, str, int]],
    strategy: EpisodeSerializationStrategy,
    stated_fields: Fields | None,
    damaged: list[tuple[str, str]],
) -> Fields | None:
    """The fields that the newest good file states; those that are not good are noted as damaged."""
    unknown_version = None
    for name, text, _ in reversed(files):
        try:
            with _opened(directory, text) as file, as_damage():
                fields = strategy.load_fields(file)
                if fields is None and stated_fields is None:
                    break
                fields = stated_fields if fields is None else fields
                assert fields is not None  # One of the two is there.
                file.seek(0)
                strategy.check(file, fields, name.length)
                return fields
        except FileNotFoundError:
            continue
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
        with _opened(directory, text) as file, as_damage():
            (strategy.verify if is_full else strategy.check)(file, fields, length)
    except (DamagedEpisodeError, FileNotFoundError) as error:
        return error
    return None


def _opened(directory: EpisodeDirectory, text: str) -> io.FileIO:
    return os.fdopen(directory.open(text), "rb", buffering=0)
