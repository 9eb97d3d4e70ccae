"""`python -m buffers inspect`: what a directory of episodes holds. Nothing in it is changed.

A process that writes to it is not disturbed: where the system lists its locks, none is taken.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from buffers.dataset.files.directory import EpisodeDirectory
from buffers.dataset.files.individual_file import IndividualFileDataset
from buffers.dataset.files.opening import Verify
from buffers.dataset.printing import fields_table
from buffers.disk import DAMAGED, NO_SURPRISES, DamagedEpisodeError
from buffers.disk.lock import LOCK
from buffers.interop import FormatError
from buffers.interop.origin import read_origin
from buffers.saving import is_save_directory
from buffers.utils import aligned, format_bytes
from buffers.viewing.compression import try_on_files, try_on_save
from buffers.viewing.saves import describe_saves
from buffers.viewing.tracks import to_numpy

__all__ = ["InspectionError", "inspect_directory"]

_MAX_BINS = 10
_MAX_BAR = 40
_MAX_NAMES = 20
# Where Linux lists all file locks.
_LOCKS = "/proc/locks"


class InspectionError(Exception):
    """Why a directory or episode cannot be inspected, in one line."""


def inspect_directory(
    path: str, episode_id: int | None, output: str | None, verify: Verify, compression: bool = False
) -> None:
    """Print what is in a directory, or in one of its episodes, and draw it.

    Args:
        path: The directory.
        episode_id: The episode to print; None for the whole directory.
        output: The file of the picture; None for no picture.
        verify: How much of each file is checked.
        compression: Instead, print how well what is stored can be compressed.

    Raises:
        InspectionError: There is no such directory or episode, or the picture cannot be written.
    """
    if compression:
        if episode_id is not None or output is not None or verify == "full":
            raise InspectionError("--compression goes without --episode, --output and --verify.")
        _print([path, *_try_codecs(path)])
        return
    if is_save_directory(path):
        if episode_id is not None or output is not None:
            raise InspectionError("A save has no episode to print or draw before it is loaded.")
        lines, num_damaged = describe_saves(path, verify == "full")
        _print(lines)
        if num_damaged:
            raise InspectionError(f"The newest {num_damaged:,} cannot be loaded.")
        return
    if output is not None:
        _check_output(path, output)
    with _open(path, verify) as dataset:
        if dataset.is_empty:
            findings = _find_other_files(path, dataset)
            if any(findings):
                _print([path, *_describe_findings(findings)])
            raise InspectionError(f"{path} holds no whole episode of a known format.")
        if episode_id is None:
            findings = _find_other_files(path, dataset)
            state = [f"Format: {dataset.serialization_strategy.suffix}", f"Writer: {_describe_writer(path)}"]
            state += _describe_origin(path)
            verified = [f"Verified: {dataset.num_episodes:,} whole episodes"] if verify == "full" else []
            _print([path, *_describe_dataset(dataset), "", *state, *verified, *_describe_findings(findings)])
            if verify == "full" and findings.damaged:
                raise InspectionError(f"{len(findings.damaged):,} files are damaged.")
        else:
            episode = _read_episode(dataset, episode_id)
            _print(_describe_episode(dataset, episode_id, episode))
        if output is not None:
            _save(_draw(dataset, None if episode_id is None else (episode_id, episode)), output)
            _print([f"Drawn: {output}"])


def _open(path: str, verify: Verify) -> IndividualFileDataset:
    try:
        with warnings.catch_warnings():
            # The warning names some damaged files. All of them are printed later.
            warnings.simplefilter("ignore", UserWarning)
            return IndividualFileDataset(directory=path, mode="r", verify=verify)
    except FileNotFoundError:
        raise InspectionError(f"There is no directory {path}.") from None
    except NotADirectoryError:
        raise InspectionError(f"{path} is no directory. Give one of episodes, or of saves.") from None
    except OSError as error:
        raise InspectionError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InspectionError(f"{path} cannot be inspected: {error}") from error


def _try_codecs(path: str) -> list[str]:
    try:
        if is_save_directory(path):
            return try_on_save(path)
        with _open(path, "size") as dataset, warnings.catch_warnings():
            # Of damaged files, which are left out.
            warnings.simplefilter("ignore", UserWarning)
            if dataset.is_empty:
                raise InspectionError(f"{path} holds no whole episode of a known format.")
            return try_on_files(dataset)
    except (ImportError, DamagedEpisodeError) as error:
        raise InspectionError(str(error)) from error


# The dataset.


def _describe_dataset(dataset: IndividualFileDataset) -> list[str]:
    """A summary, the table of fields, and a histogram of lengths."""
    lengths, ids = dataset.table.lengths, dataset.table.ids
    head = (
        f"{dataset.num_episodes:,} episodes, {dataset.num_timesteps:,} steps, ids {ids[0]} to {ids[-1]}, "
        f"length {lengths.min()} to {lengths.max()}, mean {dataset.average_episode_length:.1f}"
    )
    late = [f"{name}: {field.kind}" for name, field in dataset.late.items()]
    named = ["", f"Late fields: {', '.join(late)}"] if late else []
    return [head, "", fields_table(dataset), *named, "", *_histogram(lengths)]


def _describe_origin(path: str) -> list[str]:
    """Where an imported directory came from."""
    try:
        origin = read_origin(path)
    except FormatError as error:
        return [str(error)]
    if origin is None:
        return []
    state = "Imported from" if origin.is_finished else "Part of an unfinished import from"
    return [f"{state}: {origin.source} ({origin.format})", *(f"- {text}" for text in origin.lost)]


def _histogram(lengths: np.ndarray) -> list[str]:
    """A table of episode lengths, in bins of equal width, with bars."""
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // _MAX_BINS)
    counts = np.bincount((lengths - low) // width)
    rows = [("length", "episodes", "")]
    for i, count in enumerate(counts.tolist()):
        first, last = low + i * width, min(low + (i + 1) * width - 1, high)
        bar = "#" * -(-count * _MAX_BAR // int(counts.max()))
        rows.append((str(first) if first == last else f"{first}-{last}", f"{count:,}", bar))
    return aligned(rows)


# The directory.


class _Findings(NamedTuple):
    """What else is in the directory, as pairs of a file name and its size or damage."""

    temporaries: list[tuple[str, str]]
    damaged: list[tuple[str, str]]
    set_aside: list[tuple[str, str]]


def _find_other_files(path: str, dataset: IndividualFileDataset) -> _Findings:
    directory = EpisodeDirectory(path, dataset.serialization_strategy.suffix, writable=False)
    try:
        temporaries = sorted(directory.list().temporaries)
    finally:
        directory.close()
    sizes = [(name, _size_of(os.path.join(path, name))) for name in temporaries]
    return _Findings(sizes, sorted(dataset.damaged_files), _find_set_aside(path))


def _describe_findings(findings: _Findings) -> list[str]:
    unfinished = "being written, or left by a killed process; the next writer removes them"
    return [
        *_describe_files("Temporaries", findings.temporaries, unfinished),
        *_describe_files("Damaged", findings.damaged, "left out"),
        *_describe_files("Set aside", findings.set_aside, "found damaged by a writer, and moved"),
    ]


def _describe_files(title: str, files: Sequence[tuple[str, str]], meaning: str) -> list[str]:
    """The number of files, what it means, and the first names."""
    if not files:
        return [f"{title}: none"]
    lines = [f"  {name}: {text}" for name, text in files[:_MAX_NAMES]]
    more = [f"  and {len(files) - _MAX_NAMES:,} more"] if len(files) > _MAX_NAMES else []
    return [f"{title}: {len(files):,} ({meaning})", *lines, *more]


def _find_set_aside(path: str) -> list[tuple[str, str]]:
    found = []
    with os.scandir(path) as entries:
        folders = [entry.name for entry in entries if re.fullmatch(rf"{DAMAGED}(-\d+)?", entry.name)]
    for folder in sorted(folders):
        try:
            with os.scandir(os.path.join(path, folder)) as entries:
                found += [(f"{folder}/{entry.name}", _size_of(entry.path)) for entry in entries]
        except OSError as error:
            found.append((folder, f"cannot be read ({error.strerror})"))
    return sorted(found)


def _size_of(path: str) -> str:
    try:
        return format_bytes(os.stat(path, follow_symlinks=False).st_size)
    except OSError:
        return "just removed"


def _describe_writer(path: str) -> str:
    """The process that holds the lock for writing, or held it last."""
    try:
        descriptor = os.open(os.path.join(path, LOCK), os.O_RDONLY | NO_SURPRISES)
    except FileNotFoundError:
        return "none so far"
    except OSError as error:
        return f"unknown ({error.strerror})"
    try:
        holder = os.read(descriptor, 200).decode(errors="replace").strip()
        if _is_locked(descriptor, holder):
            return holder or "an unknown process"
        return f"none seen (the last was {holder or 'an unknown process'})"
    finally:
        os.close(descriptor)


def _is_locked(descriptor: int, holder: str) -> bool:
    """Whether a process holds an exclusive flock on the file."""
    try:
        with open(_LOCKS) as file:
            locks = [line.split() for line in file]
    except OSError:
        return not _can_share(descriptor)
    status = os.fstat(descriptor)
    for _, *words in locks:
        if words[:1] != ["FLOCK"] or words[2] != "WRITE":
            continue
        major, minor, inode = words[4].split(":")
        is_same_device = (int(major, 16), int(minor, 16)) == (os.major(status.st_dev), os.minor(status.st_dev))
        # Some file systems report another device than `stat` does. Then the process identifies the lock.
        if int(inode) == status.st_ino and (is_same_device or holder.startswith(f"process {words[3]} ")):
            return True
    return False


def _can_share(descriptor: int) -> bool:
    """Whether a shared lock is granted; it is released at once."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return True


