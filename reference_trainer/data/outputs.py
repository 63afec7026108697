"""The tensor in whatever an autoencoder returns: diffusers' outputs, distributions, tuples, dicts, arrays."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import getattr_static
from typing import Any

import numpy as np
import torch
from torch import Tensor

NAMES = ("latent_dist", "latents", "latent", "sample", "mean")
"""Where a tensor, or a distribution, is looked for in an object's attributes and a dict's keys, in this order."""


def tensor_in(output: Any) -> Tensor | None:
    """The tensor ``output`` is or holds; of a distribution its mode or mean; of a tuple what its first entry holds.

    None where nothing is recognised. What the output's own code raises passes through.
    """
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "__array__"):
        return torch.from_numpy(
            np.array(output)
        )  # a copy: torch takes no negative strides, and would warn of constants
    for name in NAMES[:-1]:
        # A distribution has a method ``sample``, which draws.
        if (held := _held(output, name)) is not None and not callable(held):
            return tensor_in(held)
    if callable(getattr_static(output, "mode", None)):  # of diffusers, CompVis; torch's distributions: a property
        return tensor_in(output.mode())
    if (mean := _held(output, NAMES[-1])) is not None:
        return tensor_in(mean() if callable(mean) else mean)
    if isinstance(output, (tuple, list)) and output:
        return tensor_in(output[0])
    return None


def described(output: Any) -> str:
    """What came instead, in a few words."""
    kind = type(output).__name__
    if isinstance(output, Mapping):
        return f"a {kind} of {', '.join(map(str, list(output)[:6])) or 'nothing'}"
    if isinstance(output, (tuple, list)):
        return f"a {kind} of {', '.join(type(entry).__name__ for entry in output[:6]) or 'nothing'}"
    return "None" if output is None else f"a {kind}"


def _held(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) and name in output else getattr(output, name, None)
