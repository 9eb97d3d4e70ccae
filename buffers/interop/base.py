"""What the readers of all formats share: episodes one at a time, and what is said where something is missing."""

from __future__ import annotations

import difflib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from buffers.conversion import TO_NUMPY, torch_dtype
from buffers.dataset.episode_info import EpisodeInfo
from buffers.disk import fill_from
from buffers.fields import Fields
from buffers.interop.alignment import FINAL_MISSING
from buffers.utils import how_to_install, integer

__all__ = [
    "Episode",
    "FormatError",
    "FormatReader",
    "Notes",
    "UnknownFieldError",
    "chosen_fields",
    "fill",
    "library",
    "note_absence",
]


class Episode(NamedTuple):
    """An episode of another format, as `dataset.add_episode(*episode)` takes it."""

    rows: dict[str, Any]  # field -> (L, *shape), which may be nested; aligned on arrival, see `alignment`.
    info: EpisodeInfo


class FormatError(ValueError):
    """A file or directory is not what its format says. Names the path, what was found, and what to do."""

    def __init__(self, path: str, found: str, advice: str) -> None:
        super().__init__(f"{path}: {found}. {advice}")
        self.path, self.found, self.advice = path, found, advice

    def __reduce__(self) -> tuple[Any, ...]:
        return FormatError, (self.path, self.found, self.advice)


class UnknownFieldError(ValueError):
    """There are no fields of these names; says which there are, and which one may have been meant."""

    def __init__(self, where: str, missing: Sequence[str], known: Collection[str]) -> None:
        names = {*known, *(name.partition("/")[0] for name in known)}
        close = [*dict.fromkeys(n for one in missing for n in difflib.get_close_matches(one, names, 1))]
        hint = f" Did you mean {close}?" if close else ""
        super().__init__(f"{where} has no fields {[*missing]}. It has {[*known]}.{hint}")
        self.where, self.missing, self.known = where, [*missing], [*known]

    def __reduce__(self) -> tuple[Any, ...]:
        return UnknownFieldError, (self.where, self.missing, self.known)


class Notes:
    """What a format does not have, or could not be kept: each said once, in order."""

    def __init__(self, texts: Sequence[str] = ()) -> None:
        self.texts = list(texts)

    def add(self, text: str) -> None:
        """Say it, unless it was said."""
        if text not in self.texts:
            self.texts.append(text)

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)

    def __len__(self) -> int:
        return len(self.texts)


def fill(descriptor: int, values: np.ndarray, offset: int) -> bool:
    """Fill a contiguous array with the bytes of an open file from an offset on; False if the file ends before."""
    return fill_from(descriptor, values.reshape(-1).view(np.uint8).data, offset)


