"""What is measured on: rows that carry (episode, step), and the workloads. numpy alone, as peers have no torch.

Rows are aligned on arrival: an observation with the action that led to it, its reward and its two flags.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

_COMMON = {
    "action": ((6,), "float32"),
    "reward": ((), "float32"),
    "terminated": ((), "bool"),
    "truncated": ((), "bool"),
}
#: By kind: `field -> (shape, dtype)`.
FIELDS: dict[str, dict[str, tuple[tuple[int, ...], str]]] = {
    "state": {"obs": ((24,), "float32"), **_COMMON},
    "pixels": {"obs": ((64, 64, 3), "uint8"), **_COMMON},
}
NUM_STEPS = {"state": 1_000_000, "pixels": 100_000}
SIZES = [("state", 256, 64), ("state", 32, 16), ("state", 256, 1), ("pixels", 16, 64), ("pixels", 256, 3)]
EPISODE_LENGTH = 200
#: Rows of each field that "offsets" reads, relative to an anchor; of fields not named, the anchor's own.
OFFSETS = {"obs": (-1, 0), "action": tuple(range(16))}
#: Rows before and behind an episode of 200, in "padding": of its windows of 64, 15 in 152 are padded, about a tenth.
PADDING = {"pad_before": 7, "pad_after": 8}
#: What a call of "priorities" does: `UPDATED` draws a batch and gives its rows new priorities, `UPDATE` only gives.
UNIFORM, PRIORITIZED, UPDATED, UPDATE = "uniform", "prioritized", "prioritized and updated", "update alone"
RECENCY, ONLINE = "recency", "online"
ALPHA, BETA = 0.6, 0.4


@dataclass(frozen=True)
class Store:
    """What is stored when something is measured.

    Attributes:
        kind: "state" or "pixels".
        num_steps: Stored; also the capacity.
        episode_length: In rows.
        num_envs: Streams that rows come from.
        prioritized: Whether its rows have priorities, spread log-uniformly over three orders of magnitude.
        transitions: Whether (obs, action, reward, terminated, truncated, next_obs) is drawn, not sequences of rows.
        is_filled: Whether it is full before anything is timed.
        on_disk: Whether episodes live in files.
    """

    kind: str
    num_steps: int
    episode_length: int = EPISODE_LENGTH
    num_envs: int = 1
    transitions: bool = False
    is_filled: bool = True
    on_disk: bool = False
    prioritized: bool = False

    @property
    def fields(self) -> dict[str, tuple[tuple[int, ...], str]]:
        return FIELDS[self.kind]

    @property
    def num_bytes(self) -> int:
        """Payload of what is stored, in bytes."""
        return self.num_steps * sum(row_bytes(shape, dtype) for shape, dtype in self.fields.values())


@dataclass(frozen=True)
class Workload:
    """What is timed, over a store. What a call does follows from `part`:

    sampling, disk   draw B sequences of T rows
    transitions      draw B transitions
    adding           add a row of each environment
    growth           add an episode, and draw B sequences of T rows
    training         step 256 environments, add their rows, and draw B sequences of T rows
    samplers         draw B sequences of T rows, by each of several samplers
    wrapping         draw B sequences of T rows, from short episodes and from long ones
    padding          draw B sequences of T rows, as they are, with a tenth padded, and as stacks of four frames
    offsets          draw B anchors, and read each field at its own rows around them
    priorities, priorities_growth
                     draw B sequences of T rows, or write priorities of B x T rows, as `task` says
    saving           save the store, load it, and save again what is new

    With `adds_episode`, an episode is added before each draw.
    """

    part: str
    label: str
    store: Store
    batch_size: int = 0
    length: int = 0
    adds_episode: bool = False
    task: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Workload:
        return cls(**{**values, "store": Store(**values["store"])})


def workloads(part: str, scale: int = 1) -> list[Workload]:
    """The workloads of a part. With `scale` n, n times fewer steps are stored."""
    return {
        "sampling": _sampling,
        "transitions": _transitions,
        "disk": _disk,
        "adding": _adding,
        "growth": _growth,
        "training": _training,
        "memory": _memory,
        "samplers": _samplers,
        "wrapping": _wrapping,
        "padding": _padding,
        "offsets": _offsets,
        "priorities": _priorities,
        "priorities_growth": _priorities_growth,
        "saving": _saving,
    }[part](scale)


def _sampling(scale: int) -> list[Workload]:
    return [
        Workload("sampling", f"{kind} {batch} x {length}", Store(kind, NUM_STEPS[kind] // scale), batch, length)
        for kind, batch, length in SIZES
    ]


def _transitions(scale: int) -> list[Workload]:
    return [
        Workload("transitions", f"{kind} 256", Store(kind, NUM_STEPS[kind] // scale, transitions=True), 256, 1)
        for kind in FIELDS
    ]


def _disk(scale: int) -> list[Workload]:
    store = Store("pixels", 50_000 // scale, on_disk=True)
    return [
        Workload("disk", f"pixels {batch} x {length}", store, batch, length) for batch, length in ((16, 64), (256, 3))
    ]


def _adding(scale: int) -> list[Workload]:
    found = []
    for kind, num_envs in itertools.product(FIELDS, (1, 16, 256)):
        # 256 environments of pixels bring 3 MB a step: short episodes, so that the open ones fit beside the rest.
        episode_length = 50 if (kind, num_envs) == ("pixels", 256) else EPISODE_LENGTH
        capacity = max(20_000, 2 * episode_length * num_envs)
        store = Store(kind, capacity, episode_length, num_envs)
        plural = "" if num_envs == 1 else "s"
        found.append(Workload("adding", f"{kind}, {num_envs} environment{plural}", store))
    return found


def _growth(scale: int) -> list[Workload]:
    return [
        Workload("growth", f"{number:,}", Store("state", number * 20, 20), 256, 8, adds_episode=True)
        for number in (100, 1_000, 10_000, 100_000, 1_000_000)
        if scale == 1 or number <= 100_000
    ]


def _training(scale: int) -> list[Workload]:
    store = Store("state", NUM_STEPS["state"] // scale, num_envs=256)
    return [Workload("training", f"state, 256 environments, {b} x {t}", store, b, t) for b, t in ((32, 16), (256, 8))]


def _memory(scale: int) -> list[Workload]:
    return [
        Workload("memory", f"episodes of {length}", Store("state", NUM_STEPS["state"] // scale, length), 32, 1)
        for length in (1, 10, 200)
    ]


def _samplers(scale: int) -> list[Workload]:
    frozen = [replace(workload, part="samplers") for workload in _sampling(scale)]
    store = Store("state", NUM_STEPS["state"] // scale)
    return [*frozen, Workload("samplers", "state 256 x 8, an episode added", store, 256, 8, adds_episode=True)]


def _wrapping(scale: int) -> list[Workload]:
    # 100 steps divide the capacity, so that no episode of these would wrap.
    store = Store("state", 10_000, 100)
    return [Workload("wrapping", f"state {b} x {t}", store, b, t) for b, t in ((32, 16), (256, 8))]


def _padding(scale: int) -> list[Workload]:
    return [
        replace(workload, part="padding")
        for workload in _sampling(scale)
        if workload.batch_size * workload.length > 1_000
    ]


def _offsets(scale: int) -> list[Workload]:
    # LeRobot writes an image of each row: more rows would take minutes.
    return [Workload("offsets", "pixels 256", Store("pixels", 10_000 // scale), 256)]


def _priorities(scale: int) -> list[Workload]:
    """Over full stores, then with an episode added before each draw, so that no store is used again after it."""
    sizes = [size for size in SIZES if size != ("pixels", 256, 3)]
    frozen = (UNIFORM, PRIORITIZED, UPDATED, UPDATE, RECENCY)
    found = []
    for tasks, adds_episode in ((frozen, False), ((UNIFORM, PRIORITIZED, ONLINE), True)):
        for (kind, batch, length), task in itertools.product(sizes, tasks):
            store = Store(kind, NUM_STEPS[kind] // scale, prioritized=True)
            found.append(_prioritized(f"{kind} {batch} x {length}", store, batch, length, task, adds_episode))
    short = Store("state", 800_000 // scale, 8, prioritized=True)
    label = f"state 256 x 4, {short.num_steps // 8:,} episodes of 8"
    return [*found, *(_prioritized(label, short, 256, 4, task, True) for task in (UNIFORM, PRIORITIZED))]


def _priorities_growth(scale: int) -> list[Workload]:
    found = []
    for number, task in itertools.product((10_000, 100_000, 1_000_000), (UNIFORM, PRIORITIZED)):
        if scale == 1 or number <= 100_000:
            store = Store("state", number * 20, 20, prioritized=True)
            workload = _prioritized(f"{number:,}", store, 256, 8, task, adds_episode=True)
            found.append(replace(workload, part="priorities_growth"))
    return found


def _prioritized(label: str, store: Store, batch: int, length: int, task: str, adds_episode: bool) -> Workload:
    label = f"{label}, {task}{', an episode added' if adds_episode else ''}"
    return Workload("priorities", label, store, batch, length, adds_episode, task)


def _saving(scale: int) -> list[Workload]:
    stores = [Store(kind, NUM_STEPS[kind] // scale) for kind in ("pixels", "state")]
    stores.append(Store("state", NUM_STEPS["state"] // scale, 10))
    return [
        Workload("saving", f"{s.kind}, {s.num_bytes / 1e6:,.0f} MB, {s.num_steps // s.episode_length:,} episodes", s)
        for s in stores
    ]


def offsets_of(name: str) -> np.ndarray:
    """What "offsets" reads of a field, int64 `(n,)`."""
    return np.asarray(OFFSETS.get(name, (0,)))


# Rows.


def row_bytes(shape: tuple[int, ...], dtype: str) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def empty_rows(kind: str, *leading: int) -> dict[str, np.ndarray]:
    """Rows `field -> (*leading, *shape)` of values that do not matter."""
    rng = np.random.default_rng(0)
    rows = {}
    for name, (shape, dtype) in FIELDS[kind].items():
        values = np.zeros((*leading, *shape), dtype)
        if name in ("obs", "action"):
            # One row of noise, everywhere: quick to make, and no page is all zeros.
            values[...] = rng.integers(0, 255, shape).astype(dtype)
        rows[name] = values
    return rows


def tag(obs: np.ndarray, episode: Any, step: Any) -> None:
    """Write (episode, step) into observations `(*leading, *shape)`; `episode` and `step` are `(*leading)`."""
    if obs.dtype == np.uint8:
        flat = obs.reshape(*obs.shape[:-3], -1)
        for begin, value in ((0, episode), (4, step)):
            value = np.broadcast_to(np.asarray(value, "<u4"), flat.shape[:-1])
            flat[..., begin : begin + 4] = np.ascontiguousarray(value)[..., None].view(np.uint8)
        return
    obs[..., 0], obs[..., 1] = episode, step


def tags_of(obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(episode, step), int64 `(*leading)`, of observations `(*leading, *shape)`."""
    if obs.dtype == np.uint8:
        flat = obs.reshape(*obs.shape[:-3], -1)
        words = np.ascontiguousarray(flat[..., :8]).view("<u4").astype(np.int64)
        return words[..., 0], words[..., 1]
    return obs[..., 0].astype(np.int64), obs[..., 1].astype(np.int64)


