"""Checks of shapes, so that nothing broadcasts where one value a sample was meant. Free: they look at no value."""

from __future__ import annotations

from torch import Tensor


def one_a_sample(name: str, value: Tensor, b: int) -> Tensor:
    """``value`` as ``[b]``, whether it came as ``[b]``, ``[b, 1, 1, 1]`` or as one number ``[]``.

    Raises:
        ValueError: it is not one value a sample.
    """
    if value.dim() == 0:
        return value.expand(b)
    if value.shape[:1] != (b,) or value.numel() != b:
        raise ValueError(f"{name} must be one value a sample, [{b}], got {list(value.shape)}")
    return value.reshape(b)


def same_shape(**tensors: Tensor) -> None:
    """Refuse tensors of different shapes, or without a batch axis and a feature axis.

    Raises:
        ValueError: names and shapes.
    """
    shapes = [tuple(tensor.shape) for tensor in tensors.values()]
    if any(shape != shapes[0] for shape in shapes) or len(shapes[0]) < 2:
        names = " and ".join(tensors)
        raise ValueError(f"{names} must have one shape [b, ...], got {' and '.join(map(str, shapes))}")


def over_samples(per_sample: Tensor, like: Tensor) -> Tensor:
    """``[b]`` as ``[b, 1, ...]``, to multiply ``like [b, ...]``."""
    return per_sample.reshape(-1, *[1] * (like.dim() - 1))
