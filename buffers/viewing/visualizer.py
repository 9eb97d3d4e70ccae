"""Pictures of what is stored and drawn, by matplotlib, which nothing else here imports.

    figure = MatplotlibVisualizer(dataset).visualize(buffer.sample())
    figure.savefig("batch.png")

Figures are not registered with pyplot: they take no memory once they are dropped, `plt.show()` does not know them, and
no backend is chosen for them. A notebook shows one that is the last value of its cell, or is handed to `display`.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError(
        "`buffers.visualization` needs matplotlib, which comes with `pip install 'buffers[extras]'`."
    ) from error

from buffers.dataset.episode_source import EpisodeSource
from buffers.dataset.fields import ColorImage, PaddedPointcloud
from buffers.utils import integer
from buffers.viewing.overview import draw_overview, has_returns
from buffers.viewing.panels import (
    END,
    MAX_LINES,
    NOT_FINITE,
    PADDING,
    START,
    TEXT_SIZE,
    HeatMap,
    Lines,
    Marks,
    Nothing,
    Panel,
    TimePanel,
    shortened,
)
from buffers.viewing.scenes import Clouds, Filmstrip
from buffers.viewing.tracks import DrawnSequence, Timeline, Track, read_sequence

__all__ = ["MatplotlibVisualizer", "plot_dataset"]

# 900 pixels at matplotlib's 100 dots per inch: what a README or a notebook shows without scaling it.
_WIDTH = 9.0
# What a row has besides its axes: a title, and where no other follows, the numbers below the axis and its label.
_AXIS_HEIGHT, _HEAD_HEIGHT, _LEGEND_HEIGHT, _SLIDER_HEIGHT = 0.35, 0.35, 0.15, 0.2
# Renderers refuse pictures of 65,536 pixels: rows become lower where there are hundreds of them.
_MAX_HEIGHT = 300.0


@final
class MatplotlibVisualizer:
    """Draws sequences of batches, a row of panels for each field.

    | field | panel |
    |---|---|
    | `ColorImage` | a filmstrip of at most 10 steps |
    | `Scalar`, `Vector` of at most 7 | lines; integers in steps |
    | flags: the same, of bools | marks where they are True |
    | a wider `Vector`, or more dimensions, flattened | a heat map |
    | `PaddedPointcloud` | points in 3-D at 4 steps, or merged |

    Args:
        dataset: Its fields say what the fields of a batch are; others are judged by their shape.

    Raises:
        TypeError: No EpisodeSource.
    """

    def __init__(self, dataset: EpisodeSource) -> None:
        _check_source(dataset)
        self.dataset = dataset

    def visualize(
        self, batch: Any, batch_index: int = 0, *, merge_pointclouds: bool = False, interactive: bool = False
    ) -> Figure:
        """Draw one sequence of a batch.

        Padding (where `mask` is False) is shaded; `is_first` and `is_last` are marked by vertical lines. With `step`,
        the axis is the step of the episode, else that of the sequence. What `include` adds is no panel.

        Args:
            batch: `field -> (B, T, *shape)`, nested as the steps are, on any device. It is not changed, and no part of
                it is kept, but by an interactive figure.
            batch_index: Which sequence; negative numbers count from the last.
            merge_pointclouds: The points of up to 12 steps in one picture, coloured by the step.
            interactive: Add a slider over the steps. It moves where pyplot has a live backend (in a notebook after
                `%matplotlib widget`, which needs ipympl). The figure is then pyplot's, to be closed by `plt.close`.

        Returns:
            The figure, 9 inches wide.

        Raises:
            TypeError: Not a batch.
            ValueError: `batch_index` is out of range, or the batch has no steps.
        """
        sequence = read_sequence(batch, batch_index, self.dataset.fields)
        panels = [_panel_for(track, sequence.timeline, merge_pointclouds, interactive) for track in sequence.tracks]
        has_axis = [
            isinstance(panel, TimePanel) and not (i + 1 < len(panels) and isinstance(panels[i + 1], TimePanel))
            for i, panel in enumerate(panels)
        ]
        heights = [_LEGEND_HEIGHT] + [panel.height for panel in panels] + [_SLIDER_HEIGHT] * interactive
        extra = sum(panel.margin for panel in panels) + sum(has_axis) * _AXIS_HEIGHT
        figure = _new_figure(min(sum(heights) + extra + _HEAD_HEIGHT, _MAX_HEIGHT), interactive)
        grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
        for i, panel in enumerate(panels):
            panel.draw(figure, grid[i + 1])
        _join_axes(panels, has_axis, sequence.timeline)
        _add_head(figure, grid[0], sequence)
        if interactive:
            _add_slider(figure, grid[-1], panels, sequence.timeline)
        return figure

    def plot_dataset(self) -> Figure:
        """`plot_dataset` of the dataset."""
        return plot_dataset(self.dataset)


def plot_dataset(dataset: EpisodeSource, *, max_episodes: int = 500) -> Figure:
    """Draw what a dataset holds: lengths and returns of its episodes from the oldest on, its fill, and bytes by field.

    Returns need a scalar field `reward`, and episodes that are read: evenly spaced ones, at most so many that they hold
    256 MB, which the title says.

    Args:
        dataset: Any.
        max_episodes: At most so many episodes are read.

    Returns:
        The figure, 9 inches wide.

    Raises:
        TypeError: No EpisodeSource, or `max_episodes` is no integer.
        ValueError: `max_episodes` is negative.
    """
    _check_source(dataset)
    max_episodes = integer("max_episodes", max_episodes, 0)
    height = 2.8 + 1.7 * has_returns(dataset) + 0.17 * len(dataset.fields or ())
    figure = _StaticFigure(figsize=(_WIDTH, min(height, _MAX_HEIGHT)), layout="constrained")
    draw_overview(figure, dataset, max_episodes)
    name = f"{type(dataset).__name__}: {dataset.num_episodes:,} episodes, {dataset.num_timesteps:,} steps"
    figure.suptitle(name, x=0.01, ha="left", fontsize=10)
    return figure


def _check_source(dataset: object) -> None:
    if not isinstance(dataset, EpisodeSource):
        found = type(dataset).__name__
        raise TypeError(f"`dataset` must be an EpisodeSource (a dataset or a mixture), found {found}.")


class _StaticFigure(Figure):
    """A figure that shows itself in a notebook, also where pyplot has not taught it to."""

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png")
        return picture.getvalue()


def _new_figure(height: float, interactive: bool) -> Figure:
    if not interactive:
        return _StaticFigure(figsize=(_WIDTH, height), layout="constrained")
    # Only pyplot knows the live backend.
    from matplotlib import pyplot

    return pyplot.figure(figsize=(_WIDTH, height), layout="constrained")


def _panel_for(track: Track, timeline: Timeline, merge: bool, interactive: bool) -> Panel:
    kind = track.kind
    if 0 in kind.shape:
        return Nothing(track, timeline)
    if isinstance(kind, ColorImage):
        return Filmstrip(track, timeline)
    if isinstance(kind, PaddedPointcloud):
        return Clouds(track, timeline, merge, single=interactive)
    if len(kind.shape) > 1 or int(np.prod(kind.shape)) > MAX_LINES:
        return HeatMap(track, timeline)
    return Marks(track, timeline) if kind.dtype == torch.bool else Lines(track, timeline)


def _join_axes(panels: Sequence[Panel], has_axis: Sequence[bool], timeline: Timeline) -> None:
    """Let all time panels move together; the last of those that follow each other has the numbers."""
    first = next((panel.axes[0] for panel in panels if isinstance(panel, TimePanel)), None)
    for panel, is_labelled in zip(panels, has_axis, strict=True):
        if first is None or not isinstance(panel, TimePanel):
            continue
        (ax,) = panel.axes
        if ax is not first:
            ax.sharex(first)
        ax.tick_params(axis="x", labelbottom=is_labelled)
        if is_labelled:
            ax.set_xlabel(timeline.label, fontsize=TEXT_SIZE)


def _add_head(figure: Figure, cell: Any, drawn: DrawnSequence) -> None:
    """The title, and a legend of what is not explained where it stands."""
    text = shortened("  ·  ".join(drawn.facts), 400)
    figure.suptitle("\n".join(textwrap.wrap(text, 110)), x=0.01, ha="left", fontsize=10, parse_math=False)
    found: dict[str, Any] = {}
    for ax in figure.axes:
        found.update(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    explained = [label for label in (START, END, PADDING, NOT_FINITE) if label in found]
    if explained:
        # On axes of its own: beside a title, the layout has no room for a legend of the figure.
        ax = figure.add_subplot(cell, label="legend")
        ax.set_axis_off()
        handles = [found[label] for label in explained]
        ax.legend(handles, explained, loc="center left", ncols=4, fontsize=TEXT_SIZE, frameon=False, borderpad=0)


def _add_slider(figure: Figure, cell: Any, panels: Sequence[Panel], timeline: Timeline) -> None:
    from matplotlib.widgets import Slider

    x = timeline.x
    slider = Slider(
        figure.add_subplot(cell, label="slider"), "step", x[0] - 0.5, x[-1] + 0.5, valinit=x[0], valstep=x, valfmt="%d"
    )

    def move(value: float) -> None:
        for panel in panels:
            panel.show(round(value) - int(x[0]))
        figure.canvas.draw_idle()

    slider.vline.set_visible(False)
    slider.on_changed(move)
    move(x[0])
    # A slider that nobody refers to does not move.
    figure.time_slider = slider  # type: ignore[attr-defined]
