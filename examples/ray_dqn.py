"""DQN on CartPole with Ray: two actors record, two shards hold the episodes, one learner draws from both.

    python examples/ray_dqn.py                      on this machine, in about a minute
    python examples/ray_dqn.py --address auto       on the cluster that runs here

    actor 0  --episodes-->  shard 0  --batches-->  learner
    actor 1  --episodes-->  shard 1  --batches-->     |
       ^_________________ weights ____________________|

The limiter holds the actors or the learner up, whoever is ahead, so that a run is the same experiment on any machine.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import ray
import torch

from buffers import SamplesPerInsert
from buffers.dataset import RingBufferDataset
from buffers.remote import RemoteLoader, RemoteWriter, Shards, start_shards
from buffers.transforms import to_transitions
from buffers.wrappers import VectorRecordEpisodes

NUM_ENVS, GAMMA, TAU = 8, 0.99, 0.005


def make_net() -> torch.nn.Module:
    """Values of both actions, (B, 4) -> (B, 2)."""
    hidden = torch.nn.Linear(4, 128), torch.nn.ReLU(), torch.nn.Linear(128, 128), torch.nn.ReLU()
    return torch.nn.Sequential(*hidden, torch.nn.Linear(128, 2))


class Actor:
    """Steps environments, whose episodes are recorded on the shards."""

    def __init__(self, shards: Shards, seed: int) -> None:
        torch.set_num_threads(1)
        self.writer = RemoteWriter(shards)
        envs = gymnasium.make_vec("CartPole-v1", num_envs=NUM_ENVS, vectorization_mode="sync")
        self.envs = VectorRecordEpisodes(envs, self.writer)
        self.obs, _ = self.envs.reset(seed=seed)
        self.net, self.rng = make_net(), np.random.default_rng(seed)

    def collect(self, weights: dict[str, torch.Tensor], epsilon: float, seconds: float) -> float:
        """Act by these weights for a while; the mean return of the last 100 episodes."""
        self.net.load_state_dict(weights)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not self.writer.may_add:  # The learner is behind.
                time.sleep(0.005)
                continue
            with torch.no_grad():
                actions = self.net(torch.from_numpy(self.obs)).argmax(1).numpy()
            is_random = self.rng.random(NUM_ENVS) < epsilon
            actions = np.where(is_random, self.rng.integers(0, 2, NUM_ENVS), actions)
            self.obs, *_ = self.envs.step(actions)
        return self.writer.stats().get("mean_episode_return", 0.0)

    def close(self) -> None:
        """Hand over what is recorded, before the shards end."""
        self.writer.close()


def loss_of(net: torch.nn.Module, target: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The error of double DQN over transitions."""
    rows = {name: values[:, 0] for name, values in batch.items()}
    value = net(rows["obs"]).gather(1, rows["action"][:, None])[:, 0]
    with torch.no_grad():
        best = net(rows["next_obs"]).argmax(1, keepdim=True)
        next_value = target(rows["next_obs"]).gather(1, best)[:, 0]
        goal = rows["reward"] + GAMMA * ~rows["terminated"] * next_value
    return torch.nn.functional.smooth_l1_loss(value, goal)


class Collection:
    """Keeps all actors at work: whoever has done with its last weights gets new ones, nobody waits for a slow one."""

    def __init__(self, shards: Shards, net: torch.nn.Module) -> None:
        remote_actor: Any = ray.remote(Actor)
        self.net = net
        self.actors = [remote_actor.remote(shards, seed) for seed in (1, 2)]
        self.calls: dict[Any, Any] = {}
        self.returns = dict.fromkeys(self.actors, 0.0)

    def go_on(self, epsilon: float) -> None:
        """Give idle actors the net's weights; returns at once."""
        done = ray.wait(list(self.calls), num_returns=len(self.calls), timeout=0)[0] if self.calls else []
        for call in done:
            self.returns[self.calls.pop(call)] = ray.get(call, timeout=10)
        for actor in set(self.actors) - {*self.calls.values()}:
            weights = ray.put(self.net.state_dict())
            self.calls[actor.collect.remote(weights, epsilon, 0.2)] = actor

    @property
    def mean_return(self) -> float:
        """Over the last episodes of all actors."""
        return float(np.mean(list(self.returns.values())))

    def close(self) -> None:
        """Hand over what is recorded, before the shards end."""
        ray.get([actor.close.remote() for actor in self.actors], timeout=60)


def train(shards: Shards, num_updates: int) -> float:
    """Train, print how it goes, and return the mean return of the last episodes."""
    net, target = make_net(), make_net()
    target.load_state_dict(net.state_dict())
    optimizer = torch.optim.Adam(net.parameters(), 5e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, num_updates)
    collection = Collection(shards, net)
    with RemoteLoader(shards, batch_size=128, sequence_length=2, transform=to_transitions, timeout=120.0) as loader:
        for update in range(num_updates):
            epsilon = max(0.05, 1.0 - 3.0 * update / num_updates)
            collection.go_on(epsilon)
            # `next` alone would wait for steps that idle actors never take.
            while not loader.num_batches_due:
                time.sleep(0.005)
                collection.go_on(epsilon)
            loss = loss_of(net, target, next(loader))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 10.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for slow, fast in zip(target.parameters(), net.parameters(), strict=True):
                    slow.lerp_(fast, TAU)
            if update % 500 == 499:
                shown = _shown(loader.stats())
                print(f"{update + 1:6} updates: mean return {collection.mean_return:.0f}, {shown}", flush=True)
    collection.close()
    return collection.mean_return


def _shown(stats: dict[str, float]) -> str:
    names = ("num_timesteps", "num_episodes", "samples_per_insert")
    return ", ".join(f"{name} {stats.get(name, 0):,.5g}" for name in names)


def main() -> None:
    """Parse the command line, and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default="local", help="of a cluster; starts one of its own by default")
    parser.add_argument("--directory", type=Path, help="where shards save, and go on from; nowhere by default")
    parser.add_argument("--updates", type=int, default=8_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ray.init(address=arguments.address, include_dashboard=False)
    limiter = SamplesPerInsert(ratio=32, min_steps=1_000, timeout=120.0)
    options: dict[str, Any] = {"directory": arguments.directory, "limiter": limiter}
    begin = time.monotonic()
    with start_shards(2, lambda shard: RingBufferDataset(100_000), **options) as shards:
        mean = train(shards, arguments.updates)
    print(f"mean return of the last episodes {mean:.0f}, after {time.monotonic() - begin:.0f} s")
    ray.shutdown()


if __name__ == "__main__":
    main()
