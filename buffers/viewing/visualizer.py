"""Pictures of datasets and batches, drawn with matplotlib. No other module imports it.

    MatplotlibVisualizer(dataset).visualize(buffer.sample(), output="batch.png")

Drawing shows nothing yet. A notebook shows a figure that is the last value of a cell or is passed to `display`. A
script writes it to a file with `output=`, or opens a window:

    MatplotlibVisualizer(dataset).visualize(buffer.sample(), interactive=True)
    matplotlib.pyplot.show()

Figures that are not interactive are not registered with pyplot: their memory is freed when the last reference goes,
`pyplot.show()` does not show them, and no backend is chosen.
"""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Collection, Sequence
from typing import Any, final

import numpy as np
import torch

from buffers.utils import how_to_install, integer

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError(f"`buffers.visualization` needs matplotlib: {how_to_install('extras')}.") from error

from buffers.dataset.episode_source import EpisodeSource
from buffers.fields import ColorImage, PaddedPointcloud, Scalar, TensorType
from buffers.viewing.overview import draw_overview, has_returns
from buffers.viewing.panels import (
    END,
    MAX_LINES,
    NOT_FINITE,
    PADDING,
    START,
    TEXT_SIZE,
    EmptyField,
    HeatMap,
    Lines,
    Marks,
    Panel,
    TimePanel,
    shorten,
)
from buffers.viewing.scenes import Filmstrip, PointClouds
from buffers.viewing.tracks import DrawnSequence, Timeline, Track, joined, read_sequence

__all__ = ["MatplotlibVisualizer", "plot_dataset"]

# 900 pixels at matplotlib's 100 dots per inch, which a README or a notebook shows unscaled.
_WIDTH = 9.0
# In inches: the numbers and the label below the last of a run of time panels, the title, the legend, the slider.
_AXIS_HEIGHT, _HEAD_HEIGHT, _LEGEND_HEIGHT, _SLIDER_HEIGHT = 0.35, 0.35, 0.15, 0.2
# Renderers refuse pictures of 65,536 pixels or more, so hundreds of rows are squeezed.
_MAX_HEIGHT = 300.0
# Smaller arrays are taken for matrices, and those of more dimensions or frames for neither.
_MIN_SIDE, _MAX_STACK = 8, 8


