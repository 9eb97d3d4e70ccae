"""Which library wrote a directory of `.npz` files: by the names of the files, and by their arrays."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

from buffers.interop.base import FormatError
from buffers.utils import one_of

__all__ = ["LAYOUTS", "Layout", "find_files", "find_layout", "natural_order"]


class Layout(NamedTuple):
    """How a library names its files and arrays."""

    pattern: re.Pattern[str]  # Of the names, without the suffix.
    arrays: tuple[str, ...]  # Those that it always has.
    meaning: str


LAYOUTS = {
    "dreamer": Layout(
        re.compile(r"\d{8}T\d{6}-[0-9A-Za-z]+-\d+"),
        ("action",),
        "action and reward of a row led to its observation",
    ),
    "dreamerv3": Layout(
        re.compile(r"(\d{8}T\d{6}F\d+)-([0-9A-Za-z]+)-([0-9A-Za-z]+)-(\d+)"),
        ("action", "is_first"),
        "chunks of streams; the reward of a row led to its observation, its action is taken there",
    ),
    "exorl": Layout(
        re.compile(r"(?:\d{8}T\d{6}|episode)_\d+_\d+"),
        ("observation", "action"),
        "action, reward and discount of a row led to its observation",
    ),
    "original": Layout(re.compile(r"\d+_\d+_\d{8}-\d{6}"), (), "rows as they are"),
}


def find_files(path: str) -> tuple[str, list[str], list[str]]:
    """The directory, the stems of its `.npz` files, and the names of its other files; `path` may be one file."""
    if not os.path.lexists(path):
        raise FormatError(path, "is not there", "Check the path")
    if os.path.isfile(path) and path.endswith(".npz"):
        return os.path.dirname(path), [os.path.basename(path).removesuffix(".npz")], []
    if not os.path.isdir(path):
        raise FormatError(path, "is no directory, and no .npz file", "Name the directory with one file an episode")
    names = sorted(os.listdir(path))
    found = [name.removesuffix(".npz") for name in names if name.endswith(".npz")]
    others = [name for name in names if not name.endswith(".npz")]
    if any(_is_torch_file(name) for name in others):
        found_text = "It has .pt files of the original project, which hold pickles"
        advice = "Convert them: np.savez(name + '.npz', **torch.load(name + '.pt', weights_only=True))"
        raise FormatError(path, found_text, advice)
    if not found:
        has = f"{len(names)} others" if names else "nothing"
        raise FormatError(path, f"It has no .npz files, but {has}", "Name the directory with one file an episode")
    return path, found, others


def _is_torch_file(name: str) -> bool:
    return name.endswith(".pt") and LAYOUTS["original"].pattern.fullmatch(name.removesuffix(".pt")) is not None


def find_layout(path: str, stems: Sequence[str], arrays: Collection[str], layout: str | None) -> str:
    """The layout that is asked for, or the only one that both the names and the arrays of the first file fit.

    Raises:
        FormatError: None fits.
        ValueError: There is no such layout.
    """
    if layout is None:
        fitting = [name for name in LAYOUTS if all(LAYOUTS[name].pattern.fullmatch(stem) for stem in stems)]
        fitting = [name for name in fitting if {*LAYOUTS[name].arrays} <= {*arrays}]
        if len(fitting) != 1:
            meanings = "; ".join(f'"{name}": {known.meaning}' for name, known in LAYOUTS.items())
            odd = next(
                (s for s in stems if not any(known.pattern.fullmatch(s) for known in LAYOUTS.values())), stems[0]
            )
            found = (
                f"Names like {odd + '.npz'!r:.80} with the arrays {sorted(arrays)!r:.200} are of no library known here"
            )
            raise FormatError(path, found, f"Say `layout=`, as which rows mean different things. {meanings}")
        return fitting[0]
    missing = [name for name in LAYOUTS[one_of("layout", layout, [*LAYOUTS])].arrays if name not in arrays]
    if missing:
        raise FormatError(path, f"Files of the layout {layout!r} have {missing}, found {sorted(arrays)}", "Try another")
    return layout


def natural_order(stem: str) -> tuple[tuple[int, int, str], ...]:
    """A key by which numbers in names count as numbers: 2 before 10."""
    parts = re.findall(r"[0-9]+|[^0-9]+", stem)
    return tuple((0, int(part), part) if "0" <= part[0] <= "9" else (1, 0, part) for part in parts)
