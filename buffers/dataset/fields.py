"""The documented import path of `buffers.fields`."""

from buffers.fields import ColorImage, Fields, PaddedPointcloud, Scalar, TensorType, Vector, as_tensor

__all__ = ["ColorImage", "Fields", "PaddedPointcloud", "Scalar", "TensorType", "Vector", "as_tensor"]
