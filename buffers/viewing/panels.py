"""Panels over time: lines, heat maps and marks. Padding is shaded, first and last steps of episodes are marked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, final

import numpy as np
import numpy.typing as npt

from buffers.viewing.tracks import Timeline, Track, evenly_spaced

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec

__all__ = [
    "COLORS",
    "EmptyField",
    "HeatMap",
    "Lines",
    "Marks",
    "Panel",
    "TimePanel",
    "mark_ends",
    "set_title",
    "shorten",
]

# The palette of Okabe and Ito, which colour-blind people can tell apart. Yellow is left out (too pale on white), and
# grey replaces black (visible on dark backgrounds).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#7F7F7F")
# One line per component, as long as there is a colour for each.
MAX_LINES = len(COLORS)
# No screen shows more rows, and memory must not grow with the size of a field.
MAX_HEAT_ROWS = 1024
_MAX_MARKERS = 64
NAME_SIZE, TEXT_SIZE, TICK_SIZE = 9, 8, 7
PADDING_STYLE: dict[str, Any] = {
    "facecolor": "#999999",
    "alpha": 0.3,
    "hatch": "////",
    "linewidth": 0,
    "edgecolor": "#666666",
}
# Labels that go into the legend of the figure.
PADDING, START, END, NOT_FINITE = "padding", "first step of an episode", "last step of an episode", "NaN or infinite"


class Panel(ABC):
    """One row of the figure: a field of one sequence.

    Attributes:
        height: Height of its axes, in inches.
        margin: Additional height for its title and for texts below it, in inches.
        axes: The axes that it has drawn on.
    """

    height: float = 0.9
    margin: float = 0.27

    def __init__(self, track: Track, timeline: Timeline) -> None:
        self.track, self.timeline = track, timeline
        self.axes: list[Axes] = []

    @abstractmethod
    def draw(self, figure: Figure, cell: SubplotSpec) -> None:
        """Draw the panel into a cell of the figure's grid."""

    @abstractmethod
    def show(self, t: int) -> None:
        """Highlight step t of the sequence: the slider has moved."""


class TimePanel(Panel):
    """A panel whose horizontal axis is time."""

    @final
    def draw(self, figure: Figure, cell: SubplotSpec) -> None:
        """Draw the values, the ends of episodes and the padding on one pair of axes."""
        ax = figure.add_subplot(cell)
        self.axes = [ax]
        x = self.timeline.x
        ax.tick_params(labelsize=TICK_SIZE)
        ax.yaxis.get_offset_text().set_fontsize(TICK_SIZE)
        ax.locator_params(axis="y", nbins=4)
        ax.locator_params(axis="x", integer=True, min_n_ticks=1)
        ax.spines[["top", "right"]].set_visible(False)
        set_title(ax, self.track.name, self.track.describe(*self._plot(figure, ax)))
        mark_ends(ax, x[self.timeline.is_first] - 0.5, x[self.timeline.is_last] + 0.5)
        for begin, end in runs(~self.timeline.is_real):
            ax.axvspan(x[begin] - 0.5, x[end - 1] + 0.5, label=PADDING, zorder=2.5, **PADDING_STYLE)
        margin = 0.5 + 0.01 * len(x)
        ax.set_xlim(x[0] - margin, x[-1] + margin)
        self._cursor: Any = None

    @final
    def show(self, t: int) -> None:
        """Move a vertical line to step t."""
        x = self.timeline.x[t]
        if self._cursor is None:
            self._cursor = self.axes[0].axvline(x, color=COLORS[3], linewidth=1.5, alpha=0.8)
        self._cursor.set_xdata([x, x])

    @abstractmethod
    def _plot(self, figure: Figure, ax: Axes) -> list[str]:
        """Draw the values; returns notes for the title."""

    def _values(self) -> np.ndarray:
        """The values as `(T, n)`, one column per component."""
        rows = self.track.rows()
        return rows.reshape(len(rows), -1)


@final
class Lines(TimePanel):
    """Scalars and small vectors: one line per component, stepped for integers."""

    def _plot(self, figure: Figure, ax: Axes) -> list[str]:
        rows = self._values()
        x, is_real = self.timeline.x, self.timeline.is_real
        values = rows.astype(np.float64)
        is_not_finite = ~np.isfinite(values) & is_real[:, None]
        values[~(np.isfinite(values) & is_real[:, None])] = np.nan
        is_integer = rows.dtype.kind in "iu"
        drawstyle = "steps-mid" if is_integer else "default"
        if is_integer:
            ax.locator_params(axis="y", integer=True, min_n_ticks=1)
        for i, column in enumerate(values.T):
            # A point without neighbours needs a marker to be visible.
            is_gap = np.pad(np.isnan(column), 1, constant_values=True)
            is_alone = ~is_gap[1:-1] & is_gap[:-2] & is_gap[2:]
            markers = np.flatnonzero(is_alone | (len(x) <= _MAX_MARKERS))
            style = {"drawstyle": drawstyle, "marker": ".", "markevery": markers.tolist(), "markersize": 4}
            ax.plot(x, column, color=COLORS[i], linewidth=1.2, label=str(i), **style)
        if values.shape[1] > 1:
            columns = 1 if values.shape[1] <= 4 else 2
            ax.legend(
                loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=TICK_SIZE, frameon=False, ncols=columns,
                handlelength=1.0, labelspacing=0.2, columnspacing=0.8, borderaxespad=0.3,
            )  # fmt: skip
        bad = x[is_not_finite.any(1)]
        if len(bad):
            style = {"transform": ax.get_xaxis_transform(), "clip_on": False, "zorder": 3}
            ax.plot(bad, np.zeros(len(bad)), "x", color=foreground_of(ax), markersize=5, label=NOT_FINITE, **style)
        return [count_not_finite(rows[is_real])]


