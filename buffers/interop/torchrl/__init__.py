"""Buffers of TorchRL, and memory-mapped TensorDicts in its layout (TED), read by numpy alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from buffers.interop.torchrl.layout import MASK_KEY, TRAJ_KEY, Options
from buffers.interop.torchrl.reader import TorchRLDataset, TorchRLReader

__all__ = ["TorchRLDataset", "TorchRLReader", "open", "read"]


def read(
    path: str | os.PathLike[str],
    *,
    fields: Sequence[str] | None = None,
    dtypes: Mapping[str, Any] | None = None,
    num_envs: int | None = None,
    ndim: int | None = None,
    time_axis: int | None = None,
    num_rows: int | None = None,
    observations: Sequence[str] | None = None,
    traj_key: str | None = TRAJ_KEY,
    mask_key: str | None = MASK_KEY,
    gaps: Literal["refuse", "split"] = "refuse",
    repeats: Literal["drop", "keep"] | None = None,
) -> TorchRLReader:
    """Read what `TensorDictReplayBuffer.dumps`, or `TensorDict.memmap`, has written.

    An episode of T = 3 steps, which the environment ended. Each row of the file is a step; the row after the last one
    comes from its next observation:

        row of the file        n    n+1   n+2
        observation            o0   o1    o2
        action                 a0   a1    a2
        next/observation       o1   o2    o3
        next/reward            r1   r2    r3
        next/done              -    -     x
        step_count             0    1     2

        row here               0    1     2     3
        obs                    o0   o1    o2    o3
        action                 0    a0    a1    a2
        reward                 0    r1    r2    r3
        terminated, truncated  -    -     -     x      as the file has them; a cut recording has neither
        is_first               x    -     -     -
        step_count             0    1     2     3      as all that the file has at rows and after steps

    `next/observation` is compared with the observation of the row that follows, for every row that is read: rows that
    do not follow each other are an error. An episode ends at `next/done`, before `is_init`, and where
    `collector/traj_ids` changes. Episodes come in the order in which their first rows were written. With one
    observation, `obs` is an array, else a dict by the names in the file. `done`, `reward` and flags of rows, which are
    of the step before, and `index` are not read, nor is anything that is no tensor: pickles are never opened.

    How rows lie, where there are no `collector/traj_ids`:

        saved                                  time axis     environments
        buffer, one axis                       that one      one, or `num_envs` that take turns
        buffer, `ndim=2`: (T, B)               the first     B
        buffer, one axis of items of (n,)      `time_axis`
        plain TensorDict of (B, T)             the last      B

    Args:
        path: The directory. A buffer that was full is read from its oldest row, which the writer's cursor tells.
        fields: The fields to read, where "obs" stands for all below it; None for all.
        dtypes: `field -> dtype` for fields that are to be read as another one.
        num_envs: Environments whose rows take turns in one axis. Unneeded where there are trajectory ids.
        ndim: That of the storage, where the number of rows fits several.
        time_axis: The axis of rows that is time.
        num_rows: Rows of the first axis that hold data, of a `scratch_dir` without `dumps`.
        observations: Keys that are observations, such as "agents/position"; None for all that are there also as next
            observations. Where none of them is, the final observation is missing.
        traj_key: The key of trajectory ids; None to ignore them.
        mask_key: The key that is False where rows are padding.
        gaps: "split" ends an episode, as a cut recording, where a next observation is not that of the following row;
            "refuse" makes it an error.
        repeats: What to do with rows that repeat an end, as `rollout(break_when_all_done=True)` writes them: "drop"
            them, or "keep" them as episodes of one step. None drops those that `is_init` tells; others are an error.

    Returns:
        The episodes. An index of 8 bytes for each row is in memory, and one episode.

    Raises:
        FormatError: The source is damaged, of another kind, or leaves open which rows follow each other.
        ValueError: An option out of its range, or a name that is not there.
    """
    options = Options(num_envs, ndim, time_axis, num_rows, observations, traj_key, mask_key, gaps, repeats)
    return TorchRLReader(os.fspath(path), fields, dtypes, options)


def open(
    path: str | os.PathLike[str],
    *,
    fields: Sequence[str] | None = None,
    num_envs: int | None = None,
    ndim: int | None = None,
    time_axis: int | None = None,
    num_rows: int | None = None,
    observations: Sequence[str] | None = None,
    traj_key: str | None = TRAJ_KEY,
    mask_key: str | None = MASK_KEY,
    gaps: Literal["refuse", "split"] = "refuse",
    repeats: Literal["drop", "keep"] | None = None,
) -> TorchRLDataset:
    """Open what `read` reads in place. Nothing may be written to it meanwhile.

    Args and errors are those of `read`, without `dtypes`. Next observations are compared with the rows that follow only
    in the first 64 MB of each.
    """
    options = Options(num_envs, ndim, time_axis, num_rows, observations, traj_key, mask_key, gaps, repeats)
    # Absolute: files are opened when they are read, perhaps in another directory.
    return TorchRLDataset(os.path.abspath(path), fields, options)
