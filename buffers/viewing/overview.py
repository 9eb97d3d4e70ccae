"""The picture of a whole dataset: lengths and returns of its episodes, its fill, and bytes by field."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from buffers.dataset.printing import bytes_per_step
from buffers.table import context_of
from buffers.utils import format_bytes
from buffers.viewing.panels import COLORS, NAME_SIZE, TEXT_SIZE, TICK_SIZE, shorten
from buffers.viewing.tracks import evenly_spaced

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from buffers.dataset.episode_source import EpisodeSource

__all__ = ["draw_overview", "has_returns"]

# Read from the dataset at most.
MAX_BYTES = 256e6
# With fewer points, a moving mean adds nothing.
_MIN_FOR_MEAN = 40


def has_returns(dataset: EpisodeSource) -> bool:
    """Whether the dataset has a scalar field `reward`."""
    return dataset.fields is not None and "reward" in dataset.fields and dataset.fields["reward"].shape == ()


def draw_overview(figure: Figure, dataset: EpisodeSource, max_episodes: int) -> None:
    """Draw everything on an empty figure, one plot below the other.

    Args:
        figure: The figure.
        dataset: A dataset or a mixture.
        max_episodes: How many episodes are read at most, for their returns.
    """
    num_fields = 0 if dataset.fields is None else len(dataset.fields)
    heights = [1.2] + [1.2] * has_returns(dataset) + [0.25] + [0.17 * num_fields] * bool(num_fields)
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    axes = [figure.add_subplot(grid[i]) for i in range(len(heights))]
    for ax in axes:
        ax.tick_params(labelsize=TICK_SIZE)
        ax.spines[["top", "right"]].set_visible(False)
    rest = iter(axes)
    # A copy: another thread may add episodes.
    lengths = np.array(dataset.episode_lengths)
    _draw_points(next(rest), "length", "steps of each episode", np.arange(len(lengths)), lengths)
    if has_returns(dataset):
        positions, returns = _read_returns(dataset, max_episodes)
        kind = "piece of a stream" if dataset.table.rows[:, 3].any() else "episode"
        some = "" if len(positions) == len(lengths) else f" ({len(positions):,} of {len(lengths):,} episodes read)"
        ax = next(rest)
        _draw_points(ax, "return", f"sum of rewards of each {kind}{some}", positions, returns)
        ax.sharex(axes[0])
    _draw_fill(next(rest), dataset)
    if num_fields:
        _draw_bytes(next(rest), dataset)


def _draw_points(ax: Axes, name: str, what: str, positions: np.ndarray, values: np.ndarray) -> None:
    """A point for each episode, and a moving mean if there are many."""
    ax.plot(positions, values, ".", color=COLORS[0], markersize=4, alpha=1.0 if len(values) < 1000 else 0.3)
    if len(values) >= _MIN_FOR_MEAN:
        window = max(5, len(values) // 20)
        means = np.convolve(values, np.full(window, 1 / window), "valid")
        middles = np.convolve(positions, np.full(window, 1 / window), "valid")
        ax.plot(middles, means, color=COLORS[1], linewidth=1.5)
        what += f", and the mean of {window} (line)"
    _set_title(ax, what if len(values) else f"{what}: none yet")
    ax.set_ylabel(name, fontsize=TEXT_SIZE)
    ax.set_xlabel("episode, from the oldest on", fontsize=TEXT_SIZE)
    ax.locator_params(axis="x", integer=True, min_n_ticks=1)
    ax.locator_params(axis="y", nbins=4, integer=name == "length", min_n_ticks=1)
    if name == "length":
        ax.set_ylim(0, 1.1 * max(values, default=1))


def _read_returns(dataset: EpisodeSource, max_episodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and returns of all episodes, or of evenly spaced ones if all are too many."""
    fields, ids = dataset.fields, dataset.table.ids.copy()
    assert fields is not None  # `has_returns` was True.
    bytes_each = fields.nbytes * dataset.average_episode_length
    affordable = math.inf if bytes_each == 0 else MAX_BYTES / bytes_each
    num = min(len(ids), max_episodes, max(affordable, 1))
    positions, returns = [], []
    for position in evenly_spaced(np.arange(len(ids)), int(num)).tolist():
        episode = _episode(dataset, int(ids[position]))
        if episode is not None:
            positions.append(position)
            context = context_of(dataset.table.row_of(int(ids[position]))[3])
            returns.append(float(episode["reward"][context:].double().sum()))
    return np.array(positions, np.int64), np.array(returns, np.float64)


def _episode(dataset: EpisodeSource, episode_id: int) -> dict[str, Any] | None:
    """A whole episode by its id; None if it has been evicted."""
    try:
        return dataset.episode_of_id(episode_id)
    except (RuntimeError, ValueError):
        return None


def _draw_fill(ax: Axes, dataset: EpisodeSource) -> None:
    stored, capacity = dataset.num_timesteps, dataset.capacity
    # A reader of files sees all there are, whatever its own capacity.
    if dataset.longest_window > capacity:
        _set_title(ax, f"fill: {stored:,} steps (read-only)")
        capacity = max(stored, 1)
    else:
        _set_title(ax, f"fill: {stored:,} of {capacity:,} steps ({stored / capacity:.0%})")
    ax.barh([0], [capacity], color="#DDDDDD", height=1.0)
    ax.barh([0], [stored], color=COLORS[2], height=1.0)
    ax.set(xlim=(0, capacity), ylim=(-0.5, 0.5), yticks=[])
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.set_xlabel("steps", fontsize=TEXT_SIZE)


def _draw_bytes(ax: Axes, dataset: EpisodeSource) -> None:
    fields = dataset.fields
    assert fields is not None  # The caller checked.
    by_field = bytes_per_step(dataset, dataset.compressed_bytes())
    sizes = [num_bytes * dataset.num_timesteps for num_bytes in by_field.values()]
    _set_title(ax, f"bytes by field: {format_bytes(sum(sizes))}")
    bars = ax.barh(range(len(sizes)), sizes, color=COLORS[4], height=0.8)
    ax.bar_label(bars, labels=[format_bytes(size) for size in sizes], padding=3, fontsize=TICK_SIZE)
    names = [shorten(name, 32) for name in fields]
    ax.set_yticks(range(len(sizes)), labels=names, parse_math=False)
    ax.set_ylim(len(sizes) - 0.5, -0.5)
    # Space for the label of the longest bar.
    ax.set_xlim(0, max(sizes) * 1.12 or 1.0)
    ax.xaxis.set_major_formatter(lambda value, _: format_bytes(value))


def _set_title(ax: Axes, text: str) -> None:
    ax.set_title(text, loc="left", fontsize=NAME_SIZE, fontweight="bold", pad=4)