@final
class HeatMap(TimePanel):
    """Large vectors and flattened arrays: one row per component, one column per step."""

    height = 1.0

    def _plot(self, figure: Figure, ax: Axes) -> list[str]:
        rows = self._values()
        num_components = rows.shape[1]
        components = evenly_spaced(np.arange(num_components), MAX_HEAT_ROWS)
        x, is_real = self.timeline.x, self.timeline.is_real
        values = rows[:, components].astype(np.float64)
        shown = np.ma.masked_array(values, ~(np.isfinite(values) & is_real[:, None]))
        low, high = (float(shown.min()), float(shown.max())) if shown.count() else (0.0, 1.0)
        extent = (x[0] - 0.5, x[-1] + 0.5, num_components - 0.5, -0.5)
        options: dict[str, Any] = {"aspect": "auto", "origin": "upper", "cmap": "viridis", "interpolation": "nearest"}
        image = ax.imshow(shown.T, extent=extent, vmin=low, vmax=high, **options)
        ax.locator_params(axis="y", integer=True, min_n_ticks=1)
        ticks = [low, high] if high > low else [low]
        bar = figure.colorbar(image, ax=ax, ticks=ticks, format="%.3g", pad=0.01, fraction=0.02, aspect=12)
        bar.ax.tick_params(labelsize=TICK_SIZE)
        flattened = f"flattened to {num_components:,}" if len(self.track.kind.shape) > 1 else ""
        some = f"{len(components):,} of {num_components:,} shown" if len(components) < num_components else ""
        return [flattened, some, count_not_finite(rows[is_real])]


@final
class Marks(TimePanel):
    """Flags: a mark at each step where the value is True."""

    height = 0.35

    def __init__(self, track: Track, timeline: Timeline) -> None:
        super().__init__(track, timeline)
        self.height = 0.25 + 0.1 * int(np.prod(track.kind.shape))

    def _plot(self, figure: Figure, ax: Axes) -> list[str]:
        is_real = self.timeline.is_real
        values = self._values() & is_real[:, None]
        for i, column in enumerate(values.T):
            steps = self.timeline.x[column]
            ax.plot(steps, np.full(len(steps), i), linestyle="none", marker="D", markersize=4, color=COLORS[i])
        num = values.shape[1]
        ax.set_ylim(num - 0.5, -0.5)
        ax.set_yticks(range(num) if num > 1 else [])
        return [f"True {values.sum():,} of {is_real.sum() * num:,} times"]


@final
class EmptyField(Panel):
    """A field without values: one of its dimensions is 0."""

    height = 0.2

    def draw(self, figure: Figure, cell: SubplotSpec) -> None:
        """Draw the title only."""
        ax = figure.add_subplot(cell)
        self.axes = [ax]
        ax.set_axis_off()
        set_title(ax, self.track.name, self.track.describe("nothing to draw"))

    def show(self, t: int) -> None:
        """There is nothing to highlight."""


def set_title(ax: Axes, name: str, details: str) -> None:
    """Write the field's name above the axes, on the left, followed by its details."""
    title = ax.set_title(shorten(name), loc="left", fontsize=NAME_SIZE, fontweight="bold", pad=4, parse_math=False)
    text = ax.annotate(
        shorten(details, 90), (1, 0), (6, 0), xycoords=title, textcoords="offset points",
        fontsize=TEXT_SIZE, color="#7F7F7F", parse_math=False, annotation_clip=False, va="bottom",
    )  # fmt: skip
    # Else the layout would make the axes narrower by its width.
    text.set_in_layout(False)


def shorten(text: str, size: int = 60) -> str:
    """The text on one line; the middle of a long one is left out."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= size else f"{text[: size // 2 - 1]}…{text[len(text) - size // 2 :]}"


def mark_ends(ax: Axes, starts: np.ndarray, ends: np.ndarray) -> list[Any]:
    """Draw vertical lines: solid before the first step of an episode, dashed after its last."""
    kinds = ((starts, START, "-"), (ends, END, "--"))
    return [
        ax.axvline(position, color=foreground_of(ax), linewidth=1.6, linestyle=style, label=label, clip_on=False)
        for positions, label, style in kinds
        for position in positions
    ]


def runs(flags: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """The intervals `[begin, end)` in which flags are True."""
    changes = np.flatnonzero(np.diff(np.pad(flags.astype(np.int8), 1)))
    return list(zip(changes[::2].tolist(), changes[1::2].tolist(), strict=True))


def count_not_finite(values: np.ndarray) -> str:
    """How many values are NaN or infinite, as text; empty if none are."""
    if values.dtype.kind != "f":
        return ""
    counts = ((np.isnan(values).sum(), "NaN"), (np.isinf(values).sum(), "infinite"))
    return ", ".join(f"{count:,} {what}" for count, what in counts if count)


def foreground_of(ax: Axes) -> Any:
    """The colour of the axes' frame, which is visible in any style."""
    return ax.spines["left"].get_edgecolor()
