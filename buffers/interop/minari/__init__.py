"""Minari's datasets: HDF5, Arrow and Parquet storage, read and written.

    from buffers.interop import minari

    for rows, info in minari.read("D4RL/pointmaze/umaze-v2"):
        ...

Reading needs h5py for HDF5, pyarrow for Arrow and Parquet, Pillow for images stored as JPEG, and Minari only to find a
dataset by its id. Writing needs Minari.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from buffers.interop.minari.reading import MinariReader
from buffers.interop.minari.writing import write

__all__ = ["MinariReader", "read", "write"]


def read(
    path: str | os.PathLike[str],
    *,
    fields: Sequence[str] | None = None,
    dtypes: Mapping[str, Any] | None = None,
    episode_indices: Sequence[int] | None = None,
) -> MinariReader:
    """The episodes of a dataset of Minari, one at a time.

    An episode of T steps has T + 1 observations and infos, and T of all else:

        Minari              observations  o0    o1    o2    ...   oT
                            infos         i0    i1    i2          iT      if they were recorded
                            actions          a0    a1    ...  aT-1
                            rewards          r1    r2         rT
                            terminations,    d1    d2         dT
                            truncations

        row                 0     1     2    ...    T
        obs                 o0    o1    o2          oT
        action              0     a0    a1          aT-1
        reward              0     r1    r2          rT
        terminated, ...     -     d1    d2          dT
        is_first            x     -     -           -
        infos               i0    i1    i2          iT

    Dict and Tuple spaces become nested dicts, with the keys "0", "1" ... for a Tuple. Discrete ones are integers. The
    dtypes are those of the files. Text is not read, nor are infos that only some episodes have. Infos with T values
    have zeros in row 0. An episode that was recorded without its final observation repeats the last one, and
    `final_obs_missing` says so.

    The info of an episode has its `id`, `seed`, `options/NAME`, and what else Minari keeps for it. Seeds beyond int64
    are text. `metadata` is what Minari keeps for the dataset; long spaces have one number for bounds that are equal.

    Args:
        path: The directory that holds `data/`; or, if there is no such path, the id of a dataset in the local store,
            such as "D4RL/pointmaze/umaze-v2".
        fields: The fields to read, where "obs" stands for all below it; None for all.
        dtypes: `field -> dtype` for fields that are to be stored as another one.
        episode_indices: Ids of the episodes to read, in this order, such as the attribute of that name of a dataset
            that Minari has split or filtered; None for all, by ascending id.

    Raises:
        FormatError: It is no whole dataset of Minari.
        ValueError: There are no such episodes or fields.
        ImportError: A library of the extra `minari` is missing.
    """
    return MinariReader(os.fspath(path), fields, dtypes, episode_indices)
