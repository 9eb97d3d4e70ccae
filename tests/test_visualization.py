"""MatplotlibVisualizer as a whole: what fields become, the layout, what it leaves alone, the slider, errors."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from buffers import ReplayBuffer
from buffers.dataset.fields import ColorImage, Fields, PaddedPointcloud, Scalar, TensorType, Vector
from buffers.transforms import to_transitions
from buffers.visualization import MatplotlibVisualizer, plot_dataset
from tests import tagged
from tests.figure_helpers import (
    assert_texts_are_apart,
    axes_of,
    caption,
    cloud_fields,
    clouds,
    clouds_of,
    curves,
    dataset_of,
    draw,
    drawn_points,
    film,
    labels,
    names,
    rendered,
    spans,
    verticals,
)


@pytest.fixture
def live() -> Any:
    """pyplot with a backend that opens no windows and whose canvas can be read."""
    from matplotlib import pyplot

    pyplot.switch_backend("agg")
    yield pyplot
    pyplot.close("all")


def many_fields(length: int) -> dict[str, Any]:
    leading, generator = (2, length), torch.Generator().manual_seed(0)
    steps = torch.arange(length).expand(leading)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*leading, *shape, generator=generator)

    name = "of_a_name_so_long/that_it_does_not_fit_into/a_row_of_the_figure_as_it_stands"
    image, points = (randn(12, 16, 3) * 50 + 100).clamp(0, 255).byte(), randn(30, 3) * torch.tensor([1.0, 2.0, 0.5])
    num_real = max(1, length - 3)
    return {
        "obs": {"image": image, "depth": randn(1, 12, 16).sigmoid(), "points": points, name: torch.zeros(leading)},
        "action": randn(4),
        "large": steps + 10**12,
        "reward": randn() * 1e-7,
        "contacts": randn(4) > 0,
        "matrix": randn(4, 6),
        "$odd_{name}$": torch.full(leading, torch.nan),
        "mask": steps < num_real,
        "is_first": steps == 0,
        "is_last": steps == num_real - 1,
        "step": steps + 100,
    }


POINTS = Fields(obs={"points": PaddedPointcloud((30, 3))})


@pytest.mark.parametrize(("length", "interactive"), [(1, False), (40, False), (40, True)])
def test_texts_of_many_fields_do_not_overlap(length: int, interactive: bool, live: Any) -> None:
    figure = draw(many_fields(length), POINTS, interactive=interactive)
    if interactive:
        figure.time_slider.set_val(100 + length // 2)
    assert len(names(figure)) == 10
    assert_texts_are_apart(figure, at_least=40)


# What fields become.


def test_the_dataset_determines_what_a_field_is() -> None:
    obs = {"image": ColorImage((4, 5, 3)), "grid": TensorType((4, 5, 3), torch.uint8)}
    fields = Fields(obs=obs, points=PaddedPointcloud((20, 3)))
    batch = {"obs": {"image": film(2), "grid": film(2)}, "points": clouds([3, 3])}
    figure = draw(batch, fields)
    assert names(figure) == ["obs/image", "obs/grid", "points"]
    assert [len(axes_of(figure, name).images) for name in names(figure)[:2]] == [2, 1]
    assert len(clouds_of(figure)) == 2
    # Without the dataset's fields, a cloud looks like any matrix.
    assert len(clouds_of(draw(batch))) == 0


def test_transforms_that_change_dtype_or_size_keep_the_type() -> None:
    fields = Fields(points=PaddedPointcloud((20, 3)), image=ColorImage((4, 5, 3)))
    figure = draw({"points": clouds([3, 3])[:, :, :10].half(), "image": torch.zeros(1, 2, 8, 9, 1)}, fields)
    assert len(clouds_of(figure)) == 2 and len(axes_of(figure, "image").images) == 2
    # Shapes that do not fit the type decide by themselves.
    figure = draw({"points": torch.zeros(1, 2), "image": torch.zeros(1, 2, 9)}, fields)
    assert len(curves(axes_of(figure, "points"))) == 1
    assert axes_of(figure, "image").images[0].get_array().shape == (9, 2)


def test_transitions_are_drawn_like_the_fields_they_come_from() -> None:
    flag, obs = Scalar((), torch.bool), {"points": PaddedPointcloud((20, 3)), "x": Scalar()}
    fields = Fields(obs=obs, action=Vector(2), reward=Scalar(), terminated=flag, truncated=flag)
    rows = {"obs": {"points": clouds([3] * 6)[0], "x": torch.arange(6.0)}, "action": torch.zeros(6, 2)}
    is_last = torch.arange(6) == 5
    dataset = dataset_of(fields, {**rows, "reward": torch.zeros(6), "terminated": is_last, "truncated": is_last})
    batch = next(iter(dataset.get_loader(2, 6, include=("step", "is_first"), transform=to_transitions)))
    figure = MatplotlibVisualizer(dataset).visualize(batch)
    assert names(figure) == [*fields.names, "next_obs/points", "next_obs/x"]
    assert len(clouds_of(figure)) == 8
    (line,) = curves(axes_of(figure, "next_obs/x"))
    assert line.get_ydata().tolist() == [1, 2, 3, 4, 5]


def test_values_without_time_are_in_the_title() -> None:
    priority = torch.tensor([0.0, 0.25, 0.5, 0.75])
    rest = {"embedding": torch.zeros(4, 128), "$\\frac{$": torch.zeros(4), "name": "run 3"}
    figure = draw({"x": torch.zeros(4, 5), "priority": priority, **rest}, b=3)
    rendered(figure)  # A name is text, not mathematics.
    assert names(figure) == ["x"]
    title = " ".join(figure.get_suptitle().split())
    assert "priority 0.75" in title and "$\\frac{$ 0" in title and "embedding (4, 128), name str" in title


def test_fields_named_like_what_include_adds_are_panels() -> None:
    fields = Fields(mask=Vector(2), step=Scalar(), weight=Scalar())
    figure = draw({"mask": torch.zeros(1, 4, 2), "step": torch.zeros(1, 4), "weight": torch.ones(1, 4)}, fields)
    assert names(figure) == ["mask", "step", "weight"]
    assert all(spans(axes_of(figure, name)) == [] for name in names(figure))


def test_hundreds_of_fields_stay_below_what_can_be_rendered() -> None:
    figure = draw({f"image{i}": film(1) for i in range(170)})
    assert len(names(figure)) == 170
    assert figure.get_size_inches()[1] * figure.dpi < 2**16


# What it leaves alone.


def test_batch_and_figure_do_not_change_each_other() -> None:
    batch = many_fields(10)
    batch["obs"]["points"][0, :, 20:] = torch.nan
    before = copy.deepcopy(batch)
    figure = draw(batch, POINTS)
    assert_equal(batch, before)
    # Batches from workers lie in memory that is used again.
    figure.set_layout_engine("none")
    pixels = rendered(figure).copy()
    for value in tagged.flatten(batch).values():
        if value.is_contiguous():
            value.zero_()
    np.testing.assert_array_equal(rendered(figure), pixels)


def assert_equal(batch: dict[str, Any], expected: dict[str, Any]) -> None:
    flat, flat_expected = tagged.flatten(batch), tagged.flatten(expected)
    assert list(flat) == list(flat_expected)
    for name, value in flat.items():
        torch.testing.assert_close(value, flat_expected[name], rtol=0, atol=0, equal_nan=True)


def test_figures_that_are_dropped_leave_nothing_behind() -> None:
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    figures = [weakref.ref(draw({"x": torch.zeros(1, 4), "y": torch.zeros(1, 4, 9)})) for _ in range(10)]
    gc.collect()
    assert pyplot.get_fignums() == before
    assert [figure for figure in figures if figure() is not None] == []


def test_a_script_writes_a_picture_to_output_and_shows_nothing(tmp_path: Path, live: Any) -> None:
    dataset = dataset_of(None, tagged.episode(5, 0))
    visualizer, batch = MatplotlibVisualizer(dataset), next(iter(dataset.get_loader(2, 3)))
    for name, magic in (("a.png", b"\x89PNG"), ("b.pdf", b"%PDF")):
        pictures = tmp_path / f"batch-{name}", tmp_path / f"dataset-{name}", tmp_path / f"method-{name}"
        visualizer.visualize(batch, output=pictures[0])
        plot_dataset(dataset, output=str(pictures[1]))
        visualizer.plot_dataset(output=pictures[2])
        assert [path.read_bytes().startswith(magic) for path in pictures] == [True] * 3
    assert live.get_fignums() == []


INTERACTIVE = """
from tests.figure_helpers import dataset_of, film
from buffers.visualization import MatplotlibVisualizer
visualizer, batch = MatplotlibVisualizer(dataset_of()), {"image": film(5)}
"""


@pytest.mark.parametrize("magic", [pytest.param("", marks=pytest.mark.slow), "%matplotlib widget"])
def test_a_cell_of_a_notebook_shows_an_interactive_figure_once(magic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    if magic:
        pytest.importorskip("ipympl")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    cells = [
        f"{magic}\n{INTERACTIVE}",
        "visualizer.visualize(batch, interactive=True)",
        "from matplotlib import pyplot\npyplot.plot([1]);",
        "figure = visualizer.visualize(batch, interactive=True)",
        "figure",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=100, kernel_name="python3").execute()
    # Widgets come with a picture, for viewers that cannot run them. `pyplot.plot` draws into the widget shown before.
    shown = [[output.get("data", {}) for output in cell.outputs] for cell in notebook.cells]
    assert [len(outputs) for outputs in shown] == [0, 1, 0 if magic else 1, 0, 1]
    kind = "application/vnd.jupyter.widget-view+json" if magic else "image/png"
    assert kind in shown[1][0] and kind in shown[4][0]


def test_a_notebook_shows_a_figure_without_pyplot() -> None:
    figure = draw({"x": torch.zeros(1, 3)})
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert figure.get_size_inches()[0] == 9.0


# The slider.


def test_the_slider_highlights_a_step_in_every_panel(live: Any) -> None:
    batch = {
        "image": film(30),
        "points": clouds(list(range(30)), size=30),
        "reward": torch.zeros(1, 30),
        "state": torch.zeros(1, 30, 9),
        "flag": torch.zeros(1, 30, dtype=torch.bool),
        "step": torch.arange(100, 130)[None],
    }
    before = copy.deepcopy(batch)
    figure = draw(batch, cloud_fields(30), interactive=True)
    figure.time_slider.set_val(117)
    for name in ("reward", "state", "flag"):
        assert axes_of(figure, name).lines[-1].get_xdata() == [117, 117]
    images, (cloud,) = axes_of(figure, "image"), clouds_of(figure)
    assert [int(image.get_array()[0, 0, 0]) + 100 for image in images.images] == [*map(int, labels(images))]
    assert "117" in labels(images)
    assert caption(cloud) == "step 117: 17 points" and len(drawn_points(cloud)) == 17
    for step, at in ((100, 0), (129, -1)):
        figure.time_slider.set_val(step)
        assert labels(images)[at] == str(step) and len(drawn_points(cloud)) == step - 100
    assert_equal(batch, before)


def test_the_slider_adds_merged_clouds_and_moves_marks(live: Any) -> None:
    mask = torch.tensor([[True, True, True, False]])
    batch = {"points": clouds([1, 2, 3, 4]), "mask": mask}
    figure = draw(batch, cloud_fields(), merge_pointclouds=True, interactive=True)
    for step, num_points in ((0, 1), (1, 3), (3, 6)):
        figure.time_slider.set_val(step)
        assert len(drawn_points(clouds_of(figure)[0])) == num_points, "padding is skipped"
    figure = draw({"image": film(30), "is_last": torch.arange(30)[None] == 29}, interactive=True)
    for step, num_marks in ((3, 0), (29, 1)):
        figure.time_slider.set_val(step)
        assert len(verticals(axes_of(figure, "image"), "--")) == num_marks


def test_the_slider_moves_stacked_frames_and_clouds_of_several_fields(live: Any) -> None:
    stack = torch.arange(30, dtype=torch.uint8).view(1, 30, 1, 1, 1).expand(1, 30, 4, 8, 8)
    batch = {"stack": stack, "left": clouds(list(range(30)), size=30), "right": clouds([1] * 30)}
    figure = draw(batch, interactive=True, pointclouds=("left", "right"), merge_fields=True)
    figure.time_slider.set_val(17)
    frames = [int(image.get_array()[0, 0, 0]) for image in axes_of(figure, "stack").images]
    assert frames == [step for step in range(12, 22) for _ in range(4)]
    (cloud,) = clouds_of(figure)
    assert caption(cloud) == "step 17: 18 points"


def test_an_interactive_figure_and_its_slider_belong_to_pyplot(live: Any) -> None:
    before = live.get_fignums()
    figure = draw({"x": torch.zeros(1, 1)}, interactive=True)
    gc.collect()
    assert live.get_fignums() == [*before, figure.number]
    figure.time_slider.set_val(0)
    live.close(figure)
    assert live.get_fignums() == before


# Errors.


def test_anything_but_a_source_is_refused() -> None:
    for make in (MatplotlibVisualizer, plot_dataset):
        with pytest.raises(TypeError, match="`dataset` must be an EpisodeSource .*, found ReplayBuffer"):
            make(ReplayBuffer(dataset_of(), batch_size=2))


NUMBERS = {"x": torch.arange(6.0).view(3, 2)}


@pytest.mark.parametrize(
    ("batch", "b", "error", "message"),
    [
        (torch.zeros(2, 3), 0, TypeError, "`batch` must be a dict from field to tensor, found Tensor"),
        ({}, 0, TypeError, r"no tensor of shape \(B, T, \.\.\.\)"),
        ({"x": "text"}, 0, TypeError, r"no tensor of shape \(B, T, \.\.\.\)"),
        ({"x": torch.zeros(3)}, 0, TypeError, r"no tensor of shape \(B, T, \.\.\.\)"),
        ({"obs": torch.zeros(5, 3)}, 0, TypeError, r"`obs` has shape \(5, 3\), expected \(B, T, 3\).*value\[None\]"),
        (NUMBERS, 3, ValueError, "`batch_index`=3 is out of range: the batch has 3 sequences"),
        (NUMBERS, -4, ValueError, "`batch_index` must be at least -3, found -4"),
        (NUMBERS, 1.0, TypeError, "`batch_index` must be an integer, found float"),
        ({"x": torch.zeros(3, 0)}, 0, ValueError, "sequences of no steps"),
    ],
)
def test_what_is_no_sequence_of_a_batch_is_refused(batch: Any, b: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        draw(batch, Fields(obs=Vector(3)), b)