# One episode.


def _read_episode(dataset: IndividualFileDataset, episode_id: int) -> dict[str, torch.Tensor]:
    """An episode by its id, `name -> (L, *shape)`."""
    ids, fields = dataset.table.ids, dataset.fields
    assert fields is not None  # There is an episode, so there are fields.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            episode = dataset.episode_of_id(episode_id)
        except OSError as error:
            raise InspectionError(f"Episode {episode_id} cannot be read: {error}") from error
    if caught:
        raise InspectionError(f"Episode {episode_id} cannot be read: {caught[0].message}")
    if episode is None:
        raise InspectionError(f"There is no episode {episode_id}: {len(ids):,} have ids from {ids[0]} to {ids[-1]}.")
    return dict(zip(fields, fields.flatten(episode), strict=True))


def _describe_episode(dataset: IndividualFileDataset, episode_id: int, episode: dict[str, torch.Tensor]) -> list[str]:
    fields = dataset.fields
    assert fields is not None  # There is an episode, so there are fields.
    length = len(next(iter(episode.values())))
    rows = [("field", "type", "dtype", "shape", "min", "max", "mean", "not finite")]
    for name, field in fields.items():
        dtype = str(field.dtype).removeprefix("torch.")
        rows.append((name, type(field).__name__, dtype, str(field.shape), *_summary(to_numpy(episode[name]))))
    info = dataset.episode_info(episode_id)
    known = ["", *aligned([("info", "value"), *((name, str(value)) for name, value in info.items())])] if info else []
    head = f"Episode {episode_id}: {length:,} steps, {format_bytes(fields.nbytes * length)}"
    return [head, "", *aligned(rows), *known]


