"""Which fields are compressed, and how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from buffers import fields as field_types
from buffers.compression.codecs import CODECS, Codec
from buffers.fields import Fields, TensorType

__all__ = ["Compress", "checked_choice", "choice_as", "chosen_codecs", "described_choice"]

_TYPES = {*field_types.__all__} - {"Fields"}

#: Codecs by the names of fields ("obs" stands for all below it), or by their types (`ColorImage`).
Compress = Mapping[str | type[TensorType], str]


def checked_choice(compress: Any) -> Compress:
    """`compress` as it was given; TypeError or ValueError for what no fields could fit, ImportError for a library."""
    if not isinstance(compress, Mapping):
        raise TypeError(f'`compress` must be a dict, such as {{"obs/image": "lz4"}}, found {compress!r:.60}.')
    for key, name in compress.items():
        if not (isinstance(key, str) or (isinstance(key, type) and issubclass(key, TensorType))):
            raise TypeError(
                f"`compress` has keys that are names of fields, or types such as ColorImage, found {key!r}."
            )
        if not isinstance(name, str) or name not in CODECS:
            raise ValueError(f"`compress` of {key!r} must be one of {sorted(CODECS)}, found {name!r:.60}.")
        CODECS[name].library()
    return dict(compress)


def chosen_codecs(compress: Compress, fields: Fields) -> dict[str, Codec]:
    """The codec of each field that is compressed. What is said of a name goes before what is said of a type.

    Raises:
        ValueError: A name that is no field, or a field that the codec cannot compress.
        ImportError: The library of a codec is missing.
    """
    found: dict[str, str] = {}
    by_type = {key: name for key, name in compress.items() if not isinstance(key, str)}
    for field, kind in fields.items():
        for key, name in by_type.items():
            if isinstance(kind, key):
                found[field] = name
    # "obs/image" after "obs", as it says more.
    for named in sorted((key for key in compress if isinstance(key, str)), key=len):
        if not (below := fields.below(named)):
            raise ValueError(
                f"`compress` names `{named}`, which is no field of the steps (late fields are not compressed). There "
                f"are {list(fields)}."
            )
        found |= dict.fromkeys(below, compress[named])
    # Some have no bytes.
    return {name: CODECS[found[name]](name, kind) for name, kind in fields.items() if name in found and kind.nbytes}


def described_choice(compress: Compress) -> dict[str, dict[str, str]]:
    """A choice for fields that are not known yet, as JSON can hold it."""
    names = {key: codec for key, codec in compress.items() if isinstance(key, str)}
    types = {key.__name__: codec for key, codec in compress.items() if not isinstance(key, str)}
    return {"names": names, "types": types}


def choice_as(described: Mapping[str, Mapping[str, str]]) -> Compress:
    """The inverse of `described_choice`. Types of a user's own are left out: fields that are found have none."""
    types = {getattr(field_types, name): codec for name, codec in described["types"].items() if name in _TYPES}
    return {**described["names"], **types}
