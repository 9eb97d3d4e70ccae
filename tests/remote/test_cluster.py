"""Shards on several machines, as Ray's own test cluster pretends to have them: one is lost."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import pytest

from buffers.remote import RemoteLoader, RemoteWriter, start_shards
from tests.remote.actors import make_ring, stored
from tests.remote.simulated import episode, number_of

ray = pytest.importorskip("ray")
ROOT = Path(__file__).parent.parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


def test_a_machine_that_is_lost_takes_nothing_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    store = {"object_store_memory": 200_000_000}
    head = {"num_cpus": 1, "include_dashboard": False, "resources": {"room": 4}, **store}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        other = cluster.add_node(num_cpus=1, resources={"room": 1}, **store)
        ray.init(address=cluster.address, log_to_driver=False)
        options = {"num_cpus": 0, "resources": {"room": 1}, "scheduling_strategy": "SPREAD"}
        shards = start_shards(2, make_ring, directory=tmp_path / "saves", save_every=1.0, **options)
        handles = shards.transport.handles  # type: ignore[attr-defined]
        nodes = [ray.get(handle.__ray_call__.remote(_node), timeout=60) for handle in handles]
        assert len(set(nodes)) == 2, "both shards are on one machine"
        lost = nodes.index(other.node_id)
        writer = RemoteWriter(shards, num_envs=1)
        loader = RemoteLoader(shards, 8, 1, include=("source",))
        added = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            for second in range(60):
                if second == 5:
                    cluster.remove_node(other, allow_graceful=False)
                for _ in range(20):
                    writer.add_episode(episode(added))
                    added += 1
                assert next(loader)["number"].shape == (8, 1)
                time.sleep(0.2)
                if second == 5:
                    begin = time.monotonic()
                    while lost not in loader.troubles:
                        next(loader)
                        assert time.monotonic() - begin < 30
        writer.wait_until_saved(120.0)
        found = sorted(number_of(rows) for side in stored(shards) for rows in side)
        assert found == list(range(added))
        writer.close()
        shards.close()
    finally:
        ray.shutdown()
        cluster.shutdown()


def _node(_: object) -> str:
    found: str = ray.get_runtime_context().get_node_id()
    return found