def _summary(values: np.ndarray) -> tuple[str, str, str, str]:
    """Minimum, maximum and mean of the finite values, and the number of others."""
    finite = values if values.dtype.kind in "biu" else values[np.isfinite(values)]
    num_not_finite = f"{values.size - finite.size:,}" if values.size > finite.size else ""
    if finite.size == 0:
        return "-", "-", "-", num_not_finite
    low, high = finite.min(), finite.max()
    exact = [f"{number:.6g}" if values.dtype.kind == "f" else str(number) for number in (low, high)]
    return exact[0], exact[1], f"{finite.mean(dtype=np.float64):.6g}", num_not_finite


# The picture.


def _check_output(path: str, output: str) -> None:
    inside, target = os.path.realpath(path), os.path.realpath(output)
    if target == inside or target.startswith(os.path.join(inside, "")):
        raise InspectionError(f"{output} is in the inspected directory, which must not change.")


def _draw(dataset: IndividualFileDataset, drawn: tuple[int, dict[str, torch.Tensor]] | None) -> Any:
    try:
        from buffers.viewing.visualizer import MatplotlibVisualizer, plot_dataset
    except ImportError as error:
        raise InspectionError(f"A picture needs matplotlib: {error}") from error
    if drawn is None:
        return plot_dataset(dataset)
    episode_id, episode = drawn
    step = torch.arange(len(next(iter(episode.values()))))
    batch: dict[str, Any] = {name: rows[None] for name, rows in episode.items()}
    known = {"step": step, "is_first": step == 0, "is_last": step == len(step) - 1, "episode": torch.tensor(episode_id)}
    # Fields of the episode with such a name win.
    batch = {**{name: value[None] for name, value in known.items()}, **batch}
    return MatplotlibVisualizer(dataset).visualize(batch)


def _save(figure: Any, output: str) -> None:
    try:
        figure.savefig(output, format=os.path.splitext(output)[1][1:] or "png")
    except OSError as error:
        raise InspectionError(f"{output} cannot be written: {error.strerror or error}") from error
    except ValueError as error:
        raise InspectionError(f"{output} cannot be drawn: {error}") from error


# Text.


def _print(lines: Sequence[str]) -> None:
    """Print lines. Names come from files, so control characters are escaped."""
    for line in "\n".join(lines).split("\n"):
        print("".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line))
