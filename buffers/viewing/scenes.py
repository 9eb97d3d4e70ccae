"""Panels of single steps: images as a filmstrip, point clouds in 3-D."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

import numpy as np
import numpy.typing as npt
import torch

from buffers.viewing.panels import (
    COLORS,
    PADDING,
    PADDING_STYLE,
    TEXT_SIZE,
    TICK_SIZE,
    Panel,
    count_not_finite,
    mark_ends,
    set_title,
    shorten,
)
from buffers.viewing.tracks import Timeline, Track, evenly_spaced, joined

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec

__all__ = ["Filmstrip", "PointClouds"]

Positions = npt.NDArray[np.int64]
MAX_STEPS = 10
MAX_CLOUDS = 4
MAX_MERGED = 12
# Per cloud.
MAX_POINTS = 4000
# Approximate width of the axes, in inches.
_WIDTH = 8.3
# Images that are wider or higher than this ratio are stretched; the pixels of all others are square.
_MAX_RATIO = 5.0
# The reddish purple of Okabe and Ito, for pixels that are NaN or infinite.
_NOT_FINITE_COLOR = (0.8, 0.475, 0.655)


@final
class Filmstrip(Panel):
    """Images side by side, evenly spaced over the real steps; the slider shows the images around a step.

    The frames of a stack lie one below the other.
    All frames share one pair of axes, since the time for the layout grows with the number of axes.
    """

    margin = 0.36

    def __init__(self, track: Track, timeline: Timeline) -> None:
        super().__init__(track, timeline)
        self._num_frames, self._frame_height, self._width = as_frames(np.empty((0, *track.kind.shape))).shape[1:4]
        self._real = np.flatnonzero(timeline.is_real)
        self._steps = evenly_spaced(self._real, MAX_STEPS)
        self._low, self._high, self._note = _range_of(track, self._real)
        # All padding together is one shaded frame.
        self._has_padding = len(self._real) < len(timeline)
        num_columns = len(self._steps) + self._has_padding
        self._gap = max(1.0, 0.06 * self._width)
        # Of a column, in pixels.
        self._height = self._num_frames * (self._frame_height + self._gap) - self._gap
        self._ratio = float(np.clip(self._frame_height / self._width, 1 / _MAX_RATIO, _MAX_RATIO))
        column_ratio = self._ratio * self._height / self._frame_height
        self.height = float(np.clip(_WIDTH / num_columns * column_ratio, 0.5, 1.5 if self._num_frames == 1 else 3.0))
        self._marks: list[Any] = []
        self._outline: Any = None

    def draw(self, figure: Figure, cell: SubplotSpec) -> None:
        """Draw a column of frames for each step."""
        ax = figure.add_subplot(cell)
        self.axes = [ax]
        ax.spines[:].set_visible(False)
        ax.set_yticks([])
        ax.tick_params(length=0, labelsize=TICK_SIZE, pad=2)
        self._images = []
        for number, picture in enumerate(self._pictures(self._steps)):
            column, row = divmod(number, self._num_frames)
            left, top = self._left(column), self._height - row * (self._frame_height + self._gap)
            extent = (left, left + self._width, top - self._frame_height, top)
            self._images.append(ax.imshow(picture, origin="upper", extent=extent))
        num_columns = len(self._steps)
        if self._has_padding:
            left = self._left(num_columns)
            ax.fill_between([left, left + self._width], 0, self._height, label=PADDING, **PADDING_STYLE)
            num_columns += 1
        self._annotate(self._steps)
        # Space at the edges for the lines at the ends of an episode.
        ax.set(xlim=(-self._gap, self._left(num_columns)), ylim=(0, self._height), anchor="NW")
        ax.set_aspect(self._ratio * self._width / self._frame_height)
        stretched = "" if np.isclose(self._ratio, self._frame_height / self._width) else "pixels are not square"
        stack = f"{self._num_frames} frames a step, the first on top" if self._num_frames > 1 else ""
        set_title(ax, self.track.name, self.track.describe(stack, self._note, stretched))

    def show(self, t: int) -> None:
        """Show the steps around step t, with an outline around its own."""
        num = len(self._steps)
        if not num:
            return
        at = nearest(self._real, t)
        first = int(np.clip(at - num // 2, 0, len(self._real) - num))
        steps = self._real[first : first + num]
        for image, picture in zip(self._images, self._pictures(steps), strict=True):
            image.set_data(picture)
        self._annotate(steps)
        left, gap = self._left(at - first), self._gap / 2
        right = left + self._width + gap
        if self._outline is None:
            (self._outline,) = self.axes[0].plot([], [], color=COLORS[3], linewidth=2, clip_on=False)
        height = self._height
        self._outline.set_data([left - gap, right, right, left - gap, left - gap], [0, 0, height, height, 0])

    def _left(self, column: int) -> float:
        return column * (self._width + self._gap)

    def _annotate(self, steps: Positions) -> None:
        """Write the steps below their frames, and mark the ends of an episode."""
        ax, timeline = self.axes[0], self.timeline
        lefts = np.array([self._left(column) for column in range(len(steps))])
        labels = [str(step) for step in timeline.x[steps]]
        if self._has_padding:
            labels.append("padding")
        ax.set_xticks([self._left(column) + self._width / 2 for column in range(len(labels))], labels=labels)
        for mark in self._marks:
            mark.remove()
        begins = lefts[timeline.is_first[steps]] - self._gap / 2
        ends = lefts[timeline.is_last[steps]] + self._width + self._gap / 2
        self._marks = mark_ends(ax, begins, ends)

    def _pictures(self, steps: Positions) -> np.ndarray:
        """All frames of some steps, `(n, H, W, 3 or 4)`, uint8, or floats between 0 and 1."""
        frames = as_frames(self.track.rows(steps))
        pixels = frames.reshape(-1, *frames.shape[2:])
        if pixels.shape[-1] == 1:
            pixels = np.repeat(pixels, 3, -1)
        if pixels.dtype == np.uint8:
            return pixels
        pixels = pixels.astype(np.float64)
        is_not_finite = ~np.isfinite(pixels).all(-1)
        pixels[is_not_finite] = 1.0
        pixels = ((pixels - self._low) / (self._high - self._low)).clip(0.0, 1.0)
        pixels[is_not_finite, :3] = _NOT_FINITE_COLOR
        return pixels


def as_frames(rows: np.ndarray) -> np.ndarray:
    """The images or stacks of n steps as `(n, k, H, W, C)`: k frames a step, of 1, 3 or 4 channels."""
    if rows.ndim == 3:
        return rows[:, None, :, :, None]
    if rows.shape[3] in (1, 3, 4):
        return rows[:, None]
    return np.moveaxis(rows, 1, -1)[:, None] if rows.shape[1] == 3 else rows[..., None]


def _range_of(track: Track, real: Positions) -> tuple[float, float, str]:
    """The values that are drawn black and white, and a note for the title.

    They are 0 and 255 for integers in this range, 0 and 1 for floats in this range, else the extremes.
    """
    if track.kind.dtype == torch.uint8:
        return 0.0, 255.0, ""
    pixels = track.rows(real)
    finite = pixels[np.isfinite(pixels)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    is_integer = pixels.dtype.kind in "iu"
    if low >= 0.0 and high <= (255.0 if is_integer else 1.0):
        return 0.0, 255.0 if is_integer else 1.0, count_not_finite(pixels)
    note = f"{low:.3g} is black and {high:.3g} white"
    return low, high if high > low else low + 1.0, ", ".join(filter(None, (note, count_not_finite(pixels))))


@final
class PointClouds(Panel):
    """Point clouds in 3-D: of some steps side by side, or of several steps in one picture.

    Args:
        tracks: The fields, drawn in one picture. Points with NaN coordinates or a mask of 0 are padding.
        timeline: Only its real steps are drawn.
        merge: Draw several steps in one picture, coloured by step.
        single: Draw one step, chosen by the slider.
    """

    margin = 0.5

    def __init__(self, tracks: Sequence[Track], timeline: Timeline, merge: bool, single: bool) -> None:
        super().__init__(joined(tracks), timeline)
        self._tracks, self._merge, self._single = tracks, merge, single
        self.height = 2.6 if merge or single else 1.9
        self._real = np.flatnonzero(timeline.is_real)
        self._steps = evenly_spaced(self._real, MAX_MERGED if merge else 1 if single else MAX_CLOUDS)
        self._scatters: dict[Any, Any] = {}
        self._captions: dict[Any, Any] = {}
        self._is_thinned = False
        has_feature = tracks[0].kind.shape[1] > 3 and not tracks[0].has_mask
        self._hue = "field" if len(tracks) > 1 else "step" if merge else "feature 3" if has_feature else "z"

    def draw(self, figure: Figure, cell: SubplotSpec) -> None:
        """Draw the clouds side by side, or one."""
        if not len(self._steps):
            self.axes = [figure.add_subplot(cell)]
            self.axes[0].set_axis_off()
            set_title(self.axes[0], self.track.name, self.track.describe("all rows are padding"))
            return
        is_one = self._merge or self._single
        grid = cell.subgridspec(1, 3 if is_one else MAX_CLOUDS)
        num = 1 if is_one else len(self._steps)
        self.axes = [figure.add_subplot(grid[i], projection="3d") for i in range(num)]
        self._find_limits()
        for ax, step in zip(self.axes, self._steps, strict=False):
            self._prepare(ax)
            self._fill(ax, self._steps if self._merge else np.array([step]))
        thinned = f"at most {MAX_POINTS:,} points of each shown" if self._is_thinned else ""
        kinds = dict.fromkeys(track.describe() for track in self._tracks)
        details = ", ".join(filter(None, (*kinds, f"coloured by {self._hue}", thinned)))
        set_title(self.axes[0], self.track.name, details)
        if self._hue == "field":
            self._add_legend()
        elif self._merge:
            x = self.timeline.x[self._real]
            mapped, ticks = self._scatters[self.axes[0]], [x[0], x[-1]]
            bar = figure.colorbar(mapped, ax=self.axes[0], ticks=ticks, shrink=0.7, pad=0.1, panchor=False)
            bar.ax.tick_params(labelsize=TICK_SIZE)

    def show(self, t: int) -> None:
        """Show the cloud of step t; if merged, the clouds of all steps up to t."""
        if len(self._real):
            at = nearest(self._real, t)
            steps = evenly_spaced(self._real[: at + 1], MAX_MERGED) if self._merge else self._real[at : at + 1]
            self._fill(self.axes[0], steps)

    def _find_limits(self) -> None:
        """Find the box that holds all clouds that are drawn or can be chosen."""
        steps = evenly_spaced(self._real, 64) if self._single or self._merge else self._steps
        points = np.concatenate([self._points(step) for step in steps])
        points = points if len(points) else np.zeros((1, 4))
        low, high = points.min(0), points.max(0)
        self._center, self._reach = (low[:3] + high[:3]) / 2, (high[:3] - low[:3]) / 2
        # A flat cloud still needs a box with some depth.
        self._reach = np.maximum(self._reach, 0.05 * self._reach.max() or 1.0)
        self._hues = float(low[3]), float(high[3])
        if self._hue == "step":
            self._hues = self.timeline.x[self._real[0]], self.timeline.x[self._real[-1]]

    def _add_legend(self) -> None:
        """Name the fields in their colours."""
        ax = self.axes[-1]
        for number, track in enumerate(self._tracks):
            color = COLORS[number % len(COLORS)]
            ax.plot([], [], [], linestyle="none", marker="o", markersize=4, color=color, label=shorten(track.name, 24))
        ax.legend(loc="center left", bbox_to_anchor=(1.2, 0.5), fontsize=TICK_SIZE, frameon=False, handlelength=1.0)

    def _prepare(self, ax: Any) -> None:
        low, high = self._center - self._reach, self._center + self._reach
        ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), zlim=(low[2], high[2]), anchor="W")
        ax.set_box_aspect(tuple(self._reach))
        ax.tick_params(labelsize=TICK_SIZE - 1, pad=-3)
        for axis, name, reach in zip((ax.xaxis, ax.yaxis, ax.zaxis), "xyz", self._reach, strict=True):
            # More numbers would overlap on a short side.
            share = reach / self._reach.max()
            num = 3 if share > 0.6 else 2 if share > 0.4 else 1
            axis.get_major_locator().set_params(nbins=num, min_n_ticks=1)
            axis.set_label_text(name, fontsize=TICK_SIZE)
            axis.labelpad = -5

    def _fill(self, ax: Any, steps: Positions) -> None:
        """Draw the clouds of some steps, and remove those drawn before."""
        if ax in self._scatters:
            self._scatters.pop(ax).remove()
        points = np.concatenate([self._points(step) for step in steps])
        x = self.timeline.x
        colors: dict[str, Any] = {"cmap": "viridis", "vmin": self._hues[0], "vmax": self._hues[1]}
        if self._hue == "field":
            from matplotlib.colors import ListedColormap

            colors = {"cmap": ListedColormap(COLORS), "vmin": 0, "vmax": len(COLORS) - 1}
        self._scatters[ax] = ax.scatter(*points[:, :3].T, c=points[:, 3], s=3, depthshade=False, **colors)
        steps_text = f"{x[steps[0]]} to {x[steps[-1]]}" if len(steps) > 1 else str(x[steps[0]])
        caption = f"step {steps_text}: {len(points):,} points"
        if ax not in self._captions:
            self._captions[ax] = ax.text2D(
                0.5, -0.14, "", transform=ax.transAxes, ha="center", va="top", fontsize=TEXT_SIZE
            )
        self._captions[ax].set_text(caption)

    def _points(self, step: int) -> np.ndarray:
        """The points of a step, float64 `(n, 4)`: x, y, z and hue; at most MAX_POINTS of each field."""
        clouds = []
        for number, track in enumerate(self._tracks):
            rows = track.rows(np.array([step]))[0].astype(np.float64)
            rows = rows[np.isfinite(rows[:, :3]).all(1)]
            if track.has_mask:
                rows = rows[np.nan_to_num(rows[:, 3]) != 0]
            self._is_thinned |= len(rows) > MAX_POINTS
            rows = rows[evenly_spaced(np.arange(len(rows)), MAX_POINTS)]
            constant = {"field": number % len(COLORS), "step": self.timeline.x[step]}.get(self._hue)
            hue = rows[:, 2 if self._hue == "z" else 3] if constant is None else np.full(len(rows), constant)
            clouds.append(np.column_stack([rows[:, :3], np.nan_to_num(hue)]))
        return np.concatenate(clouds)


def nearest(positions: Positions, t: int) -> int:
    """Which of the ascending positions is closest to t."""
    return int(np.abs(positions - t).argmin())