@final
class MatplotlibVisualizer:
    """Draws a sequence of a batch, one row per field.

    | field | panel |
    |---|---|
    | `ColorImage`, and uint8 or floats `(H, W)` or `(k, H, W)` of at least 8 x 8 | a filmstrip of at most 10 steps |
    | `Scalar`, or `Vector` of at most 7 | lines, stepped for integers |
    | the same with dtype bool | a mark where the value is True; flags that are never True share a row |
    | a larger `Vector`, or more dimensions (flattened) | a heat map |
    | `PaddedPointcloud` | points in 3-D, at 4 steps or merged |

    Args:
        dataset: A dataset or a mixture. Its fields determine the panels; a field of the batch that the dataset does
            not have is drawn by its shape.

    Raises:
        TypeError: `dataset` is not an EpisodeSource.
    """

    def __init__(self, dataset: EpisodeSource) -> None:
        _check_source(dataset)
        self.dataset = dataset

    def visualize(
        self,
        batch: Any,
        batch_index: int = 0,
        *,
        pointclouds: str | Collection[str] = (),
        merge_pointclouds: bool = False,
        merge_fields: bool = False,
        interactive: bool = False,
        output: str | os.PathLike[str] | None = None,
    ) -> Figure:
        """Draw one sequence of a batch.

        Padding (`mask` is False) is shaded; `is_first` and `is_last` are vertical lines. The axis counts steps of the
        episode if the batch has `step`, else steps of the sequence. Keys added by `include` get no panel.

        Args:
            batch: `field -> (B, T, *shape)`, nested like the steps, on any device. It is not changed. Only an
                interactive figure keeps a reference to it.
            batch_index: Which sequence; negative numbers count from the end.
            pointclouds: Names of float fields that are point clouds, besides those that the dataset declares:
                `(n, 3)`, or `(n, 4)` with a mask, where points of mask 0 are left out.
            merge_pointclouds: Draw the points of up to 12 steps in one picture, coloured by step.
            merge_fields: Draw the point clouds of all fields in one picture, coloured by field.
            interactive: Add a slider over the steps. It needs an interactive pyplot backend (in a notebook,
                `%matplotlib widget` with ipympl). The figure then belongs to pyplot: a script shows it with
                `pyplot.show()`; close it with `pyplot.close(figure)`.
            output: A file to write the figure to, .png, .pdf or .svg.

        Returns:
            The figure, 9 inches wide. It is not shown.

        Raises:
            TypeError: `batch` is not a batch.
            ValueError: `batch_index` is out of range, sequences have no steps, or `pointclouds` names what is none.
            OSError: `output` cannot be written.
        """
        named = (pointclouds,) if isinstance(pointclouds, str) else tuple(pointclouds)
        sequence = read_sequence(batch, batch_index, self.dataset.fields, named)
        panels = [
            _panel_for(tracks, sequence.timeline, merge_pointclouds, interactive)
            for tracks in _rows_of(sequence, merge_fields)
        ]
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
        if output is not None:
            figure.savefig(output)
        return figure

    def plot_dataset(self, *, output: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the dataset itself: `plot_dataset(self.dataset)`."""
        return plot_dataset(self.dataset, output=output)


def plot_dataset(
    dataset: EpisodeSource, *, max_episodes: int = 500, output: str | os.PathLike[str] | None = None
) -> Figure:
    """Draw what a dataset holds: lengths and returns of its episodes, oldest first, its fill, and bytes by field.

    Returns are drawn if there is a scalar field `reward`. All episodes are read for them, or evenly spaced ones if all
    would be more than `max_episodes` or 256 MB; the title then says how many.

    Args:
        dataset: A dataset or a mixture.
        max_episodes: How many episodes are read at most.
        output: A file to write the figure to, .png, .pdf or .svg.

    Returns:
        The figure, 9 inches wide. It is not shown.

    Raises:
        TypeError: `dataset` is not an EpisodeSource, or `max_episodes` is not an integer.
        ValueError: `max_episodes` is negative.
        OSError: `output` cannot be written.
    """
    _check_source(dataset)
    max_episodes = integer("max_episodes", max_episodes, 0)
    height = 2.8 + 1.7 * has_returns(dataset) + 0.17 * len(dataset.fields or ())
    figure = _StaticFigure(figsize=(_WIDTH, min(height, _MAX_HEIGHT)), layout="constrained")
    draw_overview(figure, dataset, max_episodes)
    name = f"{type(dataset).__name__}: {dataset.num_episodes:,} episodes, {dataset.num_timesteps:,} steps"
    figure.suptitle(name, x=0.01, ha="left", fontsize=10)
    if output is not None:
        figure.savefig(output)
    return figure


def _check_source(dataset: object) -> None:
    if not isinstance(dataset, EpisodeSource):
        found = type(dataset).__name__
        raise TypeError(f"`dataset` must be an EpisodeSource (a dataset or a mixture), found {found}.")


class _StaticFigure(Figure):
    """A figure that a notebook can show without pyplot."""

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png")
        return picture.getvalue()


class _PyplotFigure(_StaticFigure):
    """A figure of pyplot's that a notebook shows as its widget, or else as a picture."""

    def _repr_mimebundle_(self, **options: Any) -> Any:
        if hasattr(self.canvas, "_repr_mimebundle_"):
            return self.canvas._repr_mimebundle_(**options)
        if type(self.canvas) is FigureCanvasAgg:
            # The inline backend, too, closes what it shows. Else the next cell that draws would show it again.
            from matplotlib import pyplot

            pyplot.close(self)
        return {}


def _new_figure(height: float, interactive: bool) -> Figure:
    if not interactive:
        return _StaticFigure(figsize=(_WIDTH, height), layout="constrained")
    # Only pyplot can make a figure of the interactive backend.
    from matplotlib import pyplot

    # Load the backend, which may turn the interactive mode on: only then can it be turned off for a while.
    pyplot.draw_if_interactive()
    # In the interactive mode, a notebook would show the figure twice: as new, and as the value of the cell.
    with pyplot.ioff():
        return pyplot.figure(figsize=(_WIDTH, height), layout="constrained", FigureClass=_PyplotFigure)


def _rows_of(sequence: DrawnSequence, merge_fields: bool) -> list[list[Track]]:
    """The tracks of each row of the figure: mostly one, but flags that are never set share a row, as may clouds."""
    rows: dict[tuple[str, ...], list[Track]] = {}
    for track in sequence.tracks:
        kind = track.kind
        if merge_fields and isinstance(kind, PaddedPointcloud) and 0 not in kind.shape:
            key: tuple[str, ...] = ("point clouds",)
        elif kind == Scalar((), torch.bool) and not track.rows()[sequence.timeline.is_real].any():
            key = ("flags",)
        else:
            key = ("field", track.name)
        rows.setdefault(key, []).append(track)
    return list(rows.values())


def _panel_for(tracks: list[Track], timeline: Timeline, merge: bool, interactive: bool) -> Panel:
    track = joined(tracks)
    kind = track.kind
    if 0 in kind.shape:
        return EmptyField(track, timeline)
    if isinstance(kind, ColorImage) or _looks_like_frames(kind):
        return Filmstrip(track, timeline)
    if isinstance(kind, PaddedPointcloud):
        return PointClouds(tracks, timeline, merge, single=interactive)
    if len(kind.shape) > 1 or int(np.prod(kind.shape)) > MAX_LINES:
        return HeatMap(track, timeline)
    return Marks(track, timeline) if kind.dtype == torch.bool else Lines(track, timeline)


def _looks_like_frames(kind: TensorType) -> bool:
    """Whether a field without a type of its own holds gray frames `(H, W)` or `(k, H, W)`, rather than a matrix."""
    is_large = len(kind.shape) in (2, 3) and min(kind.shape[-2:]) >= _MIN_SIDE
    is_stack = int(np.prod(kind.shape[:-2])) <= _MAX_STACK
    has_pixels = kind.dtype == torch.uint8 or kind.dtype.is_floating_point
    return type(kind) is TensorType and is_large and is_stack and has_pixels


def _join_axes(panels: Sequence[Panel], has_axis: Sequence[bool], timeline: Timeline) -> None:
    """Let all time panels pan and zoom together. Of adjacent ones, only the last shows the numbers of the axis."""
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
    """Add the title, and a legend of the marks that panels share."""
    text = shorten("  ·  ".join(drawn.facts), 400)
    figure.suptitle("\n".join(textwrap.wrap(text, 110)), x=0.01, ha="left", fontsize=10, parse_math=False)
    found: dict[str, Any] = {}
    for ax in figure.axes:
        found.update(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    labels = [label for label in (START, END, PADDING, NOT_FINITE) if label in found]
    if labels:
        # On axes of its own: the layout reserves no space for a figure's legend beside a title.
        ax = figure.add_subplot(cell, label="legend")
        ax.set_axis_off()
        handles = [found[label] for label in labels]
        ax.legend(handles, labels, loc="center left", ncols=4, fontsize=TEXT_SIZE, frameon=False, borderpad=0)


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
    # A slider without a reference is garbage-collected and stops working.
    figure.time_slider = slider  # type: ignore[attr-defined]
