"""Which layout a file has."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from buffers.interop.hdf5.d4rl import D4RLLayout
from buffers.interop.hdf5.demos import IsaacLabLayout, RobomimicLayout, numbered_demos
from buffers.interop.hdf5.file import HDF5File
from buffers.interop.hdf5.layout import Layout, listed
from buffers.utils import integer, one_of

__all__ = ["LAYOUTS", "layout_of"]

LAYOUTS = ("robomimic", "isaaclab", "d4rl")
STATES = ("observation", "arrival")
_NUM_DEMOS = 4  # That are looked at for signs of a layout.


def layout_of(
    file: HDF5File,
    wants: Callable[[str], bool],
    name: str | None = None,
    mask: str | None = None,
    max_episode_steps: int | None = None,
    states: str | None = None,
) -> Layout:
    """The layout of a file, by name or by what is found in it.

    Raises:
        FormatError: The file is damaged, has no layout that is known, or could be of several.
        ValueError: An argument out of its range, or one of another layout.
    """
    found = _detected(file) if name is None else one_of("layout", name, LAYOUTS)
    _check_members(file, found)
    if found == "d4rl":
        if mask is not None:
            raise ValueError(f"{file.path} has the layout of D4RL, which has no `mask`.")
        most = None if max_episode_steps is None else integer("max_episode_steps", max_episode_steps, 1)
        return D4RLLayout(file, wants, most, one_of("states", states or "observation", STATES))
    for option, value in (("max_episode_steps", max_episode_steps), ("states", states)):
        if value is not None:
            raise ValueError(f"{file.path} has the layout of {found}: `{option}` is for D4RL's.")
    return (RobomimicLayout if found == "robomimic" else IsaacLabLayout)(file, wants, mask)


def _check_members(file: HDF5File, name: str) -> None:
    members = file.members("/")
    is_there = "actions" in members if name == "d4rl" else members.get("data", False)
    if not is_there:
        needed = "array `actions`" if name == "d4rl" else "group `data`"
        raise file.damaged(f"has no {needed}, but {listed(members) or 'nothing'}", "It is of another layout")


def _detected(file: HDF5File) -> str:
    members = file.members("/")
    has_demos, is_flat = members.get("data", False), "observations" in members or "actions" in members
    if has_demos and is_flat:
        raise file.damaged("has both `data` and arrays of D4RL", f"Say which to read: `layout=` one of {LAYOUTS}")
    if is_flat:
        return "d4rl"
    if not has_demos:
        advice = (
            "robomimic and Isaac Lab have a group `data`, D4RL `observations` and `actions`. "
            "`buffers.interop.minari` reads Minari's"
        )
        raise file.damaged(f"has {listed(members) or 'nothing'}", advice)
    if not numbered_demos(file)[0]:
        raise file.damaged("has no demos in `data`", "Get a whole copy of it")
    found: dict[str, dict[str, None]] = {}
    for layout, sign in _signs(file):
        found.setdefault(layout, {})[sign] = None
    if len(found) == 1:
        return next(iter(found))
    signs = "; ".join(f"{layout}'s {', '.join(signs)}" for layout, signs in found.items())
    raise file.damaged(
        f"could be of robomimic or Isaac Lab: it has {signs or 'signs of neither'}",
        "Say which: `layout='robomimic'` has states before each action, `layout='isaaclab'` behind it",
    )


def _signs(file: HDF5File) -> Iterator[tuple[str, str]]:
    """(layout, what only that layout has)."""
    if "format_version" in file.attributes("/")[0]:
        yield "isaaclab", "an attribute `format_version`"
    for name in numbered_demos(file)[0][:_NUM_DEMOS]:
        members = file.members(f"data/{name}")
        yield from (("robomimic", f"`{key}`") for key in ("next_obs", "dones") if key in members)
        yield from (("isaaclab", f"`{key}`") for key in ("initial_state", "processed_actions") if key in members)
        if "states" in members:
            yield ("isaaclab", "a group `states`") if members["states"] else ("robomimic", "an array `states`")
        if "obs" in members and not members["obs"]:
            yield "isaaclab", "an array `obs`"
        elif "obs" in members and any(file.members(f"data/{name}/obs").values()):
            yield "isaaclab", "groups in `obs`"
