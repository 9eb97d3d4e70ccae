from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from buffers.dataset.fields import ColorImage, Fields, PaddedPointcloud, Scalar, TensorType, Vector
from tests import tagged

TREES = st.recursive(
    st.just(Scalar()),
    lambda children: st.dictionaries(st.text("ab.", min_size=1, max_size=3), children, min_size=1, max_size=3),
    max_leaves=8,
).filter(lambda tree: isinstance(tree, dict))


@given(TREES)
def test_flatten_and_unflatten_are_inverse(tree: dict) -> None:
    fields = Fields(tree)
    numbered = fields.unflatten({name: i for i, name in enumerate(fields)})
    in_another_order = dict(reversed(numbered.items()))
    assert fields.flatten(numbered) == fields.flatten(in_another_order) == list(range(len(fields)))
    assert fields.unflatten(dict(fields)) == tree
    assert list(tagged.flatten(tree)) == list(fields)


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((), torch.float32, Scalar),
        ((5,), torch.uint8, Vector),
        ((64, 64, 3), torch.uint8, ColorImage),
        ((3, 64, 64), torch.float32, ColorImage),
        ((64, 64, 1), torch.uint8, ColorImage),
        ((64, 64, 5), torch.uint8, TensorType),
        ((64, 64, 3), torch.int64, TensorType),
        ((7, 3), torch.float32, TensorType),
    ],
)
def test_types_are_inferred_from_shapes(shape, dtype, expected) -> None:
    found = TensorType.infer(shape, dtype)
    assert type(found) is expected
    assert (found.shape, found.dtype) == (shape, dtype)


def test_fields_of_an_episode_and_their_bytes() -> None:
    fields = Fields.from_episode(tagged.episode(7, 0))
    assert dict(fields) == {
        "obs/state": Vector(3),
        "obs/pixels": ColorImage((4, 2, 3)),
        "reward": Scalar(),
        "flag": Scalar(dtype=torch.bool),
        "code": Scalar(dtype=torch.int64),
    }
    assert fields.nbytes == 12 + 24 + 4 + 1 + 8
    assert fields["obs/state"].nbytes == 12
    lists = Fields.from_episode({"x": [np.zeros(3), np.ones(3)], "y": [1.0, 2.0], "z": [torch.zeros(2)] * 2})
    assert [str(tensor_type) for tensor_type in lists.values()] == ["float64 (3,)", "float32 ()", "float32 (2,)"]


def test_layouts_of_images_are_known() -> None:
    for shape in ((64, 48), (64, 48, 1), (64, 48, 3), (64, 48, 4), (1, 64, 48), (3, 64, 48), (4, 64, 48)):
        assert (ColorImage(shape).shape, ColorImage(shape).dtype) == (shape, torch.uint8)
    assert PaddedPointcloud((100, 6)).nbytes == 2400


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Fields(), ValueError, "at least one field"),
        (lambda: Fields(a=3), TypeError, "`a` must be a TensorType, found 3"),
        (lambda: Fields({"a": {"b": Scalar()}, "a/b": Scalar()}), ValueError, "both be named `a/b`"),
        (lambda: Fields({1: Scalar()}), TypeError, "must be strings, found 1"),
        (lambda: Fields({"": Scalar()}), ValueError, "must not be empty"),
        (lambda: Fields(a={}), ValueError, "`a` is an empty dict"),
        (lambda: Scalar((3,)), ValueError, r"A Scalar has shape \(\)"),
        (lambda: Vector((3, 3)), ValueError, "A Vector has shape"),
        (lambda: ColorImage((3,)), ValueError, "A ColorImage has shape"),
        (lambda: ColorImage((64, 48, 2)), ValueError, "A ColorImage has shape"),
        (lambda: PaddedPointcloud((5, 2)), ValueError, "A PaddedPointcloud has shape"),
        (lambda: TensorType((-1,)), ValueError, "negative"),
        (lambda: TensorType((1,), "U4"), TypeError, "no torch counterpart"),
        (lambda: TensorType((1,), torch.quint8), TypeError, "cannot be stored"),
        (lambda: Fields.from_episode({"a": 3.0}), ValueError, "`a` has shape .* that of the environments, or of an ep"),
        (lambda: Fields.from_episode({"a": np.ma.zeros(3)}), TypeError, "`a` is a masked array, whose mask would be"),
        (lambda: Fields.from_episode({"a": [np.ma.zeros(3)]}), TypeError, "`a` is a list of masked arrays"),
        (lambda: Fields.from_episode({"a": torch.zeros(3).to(torch.float8_e4m3fn)}), TypeError, "bfloat16 or a dtype"),
        (lambda: Fields.from_episode({"a": torch.zeros(3).to_sparse()}), TypeError, "`a` must be a dense tensor"),
        (lambda: Fields.from_episode({"a": np.zeros(3, "datetime64[s]")}), TypeError, "torch cannot hold"),
    ],
)
def test_what_is_no_field_is_refused(make, error, message) -> None:
    with pytest.raises(error, match=message):
        make()


def test_conflicts_name_what_differs() -> None:
    fields = Fields(a=Scalar(), b=Vector(3))
    assert fields.conflict_with(Fields(b=Vector(3), a=Scalar())) is None
    assert fields.conflict_with(Fields(a=Scalar())) == "missing [], unexpected ['b']"
    assert fields.conflict_with(Fields(a=Scalar(), b=Vector(4))) == "field `b` is float32 (3,), expected float32 (4,)"


def test_defaults_numpy_dtypes_and_names_are_taken() -> None:
    assert TensorType(3, np.uint8) == TensorType((3,), torch.uint8)
    assert TensorType(3, ">f8").dtype == torch.float64


def test_a_name_stands_for_its_field_or_all_below_it() -> None:
    fields = Fields(obs={"image": Vector(2), "state": {"arm": Vector(2)}}, obs2=Scalar(), action=Vector(1))
    assert fields.below("obs") == ["obs/image", "obs/state/arm"] and fields.below("obs/state") == ["obs/state/arm"]
    assert fields.below("action") == ["action"] and fields.below("ob") == fields.below("") == []
