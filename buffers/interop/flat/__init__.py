"""Flat arrays: rows of many episodes one after the other, whose meaning the user says."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from buffers.interop.arrays import Archive, ArrayFile, given_arrays, npy_directory
from buffers.interop.base import FormatError
from buffers.interop.flat.conventions import CONVENTIONS
from buffers.interop.flat.reader import FlatReader
from buffers.interop.flat.roles import find_roles
from buffers.utils import one_of

__all__ = ["CONVENTIONS", "FlatReader", "read"]

# How a file of HDF5 begins.
_HDF5 = b"\x89HDF\r\n\x1a\n"


def read(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    fields: Sequence[str] | None = None,
    dtypes: Mapping[str, Any] | None = None,
    convention: str | None = None,
    obs: str | Mapping[str, str] | None = None,
    next_obs: str | Mapping[str, str] | None = None,
    action: str | Mapping[str, str] | None = None,
    reward: str | None = None,
    terminated: str | None = None,
    truncated: str | None = None,
    done: str | None = None,
    episode_ends: str | Sequence[int] | None = None,
    episode_starts: str | Sequence[int] | None = None,
    with_action: Sequence[str] = (),
    with_reward: Sequence[str] = (),
) -> FlatReader:
    """The episodes of arrays of N rows: an `.npz` file, a directory of `.npy` files, or a dict of arrays.

    The same arrays mean different things to different libraries, and nothing in them says which, so `convention` must.
    Of an episode of 3 transitions, whose reward r2 is that for action a1:

        "transitions"                      "extra_row"
        row of the array   0    1    2     0    1    2    3
          observations     o0   o1   o2    o0   o1   o2   o3
          actions          a0   a1   a2    a0   a1   a2   -
          rewards          r1   r2   r3    r1   r2   r3   -
          flag                       x                    x

        "arrival"                          "next_action"
        row of the array   0    1    2   3    0    1    2    3
          observations     o0   o1   o2  o3   o0   o1   o2   o3
          actions          -    a0   a1  a2   a0   a1   a2   -
          rewards          -    r1   r2  r3   -    r1   r2   r3
          flag                           x                   x

        here               0    1    2    3
        obs                o0   o1   o2   o3   under "transitions": of next_obs, else o2 and `final_obs_missing`
        action             0    a0   a1   a2
        reward             0    r1   r2   r3
        terminated, ...    0    0    0    x

    "transitions" is D4RL's, "extra_row" that of OGBench's files, "arrival" that of Dreamer, dm_env and this library,
    "next_action" that of DreamerV3. With next observations, only the first is possible and need not be said; they must
    be the observations of the rows behind them. The values marked `-` are left out, those of "arrival" and rewards of
    "next_action" in row 0 are kept. Rows behind the last end are an episode, a recording that was cut. dtypes are kept.

    Episodes end where a flag is set, or where `episode_ends` or `episode_starts` say. `dones` alone do not say why an
    episode ended, and stay `done`. `terminals` are taken for `terminated`; say `done="terminals"` where they mark time
    limits, too. Arrays of other names are read only where it is said which values of a row they belong to, under
    "arrival" always.

    Args:
        source: The path, or the arrays.
        fields: The fields to read; None for all.
        dtypes: `field -> dtype` for fields that are to be stored as another one.
        convention: One of the four. Without it, an error says what the data would be under each.
        obs: The array of observations, or all below a name; or `field -> array` for several. By default, that of the
            usual names which is there, as for the others.
        next_obs: That of next observations.
        action: That of actions.
        reward: That of rewards.
        terminated: Flags of episodes that terminated.
        truncated: Flags of those that were truncated.
        done: Flags of either.
        episode_ends: The number of rows up to the end of each episode, N for the last.
        episode_starts: The first row of each, or flags that are set there.
        with_action: Other arrays that have a value for each action.
        with_reward: Other arrays that have a value for each reward.

    Raises:
        FormatError: No such source, or no whole one; one that can mean several things, or does not fit.
        ValueError: There is no such convention.
    """
    if convention is not None:
        one_of("convention", convention, [*CONVENTIONS])
    given: dict[str, Any] = {"obs": obs, "next_obs": next_obs, "action": action, "reward": reward}
    given |= {"terminated": terminated, "truncated": truncated, "done": done}
    given |= {"episode_ends": episode_ends, "episode_starts": episode_starts}
    arrays = _opened(source)
    try:
        return FlatReader(arrays, find_roles(arrays, given, with_action, with_reward), convention, fields, dtypes)
    finally:
        arrays.close()


def _opened(source: str | os.PathLike[str] | Mapping[str, Any]) -> ArrayFile:
    if isinstance(source, Mapping):
        return given_arrays(source)
    path = os.fspath(source)
    if not os.path.lexists(path):
        raise FormatError(path, "is not there", "Check the path")
    if os.path.isdir(path):
        return npy_directory(path)
    if os.path.isfile(path):
        with open(path, "rb") as file:
            if file.read(len(_HDF5)) == _HDF5:
                raise FormatError(path, "is an HDF5 file", "Read it by the format hdf5 (`import hdf5`)")
    return Archive(path)
