"""What `plot_dataset` draws, read from the artists of its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from buffers.dataset import EpisodeDataset, IndividualFileDataset, MixtureDataset, RingBufferDataset
from buffers.dataset.episode_source import EpisodeSource
from buffers.dataset.fields import Fields, Scalar, Vector
from buffers.viewing import overview
from buffers.visualization import MatplotlibVisualizer, plot_dataset
from tests.figure_helpers import assert_texts_are_apart, dataset_of, rendered


def titles(figure: Any) -> list[str]:
    return [ax.get_title(loc="left") for ax in figure.axes]


def test_lengths_returns_fill_and_bytes_are_drawn() -> None:
    dataset = dataset_of()
    for i, length in enumerate([5, 9, 2, 7]):
        dataset.add_episode({"obs": {"x": np.zeros((length, 3), np.float32)}, "reward": np.full(length, float(i))})
    figure = MatplotlibVisualizer(dataset).plot_dataset()
    lengths, returns, fill, sizes = figure.axes
    assert lengths.lines[0].get_ydata().tolist() == [5, 9, 2, 7]
    assert returns.lines[0].get_ydata().tolist() == [0, 9, 4, 21]
    assert [patch.get_width() for patch in fill.patches] == [1000, 23]
    assert fill.get_title(loc="left") == "fill: 23 of 1,000 steps (2%)"
    assert [patch.get_width() for patch in sizes.patches] == [23 * 12, 23 * 8]
    assert [label.get_text() for label in sizes.get_yticklabels()] == ["obs/x", "reward"]
    assert [text.get_text() for text in sizes.texts] == ["276 B", "184 B"]
    assert figure.get_suptitle() == "RingBufferDataset: 4 episodes, 23 steps"


def test_bytes_are_those_of_the_stored_types() -> None:
    dataset = RingBufferDataset(100, half_precision=True)
    dataset.add_episode({"x": np.zeros((10, 3), np.float32)})
    assert plot_dataset(dataset).axes[-1].patches[0].get_width() == 10 * 3 * 2


def test_many_episodes_have_a_moving_mean() -> None:
    dataset = RingBufferDataset(10_000)
    for i in range(60):
        dataset.add_episode({"reward": np.full(10 + i, 1.0, np.float32)})
    for ax in plot_dataset(dataset).axes[:2]:
        mean = ax.lines[1]
        np.testing.assert_allclose(mean.get_ydata(), mean.get_xdata() + 10)
        assert "mean of 5 (line)" in ax.get_title(loc="left")


def test_a_limited_number_of_episodes_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = dataset_of()
    for i in range(30):
        dataset.add_episode({"reward": np.array([float(i)]), "image": np.zeros((1, 10, 10, 3), np.uint8)})
    figure = plot_dataset(dataset, max_episodes=4)
    assert figure.axes[1].lines[0].get_ydata().tolist() == [0, 10, 19, 29]
    assert "(4 of 30 episodes read)" in titles(figure)[1]
    for most_bytes, num_read in ((308 * 7.5, 7), (1, 1)):
        monkeypatch.setattr(overview, "MAX_BYTES", most_bytes)
        assert f"({num_read} of 30 episodes read)" in titles(plot_dataset(dataset))[1]


def test_datasets_without_rewards_or_episodes_are_drawn() -> None:
    empty = plot_dataset(dataset_of())
    assert titles(empty) == ["steps of each episode: none yet", "fill: 0 of 1,000 steps (0%)"]
    stated = plot_dataset(dataset_of(Fields(reward=Scalar(), x=Vector(0))))
    assert titles(stated)[1] == "sum of rewards of each episode: none yet"
    for figure in (empty, stated, plot_dataset(dataset_of(None, {"reward": np.zeros((3, 2))}))):
        rendered(figure)
    assert len(figure.axes) == 3


def test_a_reader_of_files_has_no_fill_alone_or_in_a_mixture(tmp_path: Path) -> None:
    with IndividualFileDataset(100, directory=tmp_path) as writer:
        writer.add_episode({"reward": np.ones(60, np.float32)})
        assert "60 of 100 steps (60%)" in repr(writer)
    reader: EpisodeDataset = IndividualFileDataset(10, directory=tmp_path, mode="r")
    ring = RingBufferDataset(30)
    ring.add_episode({"reward": np.ones(15, np.float32)})
    sources: list[tuple[EpisodeSource, int]] = [(reader, 60), (MixtureDataset([reader, ring], [0.5, 0.5]), 75)]
    for source, num in sources:
        line = repr(source).splitlines()[0]
        assert f" episodes, {num} steps (read-only), length " in line and "%" not in line
        figure = plot_dataset(source)
        assert titles(figure)[2] == f"fill: {num} steps (read-only)"
        assert [patch.get_width() for patch in figure.axes[2].patches] == [num, num]
    assert "15 of 60 steps (25%)" in repr(MixtureDataset([ring, RingBufferDataset(30)], [0.5, 0.5]))


def test_episodes_that_vanish_are_left_out(tmp_path: Path) -> None:
    with IndividualFileDataset(100, directory=tmp_path) as dataset:
        for i in range(3):
            dataset.add_episode({"reward": [float(i)]})
        (tmp_path / "0000000001-000000000001-1.safetensors").unlink()
        figure = plot_dataset(dataset)
    assert figure.axes[1].lines[0].get_ydata().tolist() == [0, 2]


def test_texts_of_fourteen_fields_do_not_overlap() -> None:
    fields = {f"a_field_with_a_rather_long_name_{i}/that_goes_on": np.zeros((5, i + 1)) for i in range(14)}
    figure = plot_dataset(dataset_of(None, {**fields, "reward": np.zeros(5)}))
    assert_texts_are_apart(figure, at_least=40)
