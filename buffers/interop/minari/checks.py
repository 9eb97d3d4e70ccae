"""What episodes must have in common, and the lengths of their columns."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from buffers.interop.base import FormatError, Notes
from buffers.interop.minari.columns import ROOTS, Column, Path, StoredEpisode, field_of

__all__ = ["CommonColumns", "checked"]

_ADVICE = "Get a whole copy of the dataset"
_SCALARS = ("rewards", "terminations", "truncations")


def checked(source: str, episode_id: int, stored: StoredEpisode) -> tuple[StoredEpisode, bool]:
    """The episode without what no step has a value of, and whether its final observation is missing.

    Raises:
        FormatError: It lacks columns, or their lengths do not go together; names the source and the episode.
    """

    def wrong(found: str) -> FormatError:
        return FormatError(source, f"Episode {episode_id} {found}", _ADVICE)

    num_steps, columns = stored.num_steps, dict(stored.columns)
    rows = {root: {one.rows for path, one in columns.items() if path[0] == root} for root in ROOTS}
    if missing := [root for root in ROOTS if not rows[root] and root != "infos"]:
        raise wrong(f"has no {', '.join(missing)}")
    for root in ("actions", *_SCALARS):
        if rows[root] != {num_steps}:
            raise wrong(f"has {num_steps} steps, and {sorted(rows[root])} rows of {root}")
    final_missing = rows["observations"] == {num_steps} and num_steps > 0
    if rows["observations"] != {num_steps + 1} and not final_missing:
        found = sorted(rows["observations"])
        raise wrong(f"has {num_steps} steps, and {found} rows of observations, expected {num_steps + 1}")
    for root in _SCALARS:
        one = columns.get((root,))
        # Minari documents one value for each step, and HDF5 keeps the axis of an environment that returns [reward].
        if one is None or one.problem or one.shape not in ((), (1,)) or one.dtype.kind == "c":
            raise wrong(f"has {root} that are no number for each step")
        columns[root,] = one._replace(shape=())
    for path, one in columns.items():
        if path[0] == "infos" and not one.problem and one.rows not in (num_steps, num_steps + 1):
            columns[path] = one._replace(problem="has neither a value for each step nor one more")
    return stored._replace(columns=columns), final_missing


class CommonColumns:
    """The columns that all episodes have, each with one dtype and shape.

    Observations and actions must be the same in all. Infos that are not are left out, which is noted. Numbers of
    different dtypes get the smallest dtype that holds them all: where an environment returns the reward 0 in one
    episode and 0.5 in another, Minari has int64 and float64.

    Args:
        source: For errors.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._found: dict[Path, Column] = {}
        self._first: dict[Path, int] = {}
        self._dtypes: dict[Path, dict[np.dtype, None]] = {}
        self._counts: dict[Path, int] = {}
        self._ids = (-1, 0)  # Of the first episode, and the number of episodes.

    def add(self, episode_id: int, columns: Mapping[Path, Column]) -> None:
        """Take those of an episode in; FormatError if it differs from those before, which names both."""
        first, number = self._ids
        if number:
            self._check_names(first, episode_id, columns)
        self._ids = (first if number else episode_id, number + 1)
        for path, new in columns.items():
            self._counts[path] = self._counts.get(path, 0) + 1
            self._dtypes.setdefault(path, {})[new.dtype] = None
            known = self._found.get(path)
            self._first.setdefault(path, episode_id)
            self._found[path] = new if known is None else self._joined(path, known, episode_id, new)

    def finish(self, notes: Notes) -> dict[Path, Column]:
        """Those that are read; notes get the others."""
        for path, one in self._found.items():
            if self._counts[path] < self._ids[1]:
                one = self._found[path] = one._replace(problem="is not in all episodes")
            if one.problem:
                notes.add(f"`{field_of(path)}` {one.problem}, and is not read.")
            elif len(self._dtypes[path]) > 1:
                names = " or ".join(map(str, self._dtypes[path]))
                notes.add(f"`{field_of(path)}` is {names}, by episode. All of it is {one.dtype} here.")
        return {path: one for path, one in self._found.items() if not one.problem}

    def _check_names(self, first: int, episode_id: int, columns: Mapping[Path, Column]) -> None:
        expected = {path for path in self._found if path[0] != "infos"}
        found = {path for path in columns if path[0] != "infos"}
        if expected != found:
            missing, more = (sorted(map(field_of, names)) for names in (expected - found, found - expected))
            text = f"Episode {episode_id} lacks {missing} and has {more} besides, compared with episode {first}"
            raise FormatError(self._source, text, _ADVICE)

    def _joined(self, path: Path, known: Column, episode_id: int, new: Column) -> Column:
        problem = known.problem or new.problem
        if known.shape != new.shape and not problem:
            problem = "has other shapes in other episodes"
            if path[0] != "infos":
                text = f"`{field_of(path)}` has rows of shape {new.shape} in episode {episode_id}"
                text += f", of {known.shape} in episode {self._first[path]}"
                raise FormatError(self._source, text, "`episode_indices=[...]` reads those that you name")
        if problem or known.dtype == new.dtype:
            return known._replace(problem=problem, is_jpeg=known.is_jpeg or new.is_jpeg)
        return known._replace(dtype=np.result_type(known.dtype, new.dtype))
