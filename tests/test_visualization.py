"""What MatplotlibVisualizer draws, told from the artists of its figures."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from buffers import ReplayBuffer
from buffers.dataset.fields import ColorImage, Fields, PaddedPointcloud, Scalar, TensorType, Vector
from buffers.transforms import to_transitions
from buffers.visualization import MatplotlibVisualizer, plot_dataset
from tests import tagged
from tests.figure_helpers import (
    axes_of,
    caption,
    clouds_of,
    curves,
    dataset_of,
    details,
    draw,
    explained,
    labels,
    names,
    rendered,
    spans,
    texts_drawn,
    verticals,
)

ROOT = Path(__file__).parent.parent


# Images.


def pattern(height: int = 6, width: int = 9, channels: int = 3) -> np.ndarray:
    """An image that differs from each of its reflections, and by channel: `(H, W, C)` uint8."""
    rows, columns, channel = np.indices((height, width, channels))
    return (rows * 20 + columns * 7 + channel * 3).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float16, np.float64])
def test_images_of_every_layout_are_the_right_side_up(channels: int, channels_first: bool, dtype: Any) -> None:
    image = pattern(channels=channels)
    frames = np.stack([image, image[::-1], image[:, ::-1]])[None]
    expected = np.repeat(frames[0], 3, -1) if channels == 1 else frames[0]
    if dtype != np.uint8:
        frames = (frames / 255).astype(dtype)
        expected = frames[0].repeat(3, -1) if channels == 1 else frames[0]
    if channels_first:
        frames = frames.transpose(0, 1, 4, 2, 3)
    ax = axes_of(draw({"image": torch.from_numpy(np.ascontiguousarray(frames))}), "image")
    assert len(ax.images) == 3
    for drawn, pixels in zip(ax.images, expected, strict=True):
        assert drawn.origin == "upper"
        left, right, bottom, top = drawn.get_extent()
        assert left < right and bottom < top
        np.testing.assert_allclose(np.asarray(drawn.get_array()), pixels.astype(drawn.get_array().dtype))
    assert not ax.yaxis_inverted() and not ax.xaxis_inverted()
    assert "black" not in details(ax)


def test_the_first_row_of_an_image_is_the_uppermost_on_the_canvas() -> None:
    image = np.zeros((1, 1, 8, 8, 3), np.uint8)
    image[0, 0, 0, :4] = (255, 0, 0)
    figure = draw({"image": torch.from_numpy(image)})
    canvas = rendered(figure)
    box = axes_of(figure, "image").images[0].get_window_extent()
    is_red = (canvas[..., :3] == (255, 0, 0)).all(-1)
    rows, columns = np.nonzero(is_red)
    from_top = len(canvas) - box.y1
    assert rows.min() == pytest.approx(from_top, abs=2) and rows.max() < from_top + box.height / 6
    assert columns.min() == pytest.approx(box.x0, abs=2) and columns.max() < box.x0 + box.width * 0.55


def test_a_film_has_at_most_ten_frames_evenly_spaced_with_their_steps() -> None:
    frames = torch.arange(100, dtype=torch.uint8).view(1, 100, 1, 1, 1).expand(1, 100, 4, 5, 3)
    ax = axes_of(draw({"image": frames}), "image")
    assert labels(ax) == ["0", "11", "22", "33", "44", "55", "66", "77", "88", "99"]
    assert [int(image.get_array()[0, 0, 0]) for image in ax.images] == [int(label) for label in labels(ax)]
    lefts = [image.get_extent()[0] for image in ax.images]
    assert len(set(np.diff(lefts).round(6))) == 1
    short = axes_of(draw({"image": frames[:, :3]}), "image")
    assert labels(short) == ["0", "1", "2"]


def test_frames_are_of_real_rows_and_padding_is_one_more_that_is_shaded() -> None:
    frames = torch.arange(8, dtype=torch.uint8).view(1, 8, 1, 1, 1).expand(1, 8, 4, 5, 3)
    mask = torch.tensor([[True] * 5 + [False] * 3])
    figure = draw({"image": frames, "mask": mask})
    ax = axes_of(figure, "image")
    assert labels(ax) == ["0", "1", "2", "3", "4", "padding"]
    assert len(ax.images) == 5
    (shade,) = ax.collections
    assert shade.get_datalim(ax.transData).x0 > ax.images[-1].get_extent()[1]
    assert explained(figure) == ["padding"]


def test_images_out_of_the_usual_range_are_scaled_and_it_is_said() -> None:
    frames = torch.linspace(-2.0, 6.0, 2 * 4 * 5 * 3).view(1, 2, 4, 5, 3)
    ax = axes_of(draw({"image": frames}), "image")
    assert "-2 is black and 6 white" in details(ax)
    np.testing.assert_allclose(np.asarray(ax.images[1].get_array()), ((frames[0, 1] + 2) / 8).numpy(), atol=1e-6)
    integers = Fields(image=ColorImage((4, 5, 3), torch.int32))
    whole = torch.full((1, 1, 4, 5, 3), 255, dtype=torch.int32)
    ax = axes_of(draw({"image": whole}, integers), "image")
    assert "black" not in details(ax) and float(ax.images[0].get_array().min()) == 1.0
    ax = axes_of(draw({"image": whole * 10 - 1}, integers), "image")
    assert "2.55e+03 is black" in details(ax)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixels_that_are_not_finite_are_of_a_colour_of_their_own(channels: int) -> None:
    frames = torch.full((1, 1, 4, 5, channels), 0.5)
    frames[0, 0, 1, 2, 0], frames[0, 0, 3, 4, -1] = torch.nan, torch.inf
    ax = axes_of(draw({"image": frames}), "image")
    pixels = np.asarray(ax.images[0].get_array())
    assert {to_hex(pixels[1, 2]), to_hex(pixels[3, 4])} == {"#cc79a7"}
    assert to_hex(pixels[0, 0]) == "#808080"
    assert "1 NaN, 1 infinite" in details(ax)


def test_very_wide_images_keep_some_height_and_it_is_said() -> None:
    ax = axes_of(draw({"image": torch.zeros(1, 3, 2, 200, 3, dtype=torch.uint8)}), "image")
    box = ax.images[0].get_window_extent()
    assert box.height > 0.15 * box.width
    assert "not square" in details(ax)
    square = axes_of(draw({"image": torch.zeros(1, 3, 20, 30, 3, dtype=torch.uint8)}), "image")
    box = square.images[0].get_window_extent()
    assert box.height / box.width == pytest.approx(20 / 30, rel=0.01)


def test_the_ends_of_an_episode_are_marked_beside_their_frames() -> None:
    frames = torch.zeros(1, 4, 4, 5, 3, dtype=torch.uint8)
    is_first, is_last = torch.arange(4)[None] == 0, torch.arange(4)[None] == 3
    figure = draw({"image": frames, "is_first": is_first, "is_last": is_last})
    ax = axes_of(figure, "image")
    (start,), (end,) = verticals(ax, "-"), verticals(ax, "--")
    assert start < ax.images[0].get_extent()[0] and end > ax.images[3].get_extent()[1]
    assert explained(figure) == ["first step of an episode", "last step of an episode"]


# Lines, heat maps, marks.


def test_scalars_and_small_vectors_are_lines_against_the_step() -> None:
    reward, action = torch.randn(2, 12), torch.randn(2, 12, 7)
    figure = draw({"reward": reward, "action": action}, b=1)
    (line,) = curves(axes_of(figure, "reward"))
    np.testing.assert_allclose(line.get_xdata(), np.arange(12))
    np.testing.assert_allclose(line.get_ydata(), reward[1].numpy(), rtol=1e-6)
    assert axes_of(figure, "reward").get_legend() is None
    ax = axes_of(figure, "action")
    for i, line in enumerate(curves(ax)):
        np.testing.assert_allclose(line.get_ydata(), action[1, :, i].numpy(), rtol=1e-6)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list("0123456")
    assert len({to_hex(line.get_color()) for line in curves(ax)}) == 7
    assert ax.get_xlabel() == "step of the sequence"
    assert details(ax) == "Vector float32 (7,)"


def test_integers_are_drawn_in_steps_and_floats_are_not() -> None:
    figure = draw({"choice": torch.arange(5)[None], "speed": torch.arange(5.0)[None]})
    assert curves(axes_of(figure, "choice"))[0].get_drawstyle() == "steps-mid"
    assert curves(axes_of(figure, "speed"))[0].get_drawstyle() == "default"


@pytest.mark.parametrize("shape", [(8,), (30,), (2, 3), (2, 3, 4, 5)])
def test_wide_vectors_and_matrices_are_heat_maps_with_the_time_to_the_right(shape: tuple[int, ...]) -> None:
    values = torch.randn(1, 12, *shape)
    ax = axes_of(draw({"state": values}), "state")
    (image,) = ax.images
    np.testing.assert_allclose(np.asarray(image.get_array()), values[0].flatten(1).T.numpy(), rtol=1e-6)
    num = int(np.prod(shape))
    assert tuple(image.get_extent()) == (-0.5, 11.5, num - 0.5, -0.5)
    assert image.origin == "upper" and image.get_cmap().name == "viridis"
    assert image.get_clim() == pytest.approx((float(values.min()), float(values.max())))
    assert ("flattened" in details(ax)) == (len(shape) > 1)


def test_of_a_huge_field_some_components_are_shown_and_it_is_said() -> None:
    values = torch.arange(5000.0).expand(1, 3, 5000)
    ax = axes_of(draw({"state": values}), "state")
    (image,) = ax.images
    assert image.get_array().shape == (1024, 3)
    assert float(image.get_array()[0, 0]) == 0 and float(image.get_array()[-1, 0]) == 4999
    assert "1,024 of 5,000 shown" in details(ax)


def test_flags_are_marks_at_the_steps_where_they_are_true() -> None:
    contact = torch.tensor([[[1, 0], [0, 1], [0, 1], [0, 0]]], dtype=torch.bool)
    figure = draw({"done": contact[..., 1], "contact": contact})
    (marks,) = axes_of(figure, "done").lines
    assert marks.get_xdata().tolist() == [1, 2] and marks.get_linestyle() == "None" and marks.get_marker() != ""
    assert details(axes_of(figure, "done")) == "Scalar bool (), True 2 of 4 times"
    first, second = axes_of(figure, "contact").lines
    assert (first.get_xdata().tolist(), set(first.get_ydata())) == ([0], {0})
    assert (second.get_xdata().tolist(), set(second.get_ydata())) == ([1, 2], {1})


def test_padding_is_shaded_in_every_time_panel_and_not_drawn() -> None:
    mask = torch.tensor([[False] + [True] * 3 + [False] * 2])
    batch = {
        "reward": torch.arange(6.0)[None],
        "state": torch.arange(60.0).view(1, 6, 10),
        "flag": torch.ones(1, 6, dtype=torch.bool),
        "mask": mask,
    }
    figure = draw(batch)
    for name in ("reward", "state", "flag"):
        assert spans(axes_of(figure, name)) == [(-0.5, 0.5), (3.5, 5.5)], name
    (line,) = curves(axes_of(figure, "reward"))
    np.testing.assert_array_equal(line.get_ydata(), [np.nan, 1, 2, 3, np.nan, np.nan])
    image = axes_of(figure, "state").images[0]
    assert np.ma.getmaskarray(image.get_array()).all(0).tolist() == (~mask[0]).tolist()
    assert image.get_clim() == (10.0, 39.0)
    assert axes_of(figure, "flag").lines[0].get_xdata().tolist() == [1, 2, 3]
    assert explained(figure) == ["padding"]
    assert "3 of 6 rows are padding" in figure.get_suptitle()
    assert "mask" not in names(figure)


def test_the_ends_of_episodes_are_marked_in_every_time_panel() -> None:
    batch = {
        "reward": torch.zeros(1, 6),
        "state": torch.zeros(1, 6, 10),
        "is_first": torch.tensor([[0, 0, 1, 0, 0, 0]]).bool(),
        "is_last": torch.tensor([[0, 1, 0, 0, 0, 1]]).bool(),
    }
    figure = draw(batch)
    for name in ("reward", "state"):
        assert verticals(axes_of(figure, name), "-") == [1.5]
        assert verticals(axes_of(figure, name), "--") == [1.5, 5.5]
    assert names(figure) == ["reward", "state"]


def test_a_field_that_is_named_is_first_is_a_panel_and_marks() -> None:
    episode = {"obs": np.zeros((6, 2), np.float32), "is_first": np.arange(6) == 0}
    dataset = dataset_of(None, episode)
    batch = next(iter(dataset.get_loader(1, 6, include=("is_last", "step"))))
    figure = MatplotlibVisualizer(dataset).visualize(batch)
    assert names(figure) == ["obs", "is_first"]
    assert verticals(axes_of(figure, "obs"), "-") == [-0.5] and verticals(axes_of(figure, "obs"), "--") == [5.5]


def test_the_axis_is_the_step_of_the_episode_where_the_batch_has_it() -> None:
    dataset = dataset_of(None, {"x": np.arange(50.0)})
    loader = dataset.get_loader(4, 5, include=("step", "episode", "index", "weight"), seed=0)
    batch = next(iter(loader))
    figure = MatplotlibVisualizer(dataset).visualize(batch, 2)
    rendered(figure)
    ax = axes_of(figure, "x")
    first = int(batch["step"][2, 0])
    assert first > 0
    (line,) = curves(ax)
    np.testing.assert_array_equal(line.get_xdata(), line.get_ydata())
    assert ax.get_xlabel() == "step of the episode"
    assert figure.get_suptitle().split("  ·  ") == [
        "sequence 2 of 4",
        "episode 0",
        f"steps {first} to {first + 4} of the episode",
        "weight 1",
    ]
    assert names(figure) == ["x"]


def test_steps_that_a_transform_has_left_out_are_counted_in_the_sequence() -> None:
    batch = {"x": torch.zeros(1, 3), "step": torch.tensor([[0, 4, 8]])}
    ax = axes_of(draw(batch), "x")
    assert ax.get_xlabel() == "step of the sequence"
    assert curves(ax)[0].get_xdata().tolist() == [0, 1, 2]


def test_the_axis_goes_on_in_padding() -> None:
    batch = {
        "x": torch.zeros(1, 4),
        "step": torch.tensor([[7, 8, -1, -1]]),
        "mask": torch.tensor([[1, 1, 0, 0]]).bool(),
    }
    ax = axes_of(draw(batch), "x")
    assert curves(ax)[0].get_xdata().tolist() == [7, 8, 9, 10] and spans(ax) == [(8.5, 10.5)]


def test_time_panels_lie_one_below_the_other_and_the_last_of_a_run_has_the_numbers() -> None:
    batch = {
        "a": torch.zeros(1, 9),
        "b": torch.randn(1, 9, 20),
        "image": torch.zeros(1, 9, 4, 5, 3, dtype=torch.uint8),
        "c": torch.randn(1, 9, 3),
    }
    figure = draw(batch)
    boxes = [axes_of(figure, name).get_position() for name in "abc"]
    assert len({(round(box.x0, 4), round(box.x1, 4)) for box in boxes}) == 1
    assert [axes_of(figure, name).get_xlabel() for name in "abc"] == ["", *["step of the sequence"] * 2]
    axes_of(figure, "a").set_xlim(2, 3)
    assert axes_of(figure, "c").get_xlim() == (2, 3)


# Values of all kinds.


def test_numbers_that_are_not_finite_leave_gaps_that_are_marked_and_counted() -> None:
    values = torch.tensor([[0.0, torch.nan, 2.0, torch.inf, -torch.inf, 5.0]])
    figure = draw({"x": values, "wide": values[..., None].expand(1, 6, 9)})
    ax = axes_of(figure, "x")
    np.testing.assert_array_equal(curves(ax)[0].get_ydata(), [0, np.nan, 2, np.nan, np.nan, 5])
    (odd,) = [line for line in ax.lines if line.get_label() == "NaN or infinite"]
    assert odd.get_xdata().tolist() == [1, 3, 4]
    assert "1 NaN, 2 infinite" in details(ax) and explained(figure) == ["NaN or infinite"]
    assert ax.get_ylim()[1] < 10
    assert axes_of(figure, "wide").images[0].get_clim() == (0.0, 5.0)


def test_a_point_without_neighbours_is_seen_in_a_long_sequence() -> None:
    values = torch.full((1, 500), torch.nan)
    values[0, :100], values[0, 300] = 1.0, 2.0
    (line,) = curves(axes_of(draw({"x": values}), "x"))
    assert line.get_markevery() == [300]


@pytest.mark.parametrize(
    "dtype",
    ["bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"]
    + ["float16", "bfloat16", "float32", "float64", "complex64", "complex128", "float8_e5m2"],
)
@pytest.mark.parametrize("shape", [(), (3,), (20,), (4, 5), (6, 7, 3)])
def test_every_dtype_and_shape_is_drawn(dtype: str, shape: tuple[int, ...]) -> None:
    values = (torch.arange(5 * int(np.prod(shape))).view(1, 5, *shape) % 100).to(getattr(torch, dtype))
    figure = draw({"x": values}, b=-1)
    assert names(figure) == ["x"] and dtype in details(axes_of(figure, "x"))
    if shape == () and dtype != "bool":
        expected = values.abs() if values.is_complex() else values
        assert curves(axes_of(figure, "x"))[0].get_ydata().tolist() == expected[0].double().tolist()


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 64, 3), (0, 3)])
def test_a_field_of_no_size_has_a_row_that_says_so(shape: tuple[int, ...]) -> None:
    figure = draw({"empty": torch.zeros(2, 5, *shape), "x": torch.zeros(2, 5)})
    assert details(axes_of(figure, "empty")).endswith("nothing to draw")
    assert names(figure) == ["empty", "x"]


def many_fields(length: int, num_sequences: int = 2, seed: int = 0) -> dict[str, Any]:
    leading, generator = (num_sequences, length), torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*leading, *shape, generator=generator)

    return {
        "obs": {
            "image": (randn(12, 16, 3) * 50 + 100).clamp(0, 255).byte(),
            "depth": randn(1, 12, 16).sigmoid(),
            "points": randn(30, 3) * torch.tensor([1.0, 2.0, 0.5]),
            "state": randn(24),
            "of_a_name_so_long": {
                "that_it_does_not_fit_into": {"a_row_of_the_figure_as_it_stands": torch.zeros(leading)}
            },
        },
        "action": randn(4),
        "choice": torch.arange(length).expand(leading),
        "large": torch.arange(length).expand(leading) + 10**12,
        "reward": randn() * 1e-7,
        "terminated": torch.zeros(leading, dtype=torch.bool),
        "contacts": randn(4) > 0,
        "matrix": randn(4, 6),
        "$odd_{name}$": torch.full(leading, torch.nan),
        "mask": torch.arange(length).expand(leading) < max(1, length - 3),
        "is_first": torch.arange(length).expand(leading) == 0,
        "is_last": torch.arange(length).expand(leading) == max(1, length - 3) - 1,
        "step": torch.arange(length).expand(leading) + 100,
    }


def points_field() -> Fields:
    return Fields(obs={"points": PaddedPointcloud((30, 3))})


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("interactive", [False, True])
def test_no_label_overlaps_another_with_thirteen_fields(length: int, interactive: bool, live: Any) -> None:
    figure = draw(many_fields(length), points_field(), interactive=interactive)
    if interactive:
        figure.time_slider.set_val(100 + length // 2)
    assert len(names(figure)) == 13
    boxes = [(text, text.get_window_extent()) for text in texts_drawn(figure)]
    assert len(boxes) > 50
    for text, box in boxes:
        assert box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1, text
        assert box.y0 >= -1 and box.y1 <= figure.bbox.y1 + 1, text
    for i, (one, box) in enumerate(boxes):
        for other, other_box in boxes[i + 1 :]:
            assert not box.padded(-1).overlaps(other_box.padded(-1)), (one, other)


# Point clouds.


def clouds(num_points: list[int], size: int = 20, features: int = 0) -> torch.Tensor:
    """`(1, T, size, 3 + features)`, of which step t has so many points, the others NaN; x is the step."""
    cloud = torch.full((1, len(num_points), size, 3 + features), torch.nan)
    for t, num in enumerate(num_points):
        cloud[0, t, :num] = torch.rand(num, 3 + features)
        cloud[0, t, :num, 0] = t
    return cloud


def cloud_fields(size: int = 20, features: int = 0) -> Fields:
    return Fields(points=PaddedPointcloud((size, 3 + features)))


def drawn_points(ax: Any) -> np.ndarray:
    (scatter,) = ax.collections
    return np.stack(scatter._offsets3d, -1)


def test_point_clouds_are_drawn_in_3d_at_four_steps_without_their_padding() -> None:
    cloud = clouds([5, 6, 7, 0, 9, 10, 11])
    figure = draw({"points": cloud}, cloud_fields())
    found = clouds_of(figure)
    assert [caption(ax) for ax in found] == [
        "step 0: 5 points",
        "step 2: 7 points",
        "step 4: 9 points",
        "step 6: 11 points",
    ]
    for ax, (t, num) in zip(found, ((0, 5), (2, 7), (4, 9), (6, 11)), strict=True):
        np.testing.assert_allclose(drawn_points(ax), cloud[0, t, :num].numpy())
        assert (ax.get_xlim(), ax.get_zlim()) == (found[0].get_xlim(), found[0].get_zlim())
    assert names(figure) == ["points"] and "coloured by z" in details(found[0])


def test_merged_point_clouds_are_one_picture_of_the_real_steps_coloured_by_them() -> None:
    cloud = clouds([5, 6, 7, 8])
    mask = torch.tensor([[True, True, True, False]])
    figure = draw({"points": cloud, "mask": mask}, cloud_fields(), merge_pointclouds=True)
    (ax,) = clouds_of(figure)
    points = drawn_points(ax)
    assert len(points) == 5 + 6 + 7
    np.testing.assert_array_equal(ax.collections[0].get_array(), points[:, 0])
    assert caption(ax) == "step 0 to 2: 18 points"
    assert "coloured by step" in details(ax)


def test_point_clouds_in_padding_are_left_out() -> None:
    mask = torch.tensor([[False, True, True, False]])
    figure = draw({"points": clouds([5, 6, 7, 8]), "mask": mask}, cloud_fields())
    assert [caption(ax) for ax in clouds_of(figure)] == ["step 1: 6 points", "step 2: 7 points"]
    nothing = draw({"points": clouds([5, 6]), "mask": torch.zeros(1, 2, dtype=torch.bool)}, cloud_fields())
    assert clouds_of(nothing) == [] and details(axes_of(nothing, "points")).endswith("all rows are padding")


def test_point_clouds_are_coloured_by_their_first_feature() -> None:
    cloud = clouds([4], features=2)
    (ax,) = clouds_of(draw({"points": cloud}, cloud_fields(features=2)))
    np.testing.assert_allclose(ax.collections[0].get_array(), cloud[0, 0, :4, 3].numpy())
    assert "coloured by feature 3" in details(ax)


def test_of_very_many_points_some_are_shown_and_it_is_said() -> None:
    cloud = clouds([9000], size=9000)
    (ax,) = clouds_of(draw({"points": cloud}, cloud_fields(9000)))
    assert len(drawn_points(ax)) == 4000 and "at most 4,000 points" in details(ax)


def test_empty_and_flat_point_clouds_are_drawn() -> None:
    (empty,) = clouds_of(draw({"points": clouds([0])}, cloud_fields()))
    assert len(drawn_points(empty)) == 0
    flat = clouds([6])
    flat[..., 1:] = 0.0
    (ax,) = clouds_of(draw({"points": flat}, cloud_fields()))
    assert len(drawn_points(ax)) == 6


# Which fields are what.


def test_the_dataset_says_what_a_field_is() -> None:
    fields = Fields(
        obs={"image": ColorImage((4, 5, 3)), "grid": TensorType((4, 5, 3), torch.uint8)},
        points=PaddedPointcloud((20, 3)),
    )
    batch = {
        "obs": {name: torch.zeros(1, 2, 4, 5, 3, dtype=torch.uint8) for name in ("image", "grid")},
        "points": clouds([3, 3]),
    }
    figure = draw(batch, fields)
    assert names(figure) == ["obs/image", "obs/grid", "points"]
    assert len(axes_of(figure, "obs/image").images) == 2
    (heat,) = axes_of(figure, "obs/grid").images
    assert heat.get_array().shape == (60, 2)
    assert len(clouds_of(figure)) == 2
    # Without it, a cloud looks like any matrix.
    assert len(clouds_of(draw(batch))) == 0


def test_transforms_that_change_dtype_or_size_leave_a_field_what_it_is() -> None:
    fields = Fields(points=PaddedPointcloud((20, 3)), image=ColorImage((4, 5, 3)))
    batch = {"points": clouds([3, 3])[:, :, :10].half(), "image": torch.zeros(1, 2, 8, 9, 1)}
    figure = draw(batch, fields)
    assert len(clouds_of(figure)) == 2 and len(axes_of(figure, "image").images) == 2
    # What cannot be that any more is judged by its shape.
    figure = draw({"points": torch.zeros(1, 2), "image": torch.zeros(1, 2, 9)}, fields)
    assert len(curves(axes_of(figure, "points"))) == 1
    assert axes_of(figure, "image").images[0].get_array().shape == (9, 2)


def test_transitions_are_drawn_as_what_they_were_made_of() -> None:
    fields = Fields(
        obs={"points": PaddedPointcloud((20, 3)), "x": Scalar()}, action=Vector(2), reward=Scalar(),
        terminated=Scalar((), torch.bool), truncated=Scalar((), torch.bool),
    )  # fmt: skip
    episode = {
        "obs": {"points": clouds([3] * 6)[0], "x": torch.arange(6.0)},
        "action": torch.zeros(6, 2),
        "reward": torch.zeros(6),
        "terminated": torch.arange(6) == 5,
        "truncated": torch.zeros(6, dtype=torch.bool),
    }
    dataset = dataset_of(fields, episode)
    batch = next(iter(dataset.get_loader(2, 6, include=("step", "is_first"), transform=to_transitions)))
    figure = MatplotlibVisualizer(dataset).visualize(batch)
    assert names(figure) == [
        "obs/points", "obs/x", "action", "reward", "terminated", "truncated", "next_obs/points", "next_obs/x",
    ]  # fmt: skip
    assert len(clouds_of(figure)) == 8
    (line,) = curves(axes_of(figure, "next_obs/x"))
    assert line.get_ydata().tolist() == [1, 2, 3, 4, 5]


def test_what_has_no_time_is_told_in_the_title() -> None:
    batch = {
        "x": torch.zeros(4, 5),
        "y": torch.zeros(4, 5, 2),
        "priority": torch.tensor([0.0, 0.25, 0.5, 0.75]),
        "embedding": torch.zeros(4, 128),
        "$\\frac{$": torch.zeros(4),
        "name": "run 3",
    }
    figure = draw(batch, b=3)
    assert names(figure) == ["x", "y"]
    title = " ".join(figure.get_suptitle().split())
    # A name is text, not mathematics.
    assert "priority 0.75" in title and "$\\frac{$ 0" in title and "embedding (4, 128), name str" in title


def test_fields_that_are_named_like_what_include_adds_are_panels() -> None:
    fields = Fields(mask=Vector(2), step=Scalar(), weight=Scalar())
    figure = draw({"mask": torch.zeros(1, 4, 2), "step": torch.zeros(1, 4), "weight": torch.ones(1, 4)}, fields)
    assert names(figure) == ["mask", "step", "weight"]
    assert all(spans(axes_of(figure, name)) == [] for name in names(figure))


# What it leaves alone.


def test_the_batch_is_unchanged() -> None:
    batch = many_fields(10)
    batch["obs"]["points"][0, :, 20:] = torch.nan
    before = copy.deepcopy(batch)
    draw(batch, points_field())
    flat, flat_before = tagged.flatten(batch), tagged.flatten(before)
    assert list(flat) == list(flat_before)
    for name, value in flat.items():
        torch.testing.assert_close(value, flat_before[name], rtol=0, atol=0, equal_nan=True)


def test_the_figure_does_not_change_with_the_batch() -> None:
    # Batches from workers lie in memory that is used again.
    batch = many_fields(10)
    figure = draw(batch, points_field())
    figure.set_layout_engine("none")
    before = rendered(figure).copy()
    for value in tagged.flatten(batch).values():
        if value.is_contiguous():
            value.zero_()
    np.testing.assert_array_equal(rendered(figure), before)


def test_arrays_that_must_not_be_written_to_are_drawn() -> None:
    values = np.arange(10.0).reshape(1, 10)
    values.setflags(write=False)
    (line,) = curves(axes_of(draw({"x": values}), "x"))
    assert line.get_ydata().tolist() == values[0].tolist()


def test_gradients_do_not_matter() -> None:
    values = torch.arange(3.0, requires_grad=True)[None]
    assert curves(axes_of(draw({"x": values}), "x"))[0].get_ydata().tolist() == [0, 1, 2]


def test_fifty_figures_leave_nothing_behind() -> None:
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    visualizer = MatplotlibVisualizer(dataset_of())
    figures = [
        weakref.ref(visualizer.visualize({"x": torch.zeros(1, 4), "y": torch.zeros(1, 4, 9)})) for _ in range(50)
    ]
    gc.collect()
    assert pyplot.get_fignums() == before
    assert [figure for figure in figures if figure() is not None] == []


def test_no_global_state_is_touched_and_pyplot_is_not_imported(tmp_path: Path) -> None:
    code = """