def library(name: str, extra: str) -> ModuleType:
    """Import a library that an extra brings; the ImportError names the extra."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"This format needs {name} ({error}): {how_to_install(extra)}.") from None


def chosen_fields(where: str, known: Fields, names: Sequence[str] | None) -> Fields:
    """The fields that names stand for, or all; ValueError, which says where, if there is no such field.

    With observations, `final_obs_missing` is among them: without it, a repeated one would be taken for a final one.
    """
    if missing := [name for name in names or () if not known.below(name)]:
        raise UnknownFieldError(where, missing, list(known))
    if names is None:
        return known
    chosen = {field for name in names for field in known.below(name)}
    if chosen & {*known.below("obs")}:
        chosen |= {*known.below(FINAL_MISSING)}
    return known.select(chosen)


def note_absence(notes: Notes, known: Collection[str]) -> None:
    """Say which of rewards and flags are not among the fields."""
    if "reward" not in known:
        notes.add("There are no rewards.")
    if missing := [name for name in ("terminated", "truncated") if name not in known]:
        notes.add(f"There is no {' and no '.join(f'`{name}`' for name in missing)}.")


class FormatReader(ABC):
    """Episodes of a file or directory in another format, one at a time, always in the same order.

    A format implements `read_from`. Its constructor looks at the source as closely as it can without reading rows, and
    raises a FormatError for what is no whole source of its kind.

    Args:
        path: Of the source, or its name where the format has names.
        fields: The fields to read, where "obs" stands for all below it; None for all. With observations,
            `final_obs_missing` always comes along, where there is one.
        dtypes: `field -> dtype` for fields that are to be stored as another one; only where no value changes, except
            that floats lose precision. A name that stands for several fields stands for those of floats: images stay.

    Attributes:
        path: As given.
        num_episodes: How many there are; None if only reading tells.
        num_steps: Rows of all episodes as they are stored here (T + 1 for T transitions); None if only reading tells.
        metadata: What the source says of itself as a whole, as JSON can hold it.
        notes: What the source does not have, or is not read. It grows while episodes are read.
    """

    #: The name by which the format is asked for.
    format: ClassVar[str]

    def __init__(self, path: str, fields: Sequence[str] | None = None, dtypes: Mapping[str, Any] | None = None) -> None:
        if isinstance(fields, str) or not all(isinstance(name, str) for name in fields or ()):
            raise TypeError(f"`fields` must be a sequence of names, found {fields!r:.60}.")
        self.path = path
        self.fields = None if fields is None else tuple(fields)
        if torch.bfloat16 in map(torch_dtype, (dtypes or {}).values()):
            raise TypeError("`dtypes` cannot ask for bfloat16: numpy, in which formats are read, does not have it.")
        self.dtypes = {name: TO_NUMPY[torch_dtype(dtype)] for name, dtype in (dtypes or {}).items()}
        self.num_episodes: int | None = None
        self.num_steps: int | None = None
        self.metadata: dict[str, Any] = {}
        self.notes = Notes()

    @abstractmethod
    def read_from(self, number: int) -> Iterator[Episode]:
        """The episodes from this number on, 0 being the first; earlier ones are not read.

        It may leave out fields that are not in `fields` (ask `wants`); those that it yields are dropped.

        Raises:
            FormatError: The source is damaged.
        """

    def close(self) -> None:  # noqa: B027  # Most formats keep nothing open.
        """Close what is open. Iterating opens it again."""

    def files(self) -> Iterable[str]:
        """Files that are read, and directories of which all files may be."""
        return [self.path]

    def wants(self, name: str) -> bool:
        """Whether a field, or one below it, is to be read."""
        if name == FINAL_MISSING and self.wants("obs"):
            return True
        chosen = self.fields
        return chosen is None or any(f"{name}/".startswith(f"{n}/") or f"{n}/".startswith(f"{name}/") for n in chosen)

    def damaged(self, found: str, advice: str = "Get a whole copy of it") -> FormatError:
        """The error to raise for what was found at the path."""
        return FormatError(self.path, found, advice)

    def episodes(self, first: int = 0) -> Iterator[Episode]:
        """The episodes from a number on, with the chosen fields and dtypes.

        Raises:
            FormatError: As `read_from`.
            ValueError: There is no such field; a dtype that cannot hold the values.
        """
        for number, episode in enumerate(self.read_from(integer("first", first, 0)), first):
            rows = episode.rows if self.fields is None and not self.dtypes else self._chosen(episode.rows, number)
            yield Episode(rows, episode.info)

    def __iter__(self) -> Iterator[Episode]:
        return self.episodes()

    def __enter__(self) -> FormatReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        counts = "episodes" if self.num_episodes is None else f"{self.num_episodes:,} episodes"
        return f"{type(self).__name__}({self.path!r}: {counts})"

    def _chosen(self, rows: dict[str, Any], number: int) -> dict[str, Any]:
        if not rows:
            raise UnknownFieldError(self.path, self.fields or (), ())
        fields = Fields.from_episode(rows)
        chosen_fields(self.path, fields, (*(self.fields or ()), *self.dtypes))
        chosen = chosen_fields(self.path, fields, self.fields)
        leaves = dict(zip(fields.names, fields.flatten(rows), strict=True))
        for name in chosen:
            dtype = self.dtypes.get(name)
            if dtype is None and fields[name].dtype.is_floating_point:
                dtype = next((self.dtypes[n] for n in self.dtypes if name in fields.below(n)), None)
            if dtype is not None:
                leaves[name] = self._cast(name, np.asarray(leaves[name]), dtype, number)
        return chosen.unflatten(leaves)

    def _cast(self, name: str, values: np.ndarray, dtype: np.dtype, number: int) -> np.ndarray:
        with np.errstate(all="ignore"):
            found = values.astype(dtype)
            is_kept = _is_kept(values, found)
        if not is_kept:
            raise ValueError(
                f"`{name}` of episode {number} of {self.path} has values that {dtype} cannot hold. Leave it out of "
                "`dtypes`."
            )
        return found


def _is_kept(values: np.ndarray, found: np.ndarray) -> bool:
    """Whether values were cast without a change, but that floats may lose precision."""
    kinds = values.dtype.kind, found.dtype.kind
    if kinds == ("f", "f"):
        return bool((np.isfinite(values) == np.isfinite(found)).all())
    if not (_is_within(values, found.dtype) and _is_within(found, values.dtype)):
        return False
    return np.array_equal(found.astype(values.dtype), values)


def _is_within(values: np.ndarray, dtype: np.dtype) -> bool:
    """Whether values lie in the range of a dtype, if that is one of integers: casting wraps those that do not."""
    if dtype.kind not in "iu" or not values.size or values.dtype.kind not in "iuf":
        return True
    bounds = np.iinfo(dtype)
    least, most = values.min().item(), values.max().item()
    # As Python's numbers, which compare exactly. A NaN compares as False.
    return bool(bounds.min <= least <= most <= bounds.max)
