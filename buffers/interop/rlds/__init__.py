"""Directories of episodes in the RLDS format, as tensorflow-datasets writes them; TensorFlow is not needed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from buffers.interop.rlds.reader import LAST_ACTIONS, RldsReader

__all__ = ["LAST_ACTIONS", "RldsReader", "read"]


def read(
    path: str | os.PathLike[str],
    *,
    split: str | None = None,
    last_action: str = "dummy",
    fields: Sequence[str] | None = None,
    dtypes: Mapping[str, Any] | None = None,
) -> RldsReader:
    """The episodes of an RLDS dataset: splits, files and records in their order.

    RLDS has for each step an observation, the action taken at it, and the reward and discount that this brought. Where
    `is_last` is set, all but the observation is invalid: the step is the final observation, and its action is dropped.

        step                 0     1     2    ...   n-1
        observation          o0    o1    o2         on-1
        action               a0    a1    a2         -
        reward, discount     r1    r2    r3         -
        is_last              -     -     -          x

        row                  0     1     2    ...   n-1
        obs                  o0    o1    o2         on-1
        action               0     a0    a1         an-2
        reward, discount     0     r1    r2         rn-1
        terminated           -     -     -          is_terminal
        truncated            -     -     -          not is_terminal
        final_obs_missing    -     -     -          -

    Some datasets have a valid action and reward in the last step, and no final observation (many of Open X-Embodiment,
    whose only reward is there). The files do not say so, but a note says if what is dropped is not zero. Read those
    with `last_action="valid"`. The same is done with an episode whose last step is not marked, because its recording
    was cut off; it has neither flag:

        row                  0     1     2    ...   n-1     n
        obs                  o0    o1    o2         on-1    on-1
        action               0     a0    a1         an-2    an-1
        reward, discount     0     r1    r2         rn-1    rn
        terminated           -     -     -          -       is_terminal
        truncated            -     -     -          -       is_last and not is_terminal
        final_obs_missing    -     -     -          -       x

    Other features of steps are fields under their names; row t has that of step t, whose observation it has. Texts that
    are the same in all steps, and what the episode has beside its steps, go into its info: `task` is the language
    instruction, `split` the name of the split, others have their own names, without `episode_metadata/`. Images come as
    Pillow decodes them, which of JPEG is TensorFlow's `INTEGER_ACCURATE`, not its default.

    Args:
        path: The directory of a version, which has dataset_info.json and features.json.
        split: The split to read; None for all.
        last_action: "dummy" or "valid", see above.
        fields: The fields to read, where "obs" stands for all below it; None for all.
        dtypes: `field -> dtype` for fields that are to be stored as another one.

    Raises:
        FormatError: The directory is not whole, damaged, or no RLDS; names the file.
        ValueError: There is no such split; another `last_action`.
        ImportError: array_record (for its files) or Pillow (for images) is missing.
    """
    return RldsReader(os.fspath(path), split, last_action, fields, dtypes)
