"""Directories of `.npz` files: one episode each (Dreamer, ExoRL, DrQ-v2, V-D4RL, the original `buffers`), or chunks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from buffers.interop.arrays import Archive
from buffers.interop.base import FormatReader
from buffers.interop.npz.chunks import ChunkReader
from buffers.interop.npz.episodes import NpzReader
from buffers.interop.npz.layouts import LAYOUTS, find_files, find_layout
from buffers.interop.npz.writing import write

__all__ = ["ChunkReader", "LAYOUTS", "NpzReader", "read", "write"]


def read(
    path: str | os.PathLike[str],
    *,
    fields: Sequence[str] | None = None,
    dtypes: Mapping[str, Any] | None = None,
    layout: str | None = None,
    obs: str | Sequence[str] | None = None,
) -> FormatReader:
    """The episodes of a directory of `.npz` files.

    Which library wrote it is told by the names of its files and by their arrays, or by `layout`. All have a row for
    each observation. An episode of 3 transitions, whose reward r2 is that for action a1:

        row of the file       0    1    2    3
        image, ...            o0   o1   o2   o3
        "dreamer", "exorl"
          action              0    a0   a1   a2     aligned on arrival, kept
          reward              0    r1   r2   r3
        "dreamerv3"
          action              a0   a1   a2   0      comes one row later here: 0 a0 a1 a2
          reward              0    r1   r2   r3     kept
        "original"                                  all kept

    * "dreamer": `<time>-<id>-<length>.npz` of DreamerV2 and V-D4RL. `terminated` is `is_terminal`, or `discount` 0 in
      files that have none; `truncated` is `is_last` without it. All arrays but those of Dreamer itself (`action`,
      `reward`, `discount`, `is_*`, `log_*`) are observations, `obs/<name>`, unless `obs` names them.
    * "dreamerv3": `<time>-<id>-<next>-<length>.npz`, chunks of streams that hold episodes one after the other, put
      together here. Rows behind the length in the name were never written, and are left out, as are earlier versions
      of a chunk. A stream's last episode may be a cut recording, without a flag.
    * "exorl": `episode_<number>_<length>.npz` of ExoRL, `<time>_<number>_<length>.npz` of DrQ-v2 and URLB.
      `observation` is `obs`; `reward` and `discount` of shape (T + 1, 1) are scalars here. `terminated` is `discount`
      0; only finished episodes are in files, so the last row of others is `truncated`.
    * "original": `<id>_<length>_<time>.npz` of the original `buffers`: rows as they are, sorted by time, then by id.

    Others are sorted by name, where numbers count as numbers. Each file is named in the info of its episode.

    Args:
        path: The directory; or one file.
        fields: The fields to read; None for all.
        dtypes: `field -> dtype` for fields that are to be stored as another one.
        layout: Of "dreamer", "dreamerv3", "exorl", "original"; needed where names or arrays do not tell.
        obs: Names of the arrays that are observations, of Dreamer's layouts.

    Raises:
        FormatError: No such directory; a file that is not whole, or has other arrays than the others; a layout that
            cannot be told.
    """
    where = os.fspath(path)
    directory, stems, others = find_files(where)
    first = Archive(os.path.join(directory, f"{stems[0]}.npz"))
    first.close()
    found = find_layout(where, stems, first.columns, layout)
    observations = [obs] if isinstance(obs, str) else obs
    if observations is not None and found not in ("dreamer", "dreamerv3"):
        raise ValueError(f"`obs` is for Dreamer's layouts, found {found!r}.")
    reader: FormatReader
    if found == "dreamerv3":
        reader = ChunkReader(where, directory, stems, observations, fields, dtypes)
    else:
        reader = NpzReader(where, directory, stems, found, observations, fields, dtypes)
    if others:
        reader.notes.add(f"Files that are no .npz are not read: {others[0]!r:.60} for example.")
    return reader