import random, sys
import numpy, torch, matplotlib
# Asking for the backend would choose one.
settings = lambda: {key: dict.__getitem__(matplotlib.rcParams, key) for key in sorted(matplotlib.rcParams.keys())}
state = lambda: (settings(), random.getstate(), numpy.random.get_state()[1].tolist(),
                 torch.get_rng_state().tolist(), torch.get_num_threads())
before = state()
from buffers.dataset import RingBufferDataset
from buffers.visualization import MatplotlibVisualizer
dataset = RingBufferDataset(100)
dataset.add_episode({"x": torch.zeros(9), "image": torch.zeros(9, 4, 5, 3), "reward": torch.zeros(9)})
visualizer = MatplotlibVisualizer(dataset)
visualizer.visualize(next(iter(dataset.get_loader(2, 5)))).savefig("a.png")
visualizer.plot_dataset().savefig("b.png")
assert state() == before
print("matplotlib.pyplot" in sys.modules, settings()["backend"].__class__.__name__)
"""
    command = [sys.executable, "-W", "error", "-c", code]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    # The backend is still to be chosen.
    assert found.stdout.split() == ["False", "object"]


def test_a_dark_style_shows_its_marks() -> None:
    with matplotlib.rc_context({"figure.facecolor": "black", "axes.edgecolor": "white", "axes.facecolor": "black"}):
        ax = axes_of(draw({"x": torch.zeros(1, 3), "is_first": torch.tensor([[True, False, False]])}), "x")
    (start,) = [line for line in ax.lines if line.get_label() == "first step of an episode"]
    assert to_hex(start.get_color()) == "#ffffff"


def test_a_notebook_shows_a_figure_without_pyplot() -> None:
    figure = draw({"x": torch.zeros(1, 3)})
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert figure.get_size_inches()[0] == 9.0


def test_hundreds_of_fields_stay_below_what_can_be_rendered() -> None:
    figure = MatplotlibVisualizer(dataset_of()).visualize({f"field{i}": torch.zeros(1, 2) for i in range(300)})
    assert len(names(figure)) == 300
    assert figure.get_size_inches()[1] * figure.dpi < 2**16


# The slider.


@pytest.fixture
def live() -> Any:
    from matplotlib import pyplot

    # No windows, and a canvas that can be read.
    pyplot.switch_backend("agg")
    yield pyplot
    pyplot.close("all")


def slid(figure: Any, x: float) -> None:
    figure.time_slider.set_val(x)


def test_the_slider_points_at_a_step_in_every_panel(live: Any) -> None:
    frames = torch.arange(30, dtype=torch.uint8).view(1, 30, 1, 1, 1).expand(1, 30, 4, 5, 3)
    batch = {
        "image": frames,
        "points": clouds(list(range(30)), size=30),
        "reward": torch.zeros(1, 30),
        "state": torch.zeros(1, 30, 9),
        "flag": torch.zeros(1, 30, dtype=torch.bool),
        "step": torch.arange(100, 130)[None],
    }
    before = copy.deepcopy(batch)
    figure = draw(batch, cloud_fields(30), interactive=True)
    slid(figure, 117)
    for name in ("reward", "state", "flag"):
        assert axes_of(figure, name).lines[-1].get_xdata() == [117, 117]
    film = axes_of(figure, "image")
    assert labels(film) == [str(step) for step in range(112, 122)]
    assert [int(image.get_array()[0, 0, 0]) for image in film.images] == list(range(12, 22))
    left, right = film.images[5].get_extent()[:2]
    outline = film.lines[-1].get_xdata() if len(film.lines[-1].get_xdata()) == 5 else film.lines[0].get_xdata()
    assert min(outline) < left < right < max(outline)
    (cloud,) = clouds_of(figure)
    assert caption(cloud) == "step 117: 17 points" and len(drawn_points(cloud)) == 17
    slid(figure, 100)
    assert labels(film)[0] == "100" and len(drawn_points(cloud)) == 0
    slid(figure, 129)
    assert labels(film)[-1] == "129" and len(drawn_points(cloud)) == 29
    for name, value in batch.items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_the_slider_lets_merged_clouds_grow_and_skips_padding(live: Any) -> None:
    batch = {"points": clouds([1, 2, 3, 4]), "mask": torch.tensor([[True, True, True, False]])}
    figure = draw(batch, cloud_fields(), merge_pointclouds=True, interactive=True)
    (ax,) = clouds_of(figure)
    assert len(drawn_points(ax)) == 1
    slid(figure, 1)
    assert len(drawn_points(ax)) == 3
    slid(figure, 3)
    assert len(drawn_points(ax)) == 6


def test_marks_of_a_film_move_with_its_frames(live: Any) -> None:
    frames = torch.zeros(1, 30, 4, 5, 3, dtype=torch.uint8)
    figure = draw({"image": frames, "is_last": torch.arange(30)[None] == 29}, interactive=True)
    ax = axes_of(figure, "image")
    slid(figure, 3)
    assert verticals(ax, "--") == []
    slid(figure, 29)
    assert len(verticals(ax, "--")) == 1


def test_an_interactive_figure_is_pyplots_and_its_slider_lives_with_it(live: Any) -> None:
    before = live.get_fignums()
    figure = draw({"x": torch.zeros(1, 1)}, interactive=True)
    gc.collect()
    assert live.get_fignums() == [*before, figure.number]
    slid(figure, 0)
    live.close(figure)
    assert live.get_fignums() == before


# Errors.


def test_what_is_no_dataset_or_no_batch_is_a_type_error() -> None:
    dataset = dataset_of(None, tagged.episode(5, 0))
    buffer = ReplayBuffer(dataset, batch_size=2)
    with pytest.raises(TypeError, match="`dataset` must be an EpisodeSource .*, found ReplayBuffer"):
        MatplotlibVisualizer(buffer)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`dataset` must be an EpisodeSource .*, found dict"):
        plot_dataset({})  # type: ignore[arg-type]
    visualizer = MatplotlibVisualizer(dataset)
    with pytest.raises(TypeError, match="`batch` must be a dict from field to tensor, found Tensor"):
        visualizer.visualize(torch.zeros(2, 3))
    for batch in ({}, {"x": "text"}, {"x": torch.zeros(3)}):
        with pytest.raises(TypeError, match=r"no tensor of shape \(B, T, \.\.\.\)"):
            visualizer.visualize(batch)
    with pytest.raises(TypeError, match=r"`obs/state` has shape \(5, 3\), expected \(B, T, 3\).*value\[None\]"):
        visualizer.visualize(dataset.get_episode(0))


def test_an_index_out_of_range_and_sequences_of_no_steps_are_value_errors() -> None:
    visualizer = MatplotlibVisualizer(dataset_of())
    batch = {"x": torch.arange(6.0).view(3, 2)}
    with pytest.raises(ValueError, match="`batch_index`=3 is out of range: the batch has 3 sequences"):
        visualizer.visualize(batch, 3)
    with pytest.raises(ValueError, match="`batch_index` must be at least -3, found -4"):
        visualizer.visualize(batch, -4)
    with pytest.raises(TypeError, match="`batch_index` must be an integer, found float"):
        visualizer.visualize(batch, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sequences of no steps"):
        visualizer.visualize({"x": torch.zeros(3, 0)})
    assert curves(axes_of(visualizer.visualize(batch, -1), "x"))[0].get_ydata().tolist() == [4, 5]


def test_without_matplotlib_the_error_names_the_extra() -> None:
    code = "import sys; sys.modules['matplotlib'] = None; import buffers.viewing.scenes; import buffers.visualization"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert found.returncode == 1
    assert "ImportError: `buffers.visualization` needs matplotlib" in found.stderr
    assert "pip install 'buffers[extras]'" in found.stderr
    assert "in <module>\n    from matplotlib.figure import Figure" in found.stderr
