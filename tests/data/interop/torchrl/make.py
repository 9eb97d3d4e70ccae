"""Write `cases.tar.xz` beside this script with TorchRL: a folder for each case. It takes half a minute.

Run at the root of the checkout, with Python 3.11:

    python -m venv venv && venv/bin/pip install torch==2.13.0
    venv/bin/pip install torchrl==0.14.1 tensordict==0.14.3 gymnasium==1.4.0 numpy==2.4.6
    RL_LOGGING_LEVEL=ERROR venv/bin/python -W ignore -m tests.data.interop.torchrl.make

What the environments saw is computed by `tests/interop/torchrl_log.py`.
"""

from __future__ import annotations

import io
import sys
import tarfile
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from tensordict import NonTensorData, TensorDict, lazy_stack
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.collectors.utils import split_trajectories
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    ReplayBuffer,
    ReplayBufferEnsemble,
    TensorDictMaxValueWriter,
    TensorDictReplayBuffer,
)
from torchrl.data.postprocs import MultiStep
from torchrl.data.replay_buffers.checkpointers import FlatStorageCheckpointer
from torchrl.envs import Compose, GymWrapper, InitTracker, SerialEnv, StepCounter, TransformedEnv

from tests.interop import torchrl_log

HERE = Path(__file__).parent
MOST_STEPS = 30


def steps(env: int = 0, *more: str) -> TensorDict:
    """The rows of an environment in TorchRL's layout, with more keys: "is_init", "traj_ids", "image", "step_count"."""
    rows = {name: torch.from_numpy(values) for name, values in torchrl_log.rows(env).items()}
    column = {name: values[:, None] for name, values in rows.items()}
    num = len(rows["reward"])
    done = column["terminated"] | column["truncated"]
    no = torch.zeros(num, 1, dtype=torch.bool)
    flags = {"terminated": column["terminated"], "truncated": column["truncated"], "done": done}
    found: dict[str, Any] = {"observation": rows["obs"], "action": rows["action"]}
    after: dict[str, Any] = {"observation": rows["next_obs"], "reward": column["reward"], **flags}
    found |= {"done": no, "terminated": no.clone(), "truncated": no.clone()}
    for name in ("image", "step_count"):
        if name in more:
            found[name], after[name] = rows[name], rows[f"next_{name}"]
    if "is_init" in more:
        found["is_init"] = column["is_init"]
    if "traj_ids" in more:
        found["collector"] = {"traj_ids": rows["traj_ids"]}
    return TensorDict({**found, "next": after}, [num])


def together(num_envs: int, *more: str) -> TensorDict:
    """(B, T), as a collector returns them."""
    return torch.stack([steps(env, *more) for env in range(num_envs)])


def buffer(capacity: int, **options: Any) -> TensorDictReplayBuffer:
    return TensorDictReplayBuffer(storage=LazyMemmapStorage(capacity, **options), batch_size=2)


def saved(path: Path, capacity: int, *parts: TensorDict, **options: Any) -> None:
    """Add parts to a buffer and save it."""
    found = buffer(capacity, **options)
    for part in parts:
        found.extend(part)
    found.dumps(path)


def make_buffers(root: Path) -> None:
    one, three = steps(), together(3)
    saved(root / "one", 20, one[:4], one[4:])
    saved(root / "full", 11, one)
    saved(root / "wrapped", 8, one[:5], one[5:])
    saved(root / "twice_round", 4, *one.split(3))
    saved(root / "ndim2", 60, three[:, :5], three[:, 5:], ndim=2)
    saved(root / "ndim2_wrapped", 24, three[:, :5], three[:, 5:], ndim=2)
    saved(root / "turns", 40, *three.unbind(1))
    saved(root / "turns_wrapped", 20, *three.unbind(1))
    saved(root / "items_of_time", 8, three[:, :5], three[:, 5:10])
    saved(root / "items_of_envs", 12, three.transpose(0, 1))
    keys = ("traj_ids", "is_init", "image", "step_count")
    blocks = together(3, *keys)
    saved(root / "blocks", 40, blocks[:, :5].reshape(-1), blocks[:, 5:].reshape(-1))
    saved(root / "blocks_wrapped", 20, blocks[:, :5].reshape(-1), blocks[:, 5:].reshape(-1))
    mixed = three[:, :5].reshape(-1), three[:, 5:].reshape(-1)
    saved(root / "blocks_without_ids", 40, *mixed)
    # Recordings that were cut without a flag, one after the other.
    saved(root / "cuts", 40, steps(0), steps(1), steps(2))
    saved(root / "cuts_with_is_init", 40, *(steps(env, "is_init") for env in range(3)))
    no_next = one.clone()
    del no_next["next", "observation"]
    saved(root / "no_next", 20, no_next)


