"""What the tests of figures share: what is drawn, told from the artists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Annotation, Text

from buffers.dataset import RingBufferDataset
from buffers.dataset.fields import Fields
from buffers.dataset.info import EpisodeDatasetInfo
from buffers.visualization import MatplotlibVisualizer


def dataset_of(fields: Fields | None = None, *episodes: Mapping[str, Any]) -> RingBufferDataset:
    dataset = RingBufferDataset(1000, None if fields is None else EpisodeDatasetInfo(fields))
    for episode in episodes:
        dataset.add_episode(episode)
    return dataset


def draw(batch: Mapping[str, Any], fields: Fields | None = None, b: int = 0, **options: Any) -> Any:
    """The figure of a batch, drawn once, so that everything is where it will be."""
    figure = MatplotlibVisualizer(dataset_of(fields)).visualize(batch, b, **options)
    rendered(figure)
    return figure


def rendered(figure: Any) -> np.ndarray:
    """What is seen: `(H, W, 4)`."""
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


def explained(figure: Any) -> list[str]:
    """What the legend of the figure explains."""
    legends = [ax.get_legend() for ax in figure.axes if ax.get_label() == "legend"]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


def spans(ax: Any) -> list[tuple[float, float]]:
    """Where padding is shaded."""
    boxes = [patch.get_path().get_extents(patch.get_patch_transform()) for patch in ax.patches]
    return [(float(box.x0), float(box.x1)) for box in boxes]


def verticals(ax: Any, style: str) -> list[float]:
    """Where solid ("-") or dashed ("--") lines mark the ends of episodes."""
    found = [line for line in ax.lines if line.get_label().endswith("step of an episode")]
    return sorted(float(line.get_xdata()[0]) for line in found if line.get_linestyle() == style)


def curves(ax: Any) -> list[Any]:
    return [line for line in ax.lines if len(line.get_xdata()) and line.get_label().isdigit()]


def clouds_of(figure: Any) -> list[Any]:
    return [ax for ax in figure.axes if ax.name == "3d"]


def texts_drawn(figure: Any) -> list[Text]:
    """The texts that are seen: not all that there are, such as those of ticks out of range."""
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
