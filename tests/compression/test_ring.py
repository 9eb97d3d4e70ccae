"""A ring with compressed fields is a ring: the same episodes, batches and errors; and nothing torn."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from buffers import ReplayBuffer
from buffers.dataset import EpisodeDataset, MixtureDataset, RingBufferDataset
from buffers.dataset.fields import ColorImage, Fields, Scalar, TensorType, Vector
from buffers.dataset.info import EpisodeDatasetInfo
from tests import reading, tagged
from tests.contract import DTYPES, PROPERTY, DatasetContract, assert_same_batch
from tests.test_ring_buffer import ring_model, ring_starts

pytest.importorskip("cramjam")
ALL = {TensorType: "lz4"}


class TestLz4(DatasetContract):
    model = staticmethod(ring_model)
    starts = staticmethod(ring_starts)

    def make(self, capacity: int, info: EpisodeDatasetInfo | None = None) -> EpisodeDataset:
        return RingBufferDataset(capacity, info, compress=ALL)


class TestZstd(TestLz4):
    def make(self, capacity: int, info: EpisodeDatasetInfo | None = None) -> EpisodeDataset:
        return RingBufferDataset(capacity, info, compress={TensorType: "zstd"})


def twin(ring: RingBufferDataset, compress: Any = ALL, **options: Any) -> RingBufferDataset:
    """A compressed ring with the same episodes."""
    other = RingBufferDataset(ring.capacity, compress=compress, **options)
    for episode in ring.episodes():
        other.add_episode(episode)
    return other


def random_rows(rng: np.random.Generator, length: int, shape: tuple[int, ...], dtype: torch.dtype) -> np.ndarray:
    """Rows of which some are like the one before, some flat, and some noise."""
    size = TensorType(shape, dtype).nbytes
    rows = rng.integers(0, 256, (length, size), dtype=np.uint8)
    for n in range(length):
        kind = rng.integers(4)
        if kind < 2 and n:
            rows[n] = rows[n - 1]
            rows[n, rng.integers(size)] ^= 1
        elif kind == 2:
            rows[n] = rng.integers(256)
    if dtype == torch.bool:
        rows &= 1
    return rows.view(TensorType(shape, dtype).numpy_dtype).reshape(length, *shape)


@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.sampled_from([(), (3,), (7, 5), (64, 3), (33, 70)]),
    st.sampled_from(DTYPES),
    st.sampled_from(["lz4", "zstd"]),
    st.sampled_from([None, 400, 20_000]),
)
@example(0, [40] * 12, (33, 70), torch.uint8, "lz4", 20_000)
@PROPERTY
def test_every_row_comes_back_bit_by_bit(seed, lengths, shape, dtype, codec, capacity_bytes) -> None:
    rng = np.random.default_rng(seed)
    # Bits, as NaN is no equal of itself.
    ring = RingBufferDataset(100, compress={"x": codec}, capacity_bytes=capacity_bytes)
    added: dict[int, np.ndarray] = {}
    for length in lengths:
        rows = random_rows(rng, length, shape, dtype)
        rows = torch.from_numpy(rows.view(np.int16)).view(dtype) if dtype == torch.bfloat16 else torch.from_numpy(rows)
        try:
            added[ring.add_episode({"x": rows, "n": np.arange(length)})] = rows.view(-1).view(torch.uint8).numpy()
        except ValueError as error:
            assert capacity_bytes is not None and "does not fit `capacity_bytes`" in str(error)
    assert ring.compressed_bytes().get("x", 0) <= (capacity_bytes or 10**9)
    for number in ring.table.ids.tolist():
        found = ring.episode_of_id(number)
        assert found is not None
        assert np.array_equal(found["x"].reshape(-1).view(torch.uint8).numpy(), added[number])
    row_bytes = TensorType(shape, dtype).nbytes
    for batch in itertools.islice(ring.get_loader(32, 1, include=("episode",), seed=seed), 0 if ring.is_empty else 3):
        for number, n, row in zip(batch["episode"].tolist(), batch["n"][:, 0].tolist(), batch["x"], strict=True):
            expected = added[number][n * row_bytes : (n + 1) * row_bytes]
            assert np.array_equal(row.reshape(-1).view(torch.uint8).numpy(), expected)


WINDOWS: list[dict[str, Any]] = [
    {"sequence_length": 5},
    {"sequence_length": 1},
    {"sequence_length": 30, "pad_before": 29, "pad_after": 29},
    {"sequence_length": 9, "pad_before": 8, "pad": "edge"},
    {"sequence_length": None},
    {"sequence_length": 1, "offsets": {"obs": (-3, -2, -1, 0), "code": (0, 16)}},
    {"sequence_length": None, "pack": 60},
]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_those_of_a_ring_that_is_not_compressed(window, num_workers, threads) -> None:
    plain = RingBufferDataset(2_000)
    for number in range(60):
        plain.add_episode(tagged.episode(1 + number * 7 % 50, number))
    options = {**window, "seed": 3, "include": ("index", "mask") if "pack" not in window else ("index",)}
    loaders = [ring.get_loader(24, num_workers=num_workers, **options) for ring in (plain, twin(plain))]
    for expected, found in itertools.islice(zip(*loaders, strict=True), 6):
        assert_same_batch(found, expected)


@pytest.mark.parametrize(("num_envs", "options"), [(1, {}), (16, {}), (3, {"max_episode_length": 37, "overlap": 5})])
def test_blocks_that_are_compressed_while_an_episode_is_open_are_those_of_its_rows(num_envs, options) -> None:
    rng = np.random.default_rng(num_envs)
    rings = [RingBufferDataset(3_000), RingBufferDataset(3_000, compress=ALL)]
    buffers = [ReplayBuffer(ring, 4, 4, num_envs=num_envs, **options) for ring in rings]
    episodes, steps = np.zeros(num_envs, int), np.zeros(num_envs, int)
    for _ in range(700):
        done = rng.random(num_envs) < 0.02
        episodes, steps = episodes + done, np.where(done, 0, steps + 1)
        for buffer in buffers:
            buffer.add_step(tagged.rows(np.arange(num_envs), episodes, steps), done)
    for buffer in buffers:
        buffer.flush()
    for expected, found in zip(*(ring.episodes() for ring in rings), strict=True):
        assert_same_batch(found, expected)
    assert rings[0].num_episodes > 3 and not rings[1].is_empty


def test_an_episode_that_waits_for_its_sink_is_compressed_anew(monkeypatch) -> None:
    ring = RingBufferDataset(1_000, compress=ALL)
    buffer = ReplayBuffer(ring, 4, 4, num_envs=1)
    store = ring.store
    buffer.add_step(tagged.rows(0, 0, 0), False)
    for number in range(3):
        for step in range(1 if not number else 0, 40):
            buffer.add_step(tagged.rows(0, number, step), False)
        monkeypatch.setattr(ring, "store", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            buffer.flush()
        monkeypatch.setattr(ring, "store", store)
    buffer.flush()
    assert [tagged.number_and_length(episode) for episode in ring.episodes()] == [(n, 40) for n in range(3)]


def flat(length: int) -> dict[str, np.ndarray]:
    return {"image": np.zeros((length, 64, 64), np.uint8), "reward": np.zeros(length, np.float32)}


def test_the_oldest_episodes_leave_when_their_bytes_reach_the_bound() -> None:
    ring = RingBufferDataset(100_000, compress={"image": "lz4"}, capacity_bytes=100_000)
    rng = np.random.default_rng(0)
    for number in range(40):
        # Noise: 10 rows are 41 kB.
        ring.add_episode({"image": rng.integers(0, 256, (10, 64, 64), dtype=np.uint8), "n": np.full(10, number)})
    assert [int(episode["n"][0]) for episode in ring.episodes()] == [38, 39] and ring.is_full
    with pytest.raises(ValueError, match=r"An episode of 122,\d+ bytes, compressed, does not fit `capacity_bytes`="):
        ring.add_episode({"image": rng.integers(0, 256, (30, 64, 64), dtype=np.uint8), "n": np.zeros(30, int)})
    assert ring.num_episodes == 2 and sum(ring.compressed_bytes().values()) < 100_000


def test_an_episode_that_can_never_be_stored_is_left_out_with_one_error() -> None:
    ring = RingBufferDataset(100_000, compress={"image": "lz4"}, capacity_bytes=50_000)
    buffer, rng = ReplayBuffer(ring, 4, 4, num_envs=1), np.random.default_rng(0)
    num_refused = 0
    for step in range(120):
        # The second of three episodes is noise.
        image = rng.integers(0, 256 if 40 <= step < 80 else 1, (64, 64), dtype=np.uint8)
        try:
            buffer.add_step({"image": image, "n": step}, step % 40 == 39)
        except ValueError as error:
            assert "is left out. Raise it, or cut long episodes by `max_episode_length`" in str(error)
            num_refused += 1
    assert num_refused == 1 and [int(episode["n"][0]) for episode in ring.episodes()] == [0, 80]
    assert "0 steps in open episodes" in repr(buffer)


def test_a_budget_that_is_used_up_shows() -> None:
    ring, rng = RingBufferDataset(10**6, compress={"image": "lz4"}, capacity_bytes=100_000), np.random.default_rng(0)
    for _ in range(10):
        ring.add_episode({"image": rng.integers(0, 256, (5, 64, 64), dtype=np.uint8)})
    assert ReplayBuffer(ring, 4, 4).stats()["fill"] == pytest.approx(ring.compressed_bytes()["image"] / 1e5, abs=0.01)
    assert ring.fill > 0.8 and " of 100.0 kB compressed" in repr(ring)
    mixture = MixtureDataset([ring, twin(ring, {})], [1, 1])
    assert mixture.compressed_bytes()["image"] == ring.compressed_bytes()["image"] + ring.num_timesteps * 64 * 64


def test_compressed_floats_are_not_halved() -> None:
    ring = RingBufferDataset(1_000, half_precision=True, compress={"x": "lz4"})
    ring.add_episode({"x": np.full((100, 50), 1e6, np.float32), "y": np.ones((100, 3), np.float32)})
    assert (ring.get_episode(0)["x"] == 1e6).all()
    assert "float32 (50,)" not in repr(ring) and "float32 as float16" in repr(ring).splitlines()[4]
    assert "float16" not in repr(ring).splitlines()[3]


def test_stats_and_print_say_what_it_saves() -> None:
    ring = RingBufferDataset(1_000, compress={"image": "lz4"})
    buffer = ReplayBuffer(ring, 4, 4, num_envs=1)
    assert "compressed_bytes" not in ReplayBuffer(RingBufferDataset(10), 1).stats()
    ring.add_episode(flat(500))
    stats = buffer.stats()
    assert stats["compressed_bytes"] < 500 * 64 * 64 / 50
    assert stats["compression_ratio"] == pytest.approx(500 * 64 * 64 / stats["compressed_bytes"])
    assert f"{stats['compression_ratio']:.1f} times smaller" in repr(buffer)


def test_memory_is_given_back_as_episodes_leave() -> None:
    ring = RingBufferDataset(200, compress={"image": "lz4"})
    rng = np.random.default_rng(0)
    for _ in range(200):
        ring.add_episode({"image": rng.integers(0, 256, (20, 64, 64), dtype=np.uint8)})
    room = ring._room
    assert room is not None
    used = np.frombuffer(room.memory["bytes"], np.uint64).reshape(-1, 512).any(1).sum() * 4096
    assert 200 * 4096 <= used <= room.num_bytes * 1.05


def test_a_copy_has_the_same_episodes() -> None:
    plain = RingBufferDataset(300)
    for number in range(40):
        plain.add_episode(tagged.episode(1 + number % 30, number))
    ring = twin(plain)
    other = copy.deepcopy(ring)
    ring.add_episode(tagged.episode(30, 99))
    assert tagged.numbers(other) == tagged.numbers(plain)
    assert other.compressed_bytes() == twin(plain).compressed_bytes()


def test_which_fields_are_compressed() -> None:
    fields = Fields(obs={"image": ColorImage((8, 8)), "state": Vector(4)}, reward=Scalar())
    info = EpisodeDatasetInfo(fields, compress={ColorImage: "zstd"})
    assert {n: codec.name for n, codec in RingBufferDataset(10, info).codecs.items()} == {"obs/image": "zstd"}
    info = EpisodeDatasetInfo(fields)
    choice: dict[Any, str] = {"obs": "zstd", ColorImage: "zstd", "obs/image": "lz4"}
    found = RingBufferDataset(10, info, compress=choice).codecs
    assert {name: codec.name for name, codec in found.items()} == {"obs/image": "lz4", "obs/state": "zstd"}
    assert not RingBufferDataset(10, info).codecs


@pytest.mark.parametrize(
    ("compress", "error", "text"),
    [
        ("lz4", TypeError, "`compress` must be a dict"),
        ({1: "lz4"}, TypeError, "are names of fields, or types such as ColorImage, found 1"),
        ({"obs": "gzip"}, ValueError, r"`compress` of 'obs' must be one of \['jpeg', 'lz4', 'zstd'\], found 'gzip'"),
        (
            {"image": "lz4"},
            ValueError,
            r"`compress` names `image`, which is no field of .* There are \['obs', 'empty'\]",
        ),
        ({"obs": "jpeg"}, ValueError, r"JPEG takes images, .* field `obs` is float32 \(4,\)"),
    ],
)
def test_what_cannot_be_compressed_is_an_error(compress, error, text) -> None:
    info = EpisodeDatasetInfo(Fields(obs=Vector(4), empty=Vector(0)))
    with pytest.raises(error, match=text):
        RingBufferDataset(10, info, compress=compress)


@pytest.mark.parametrize("given", [{"info": EpisodeDatasetInfo(compress={})}, {"compress": {}}, {}], ids=str)
def test_an_empty_choice_compresses_nothing(given: Any) -> None:
    ring = RingBufferDataset(10, **given)
    ring.add_episode({"x": np.zeros((2, 100))})
    assert ring.compress == {} and ring.compressed_bytes() == {}


def test_arguments_that_do_not_go_together_are_an_error() -> None:
    with pytest.raises(ValueError, match="`compress` is given twice"):
        RingBufferDataset(10, EpisodeDatasetInfo(compress={}), compress={})
    with pytest.raises(ValueError, match="`capacity_bytes` bounds compressed rows: give `compress`"):
        RingBufferDataset(10, capacity_bytes=100)
    with pytest.raises(ValueError, match="`capacity_bytes` must be at least 1, found 0"):
        RingBufferDataset(10, compress={"x": "lz4"}, capacity_bytes=0)
    RingBufferDataset(10, compress={"x": "lz4"}, capacity_bytes=2**37)
    with pytest.raises(ValueError, match=f"`capacity_bytes` must be at most {2**37}, 128 GiB, found {2**40}"):
        RingBufferDataset(10, compress={"x": "lz4"}, capacity_bytes=2**40)


def test_jpeg_is_lossy_and_copied_as_it_is() -> None:
    pytest.importorskip("simplejpeg")
    ring = RingBufferDataset(100, compress={"image": "jpeg"})
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    image = np.broadcast_to(ramp[None, :, None, None] // 2 + ramp[None, None, :, None] // 2, (20, 64, 64, 3))
    ring.add_episode({"image": image})
    found = ring.get_episode(0)["image"].numpy()
    assert np.abs(found.astype(int) - image).max() < 8 and ring.compressed_bytes()["image"] < image.nbytes / 8
    assert_same_batch(copy.deepcopy(ring).get_episode(0), ring.get_episode(0))


# Readers of the live ring.


@pytest.mark.parametrize("num_batches", [1_000, pytest.param(64_000, marks=pytest.mark.slow)])
def test_no_window_is_torn_under_a_writer_that_laps(num_batches: int) -> None:
    ring = reading.tiny_ring(128, {"x": "lz4", "y": "zstd"})
    ring.add_episode(reading.tagged_episode(ring, 5))
    process, connection = reading.start(ring, "fork", num_batches, 0)
    rng, begin = np.random.default_rng(0), ring.table.next_start
    while not connection.poll():
        ring.add_episode(reading.tagged_episode(ring, int(rng.integers(1, 60))))
        if begin is not None and ring.table.next_start > begin + 20 * 128:
            connection.send("may stop")
            begin = None
    assert connection.recv() == 0
    process.join()


def test_a_block_that_is_read_without_looking_again_is_torn(monkeypatch) -> None:
    """The mutant: what was copied of a retired episode is decompressed."""
    ring = reading.tiny_ring(64, {"x": "lz4", "y": "lz4"})
    for _ in range(8):
        ring.add_episode(reading.tagged_episode(ring, 8))
    room = ring._room
    assert room is not None
    windows = ring.table.windows(np.array([0]), np.zeros(1, np.int64), 8)
    out = ring.empty_batch(windows)
    oldest, copied = ring._find_oldest_step, room._copied

    def overtaken(*arguments: Any) -> Any:
        for _ in range(8):
            ring.add_episode(reading.tagged_episode(ring, 8))
        return copied(*arguments)

    monkeypatch.setattr(room, "_copied", overtaken)
    room.read(windows, out, oldest, ["x"])
    out["x"].fill_(-1)
    room.read(windows, out, oldest, ["x"])
    assert (out["x"] == -1).all(), "it was retired, and is not decompressed"
    room.read(windows, out, lambda: 0, ["x"])
    assert (out["x"] != torch.arange(8)[:, None]).any(), "the mutant gives rows of another episode"


def test_a_reader_copies_whole_episodes_while_the_writer_overwrites(monkeypatch) -> None:
    ring = RingBufferDataset(100, compress=ALL)
    for number in range(4):
        ring.add_episode(tagged.episode(25, number))
    reader = RingBufferDataset.__new__(RingBufferDataset)
    reader.__setstate__(ring.__getstate__())
    read = reader.arrays_of_id

    def overtaken(episode_id: int) -> Any:
        episode = read(episode_id)
        ring.add_episode(tagged.episode(25, episode_id + 4))
        return episode

    monkeypatch.setattr(reader, "arrays_of_id", overtaken)
    assert tagged.numbers(copy.deepcopy(reader)) == [0, 1, 2, 3]
