"""Checks of shapes, so that nothing broadcasts where one value a sample was meant. Free: they look at no value."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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


def level_of_all(t: float, z: Tensor) -> Tensor:
    """``t`` for each sample of ``z [b, ...]``: ``[b]``, in at least float32, as levels are when training."""
    return torch.full((len(z),), t, dtype=torch.promote_types(z.dtype, torch.float32), device=z.device)


def aligned(name: str, value: Tensor, shape: Sequence[int]) -> Tensor:
    """``value`` so that it meets a tensor of ``shape`` [b, ...] as it was meant, or an error: never a silent product.

    One entry stays one for all. One entry a sample, ``[b]`` or ``[b, 1, 1, 1]``, becomes ``[b]`` with as many axes of
    length 1 as ``shape`` asks for. Whatever has all axes of ``shape``, each its length or 1, stays as it is.

    Raises:
        ValueError: any other shape.
    """
    if value.dim() == 0 or not shape or value.shape == tuple(shape):
        return value
    if value.numel() == 1:
        return value.reshape(())
    if value.numel() == len(value) == shape[0]:
        return value.reshape(-1, *[1] * (len(shape) - 1))
    if value.dim() == len(shape) and all(n in (1, m) for n, m in zip(value.shape, shape, strict=True)):
        return value
    each = f" or one of shape {tuple(shape)}" if len(shape) > 1 else ""
    raise ValueError(
        f"{name} has shape {tuple(value.shape)} where there are {shape[0]} samples: give a number, one a sample "
        f"([{shape[0]}]){each}"
    )
