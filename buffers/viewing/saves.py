"""`python -m buffers inspect` of a directory of saves."""

from __future__ import annotations

import os
import time
from typing import Any

from buffers.dataset.episode_source import EpisodeSource
from buffers.dataset.saving import verify_save
from buffers.disk import as_damage, parse_fields
from buffers.saving import DamagedSaveError, Save, list_saves
from buffers.utils import aligned, format_bytes

__all__ = ["describe_saves"]


def describe_saves(path: str, verifies: bool) -> tuple[list[str], int]:
    """Lines that say which saves a directory has, and what is in the newest that is whole; how many newer are damaged.

    Only headers are read, unless it `verifies`.
    """
    rows, whole = [("save", "made", "bytes", "")], None
    damaged: list[str] = []
    for number, file, found in reversed(list_saves(path)):
        made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(os.path.getmtime(file)))
        state = "whole" if verifies else "headers whole"
        try:
            save = found()
            _check(save, verifies)
            whole = whole or save
        except DamagedSaveError as error:
            # An older one may only be needed by later ones, and what it needs itself be gone.
            state = "cannot be loaded"
            damaged += [f"Save {number}: {error}"] if whole is None else []
        rows.append((str(number), made, format_bytes(os.path.getsize(file)), state))
    lines = [path, *aligned(rows), *damaged]
    return ([*lines, "", *_describe(whole)] if whole is not None else lines), len(damaged)


def _check(save: Save, verifies: bool) -> None:
    with as_damage():
        if verifies:
            verify_save(save, EpisodeSource.kinds)
        else:
            save.check()


def _describe(save: Save) -> list[str]:
    """What is in a save."""
    lines = [f"Save {save.number}"]
    with as_damage():
        for number, told in enumerate(save.stores):
            lines += ["", *_describe_store(save, number, told)]
        for name in sorted(name for name in save.said if name.startswith("buffer")):
            lines += ["", *_describe_buffer(save, name, name.replace("buffer", "writer"))]
    others = sorted(set(save.stamps) - {save.number})
    named = ", ".join(map(str, others[:9])) + (f" and {len(others) - 9} more" if len(others) > 9 else "")
    return [*lines, "", f"Needs the files of saves: {named or 'none but its own'}"]


def _describe_store(save: Save, number: int, told: dict[str, Any]) -> list[str]:
    kind = told["kind"]
    if told["is_reader"]:
        names = ", ".join(info["name"] for info in save.state(f"late{number}"))
        late = f"; late fields that are saved: {names}" if names else ""
        return [f"{number}: {kind}, read only: its episodes are their writer's to save, in {told['directory']}{late}"]
    live = save.live(number)
    ids = f", ids {live[0, 0]} to {live[-1, 1] - 1}" if len(live) else ""
    where = f", links to files of {told['directory']}" if told["is_linked"] else ""
    head = f"{number}: {kind}, {told['num_episodes']:,} episodes, {told['num_steps']:,} of {told['capacity']:,} steps"
    if told["fields"] is None:
        return [f"{head}, no fields yet"]
    fields = parse_fields(told["fields"])
    rows = [("field", "type", "bytes a step")]
    rows += [(name, str(kind), f"{kind.nbytes:,}") for name, kind in fields.items()]
    rows += [(info["name"], "late field", "") for info in save.state(f"late{number}")]
    return [f"{head}{ids}{where}", *aligned(rows)]


def _describe_buffer(save: Save, name: str, writer: str) -> list[str]:
    told = save.state(name)
    loader, options = told["state"]["loader"], told["options"]
    size = f"{options['batch_size']} x {options['sequence_length'] or 'whole episodes'}"
    lines = [f"{name}: batches of {size}, the next is number {loader['position']}, seed {loader['seed']}"]
    if told["given"]:
        lines.append(f"  to be passed again: {', '.join(f'{key} ({kind})' for key, kind in told['given'].items())}")
    if writer in save.said:
        lengths = save.state(writer)["lengths"]
        if lengths is not None:
            lines.append(f"  {int(lengths.sum()):,} steps in open episodes of {len(lengths)} environments")
    extra = save.state(name.replace("buffer", "extra"))
    return [*lines, f"  extra: {', '.join(map(str, extra))}"] if extra else lines