def make_plain(root: Path) -> None:
    one = steps()
    one.memmap(root / "plain")
    together(3, "image").memmap(root / "plain_of_envs")
    odd = steps()
    odd["task"] = "pick"
    odd["half"] = NonTensorData(Fraction(1, 2), batch_size=[len(odd)])
    odd["a/b c"] = torch.arange(len(odd)) / 8
    odd["brain"] = torch.arange(2 * len(odd)).reshape(-1, 2).to(torch.bfloat16)
    odd["tiny"] = torch.zeros(len(odd)).to(torch.float8_e4m3fn)
    odd["ragged"] = torch.nested.nested_tensor([torch.zeros(1 + n % 2) for n in range(len(odd))])
    odd["deep"] = {"er": {"values": torch.arange(len(odd), dtype=torch.float64)}}
    odd["nothing"] = torch.zeros(len(odd), 0)
    odd["next", "value_after"] = torch.arange(len(odd), dtype=torch.int32)
    odd.memmap(root / "odd")
    split_trajectories(steps(0, "traj_ids", "is_init")).memmap(root / "padded")
    split_trajectories(steps(0), done_key="done").memmap(root / "padded_by_done")
    scratch = buffer(14, scratch_dir=root / "scratch")
    scratch.extend(one)
    MultiStep(0.5, 3)(steps()[None]).squeeze(0).memmap(root / "multi_step")
    lazy_stack(list(one.unbind(0))).memmap(root / "lazy_stack")


def make_refused(root: Path) -> None:
    one = steps()
    ranked = TensorDictReplayBuffer(
        storage=LazyMemmapStorage(20), writer=TensorDictMaxValueWriter(rank_key=("next", "reward")), batch_size=2
    )
    ranked.extend(one)
    ranked.dumps(root / "ranked")
    compact = TensorDictReplayBuffer(storage=LazyTensorStorage(20), batch_size=2)
    compact._storage.checkpointer = FlatStorageCheckpointer()
    compact.extend(one)
    compact.dumps(root / "compact")
    dicts = ReplayBuffer(storage=LazyMemmapStorage(20), batch_size=2)
    dicts.extend({"observation": one["observation"], "next": {"done": one["next", "done"]}})
    dicts.dumps(root / "dicts")
    members = [buffer(20), buffer(20)]
    for member in members:
        member.extend(one)
    ReplayBufferEnsemble(*members, batch_size=4).dumps(root / "ensemble")
    emptied = buffer(20)
    emptied.extend(one)
    emptied.empty()
    emptied.dumps(root / "emptied")


class Game(gymnasium.Env):
    """An environment that shows what the log says."""

    observation_space = gymnasium.spaces.Box(-1, 255, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-100, 100, (2,), np.float32)

    def __init__(self, env: int) -> None:
        self.log, self.number = torchrl_log.log(env), -1

    def reset(self, **_: Any) -> tuple[np.ndarray, dict[str, Any]]:
        self.number, self.step_index = self.number + 1, 0
        return self.log[self.number]["obs"][0], {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        played, self.step_index = self.log[self.number], self.step_index + 1
        n = self.step_index - 1
        assert np.array_equal(action, played["action"][n])
        flags = bool(played["terminated"][n]), bool(played["truncated"][n])
        return played["obs"][n + 1], float(played["reward"][n]), *flags, {}


def wrapped_game(env: int, *transforms: Any) -> TransformedEnv:
    return TransformedEnv(GymWrapper(Game(env)), Compose(*transforms))


def act(observation: torch.Tensor) -> torch.Tensor:
    """What the log says that is done here."""
    env, number, step = observation.unbind(-1)
    return torch.stack([env + 10 * number + 0.5 + step / 8, -step - 1], -1)


def make_collected(root: Path) -> None:
    policy = TensorDictModule(act, in_keys=["observation"], out_keys=["action"])
    makers = [lambda env=env: wrapped_game(env, InitTracker(), StepCounter()) for env in range(3)]
    filled = buffer(60)
    # Each environment has 11 steps: as many as the collector takes.
    for part in Collector(SerialEnv(3, makers), policy, frames_per_batch=33, total_frames=33):
        filled.extend(part.reshape(-1))
    filled.dumps(root / "collected")
    # The first episodes have 3, 1 and 4 steps.
    rollouts = {"repeats": [0, 1, 2], "repeats_with_is_init": [0, 2], "repeats_of_one_step": [0, 1]}
    for name, envs in rollouts.items():
        transforms = [] if name == "repeats" else [InitTracker]
        makers = [lambda env=env, own=transforms: wrapped_game(env, *[kind() for kind in own]) for env in envs]
        together = SerialEnv(len(envs), makers)
        together.rollout(MOST_STEPS, policy, break_when_any_done=False, break_when_all_done=True).memmap(root / name)


def main(target: Path) -> None:
    """Write the archive; without dates, so that the same files give the same bytes."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for make in (make_buffers, make_plain, make_refused, make_collected):
            make(root)
        with tarfile.open(target, "w:xz") as archive:
            for path in sorted(root.rglob("*")):
                if path.is_file():
                    content, entry = path.read_bytes(), tarfile.TarInfo(str(path.relative_to(root)))
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "cases.tar.xz")
