"""HDF5 in the layouts of robomimic, Isaac Lab and D4RL. See `read`, `write` and `open`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from buffers.dataset import EpisodeDataset
from buffers.interop.hdf5.reading import HDF5Dataset, HDF5Reader
from buffers.interop.hdf5.writing import write_demos
from buffers.interop.origin import Summary

__all__ = ["HDF5Dataset", "HDF5Reader", "open", "read", "write"]


def read(
    path: str | os.PathLike[str],
    *,
    layout: str | None = None,
    mask: str | None = None,
    max_episode_steps: int | None = None,
    states: str | None = None,
    fields: Sequence[str] | None = None,
    dtypes: Mapping[str, Any] | None = None,
) -> HDF5Reader:
    """Read the episodes of an HDF5 file of robomimic, Isaac Lab or D4RL.

    An episode of T actions has T + 1 rows here, row 0 being the first observation:

        row of the episode     0       1       2     ...   T
        obs                    o0      o1      o2          oT
        action                 0       a0      a1          aT-1
        reward                 0       r0      r1          rT-1

        robomimic              data/demo_N: an array has T rows
        obs                    [0]     [1]     [2]         next_obs[T-1]
        action                 0       actions[0]          actions[T-1]
        reward, done           0       rewards[0]          rewards[T-1]    `done` is `dones`
        states                 [0]     [1]     [2]         [T-1] again     simulator states before the action
        others                 0       [0]     [1]         [T-1]

        Isaac Lab              data/demo_N: T rows; actions and obs are recorded before a step, states behind it
        obs                    [0]     [1]     [2]         obs[T-1] again, final_obs_missing
        action                 0       actions[0]          actions[T-1]
        states                 initial_state   [0]   ...   [T-1]
        others                 0       [0]     [1]         [T-1]           `processed_actions`, for example

        D4RL                   one array for all; an episode is the rows [s, e], e the first with a flag
        obs                    observations[s]             next_observations[e]
        action                 0       actions[s]          actions[e]
        reward                 0       rewards[s]          rewards[e]
        terminated             0       0       0           terminals[e]
        truncated              0       0       0           timeouts[e]
        infos/qpos, qvel       [s]     [s + 1] [s + 2]     [e] again       recorded before the step
        other infos            0       [s]     [s + 1]     [e]

    Where there are no next observations, the last row repeats the one before, and `final_obs_missing` is True there.
    robomimic and Isaac Lab do not say whether an episode was terminated or truncated, so there is neither field:
    robomimic's `dones` is 1 where the task has succeeded, or where a recording ends. (What `write` writes has both, and
    is read with them.) Rows of D4RL behind the last flag are an episode that was cut off, with neither.

    Demos come in the order of their numbers. Their attributes (`seed` and `success` of Isaac Lab, `model_file` of
    robomimic if it is small) are the info of the episodes, with `demo`, their name, and `mask/KEY` for each list of
    demos in the group `mask`: whether it is on it. `success` of Isaac Lab is False, too, where the task has no term of
    that name. Attributes of the file are in `metadata`, with `env_args` parsed. Quaternions are kept as they are: w
    first in files of Isaac Lab without the attribute `format_version`, last from version 1 on.

    Next observations must be the observations of the rows behind them. Links, virtual datasets and external files are
    refused; so are filters other than gzip, shuffle, fletcher32 and LZF.

    Args:
        path: Of the file.
        layout: "robomimic", "isaaclab" or "d4rl"; None to find out.
        mask: The name of a list of demos in the group `mask`, such as "train"; None for all demos.
        max_episode_steps: Of D4RL: an episode is truncated after so many transitions. Needed for files that have no
            `timeouts`; with them, it is one more rule.
        states: Of D4RL, what `infos/qpos` and `infos/qvel` belong to: the "observation" of their row, as in the sets of
            gym-mujoco and Maze2D, which is the default; or "arrival", recorded behind the step, as in AntMaze's.
        fields: As `FormatReader`.
        dtypes: As `FormatReader`.

    Raises:
        FormatError: The file is not there, damaged, of no known layout, or could be of several.
        ValueError: There is no such mask; an argument of another layout.
        ImportError: h5py is missing; names the extra.
    """
    return HDF5Reader(os.fspath(path), layout, mask, max_episode_steps, fields, dtypes, states)


def open(
    path: str | os.PathLike[str],
    *,
    layout: str | None = None,
    mask: str | None = None,
    max_episode_steps: int | None = None,
    states: str | None = None,
    fields: Sequence[str] | None = None,
) -> HDF5Dataset:
    """Open a file of robomimic, Isaac Lab or D4RL to draw from it where it lies, without an import.

    It has the episodes and the rows of `read`. Datasets that are not compressed and lie in one piece, as robomimic and
    `write` write them, are read past h5py, straight into the batch. Compressed ones cost a chunk for each window.

    Args are those of `read`, which also says what is raised. The file must not change while it is open.
    """
    return HDF5Dataset(os.fspath(path), layout, mask, max_episode_steps, fields, states)


def write(
    dataset: EpisodeDataset,
    path: str | os.PathLike[str],
    *,
    layout: str = "robomimic",
    fields: Sequence[str] | None = None,
    limit: int | None = None,
    progress: bool = False,
    next_obs: bool = True,
    compression: str | None = None,
    env_args: Mapping[str, Any] | None = None,
    format_version: int | None = None,
) -> Summary:
    """Write the episodes of a dataset into an HDF5 file that robomimic's `SequenceDataset` or Isaac Lab reads.

    Rows become those of the layout, as `read` draws them, with the arrays `terminated` and `truncated` beside them,
    which neither library needs and `read` finds again. Infos of episodes become attributes of the demos, and
    `mask/KEY` of infos the lists of demos in the group `mask`. Demos are numbered from 0, oldest first.

    robomimic: `dones` is the field `done`, or else terminated or truncated. An observation that is no dict is written
    as `obs/flat`. Isaac Lab: the final observation is left out.

    Args:
        dataset: Of episodes aligned on arrival, with the fields `obs` and `action`.
        path: Of the file, which must not exist.
        layout: "robomimic" or "isaaclab".
        fields: As `Exporter`.
        limit: As `Exporter`.
        progress: As `Exporter`.
        next_obs: Of robomimic: whether to write `next_obs`, which doubles the file. Without it, final observations are
            left out.
        compression: "gzip"; None writes each array in one piece, which is read much faster.
        env_args: What robomimic needs to make the environment: its `env_name`, `type` and `env_kwargs`. None for those
            that the dataset was imported with.
        format_version: Of Isaac Lab: 1 if quaternions have w last, 0 if first. None for that of the import, or 1.

    Returns:
        What was written, and what the layout cannot hold.

    Raises:
        ValueError: An argument out of its range, a field that a demo cannot hold, no episodes, or the file exists.
        ImportError: h5py is missing; names the extra.
    """
    return write_demos(dataset, path, layout, fields, limit, progress, next_obs, compression, env_args, format_version)
