"""OGBench's files, in the layouts of its library, give the log of the game that was played."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers import ReplayBuffer
from buffers.dataset import IndividualFileDataset
from buffers.interop import FormatError, import_episodes, ogbench
from tests.interop.logged import PLAYED, on_arrival, play
from tests.interop.made_up import killed_before
from tests.interop.npy_files import npy, npz

DATA = Path(__file__).parent.parent / "data" / "interop" / "ogbench"
LAYOUTS = ["raw", "regular", "compact"]
FILES = [name + suffix for name in LAYOUTS for suffix in ("", "_cut")]


def expected_rows(layout: str) -> list[dict[str, np.ndarray]]:
    """What the log says, with the dtypes that the file has."""
    found = []
    for log in play():
        rows = {"obs": log["obs"], "action": on_arrival(log["action"]), "is_first": np.arange(len(log["obs"])) == 0}
        if layout != "regular":
            rows |= {"qpos": (log["obs"] + 0.5).astype(np.float32), "button_states": log["state"]}
        found.append(rows)
    return found


def assert_rows(found: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
        assert found[name].dtype == values.dtype, name


@pytest.mark.parametrize("name", FILES)
def test_every_row_is_that_of_the_log(name: str):
    reader = ogbench.read(DATA / f"{name}.npz")
    expected = expected_rows(name.removesuffix("_cut"))
    assert reader.num_episodes == len(PLAYED)
    assert reader.num_steps == sum(length + 1 for length, _ in PLAYED)
    for (rows, info), wanted in zip(reader, expected, strict=True):
        assert_rows(rows, wanted)
        assert info == {}


def test_the_action_without_a_result_is_left_out_and_said():
    reader = ogbench.read(DATA / "raw.npz")
    assert all(77 not in rows["action"] for rows, _ in reader)
    assert any("whose result is not in the file" in note for note in reader.notes)


def test_why_a_trajectory_ends_is_not_made_up():
    for layout in LAYOUTS:
        reader = ogbench.read(DATA / f"{layout}.npz")
        rows = next(iter(reader)).rows
        assert not {"terminated", "truncated", "reward", "masks"} & set(rows)
        assert "There are no rewards." in reader.notes.texts
        assert any("not why" in note for note in reader.notes)
        reader.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_that_ends_within_a_trajectory_says_so(layout: str):
    assert "The file ends within its last trajectory." in ogbench.read(DATA / f"{layout}_cut.npz").notes.texts
    assert "The file ends within its last trajectory." not in ogbench.read(DATA / f"{layout}.npz").notes.texts


def test_states_whose_last_row_is_missing_are_not_read_and_said():
    reader = ogbench.read(DATA / "regular.npz")
    assert "`qpos` has no row for final observations here, and is not read." in reader.notes.texts


def test_rewards_and_masks_come_with_their_transition(tmp_path: Path):
    with np.load(DATA / "regular.npz") as file:
        arrays = dict(file)
    num = len(arrays["terminals"])
    np.savez(tmp_path / "a.npz", **arrays, rewards=np.arange(num) - 5.0, masks=np.arange(num) % 2.0)
    with np.load(DATA / "compact.npz") as file:
        arrays = dict(file)
    # Transitions count on; rows that are none have 99.
    counts, values = iter(range(num)), arrays["valids"] == 1
    count = np.array([next(counts) if is_valid else 99 for is_valid in values])
    np.savez(tmp_path / "b.npz", **arrays, rewards=count - 5.0, masks=np.where(values, count % 2.0, 99.0))
    for path in ("a.npz", "b.npz"):
        done = 0
        for rows, _ in ogbench.read(tmp_path / path):
            length = len(rows["obs"]) - 1
            np.testing.assert_array_equal(rows["reward"], [0, *np.arange(done, done + length) - 5.0])
            np.testing.assert_array_equal(rows["masks"], [0, *np.arange(done, done + length) % 2.0])
            done += length


def test_reading_can_start_at_any_trajectory():
    for name in FILES:
        reader = ogbench.read(DATA / f"{name}.npz")
        for first in range(len(PLAYED) + 1):
            found = [*reader.episodes(first)]
            for (rows, _), wanted in zip(found, expected_rows(name.removesuffix("_cut"))[first:], strict=True):
                assert_rows(rows, wanted)


def test_fields_that_are_not_wanted_are_not_read(monkeypatch: pytest.MonkeyPatch):
    reader = ogbench.read(DATA / "raw.npz", fields=["action", "qpos"], dtypes={"qpos": "float64"})
    del reader._file.columns["observations"], reader._file.columns["button_states"]
    for (rows, _), wanted in zip(reader, expected_rows("raw"), strict=True):
        assert_rows(rows, {"action": wanted["action"], "qpos": wanted["qpos"].astype(np.float64)})


def test_an_import_gives_the_log_and_goes_on_after_a_kill(tmp_path: Path):
    source = DATA / "raw.npz"
    with killed_before(3):
        import_episodes("ogbench", source, tmp_path / "out", fields=["obs", "action"], limit=5)
    summary = import_episodes("ogbench", source, tmp_path / "out", fields=["obs", "action"], limit=5)
    assert summary.num_episodes == 5 and any("not why" in text for text in summary.lost)
    with IndividualFileDataset(directory=tmp_path / "out", mode="r") as dataset:
        assert dataset.num_episodes == 5
        for number, wanted in enumerate(expected_rows("raw")[:5]):
            found = dataset.get_episode(number)
            assert_rows({k: v.numpy() for k, v in found.items()}, {name: wanted[name] for name in ("obs", "action")})


# In place


def stored(tmp_path: Path, name: str, **changes: Any) -> Path:
    """A file of the tests, not compressed."""
    with np.load(DATA / f"{name}.npz") as file:
        np.savez(tmp_path / f"{name}.npz", **(dict(file) | changes))
    return tmp_path / f"{name}.npz"


@pytest.mark.parametrize("name", FILES)
def test_what_is_read_in_place_is_what_is_imported(tmp_path: Path, name: str):
    with ogbench.open(stored(tmp_path, name)) as dataset:
        for number, wanted in enumerate(expected_rows(name.removesuffix("_cut"))):
            assert_rows({k: v.numpy() for k, v in dataset.get_episode(number).items()}, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_windows_in_place_are_rows_of_one_trajectory(tmp_path: Path, layout: str):
    path = stored(tmp_path, layout, actions=np.load(DATA / f"{layout}.npz")["actions"].astype(">f4"))
    logs = expected_rows(layout)
    with ogbench.open(path) as dataset:
        loader = iter(dataset.get_loader(batch_size=16, sequence_length=2, seed=0, include=("episode", "step")))
        for _ in range(10):
            batch = {key: value.numpy() for key, value in next(loader).items()}
            for b in range(16):
                episode, step = int(batch["episode"][b].flat[0]), int(batch["step"][b].flat[0])
                for name, values in logs[episode].items():
                    np.testing.assert_array_equal(batch[name][b], values[step : step + 2])


def test_a_replay_buffer_takes_the_file_with_workers(tmp_path: Path):
    with ogbench.open(stored(tmp_path, "raw")) as dataset:
        buffer = ReplayBuffer(dataset, batch_size=4, sequence_length=2, num_workers=1, seed=0)
        batch = buffer.sample()
        assert batch["obs"].shape == (4, 2, 3) and batch["obs"].dtype.itemsize == 8
        buffer.close()


def test_a_compressed_file_is_not_opened_in_place_but_told_how(tmp_path: Path):
    with pytest.raises(FormatError, match=r"compressed.*Import it, or store it anew: `np\.savez"):
        ogbench.open(DATA / "raw.npz")


def test_fortran_order_is_imported_but_not_opened_in_place(tmp_path: Path):
    with np.load(DATA / "raw.npz") as file:
        observations = np.asfortranarray(file["observations"])
    path = stored(tmp_path, "raw", observations=observations)
    for (rows, _), wanted in zip(ogbench.read(path), expected_rows("raw"), strict=True):
        assert_rows(rows, wanted)
    with pytest.raises(FormatError, match="Fortran order"):
        ogbench.open(path)


def test_a_file_that_has_become_shorter_is_noticed(tmp_path: Path):
    path = stored(tmp_path, "raw")
    with ogbench.open(path) as dataset:
        path.write_bytes(path.read_bytes()[:300])
        with pytest.raises(FormatError, match="has become shorter"):
            dataset.get_episode(5)


# What is no such file


def without(name: str, *arrays: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz") as file:
        return {key: value for key, value in file.items() if key not in arrays}


@pytest.mark.parametrize(
    ("arrays", "found"),
    [
        (without("raw", "actions"), r"no arrays of numbers \['actions'\]"),
        (without("raw") | {"actions": np.array(["a"] * 23)}, r"no arrays of numbers \['actions'\]"),
        ({name: value[:0] for name, value in without("raw").items()}, "no rows"),
        (without("raw") | {"actions": np.zeros((22, 2))}, "`actions` has 22 rows"),
        (without("raw") | {"qpos": np.zeros((22, 2))}, "`qpos` has 22 rows"),
        (without("raw") | {"terminals": np.full(23, 2)}, "no array of flags"),
        (without("regular") | {"valids": np.ones(17)}, "both"),
        (without("regular") | {"next_observations": np.zeros((9, 3))}, "`next_observations` has 9 rows"),
        (without("regular") | {"next_observations": np.zeros((17, 4))}, r"next ones float64 \(4,\)"),
        (without("compact", "valids"), "without its `valids`"),
        (without("compact_cut", "valids"), "without its `valids`"),
        (without("compact") | {"terminals": without("raw")["terminals"]}, "not 1 exactly on the rows"),
        (without("compact") | {"valids": np.ones(22)}, "not 1 exactly on the rows"),
    ],
)
def test_a_file_that_is_none_is_refused_with_what_was_found(tmp_path: Path, arrays: dict[str, Any], found: str):
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    with pytest.raises(FormatError, match=found) as error:
        ogbench.read(path)
    assert str(path) in str(error.value)


def test_rows_out_of_order_are_refused(tmp_path: Path):
    arrays = without("regular")
    arrays["next_observations"] = arrays["next_observations"][::-1]
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(FormatError, match="`next_observations` of row 0 is not the observation of the row behind it"):
        next(iter(ogbench.read(tmp_path / "a.npz")))


def test_a_lying_shape_and_a_missing_file_are_refused(tmp_path: Path):
    members = {"observations.npy": npy(np.zeros((2, 1)), shape=(10**11, 1)), "terminals.npy": npy(np.zeros(2))}
    npz(tmp_path / "a.npz", members, zipfile.ZIP_DEFLATED)
    with pytest.raises(FormatError, match="says that it has the shape"):
        ogbench.read(tmp_path / "a.npz")
    with pytest.raises(FormatError, match="is not there"):
        ogbench.read(tmp_path / "b.npz")
    with pytest.raises(FormatError, match="is no file"):
        ogbench.read(tmp_path)
    shutil.copy(DATA / "make.py", tmp_path / "c.npz")
    with pytest.raises(FormatError, match="not a zip"):
        ogbench.open(tmp_path / "c.npz")


@settings(max_examples=10)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6), is_cut=st.booleans())
def test_any_lengths_are_told_apart_as_the_library_does(tmp_path_factory: Any, lengths: list[int], is_cut: bool):
    # As the library's own code says: an observation without the flag is followed by that of the next row.
    path = tmp_path_factory.mktemp("ogbench") / "a.npz"
    terminals = np.concatenate([np.arange(length + 1) == length for length in lengths])
    terminals[-1] = not is_cut
    observations = np.arange(len(terminals))[:, None]
    np.savez(path, observations=observations, actions=observations, terminals=terminals)
    is_followed = ~terminals[:-1]
    pairs = np.stack([observations[:-1][is_followed, 0], observations[1:][is_followed, 0]], 1).tolist()
    found = [
        [*pair] for rows, _ in ogbench.read(path) for pair in zip(rows["obs"][:-1, 0], rows["obs"][1:, 0], strict=True)
    ]
    assert found == pairs
    actions = [action for rows, _ in ogbench.read(path) for action in rows["action"][1:, 0]]
    assert actions == [pair[0] for pair in pairs]
