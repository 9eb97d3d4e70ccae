"""Which fields the batches of a mixture have."""

from __future__ import annotations

from collections.abc import Sequence

from buffers.fields import Fields

__all__ = ["common_fields"]


def common_fields(members: Sequence[Fields | None], choice: str | tuple[str, ...] | None) -> Fields | None:
    """The fields of a mixture; None while those of its members do not determine them.

    Raises:
        TypeError: `choice` is neither None (all fields), "common", nor names of fields.
        ValueError: Members differ in the chosen fields, or share none.
    """
    are_names = isinstance(choice, tuple) and choice and all(isinstance(name, str) for name in choice)
    if choice not in (None, "common") and not are_names:
        raise TypeError(f"`fields` must be None, 'common', or names of fields, found {choice!r:.80}.")
    found = {member: fields for member, fields in enumerate(members) if fields is not None}
    if not found:
        return None
    if choice is not None:
        names = _common_names(list(found.values())) if isinstance(choice, str) else _chosen_names(found, choice)
        if not names:
            listed = ", ".join(f"{member} has {list(fields)}" for member, fields in found.items())
            raise ValueError(f"The members have no field in common: {listed}.")
        if len(found) < len(members):
            return None
        found = {member: fields.select(names) for member, fields in found.items()}
    (one, expected), *others = found.items()
    for other, fields in others:
        conflict = fields.conflict_with(expected)
        if conflict is not None:
            raise ValueError(
                f"The fields of member {other} differ from those of member {one}: {conflict}. "
                "`fields='common'`, or names, restricts batches to what they share."
            )
    return expected


def _common_names(found: list[Fields]) -> list[str]:
    first, *others = found

    def is_in(other: Fields, name: str) -> bool:
        return name in other and first.select([name]).conflict_with(other.select([name])) is None

    return [name for name in first if all(is_in(other, name) for other in others)]


def _chosen_names(found: dict[int, Fields], choice: tuple[str, ...]) -> list[str]:
    chosen: list[str] = []
    for member, fields in found.items():
        for wanted in choice:
            names = fields.below(wanted)
            if not names:
                raise ValueError(f"Member {member} has no field `{wanted}`. It has {list(fields)}.")
            chosen += names
    return chosen
