"""A recurrent learner with two workers: by priorities with write-back, beside uniform; and its memory.

Each turn, 16 environments step 16 times, a batch of 64 x 16 comes from the workers, a small GRU learns from it, and the
new latents and priorities are written back. The slope of the memory of all processes together is that over the turns in
which a million steps are added, after the ring is full and each process has warmed up.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.serving import memory_of
from benchmarks.timing import print_table
from buffers import ReplayBuffer
from buffers.dataset import RingBufferDataset
from buffers.fields import Vector
from buffers.sampler import PrioritizedSampler

NUM_ENVS, BATCH_SIZE, LENGTH, LATENT = 16, 64, 16, 64
CAPACITY, EPISODE_LENGTH = 100_000, 200
NUM_STEPS, NUM_READINGS = 1_000_000, 40


def learning(rounds: int) -> None:
    """Both in turn, then the memory of the first."""
    torch.set_num_threads(1)
    turns = {is_prioritized: _learn(is_prioritized) for is_prioritized in (True, False)}
    num_full = CAPACITY // (NUM_ENVS * LENGTH) + 50
    for turn in turns.values():
        for _ in range(num_full):
            next(turn)
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(max(5, rounds)):
        for is_prioritized, turn in turns.items():
            begin = time.perf_counter()
            for _ in range(20):
                next(turn)
            times[is_prioritized].append((time.perf_counter() - begin) / 20)
    ratio = np.median([a / b for a, b in zip(times[True], times[False], strict=True)])
    # What is left is measured alone.
    turn = turns.pop(True)
    turns.clear()
    gc.collect()
    memory, num_turns = [], NUM_STEPS // (NUM_ENVS * LENGTH)
    for number in range(num_turns):
        next(turn)
        if number % (num_turns // NUM_READINGS) == 0 and number:
            memory.append(_memory_of_all())
    steps = np.linspace(0, NUM_STEPS, len(memory))
    slope = np.polyfit(steps, memory, 1)[0]
    rows = [
        ("a turn, uniform", f"{1e6 * np.median(times[False]):,.0f} us"),
        ("a turn, by priorities, with write-back", f"{1e6 * np.median(times[True]):,.0f} us"),
        ("times uniform", f"{ratio:.2f}"),
        ("memory at the beginning", f"{memory[0] / 1e6:.1f} MB"),
        ("memory after a million steps", f"{memory[-1] / 1e6:.1f} MB"),
        ("slope over a million steps", f"{slope * NUM_STEPS / 1e6:+.2f} MB"),
    ]
    print_table("A recurrent learner with two workers", ("", ""), rows)


def _learn(is_prioritized: bool) -> Iterator[None]:
    dataset = RingBufferDataset(CAPACITY)
    dataset.add_late_field("latent", Vector(LATENT))
    sampler = PrioritizedSampler() if is_prioritized else None
    include = ("index", "weight") if is_prioritized else ()
    buffer = ReplayBuffer(
        dataset, BATCH_SIZE, LENGTH, num_workers=2, num_envs=NUM_ENVS, sampler=sampler, include=include, seed=0
    )
    model, head = torch.nn.GRU(24, LATENT, batch_first=True), torch.nn.Linear(LATENT, 1)
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=1e-3)
    rng = np.random.default_rng(0)
    rows = {"obs": rng.random((NUM_ENVS, 24), np.float32), "reward": rng.random(NUM_ENVS, np.float32)}
    with buffer:
        for number in range(10**9):
            for step in range(LENGTH):
                # Environments end at different times.
                done = (np.arange(NUM_ENVS) + number * LENGTH + step) % EPISODE_LENGTH == 0
                buffer.add_step(rows, done)
            if buffer.num_timesteps < EPISODE_LENGTH * NUM_ENVS:
                continue
            batch = buffer.sample()
            latents, _ = model(batch["obs"], batch["latent"][:, 0][None])
            errors = (head(latents)[..., 0] - batch["reward"]) ** 2
            loss = (errors.mean(1) * batch["weight"]).mean() if is_prioritized else errors.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if is_prioritized:
                buffer.update(batch["index"], {"latent": latents.detach(), "priority": errors.detach()})
            yield


def _memory_of_all() -> int:
    """Bytes in use by this process and its children, shared ones counted once."""
    me = str(os.getpid())
    children = open(f"/proc/{me}/task/{me}/children").read().split()  # noqa: SIM115
    return sum(memory_of(pid) for pid in (me, *children))