def tagged_rows(kind: str, first_episode: int, num_episodes: int, length: int) -> dict[str, np.ndarray]:
    """The rows of whole episodes, one after the other: `field -> (num_episodes * length, *shape)`."""
    rows = empty_rows(kind, num_episodes * length)
    episode = np.repeat(np.arange(first_episode, first_episode + num_episodes), length)
    step = np.tile(np.arange(length), num_episodes)
    tag(rows["obs"], episode, step)
    rows["reward"][:] = rows["action"][:, 0] = step
    rows["terminated"][:] = step == length - 1
    return rows


def blocks(store: Store) -> Iterator[dict[str, np.ndarray]]:
    """The rows that fill a store, some whole episodes at a time."""
    num_episodes = store.num_steps // store.episode_length
    per_block = max(1, min(num_episodes, (1_000 if store.kind == "pixels" else 100_000) // store.episode_length))
    for first in range(0, num_episodes, per_block):
        yield tagged_rows(store.kind, first, min(per_block, num_episodes - first), store.episode_length)


def transitions_of(rows: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    """From rows of whole episodes, `length - 1` transitions of each, with `next_obs`."""
    is_last = np.arange(len(rows["reward"])) % length == length - 1
    is_first = np.arange(len(rows["reward"])) % length == 0
    found = {name: values[~is_first] for name, values in rows.items() if name != "obs"}
    return {"obs": rows["obs"][~is_last], **found, "next_obs": rows["obs"][~is_first]}


def log_uniform(num: int, seed: int = 0) -> np.ndarray:
    """Priorities from 0.01 to 10, each order of magnitude as likely as another; float32 `(num,)`."""
    return (10 ** np.random.default_rng(seed).uniform(-2, 1, num)).astype(np.float32)


class TaggedEnvs:
    """N environments of which a step costs next to nothing: it writes the tags and the flags.

    `rows` are the arrays of the current step, the same ones all the time; `was_done` says whose row is its episode's
    first; `previous_obs` is what the step before had. Episodes end at different times.
    """

    def __init__(self, store: Store) -> None:
        self.length, n = store.episode_length, store.num_envs
        self.rows = empty_rows(store.kind, n)
        self.age, self.episode = np.arange(n) * self.length // n, np.arange(n)
        self.was_done = np.zeros(n, np.bool_)
        self.previous_obs = self.rows["obs"].copy()
        self._write()

    def step(self) -> None:
        """On to the next step of each, which is the next episode's first where one has ended."""
        self.previous_obs[...] = self.rows["obs"]
        np.copyto(self.was_done, self.rows["terminated"])
        self.age += 1
        self.age[self.was_done] = 0
        self.episode[self.was_done] += len(self.episode)
        self._write()

    def _write(self) -> None:
        tag(self.rows["obs"], self.episode, self.age)
        np.equal(self.age, self.length - 1, out=self.rows["terminated"])
