"""Which fields the batches of a mixture have."""

from __future__ import annotations

from collections.abc import Sequence

from buffers.fields import Fields

__all__ = ["common_fields"]

Known = Sequence[tuple[str, Fields | None]]


def common_fields(known: Known, choice: str | tuple[str, ...] | None) -> Fields | None:
    """The fields of a mixture of members `known`, (name, fields or None); None while they cannot be told.

    A TypeError for a `choice` that is neither None for all, "common", nor names; a ValueError where members differ.
    """
    are_names = isinstance(choice, tuple) and choice and all(isinstance(name, str) for name in choice)
    if choice not in (None, "common") and not are_names:
        raise TypeError(f"`fields` must be None, 'common', or names of fields, found {choice!r:.80}.")
    found = [(name, fields) for name, fields in known if fields is not None]
    if not found:
        return None
    if choice is None:
        for other in found[1:]:
            _check_same(found[0], other)
        return found[0][1]
    names = _common_names(found) if isinstance(choice, str) else _chosen_names(found, choice)
    if not names:
        raise ValueError(f"The members have no field in common: {', '.join(f'{n} has {list(f)}' for n, f in found)}.")
    if len(found) < len(known):
        return None
    chosen = [(name, fields.select(names)) for name, fields in found]
    for other in chosen[1:]:
        _check_same(chosen[0], other)
    return chosen[0][1]


def _check_same(one: tuple[str, Fields], other: tuple[str, Fields]) -> None:
    conflict = other[1].conflict_with(one[1])
    if conflict is not None:
        raise ValueError(
            f"The fields of member {other[0]} differ from those of member {one[0]}: {conflict}. "
            "`fields='common'`, or names, restricts batches to what they share."
        )


def _common_names(found: list[tuple[str, Fields]]) -> list[str]:
    first = found[0][1]
    return [
        name
        for name, path in zip(first.names, first.paths, strict=True)
        if all(
            path in fields.paths and (fields[name].shape, fields[name].dtype) == (first[name].shape, first[name].dtype)
            for _, fields in found
        )
    ]


def _chosen_names(found: list[tuple[str, Fields]], choice: tuple[str, ...]) -> list[str]:
    for member, fields in found:
        for wanted in choice:
            if not any(_is_below(name, wanted) for name in fields):
                raise ValueError(f"Member {member} has no field `{wanted}`. It has {list(fields)}.")
    return [name for name in found[0][1] if any(_is_below(name, wanted) for wanted in choice)]


def _is_below(name: str, root: str) -> bool:
    return name == root or name.startswith(root + "/")
