"""What the tests of figures share: batches to draw, and what the artists of a figure show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Annotation, Text

from buffers.dataset import RingBufferDataset
from buffers.dataset.fields import Fields, PaddedPointcloud
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.visualization import MatplotlibVisualizer


def dataset_of(fields: Fields | None = None, *episodes: Mapping[str, Any]) -> RingBufferDataset:
    dataset = RingBufferDataset(1000, None if fields is None else EpisodeDatasetInfo(fields))
    for episode in episodes:
        dataset.add_episode(episode)
    return dataset


def film(length: int) -> torch.Tensor:
    """Images `(1, T, 4, 5, 3)`, uint8, whose pixels are the step."""
    return torch.arange(length, dtype=torch.uint8).view(1, length, 1, 1, 1).expand(1, length, 4, 5, 3)


def clouds(num_points: list[int], size: int = 20, features: int = 0) -> torch.Tensor:
    """`(1, T, size, 3 + features)`: step t has `num_points[t]` points with x = t, the others are NaN."""
    cloud = torch.full((1, len(num_points), size, 3 + features), torch.nan)
    for t, num in enumerate(num_points):
        cloud[0, t, :num] = torch.rand(num, 3 + features)
        cloud[0, t, :num, 0] = t
    return cloud


def cloud_fields(size: int = 20, features: int = 0) -> Fields:
    return Fields(points=PaddedPointcloud((size, 3 + features)))


def draw(batch: Mapping[str, Any], fields: Fields | None = None, b: int = 0, **options: Any) -> Any:
    """The figure of a batch; not rendered yet, which takes most of the time, so nothing has its final place."""
    return MatplotlibVisualizer(dataset_of(fields)).visualize(batch, b, **options)


def panel(values: Any, **rest: torch.Tensor) -> Any:
    """The axes of a field `x` in the figure of a batch."""
    return axes_of(draw({"x": values, **rest}), "x")


def rendered(figure: Any) -> np.ndarray:
    """The pixels of a figure, `(H, W, 4)`."""
    canvas = figure.canvas if isinstance(figure.canvas, FigureCanvasAgg) else FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def axes_of(figure: Any, name: str) -> Any:
    (ax,) = [ax for ax in figure.axes if ax.get_title(loc="left") == name]
    return ax


def names(figure: Any) -> list[str]:
    """The names of rows, from the top down."""
    titled = [ax for ax in figure.axes if ax.get_title(loc="left")]
    titled.sort(key=lambda ax: -ax.get_position().y0)
    return [ax.get_title(loc="left") for ax in titled]


def details(ax: Any) -> str:
    (text,) = [text for text in ax.texts if isinstance(text, Annotation)]
    return text.get_text()


def caption(ax: Any) -> str:
    (text,) = [text for text in ax.texts if not isinstance(text, Annotation)]
    return text.get_text()


def labels(ax: Any) -> list[str]:
    return [label.get_text() for label in ax.get_xticklabels()]


def legend_of(figure: Any) -> list[str]:
    """The labels in the legend of the figure."""
    legends = [ax.get_legend() for ax in figure.axes if ax.get_label() == "legend"]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


def spans(ax: Any) -> list[tuple[float, float]]:
    """The intervals that are shaded as padding."""
    boxes = [patch.get_path().get_extents(patch.get_patch_transform()) for patch in ax.patches]
    return [(float(box.x0), float(box.x1)) for box in boxes]


def verticals(ax: Any, style: str) -> list[float]:
    """Positions of the solid ("-") or dashed ("--") lines at the ends of episodes."""
    found = [line for line in ax.lines if line.get_label().endswith("step of an episode")]
    return sorted(float(line.get_xdata()[0]) for line in found if line.get_linestyle() == style)


def curves(ax: Any) -> list[Any]:
    return [line for line in ax.lines if len(line.get_xdata()) and line.get_label().isdigit()]


def clouds_of(figure: Any) -> list[Any]:
    return [ax for ax in figure.axes if ax.name == "3d"]


def drawn_points(ax: Any) -> np.ndarray:
    (scatter,) = ax.collections
    return np.stack(scatter._offsets3d, -1)


def texts_drawn(figure: Any) -> list[Text]:
    """The visible texts: some artists, such as ticks out of range, draw none."""
    rendered(figure)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        draw_text = Text.draw

        def note(text: Text, renderer: Any) -> None:
            if text.get_text() and text.get_visible():
                found.append(text)
            draw_text(text, renderer)

        patch.setattr(Text, "draw", note)
        rendered(figure)
    return found


def assert_texts_are_apart(figure: Any, at_least: int) -> None:
    """Texts lie within the figure, and none overlaps another."""
    boxes = [(text, text.get_window_extent()) for text in texts_drawn(figure)]
    assert len(boxes) >= at_least
    for i, (text, box) in enumerate(boxes):
        assert box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1, text
        assert box.y0 >= -1 and box.y1 <= figure.bbox.y1 + 1, text
        for other, other_box in boxes[i + 1 :]:
            assert not box.padded(-1).overlaps(other_box.padded(-1)), (text, other)
