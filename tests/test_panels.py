"""What each kind of field looks like in the figures of MatplotlibVisualizer, told from their artists."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from buffers.dataset.fields import ColorImage, Fields, Scalar
from buffers.visualization import MatplotlibVisualizer
from tests.figure_helpers import (
    assert_texts_are_apart,
    axes_of,
    caption,
    cloud_fields,
    clouds,
    clouds_of,
    curves,
    dataset_of,
    details,
    draw,
    drawn_points,
    film,
    labels,
    legend_of,
    names,
    panel,
    rendered,
    spans,
    verticals,
)

# Images.


@pytest.mark.parametrize(("channels", "channels_first"), [(1, False), (1, True), (3, False), (3, True), (4, False)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float16])
def test_images_of_every_layout_are_the_right_side_up(channels: int, channels_first: bool, dtype: Any) -> None:
    # It differs from each of its reflections, and by channel.
    row, column, channel = np.indices((6, 9, channels))
    image = (row * 20 + column * 7 + channel * 3).astype(np.uint8)
    frames = np.stack([image, image[::-1], image[:, ::-1]])[None]
    if dtype != np.uint8:
        frames = (frames / 255).astype(dtype)
    expected = frames[0].repeat(3, -1) if channels == 1 else frames[0]
    if channels_first:
        frames = frames.transpose(0, 1, 4, 2, 3)
    ax = panel(torch.from_numpy(np.ascontiguousarray(frames)))
    assert len(ax.images) == 3
    for drawn, pixels in zip(ax.images, expected, strict=True):
        np.testing.assert_allclose(np.asarray(drawn.get_array()), pixels.astype(drawn.get_array().dtype))
    assert "black" not in details(ax)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", [(8, 9), (4, 8, 9), (2, 8, 9), (8, 8, 9)])
def test_gray_images_and_stacks_are_filmstrips_of_every_frame(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    frames = torch.arange(3 * int(np.prod(shape))).view(1, 3, *shape) % 251
    frames = frames.to(torch.uint8) if dtype == torch.uint8 else frames / 251
    declared = [Fields(x=ColorImage(shape, dtype))] if shape in ((8, 9), (4, 8, 9)) else []
    for fields in (None, *declared):
        ax = axes_of(draw({"x": frames}, fields), "x")
        expected = frames[0].reshape(-1, 8, 9, 1).expand(-1, -1, -1, 3)
        assert len(ax.images) == len(expected)
        for drawn, pixels in zip(ax.images, expected, strict=True):
            np.testing.assert_allclose(np.asarray(drawn.get_array()), pixels.numpy())
        # The frames of a step lie in one column, the first on top, and share its label.
        lefts = np.array([image.get_extent()[0] for image in ax.images]).reshape(3, -1)
        bottoms = np.array([image.get_extent()[2] for image in ax.images]).reshape(3, -1)
        assert (np.ptp(lefts, 1) == 0).all() and (np.diff(lefts[:, 0]) > 9).all()
        assert (np.diff(bottoms) < -8).all() and labels(ax) == ["0", "1", "2"]
        num = len(expected) // 3
        assert (f"{num} frames a step" in details(ax)) == (num > 1)


def test_depth_is_a_filmstrip_from_the_nearest_to_the_farthest() -> None:
    depth = torch.linspace(0.5, 12.5, 2 * 60 * 80).view(1, 2, 60, 80)
    depth[0, 0, 0, 0] = torch.inf
    ax = panel(depth)
    assert "is black and 12.5 white" in details(ax) and "1 infinite" in details(ax)
    pixels = np.asarray(ax.images[1].get_array())
    np.testing.assert_allclose(pixels[..., 0], (depth[0, 1].numpy() - 0.5) / 12, atol=1e-3)


def test_matrices_and_what_cannot_be_pixels_are_no_pictures() -> None:
    for values in (torch.zeros(1, 2, 7, 9), torch.zeros(1, 2, 30, 3), torch.zeros(1, 2, 9, 9, dtype=torch.int64)):
        assert "flattened" in details(panel(values))
    assert "flattened" in details(panel(torch.zeros(1, 2, 9, 8, 8)))


def test_first_row_of_an_image_is_on_top() -> None:
    image = torch.zeros(1, 1, 8, 8, 3, dtype=torch.uint8)
    image[0, 0, 0, :4] = torch.tensor([255, 0, 0])
    figure = draw({"image": image})
    canvas = rendered(figure)
    box = axes_of(figure, "image").images[0].get_window_extent()
    rows, columns = np.nonzero((canvas[..., :3] == (255, 0, 0)).all(-1))
    from_top = len(canvas) - box.y1
    assert rows.min() == pytest.approx(from_top, abs=2) and rows.max() < from_top + box.height / 6
    assert columns.min() == pytest.approx(box.x0, abs=2) and columns.max() < box.x0 + box.width * 0.55


def test_at_most_ten_real_frames_are_drawn_evenly_spaced() -> None:
    ax = panel(film(100))
    assert labels(ax) == [str(step) for step in range(0, 100, 11)]
    assert [int(image.get_array()[0, 0, 0]) for image in ax.images] == list(range(0, 100, 11))
    figure = draw({"image": film(8), "mask": torch.arange(8)[None] < 5})
    assert labels(axes_of(figure, "image")) == ["0", "1", "2", "3", "4", "padding"]
    assert len(axes_of(figure, "image").images) == 5 and legend_of(figure) == ["padding"]


def test_images_of_unusual_ranges_are_scaled_with_a_note() -> None:
    frames = torch.linspace(-2.0, 6.0, 2 * 4 * 5 * 3).view(1, 2, 4, 5, 3)
    ax = panel(frames)
    assert "-2 is black and 6 white" in details(ax)
    np.testing.assert_allclose(np.asarray(ax.images[1].get_array()), ((frames[0, 1] + 2) / 8).numpy(), atol=1e-6)
    fields = Fields(image=ColorImage((4, 5, 3), torch.int32))
    for pixel, details_have_range in ((255, False), (2549, True)):
        whole = torch.full((1, 1, 4, 5, 3), pixel, dtype=torch.int32)
        assert ("is black" in details(axes_of(draw({"image": whole}, fields), "image"))) is details_have_range


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixels_that_are_not_finite_have_their_own_colour(channels: int) -> None:
    frames = torch.full((1, 1, 4, 5, channels), 0.5)
    frames[0, 0, 1, 2, 0], frames[0, 0, 3, 4, -1] = torch.nan, torch.inf
    ax = panel(frames)
    pixels = np.asarray(ax.images[0].get_array())
    assert {to_hex(pixels[1, 2]), to_hex(pixels[3, 4])} == {"#cc79a7"}
    assert to_hex(pixels[0, 0]) == "#808080"
    assert "1 NaN, 1 infinite" in details(ax)


def test_ends_of_an_episode_are_marked_beside_their_frames() -> None:
    figure = draw({"image": film(4), "is_first": torch.arange(4)[None] == 0, "is_last": torch.arange(4)[None] == 3})
    ax = axes_of(figure, "image")
    (start,), (end,) = verticals(ax, "-"), verticals(ax, "--")
    assert start < ax.images[0].get_extent()[0] and end > ax.images[3].get_extent()[1]
    assert legend_of(figure) == ["first step of an episode", "last step of an episode"]


# Point clouds.


def test_point_clouds_are_drawn_at_four_steps_without_padding() -> None:
    cloud = clouds([5, 6, 7, 0, 9, 10, 11])
    figure = draw({"points": cloud}, cloud_fields())
    found = clouds_of(figure)
    sizes = {0: 5, 2: 7, 4: 9, 6: 11}
    assert [caption(ax) for ax in found] == [f"step {t}: {num} points" for t, num in sizes.items()]
    for ax, (t, num) in zip(found, sizes.items(), strict=True):
        np.testing.assert_allclose(drawn_points(ax), cloud[0, t, :num].numpy())
        assert (ax.get_xlim(), ax.get_zlim()) == (found[0].get_xlim(), found[0].get_zlim())
    assert names(figure) == ["points"] and "coloured by z" in details(found[0])


def test_merged_clouds_hold_real_steps_in_their_colours() -> None:
    batch = {"points": clouds([5, 6, 7, 8]), "mask": torch.tensor([[True, True, True, False]])}
    (ax,) = clouds_of(draw(batch, cloud_fields(), merge_pointclouds=True))
    points = drawn_points(ax)
    assert len(points) == 5 + 6 + 7
    np.testing.assert_array_equal(ax.collections[0].get_array(), points[:, 0])
    assert caption(ax) == "step 0 to 2: 18 points" and "coloured by step" in details(ax)


def test_point_clouds_in_padding_are_left_out() -> None:
    points = clouds([5, 6, 7, 8])
    figure = draw({"points": points, "mask": torch.tensor([[False, True, True, False]])}, cloud_fields())
    assert [caption(ax) for ax in clouds_of(figure)] == ["step 1: 6 points", "step 2: 7 points"]
    nothing = draw({"points": points, "mask": torch.zeros(1, 4, dtype=torch.bool)}, cloud_fields())
    assert clouds_of(nothing) == [] and details(axes_of(nothing, "points")).endswith("all rows are padding")


def test_coloured_huge_empty_and_flat_clouds_are_drawn() -> None:
    cloud = clouds([4], features=2)
    (ax,) = clouds_of(draw({"points": cloud}, cloud_fields(features=2)))
    np.testing.assert_allclose(ax.collections[0].get_array(), cloud[0, 0, :4, 3].numpy())
    assert "coloured by feature 3" in details(ax)
    (huge,) = clouds_of(draw({"points": clouds([9000], size=9000)}, cloud_fields(9000)))
    assert len(drawn_points(huge)) == 4000 and "at most 4,000 points" in details(huge)
    flat = clouds([6])
    flat[..., 1:] = 0.0
    for cloud, num_points in ((clouds([0]), 0), (flat, 6)):
        figure = draw({"points": cloud}, cloud_fields())
        rendered(figure)
        assert len(drawn_points(clouds_of(figure)[0])) == num_points


def test_fields_named_as_point_clouds_are_drawn_as_such() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.rand(1, 3, 10, size, generator=generator) for size in (3, 4))
    right[..., 3] = torch.arange(10) < 6
    batch = {"obs": {"left": left, "right": right.half()}, "next_obs": {"right": right}}
    figure = draw(batch, pointclouds=["obs/left", "obs/right"])
    assert names(figure) == ["obs/left", "obs/right", "next_obs/right"] and len(clouds_of(figure)) == 9
    for ax in clouds_of(figure)[:3]:
        assert caption(ax).endswith(": 10 points")
    # The fourth number of a point is its mask.
    for t, ax in enumerate(clouds_of(figure)[6:]):
        np.testing.assert_allclose(drawn_points(ax), right[0, t, :6, :3].numpy())
        assert caption(ax) == f"step {t}: 6 points"
    assert "PaddedPointcloud float32 (10, 4), coloured by z" in details(axes_of(figure, "next_obs/right"))
    merged = axes_of(draw({"a": left, "b": right}, pointclouds=("a", "b"), merge_fields=True), "a, b")
    types = "PaddedPointcloud float32 (10, 3), PaddedPointcloud float32 (10, 4)"
    assert details(merged) == f"{types}, coloured by field"
    (ax,) = clouds_of(draw(batch, pointclouds="obs/right", merge_pointclouds=True))[:1]
    assert caption(ax) == "step 0 to 2: 18 points"


def test_a_mask_that_is_nan_or_of_a_declared_cloud_counts_too() -> None:
    cloud = clouds([3], features=1)
    cloud[0, 0, :3, 3] = torch.tensor([1.0, 0.0, torch.nan])
    (ax,) = clouds_of(draw({"points": cloud}, cloud_fields(features=1), pointclouds=("points",)))
    assert caption(ax) == "step 0: 1 points"
    # Unless it is named, the fourth number is a feature.
    (ax,) = clouds_of(draw({"points": cloud}, cloud_fields(features=1)))
    assert caption(ax) == "step 0: 3 points" and "coloured by feature 3" in details(ax)


def test_point_clouds_of_several_fields_are_merged_on_request() -> None:
    left, right = clouds([2, 3, 4]), clouds([5, 6, 7])
    batch = {"left": left, "x": torch.zeros(1, 3), "right": right}
    named = {"pointclouds": ("left", "right"), "merge_fields": True}
    figure = draw(batch, **named)
    assert names(figure) == ["left, right", "x"]
    assert [caption(ax) for ax in clouds_of(figure)] == ["step 0: 7 points", "step 1: 9 points", "step 2: 11 points"]
    ax = clouds_of(figure)[1]
    np.testing.assert_allclose(drawn_points(ax), torch.cat([left[0, 1, :3], right[0, 1, :6]]).numpy())
    drawn = ax.collections[0]
    colours = [to_hex(drawn.cmap(drawn.norm(hue))) for hue in drawn.get_array()]
    legend = clouds_of(figure)[-1].get_legend()
    of_field = {
        text.get_text(): to_hex(line.get_color()) for text, line in zip(legend.texts, legend.get_lines(), strict=True)
    }
    assert colours == [of_field["left"]] * 3 + [of_field["right"]] * 6 and len(set(of_field.values())) == 2
    assert_texts_are_apart(figure, at_least=20)
    (both,) = clouds_of(draw(batch, merge_pointclouds=True, **named))
    assert caption(both) == "step 0 to 2: 27 points" and "coloured by field" in details(both)
    assert names(draw(batch, pointclouds=("left",), merge_fields=True)) == ["left", "x", "right"]


def test_fields_that_cannot_be_point_clouds_are_refused() -> None:
    batch = {"x": torch.zeros(1, 2, 5, 2), "n": torch.zeros(1, 2, 5, 3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"`pointclouds` names `y`, expected fields of the batch: \['x', 'n'\]"):
        draw(batch, pointclouds=("y",))
    for name, found in (("x", r"float32 \(5, 2\)"), ("n", r"int64 \(5, 3\)")):
        with pytest.raises(ValueError, match=rf"`pointclouds` names `{name}`, .* \(n, 3\) or \(n, 4\), found {found}"):
            draw(batch, pointclouds=(name,))


# Panels over time.


def test_scalars_and_small_vectors_are_lines_over_time() -> None:
    reward, action = torch.randn(2, 12), torch.randn(2, 12, 7)
    figure = draw({"reward": reward, "action": action}, b=1)
    for name, components in (("reward", reward[1, :, None]), ("action", action[1])):
        for line, values in zip(curves(axes_of(figure, name)), components.T, strict=True):
            np.testing.assert_allclose(line.get_xdata(), np.arange(12))
            np.testing.assert_allclose(line.get_ydata(), values.numpy(), rtol=1e-6)
    ax = axes_of(figure, "action")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list("0123456")
    assert len({to_hex(line.get_color()) for line in curves(ax)}) == 7
    assert ax.get_xlabel() == "step of the sequence" and details(ax) == "Vector float32 (7,)"


@pytest.mark.parametrize("shape", [(8,), (30,), (2, 3), (2, 3, 4, 5)])
def test_larger_values_are_heat_maps_with_time_rightwards(shape: tuple[int, ...]) -> None:
    values = torch.randn(1, 12, *shape)
    ax = panel(values)
    (image,) = ax.images
    np.testing.assert_allclose(np.asarray(image.get_array()), values[0].flatten(1).T.numpy(), rtol=1e-6)
    assert tuple(image.get_extent()) == (-0.5, 11.5, int(np.prod(shape)) - 0.5, -0.5)
    assert ("flattened" in details(ax)) == (len(shape) > 1)


def test_some_components_of_a_huge_field_are_shown() -> None:
    ax = panel(torch.arange(5000.0).expand(1, 3, 5000))
    (image,) = ax.images
    assert image.get_array().shape == (1024, 3)
    assert float(image.get_array()[0, 0]) == 0 and float(image.get_array()[-1, 0]) == 4999
    assert "1,024 of 5,000 shown" in details(ax)


def test_flags_are_marks_where_they_are_true() -> None:
    contact = torch.tensor([[[1, 0], [0, 1], [0, 1], [0, 0]]], dtype=torch.bool)
    figure = draw({"done": contact[..., 1], "contact": contact})
    (marks,) = axes_of(figure, "done").lines
    assert marks.get_xdata().tolist() == [1, 2] and marks.get_marker() == "D"
    assert details(axes_of(figure, "done")) == "Scalar bool (), True 2 of 4 times"
    first, second = axes_of(figure, "contact").lines
    assert (first.get_xdata().tolist(), set(first.get_ydata())) == ([0], {0})
    assert (second.get_xdata().tolist(), set(second.get_ydata())) == ([1, 2], {1})


def test_flags_that_are_never_set_share_a_panel() -> None:
    off, on = torch.zeros(1, 5, dtype=torch.bool), torch.arange(5)[None] > 3
    batch = {"x": torch.zeros(1, 5), "terminated": off, "truncated": off, "y": torch.zeros(1, 5), "is_first": off}
    fields = Fields(is_first=Scalar((), torch.bool))
    figure = draw(batch, fields)
    assert names(figure) == ["x", "terminated, truncated, is_first", "y"]
    ax = axes_of(figure, "terminated, truncated, is_first")
    assert details(ax) == "Scalar bool (), True 0 of 5 times"
    assert names(draw({**batch, "truncated": on}, fields)) == ["x", "terminated, is_first", "truncated", "y"]
    # What is set in padding only is not set.
    assert names(draw({"a": on, "b": off, "mask": ~on})) == ["a, b"]
    assert names(draw({"a": on, "b": off})) == ["a", "b"]
    assert names(draw({"contact": off[..., None], "b": off, "c": on})) == ["contact", "b", "c"]


def test_padding_is_shaded_and_its_values_are_not_drawn() -> None:
    mask = torch.tensor([[False] + [True] * 3 + [False] * 2])
    reward, state = torch.arange(6.0)[None], torch.arange(60.0).view(1, 6, 10)
    figure = draw({"reward": reward, "state": state, "flag": torch.ones(1, 6, dtype=torch.bool), "mask": mask})
    for name in ("reward", "state", "flag"):
        assert spans(axes_of(figure, name)) == [(-0.5, 0.5), (3.5, 5.5)], name
    (line,) = curves(axes_of(figure, "reward"))
    np.testing.assert_array_equal(line.get_ydata(), [np.nan, 1, 2, 3, np.nan, np.nan])
    image = axes_of(figure, "state").images[0]
    assert np.ma.getmaskarray(image.get_array()).all(0).tolist() == (~mask[0]).tolist()
    assert image.get_clim() == (10.0, 39.0)
    assert axes_of(figure, "flag").lines[0].get_xdata().tolist() == [1, 2, 3]
    assert legend_of(figure) == ["padding"] and "mask" not in names(figure)
    assert "3 of 6 rows are padding" in figure.get_suptitle()


def test_ends_of_episodes_are_marked_in_every_panel() -> None:
    is_first, is_last = torch.tensor([[[0, 0, 1, 0, 0, 0]], [[0, 1, 0, 0, 0, 1]]]).bool()
    values = {"reward": torch.zeros(1, 6), "state": torch.zeros(1, 6, 10)}
    figure = draw({**values, "is_first": is_first, "is_last": is_last})
    for name in ("reward", "state"):
        assert verticals(axes_of(figure, name), "-") == [1.5]
        assert verticals(axes_of(figure, name), "--") == [1.5, 5.5]
    assert names(figure) == ["reward", "state"]


def test_a_stored_is_first_is_a_panel_and_marks() -> None:
    dataset = dataset_of(None, {"obs": np.zeros((6, 2), np.float32), "is_first": np.arange(6) == 0})
    batch = next(iter(dataset.get_loader(1, 6, include=("is_last", "step"))))
    figure = MatplotlibVisualizer(dataset).visualize(batch)
    assert names(figure) == ["obs", "is_first"]
    assert verticals(axes_of(figure, "obs"), "-") == [-0.5] and verticals(axes_of(figure, "obs"), "--") == [5.5]


def test_axis_counts_steps_of_the_episode_if_known() -> None:
    dataset = dataset_of(None, {"x": np.arange(50.0)})
    batch = next(iter(dataset.get_loader(4, 5, include=("step", "episode", "index", "weight"), seed=0)))
    figure = MatplotlibVisualizer(dataset).visualize(batch, 2)
    ax = axes_of(figure, "x")
    first = int(batch["step"][2, 0])
    assert first > 0
    (line,) = curves(ax)
    np.testing.assert_array_equal(line.get_xdata(), line.get_ydata())
    assert ax.get_xlabel() == "step of the episode"
    steps = f"steps {first} to {first + 4} of the episode"
    assert figure.get_suptitle().split("  ·  ") == ["sequence 2 of 4", "episode 0", steps, "weight 1"]
    assert names(figure) == ["x"]


def test_axis_counts_on_in_padding_but_not_across_gaps() -> None:
    ax = panel(torch.zeros(1, 4), step=torch.tensor([[7, 8, -1, -1]]), mask=torch.tensor([[1, 1, 0, 0]]).bool())
    assert curves(ax)[0].get_xdata().tolist() == [7, 8, 9, 10] and spans(ax) == [(8.5, 10.5)]
    ax = panel(torch.zeros(1, 3), step=torch.tensor([[0, 4, 8]]))
    assert ax.get_xlabel() == "step of the sequence"
    assert curves(ax)[0].get_xdata().tolist() == [0, 1, 2]


def test_panels_over_time_pan_and_zoom_together() -> None:
    figure = draw({"a": torch.zeros(1, 9), "b": torch.randn(1, 9, 20), "image": film(9), "c": torch.randn(1, 9, 3)})
    axes_of(figure, "a").set_xlim(2, 3)
    assert axes_of(figure, "b").get_xlim() == axes_of(figure, "c").get_xlim() == (2, 3)
    # Of adjacent ones, the last has the numbers.
    assert [axes_of(figure, name).get_xlabel() for name in "abc"] == ["", *["step of the sequence"] * 2]


def test_values_that_are_not_finite_are_marked_and_counted() -> None:
    values = torch.tensor([[0.0, torch.nan, 2.0, torch.inf, -torch.inf, 5.0]])
    figure = draw({"x": values, "wide": values[..., None].expand(1, 6, 9)})
    ax = axes_of(figure, "x")
    np.testing.assert_array_equal(curves(ax)[0].get_ydata(), [0, np.nan, 2, np.nan, np.nan, 5])
    (crosses,) = [line for line in ax.lines if line.get_label() == "NaN or infinite"]
    assert crosses.get_xdata().tolist() == [1, 3, 4]
    assert "1 NaN, 2 infinite" in details(ax) and legend_of(figure) == ["NaN or infinite"]
    assert ax.get_ylim()[1] < 10
    assert axes_of(figure, "wide").images[0].get_clim() == (0.0, 5.0)


def test_a_point_without_neighbours_has_a_marker() -> None:
    values = torch.full((1, 500), torch.nan)
    values[0, :100], values[0, 300] = 1.0, 2.0
    (line,) = curves(panel(values))
    assert line.get_markevery() == [300]


@pytest.mark.parametrize(
    "dtype",
    ["bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"]
    + ["float16", "bfloat16", "float32", "float64", "complex64", "complex128", "float8_e5m2"],
)
def test_every_dtype_is_drawn_in_every_shape(dtype: str) -> None:
    shapes = [(), (3,), (20,), (4, 5), (6, 7, 3)]
    batch = {
        str(shape): (torch.arange(5 * int(np.prod(shape))).view(1, 5, *shape) % 100).to(getattr(torch, dtype))
        for shape in shapes
    }
    figure = draw(batch, b=-1)
    rendered(figure)
    assert names(figure) == list(batch)
    assert all(dtype in details(axes_of(figure, name)) for name in batch)
    if dtype != "bool":
        values = batch["()"].abs() if batch["()"].is_complex() else batch["()"]
        (line,) = curves(axes_of(figure, "()"))
        assert line.get_ydata().tolist() == values[0].double().tolist()
        assert line.get_drawstyle() == ("steps-mid" if "int" in dtype else "default")


def test_fields_without_values_have_an_empty_row() -> None:
    empty = {str(shape): torch.zeros(2, 5, *shape) for shape in [(0,), (3, 0), (0, 64, 3), (0, 3)]}
    figure = draw({**empty, "x": torch.zeros(2, 5)})
    rendered(figure)
    assert all(details(axes_of(figure, name)).endswith("nothing to draw") for name in empty)
    assert names(figure) == [*empty, "x"]


def test_arrays_that_are_read_only_and_gradients_are_drawn() -> None:
    values = np.arange(3.0).reshape(1, 3)
    values.setflags(write=False)
    for x in (values, torch.arange(3.0, requires_grad=True)[None]):
        assert curves(panel(x))[0].get_ydata().tolist() == [0, 1, 2]
