"""Non-scaling LayerNorm (technique 5) and the conversion of a whole network to it.

Axes: b = batch, ch = channels, ... = positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layout = Literal["channels_first", "channels_last"]


class NonScalingLayerNorm(nn.Module):
    """LayerNorm with a learned bias and no learned scale: nothing in it can amplify an outlier feature.

    - ``channels_first`` (maps ``[b, ch, h, w]``, sequences ``[b, ch, n]``, vectors ``[b, ch]``): normalises over all
      features of the sample, one bias a channel. Equals ``GroupNorm(1, ch)`` with its weight fixed at 1.
    - ``channels_last`` (tokens ``[b, n, ch]``, vectors ``[b, ch]``): normalises each token over its features, as
      the LayerNorm of a transformer does, one bias a feature.

    The state dict holds the bias only.

    Args:
        shape: number of channels, or for ``channels_last`` the trailing shape that is normalised.
        eps: added to the variance.
        layout: see above.
        bias: False leaves the bias out as well.
    Source: Dao et al. 2025, arXiv 2502.01441; the authors freeze the weight at 1 (checked).
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        *,
        eps: float = 1e-5,
        layout: Layout = "channels_first",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if layout == "channels_first" and len(self.shape) != 1:
            raise ValueError(f"channels_first takes the number of channels, got the shape {self.shape}")
        self.eps = eps
        self.layout = layout
        self.bias = nn.Parameter(torch.zeros(self.shape, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """The shape of ``x`` in, the shape of ``x`` out.

        Raises:
            ValueError: the channels of ``x`` are not those of the layer.
        """
        if self.layout == "channels_last":
            if x.shape[-len(self.shape) :] != self.shape:
                raise ValueError(f"expected [..., {', '.join(map(str, self.shape))}], got {tuple(x.shape)}")
            return F.layer_norm(x, self.shape, None, self.bias, self.eps)
        if x.dim() < 2 or x.shape[1] != self.shape[0]:
            raise ValueError(f"expected [b, {self.shape[0]}, ...], got {tuple(x.shape)}")
        # Not F.group_norm(x, 1, None, bias): its backward raises when the weight is None (torch 2.13, CPU).
        y = F.layer_norm(x, x.shape[1:], eps=self.eps)
        return y if self.bias is None else y + self.bias.to(y.dtype).reshape(-1, *[1] * (x.dim() - 2))

    def extra_repr(self) -> str:
        return f"{', '.join(map(str, self.shape))}, eps={self.eps}, layout={self.layout}, bias={self.bias is not None}"


@dataclass(frozen=True)
class ConversionReport:
    """What ``convert_norms`` did, by module name."""

    converted: dict[str, str] = field(default_factory=dict)
    """name -> what it was."""
    kept: dict[str, str] = field(default_factory=dict)
    """name -> why this normalisation layer was left as it is."""
    scales_removed: int = 0
    """Number of learned scale parameters that are gone."""

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} layers converted, {self.scales_removed} learned scales removed"]
        lines += [f"  converted {name}: {what}" for name, what in self.converted.items()]
        lines += [f"  kept      {name}: {why}" for name, why in self.kept.items()]
        return "\n".join(lines)


def convert_norms(network: nn.Module) -> ConversionReport:
    """Turn every GroupNorm, LayerNorm and RMSNorm inside ``network`` into a ``NonScalingLayerNorm``, in place.

    Biases, eps, device and dtype carry over, learned scales are dropped. GroupNorm becomes ``channels_first``,
    the others ``channels_last``. diffusers' adaptive norms (``AdaLayerNormZero`` and relatives) hold a LayerNorm
    without parameters, which is converted like any other; the modulation around it comes from the time embedding,
    not from a learned scale, and stays. Adaptive group norms normalise inside a function and cannot be converted;
    they and batch or instance norms are reported as kept.

    Raises:
        ValueError: ``network`` is itself a normalisation layer (there is no parent to put the new one into).
    """
    if _replacement(network) is not None:
        raise ValueError(f"{type(network).__name__} is itself a norm: build a NonScalingLayerNorm in its place")
    converted: dict[str, str] = {}
    kept: dict[str, str] = {}
    scales_removed = 0
    new_of: dict[nn.Module, nn.Module] = {}  # a layer shared between two places stays shared
    # Names, also of shared layers, are collected first: the tree changes below.
    for name, module in list(network.named_modules(remove_duplicate=False)):
        new = new_of.get(module) or _replacement(module)
        if new is None:
            if _looks_like_norm(module):
                kept[name] = _why_kept(module)
            continue
        if module not in new_of:
            new_of[module] = new
            weight = getattr(module, "weight", None)
            scales_removed += 0 if weight is None else weight.numel()
        parent, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(parent), attribute, new)
        converted[name] = repr(module)
    return ConversionReport(converted, kept, scales_removed)


def _replacement(module: nn.Module) -> NonScalingLayerNorm | None:
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    like = weight if isinstance(weight, Tensor) else bias if isinstance(bias, Tensor) else None
    # A layer without parameters (inside an adaptive norm) gets none: its shift comes from the embedding.
    learned = like is not None
    if isinstance(module, nn.GroupNorm):
        new = NonScalingLayerNorm(module.num_channels, eps=module.eps, bias=learned)
    elif isinstance(module, nn.LayerNorm):
        new = NonScalingLayerNorm(module.normalized_shape, eps=module.eps, layout="channels_last", bias=learned)
    elif _is_rms_norm(module):
        shape: Any = getattr(module, "normalized_shape", None) or getattr(module, "dim", None)
        eps: Any = torch.finfo(torch.float32).eps if module.eps is None else module.eps
        new = NonScalingLayerNorm(tuple(shape), eps=eps, layout="channels_last", bias=learned)
    else:
        return None
    if like is not None:
        new = new.to(device=like.device, dtype=like.dtype)
    if isinstance(bias, Tensor) and new.bias is not None:
        with torch.no_grad():
            new.bias.copy_(bias)
        new.bias.requires_grad_(bias.requires_grad)
    return new.train(module.training)


def _is_rms_norm(module: nn.Module) -> bool:
    # diffusers has an RMSNorm of its own, which the core does not import: same name, `dim` for the shape.
    if isinstance(module, nn.RMSNorm):
        return True
    return type(module).__name__ == "RMSNorm" and hasattr(module, "dim") and hasattr(module, "eps")


def _looks_like_norm(module: nn.Module) -> bool:
    name = type(module).__name__
    return "Norm" in name and not isinstance(module, NonScalingLayerNorm)


def _why_kept(module: nn.Module) -> str:
    name = type(module).__name__
    if any(_replacement(child) is not None or isinstance(child, NonScalingLayerNorm) for child in module.children()):
        return f"{name}: its inner norm is converted, its modulation comes from an embedding"
    if "Ada" in name:
        return f"{name}: normalises inside a function and modulates by an embedding; no layer to replace"
    return f"{name}: normalises over the batch or in a way that has no non-scaling LayerNorm counterpart"
