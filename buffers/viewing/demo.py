"""The demo: record, print, sample, train."""

from __future__ import annotations

from typing import Any

import gymnasium
import torch
from tqdm import tqdm

from buffers.dataset import RingBufferDataset
from buffers.replay_buffer import ReplayBuffer
from buffers.wrappers import RecordEpisodes, VectorRecordEpisodes

__all__ = ["demo"]

NUM_ENVS = 8
_BAR = "{desc} |{bar}| {n:.0f}/{total} s{postfix}"


def demo(seconds: float, seed: int) -> None:
    """Record one environment and eight, print what is stored, and train on batches of it."""
    print("A single CartPole, with random actions:\n")
    print(record_single(seed), "\n")
    print(f"{NUM_ENVS} Pendulums stepped together:\n")
    buffer = record_vectorized(seed)
    print(buffer, "\n")
    batch = buffer.sample()
    print("A batch:", {name: tuple(value.shape) for name, value in batch.items()}, "\n")
    first, last = train_predictor(buffer, seconds, seed)
    print(f"\nLoss: {first:.4f} before, {last:.4f} after (the next observation's squared error, predicted by a GRU).")


def record_single(seed: int) -> ReplayBuffer:
    """A buffer with random episodes of one CartPole."""
    buffer = ReplayBuffer(RingBufferDataset(capacity=10_000), batch_size=32, sequence_length=8)
    env = RecordEpisodes(gymnasium.make("CartPole-v1"), buffer)
    env.action_space.seed(seed)
    for episode in range(20):
        env.reset(seed=seed + episode)
        done = False
        while not done:
            _, _, terminated, truncated, _ = env.step(env.action_space.sample())
            done = terminated or truncated
    env.close()
    return buffer


def record_vectorized(seed: int) -> ReplayBuffer:
    """A buffer with random episodes of eight Pendulums."""
    buffer = ReplayBuffer(RingBufferDataset(capacity=20_000), batch_size=64, sequence_length=16, seed=seed)
    envs = VectorRecordEpisodes(gymnasium.make_vec("Pendulum-v1", num_envs=NUM_ENVS), buffer)
    envs.action_space.seed(seed)
    envs.reset(seed=seed)
    for _ in range(1200):
        envs.step(envs.action_space.sample())
    envs.close()
    return buffer


class Predictor(torch.nn.Module):
    """Predicts the next observation from the action and the observations so far."""

    def __init__(self, obs_size: int, action_size: int, hidden_size: int = 64) -> None:
        super().__init__()
        self.rnn = torch.nn.GRU(obs_size + action_size, hidden_size, batch_first=True)
        self.head = torch.nn.Linear(hidden_size, obs_size)

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Next observations `(B, T, obs)`, given observations and the actions that follow them."""
        hidden, _ = self.rnn(torch.cat([obs, action], -1))
        return obs + self.head(hidden)


def train_predictor(buffer: ReplayBuffer, seconds: float, seed: int) -> tuple[float, float]:
    """Train for some seconds; returns the error on one fixed batch, before and after."""
    torch.manual_seed(seed)
    test = buffer.sample()
    model = Predictor(test["obs"].shape[-1], test["action"].shape[-1])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def error(batch: dict[str, Any]) -> torch.Tensor:
        # Rows are aligned on arrival: the action of row t + 1 led from observation t to observation t + 1.
        return (model(batch["obs"][:, :-1], batch["action"][:, 1:]) - batch["obs"][:, 1:]).square().mean()

    with torch.no_grad():
        first = error(test).item()
    with tqdm(total=round(seconds), unit="s", desc="training", bar_format=_BAR) as bar:
        for num_batches, batch in enumerate(buffer, 1):
            loss = error(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            elapsed = min(bar.format_dict["elapsed"], seconds)
            bar.n = elapsed
            if num_batches % 50 == 0 or elapsed >= seconds:
                bar.set_postfix_str(f"batches={num_batches} loss={loss.item():.4f}")
            if elapsed >= seconds:
                break
    with torch.no_grad():
        return first, error(test).item()
