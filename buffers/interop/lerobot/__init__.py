"""LeRobot datasets: v3.0 read and written, v2.1 and v2.0 read, those without video also in place.

    from buffers.interop import lerobot

    for rows, info in lerobot.read("data/aloha"):
        ...

Needs the libraries of the extra `lerobot`: pyarrow, PyAV, and Pillow for images that are no PNG. LeRobot itself is not
needed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from buffers.interop.base import UnknownFieldError
from buffers.interop.lerobot.in_place import LeRobotInPlaceDataset
from buffers.interop.lerobot.reading import LeRobotReader
from buffers.interop.lerobot.writing import write

__all__ = ["LeRobotInPlaceDataset", "LeRobotReader", "open", "read", "write"]


def read(
    path: str | os.PathLike[str],
    *,
    fields: Sequence[str] | None = None,
    dtypes: Mapping[str, Any] | None = None,
    video: str = "decode",
) -> LeRobotReader:
    """The episodes of a LeRobot dataset, one at a time, by `episode_index`.

    A frame has an observation, the action taken at it, and what came of it; there is no final observation. T frames are
    T + 1 rows:

        frame                 0     1     2    ...   T-1
        observation.*         o0    o1    o2         oT-1
        action                a0    a1    a2         aT-1
        next.*                r1    r2    r3         rT

        row                   0     1     2    ...   T-1     T
        obs/*                 o0    o1    o2         oT-1    oT-1     the last one known
        action                0     a0    a1         aT-2    aT-1
        reward, done, ...     0     r1    r2         rT-1    rT
        is_first              x     -     -          -       -
        final_obs_missing     -     -     -          -       x

    `observation.images.top` is the field `obs/images/top`. `next.reward` is `reward`; `next.done`, `next.success`,
    `next.truncated` and `next.terminated` lose their `next.`, too (`done` is not `terminated`: it does not say why an
    episode ended). Other features keep their names, and belong to the transition of their frame, as the action does.
    dtypes and shapes are those that `meta/info.json` declares, read from Parquet as they are: float64 stays float64,
    `(1,)` stays `(1,)`, but for the five features of `next.`, which become scalars. Images are uint8 of the declared
    shape, depths uint16 or float32.

    `index`, `episode_index` and `frame_index` are compared with what `meta/episodes` says, and are no fields.
    `timestamp` is one only where some time is not `frame_index / fps`, `task_index` only where a task changes within an
    episode; both belong to the frame's own time, as observations do. Text is not read. The `info` of an episode has its
    `task`, and what else `meta/episodes` has for it; `metadata` has the fps, the type of robot, the features and the
    tasks.

    Args:
        path: The directory, with `meta/info.json`.
        fields: The fields to read, where "obs" stands for all below it; None for all.
        dtypes: `field -> dtype` for fields that are to be stored as another one.
        video: "decode" reads frames as images, uint8. "reference" reads, for `obs/images/top`, the field
            `obs/images/top/timestamp`, float64, seconds in a file, whose path below the directory is in the info of the
            episode as `obs/images/top/path`. "skip" leaves video out.

    Raises:
        FormatError: It is no whole LeRobot dataset; one that was not finalized, for example.
        ValueError: Another word for `video`; a field that is not there.
        ImportError: A library of the extra is missing.
    """
    return LeRobotReader(os.fspath(path), fields, dtypes, video)


def open(
    path: str | os.PathLike[str],
    *,
    fields: Sequence[str] | None = None,
    video: str | None = None,
    cache_bytes: int = 1 << 28,
) -> LeRobotInPlaceDataset:
    """A LeRobot dataset as a dataset that loaders and samplers take, read where it lies. Rows are those of `read`.

    A window decodes the images of its own rows. Numbers are kept in memory if they fit in `cache_bytes`, and as many
    bytes of encoded images are. What is not there is read by row groups, an episode each where LeRobot wrote them: if
    most of the images are not kept, import the dataset, which reads windows by their own rows.

    Args:
        path: The directory, with `meta/info.json`. It must not change while it is open.
        fields: The fields to read, where "obs" stands for all below it; None for all.
        video: Needed where a field is video, which is not decoded in place: "reference" or "skip", as for `read`.
        cache_bytes: How much to keep in memory, of numbers and of images; each process keeps its own.

    Raises:
        FormatError: As `read`; or a field is video, and `video` is not given.
        ValueError: Another word for `video`; a field that is not there.
        ImportError: A library of the extra is missing.
    """
    # Absolute: files are opened when they are read, perhaps in another directory.
    where = os.path.abspath(path)
    try:
        return LeRobotInPlaceDataset(where, fields, video, cache_bytes)
    except UnknownFieldError as error:
        whole = LeRobotInPlaceDataset(where, None, video or "skip", cache_bytes)
        raise UnknownFieldError(error.where, error.missing, list(whole.fields or ())) from None
