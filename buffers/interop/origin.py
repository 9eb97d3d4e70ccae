"""Where a directory of episodes came from: a small JSON file in it, `origin.json`."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from io import BufferedWriter
from typing import Any

from buffers.disk import NO_SURPRISES, Descriptor, Directory, as_damage, open_directory, parse_json
from buffers.interop.base import FormatError
from buffers.utils import aligned, format_bytes

__all__ = ["ORIGIN", "Origin", "Summary", "described", "read_origin", "sync_directory", "write_origin"]

ORIGIN = "origin.json"
_MOST_BYTES = 1 << 24


@dataclass
class Summary:
    """What an import or export has done. `print` shows it as text."""

    format: str
    source: str
    target: str
    num_episodes: int = 0
    num_steps: int = 0  # Rows: T + 1 for an episode of T transitions.
    fields: dict[str, str] = field(default_factory=dict)  # Name and type.
    lost: list[str] = field(default_factory=list)  # What was missing, or could not be kept.
    num_bytes: int = 0  # Of the rows.
    was_there: bool = field(default=False, compare=False)  # Whether the same import had been finished before.

    def __str__(self) -> str:
        count = f"{self.num_episodes:,} episodes, {self.num_steps:,} steps, {format_bytes(self.num_bytes)}"
        lines = [f"{self.source} -> {self.target} ({self.format})", count]
        if self.was_there:
            lines.insert(1, "It was there already, from an earlier import of the same: nothing was read again.")
        if self.fields:
            lines += ["", *aligned([("field", "type"), *self.fields.items()])]
        return "\n".join([*lines, "", *([f"- {text}" for text in self.lost] or ["Nothing was lost."])])


@dataclass
class Origin:
    """What an import knows of its directory.

    Attributes:
        format: The name of the format.
        source: The absolute path, or the name, of what was imported.
        request: What was asked for: fields, dtypes, limit, options. An import that was killed goes on only if asked for
            the same again.
        is_finished: Whether all of it is there.
        lost: See `Summary.lost`.
        metadata: What the source said of itself as a whole.
    """

    format: str
    source: str
    request: dict[str, Any]
    is_finished: bool = False
    lost: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)


def read_origin(path: str) -> Origin | None:
    """That of a directory; None if it was not imported. FormatError if the file is not what was written."""
    try:
        descriptor = Descriptor(os.open(os.path.join(path, ORIGIN), os.O_RDONLY | NO_SURPRISES))
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(os.fstat(descriptor.number).st_mode):
        raise FormatError(os.path.join(path, ORIGIN), "is no file", "The episodes are whole without it: move it away")
    with open(os.dup(descriptor.number), "rb") as file:
        content = file.read(_MOST_BYTES)
    try:
        with as_damage():
            found = parse_json(content)
            origin = Origin(**found)
            kinds = [(origin.format, str), (origin.source, str), (origin.request, dict), (origin.is_finished, bool)]
            if not all(isinstance(value, kind) for value, kind in [*kinds, (origin.metadata, dict)]):
                raise ValueError("values of other types")
            origin.lost = [str(text) for text in origin.lost]
    except ValueError as error:
        advice = "The episodes are whole without it: remove the file"
        raise FormatError(os.path.join(path, ORIGIN), f"is damaged ({error})", advice) from error
    return origin


def write_origin(path: str, origin: Origin) -> None:
    """Replace that of a directory; an error leaves the old one."""
    text = json.dumps(asdict(origin), indent=1).encode()
    if len(text) > _MOST_BYTES:
        origin.metadata = {}
        origin.lost.append("What the source says of itself as a whole is too long, and is left out.")
        text = json.dumps(asdict(origin), indent=1).encode()
    directory = Directory(path, Descriptor(open_directory(path, False)), durable=True)
    try:
        directory.commit(ORIGIN, partial(_write, text), replaces=True)
    finally:
        directory.close()


def sync_directory(path: str) -> None:
    """Wait until what was created in a directory, or renamed, is on the disk."""
    descriptor = Descriptor(open_directory(path, False))
    os.fsync(descriptor.number)
    descriptor.close()


def _write(text: bytes, file: BufferedWriter) -> None:
    file.write(text)


def described(fields: Mapping[str, Any]) -> dict[str, str]:
    """Name and type of fields, for a summary."""
    return {name: str(kind) for name, kind in fields.items()}
