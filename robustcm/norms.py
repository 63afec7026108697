"""Non-scaling LayerNorm (technique 5) and the conversion of a whole network to it.

Axes: b = batch, ch = channels, ... = positions.

    report = convert_norms(network)                       # before the optimizer, EMA and DDP are made of it
    report.max_difference(network, example)               # against the network before, its scales at 1
    report.layer_differences(network, example)            # the same for each layer by itself

**Converting late.** A bias stays the very Parameter it was: what holds it goes on training it. The scales are gone from
``network.parameters()``. An optimizer that still holds them steps over them (they get no gradient). DDP waits for their
gradients and raises in its second step, and an average that walks two networks by position
(``zip(ema, network.parameters())``) pairs the wrong ones: make these two after the conversion.

**Saving and loading.** The state dict of a converted network is the stock one without the ``weight`` of the converted
layers. Only a converted network takes it, so build, convert, load:

    network.save_pretrained(folder)                                                     # a converted diffusers model
    network = UNet2DModel.from_config(UNet2DModel.load_config(folder))
    convert_norms(network)
    network.load_state_dict(load_file(f"{folder}/diffusion_pytorch_model.safetensors"))

Stock weights go in by ``from_pretrained``, then ``convert_norms``, which drops their scales. ``from_pretrained`` of a
converted folder is not the way: it builds the stock network and misses the scales.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from robustcm.swaps import layer_differences, output_difference, put

Layout = Literal["channels_first", "channels_last"]

Counterpart: TypeAlias = Callable[[Any], "NonScalingLayerNorm | None"]
"""From a norm to what takes its place; None keeps it."""


class NonScalingLayerNorm(nn.Module):
    """LayerNorm with a learned bias and no learned scale: nothing in it can amplify an outlier feature.

    - ``channels_first`` (maps ``[b, ch, h, w]``, video ``[b, ch, f, h, w]``, audio ``[b, ch, n]``, vectors
      ``[b, ch]``): normalises over all features of the sample, one bias a channel. Equals ``GroupNorm(1, ch)`` with
      its weight fixed at 1. The memory format stays what it was (``torch.channels_last``).
    - ``channels_last`` (tokens ``[b, n, ch]``, vectors ``[b, ch]``): normalises each token over its features, as
      the LayerNorm of a transformer does, one bias a feature.

    The state dict holds the bias only.

    Args:
        shape: number of channels, or for ``channels_last`` the trailing shape that is normalised.
        eps: added to the variance.
        layout: see above.
        bias: True makes one at 0, False leaves it out, a Parameter is taken as it is, the same object.
    Source: Dao et al. 2025, arXiv 2502.01441; the authors freeze the weight at 1 (checked).
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        *,
        eps: float = 1e-5,
        layout: Layout = "channels_first",
        bias: bool | nn.Parameter = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if layout not in get_args(Layout):
            raise ValueError(f"layout must be one of {', '.join(get_args(Layout))}, got {layout!r}")
        if layout == "channels_first" and len(self.shape) != 1:
            raise ValueError(f"channels_first takes the number of channels, got the shape {self.shape}")
        if isinstance(bias, nn.Parameter) and bias.shape != self.shape:
            raise ValueError(f"the bias has shape {tuple(bias.shape)}, the layer {self.shape}")
        self.eps = eps
        self.layout = layout
        if bias is True:
            bias = nn.Parameter(torch.zeros(self.shape, device=device, dtype=dtype))
        self.bias = bias if isinstance(bias, nn.Parameter) else None

    @property
    def weight(self) -> Tensor:
        """Ones, made when asked for: torch's fused encoder layer, in eval mode, reads the scale of its norms."""
        like = torch.empty(()) if self.bias is None else self.bias
        return torch.ones(self.shape, device=like.device, dtype=like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The shape of ``x`` in, the shape of ``x`` out.

        Raises:
            ValueError: the channels of ``x`` are not those of the layer.
        """
        if self.layout == "channels_first":
            if x.dim() < 2 or x.shape[1] != self.shape[0]:
                raise ValueError(f"expected [b, {self.shape[0]}, ...], got {tuple(x.shape)}")
            # Not F.group_norm(x, 1, None, bias): its backward raises when the weight is None (torch 2.13, CPU).
            y = _normalise_samples(x, self.eps)
            return y if self.bias is None else y + self.bias.to(y.dtype).reshape(-1, *[1] * (x.dim() - 2))
        if x.is_nested:  # padded tokens inside torch's TransformerEncoder; layer_norm wants a weight there
            return F.layer_norm(x, self.shape, self.weight.to(x.device), self.bias, self.eps)
        if x.shape[-len(self.shape) :] != self.shape:
            raise ValueError(f"expected [..., {', '.join(map(str, self.shape))}], got {tuple(x.shape)}")
        if self.bias is None or self.bias.dtype == x.dtype:
            return F.layer_norm(x, self.shape, None, self.bias, self.eps)
        y = F.layer_norm(x, self.shape, eps=self.eps)  # it refuses most biases of another dtype
        return y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{', '.join(map(str, self.shape))}, eps={self.eps}, layout={self.layout}, bias={self.bias is not None}"


def _normalise_samples(x: Tensor, eps: float) -> Tensor:
    """Each sample of ``x [b, ch, ...]`` to mean 0 and variance 1, in the memory format of ``x``."""
    channels_innermost = x.movedim(1, -1)
    if channels_innermost.is_contiguous() and not x.is_contiguous():
        # layer_norm would copy x. The order of the features does not matter to their mean and variance.
        return F.layer_norm(channels_innermost, channels_innermost.shape[1:], eps=eps).movedim(-1, 1)
    return F.layer_norm(x, x.shape[1:], eps=eps)


@dataclass(frozen=True)
class ConversionReport:
    """What ``convert_norms`` did, by module name."""

    converted: dict[str, str] = field(default_factory=dict)
    """name -> what it was, and what changes by design besides the scale (``32 groups -> 1``)."""
    kept: dict[str, str] = field(default_factory=dict)
    """name -> why this normalisation layer was left as it is."""
    scales_removed: int = 0
    """Number of learned scale parameters that are gone."""
    new_biases: tuple[str, ...] = ()
    """Names of the biases that did not exist before (``new_biases=True``): an optimizer made earlier lacks them."""
    originals: dict[str, nn.Module] = field(default_factory=dict, repr=False)
    """name -> the layer that stood there, its scale included; it lives as long as this report."""

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} layers converted, {self.scales_removed} learned scales removed"]
        lines += [f"  converted {name}: {what}" for name, what in self.converted.items()]
        lines += [f"  kept      {name}: {why}" for name, why in self.kept.items()]
        lines += [f"  new       {name}: a parameter for the optimizer" for name in self.new_biases]
        return "\n".join(lines)

    def max_difference(self, network: nn.Module, example: object) -> float:
        """The largest absolute difference that the conversion makes to the output, scales at 1.

        Runs ``network`` in eval mode on ``example``, then again with the original layers in it, their parameter
        ``weight`` at 1 and their bias that of today, and leaves all as it was, also on an error. 0 up to rounding
        where ``converted`` names no change. Where it does (``32 groups -> 1``, an RMSNorm that subtracts the mean) a
        difference is the purpose of technique 5, and ``layer_differences`` tells a fault from it. So is what a new
        bias has learned where the original (torch's RMSNorm) has no place for one.

        Args:
            network: the converted network, or a copy of it.
            example: what it is called with: a tensor, a tuple of arguments or a dict of named ones.
        Returns:
            Over all tensors of the output (a tensor, tuple, dict or dataclass); NaN if one of them is.
        Raises:
            ValueError: ``network`` lacks the converted layers, or its output holds no tensor.
        """
        originals = {name: self._at_scale_one(name, network) for name in self.originals}
        return output_difference(network, originals, example)

    def layer_differences(self, network: nn.Module, example: object) -> dict[str, float]:
        """name -> the largest absolute difference of that converted layer to its original with the scale at 1.

        Each layer gets the input that ``example`` brings to it. The original follows the design here (one group; an
        RMSNorm gets its input with mean 0), so all are 0 up to rounding. Arguments and errors are those of
        ``max_difference``; layers that ``example`` does not reach are left out.
        """
        originals = {name: _as_designed(self._at_scale_one(name, network)) for name in self.originals}
        return layer_differences(network, originals, example)

    def _at_scale_one(self, name: str, network: nn.Module) -> nn.Module:
        """A copy of the original ``name`` with its scale at 1, where ``network`` is now, with the bias of now."""
        try:
            new = network.get_submodule(name)
        except AttributeError:
            new = None
        if not isinstance(new, NonScalingLayerNorm):
            raise ValueError(f"{name} is no NonScalingLayerNorm: give the network that was converted")
        original = copy.deepcopy(self.originals[name]).eval()
        like = new.bias if new.bias is not None else next(network.parameters(), None)
        if like is not None:
            original = original.to(device=like.device, dtype=like.dtype)
        if original._parameters.get("weight") is not None:
            nn.init.ones_(original.get_parameter("weight"))
        if new.bias is not None and hasattr(original, "bias"):
            original.bias = new.bias
        return original


def convert_norms(
    network: nn.Module, *, also: Mapping[type[nn.Module], Counterpart] | None = None, new_biases: bool = False
) -> ConversionReport:
    """Turn every norm inside ``network`` that is known here into a ``NonScalingLayerNorm``, in place.

    **Known** is a layer computed by the ``forward`` of torch's GroupNorm, LayerNorm or RMSNorm, or of the RMSNorm or
    FP32LayerNorm of diffusers, itself or as a subclass that leaves ``forward`` alone. Of these it is known what they
    compute: with the scale at 1 the new layer is equal, but for two things that technique 5 changes by design and
    ``report.converted`` says: several groups become one, and an RMSNorm subtracts the mean as well. All else keeps its
    place and is reported with the reason: a ``forward`` of its own, hooks, parametrizations, more parameters, norms
    of other code bases.

    GroupNorm becomes ``channels_first``, the others ``channels_last``. The bias stays the same Parameter; eps, device
    and dtype carry over; learned scales are dropped. diffusers' adaptive norms (``AdaLayerNormZero`` and relatives)
    hold a LayerNorm without parameters, which is converted like any other; the modulation around it comes from the
    time embedding, not from a learned scale, and stays.

    Args:
        network: changed in place. A layer that stands in several places stays one layer.
        also: for norms of other code bases, by their exact type, what takes their place (None keeps it):
            ``{LlamaRMSNorm: lambda norm: NonScalingLayerNorm(
            norm.weight.shape, eps=norm.variance_epsilon, layout="channels_last", bias=False)}``.
        new_biases: give a bias, at 0, to layers that had a scale but none, as in the paper. Convert before the
            optimizer, EMA and DDP are made, or hand them ``report.new_biases``. By default nothing new appears.
    Raises:
        ValueError: ``network`` is itself a norm (there is no parent to put the new one into), or holds no norm that
            could be converted. Nothing has changed then.
    """
    before = set(network.parameters())
    new_of: dict[nn.Module, NonScalingLayerNorm] = {}  # by layer, so that one in two places stays one
    originals: dict[str, nn.Module] = {}
    kept: dict[str, str] = {}
    modules = dict(network.named_modules(remove_duplicate=False))  # names also of shared layers
    for name, module in modules.items():
        if isinstance(module, NonScalingLayerNorm) or any(name.startswith(f"{above}.") for above in originals):
            continue
        new = _counterpart(module, also or {}, new_biases)
        parent, _, attribute = name.rpartition(".")
        if attribute == "norm_cross" and hasattr(modules[parent], "norm_encoder_hidden_states"):
            new = "diffusers' Attention asks for its type"
        if isinstance(new, NonScalingLayerNorm):
            new_of[module] = new
            originals[name] = module
        elif new is not None:
            kept[name] = f"{type(module).__name__}: {new}"
    if network in new_of:
        raise ValueError(f"{type(network).__name__} is itself a norm: build a NonScalingLayerNorm in its place")
    if not originals and not any(isinstance(module, NonScalingLayerNorm) for module in modules.values()):
        reasons = "; ".join(f"{name} is kept, {why}" for name, why in kept.items()) or "it holds none"
        raise ValueError(f"no norm of {type(network).__name__} was converted: {reasons}")
    for name, module in originals.items():
        put(network, name, new_of[module])
    return ConversionReport(
        converted={name: f"{module!r}{_changed_by_design(module)}" for name, module in originals.items()},
        kept=kept,
        scales_removed=sum(scale.numel() for scale in before.difference(network.parameters())),
        new_biases=tuple(name for name, parameter in network.named_parameters() if parameter not in before),
        originals=originals,
    )


# --- What is known of a layer ----------------------------------------------------------------------------------------

# By name, as the core does not import diffusers.
_GROUP_NORM = "torch.nn.modules.normalization.GroupNorm"
_LAYER_NORMS = {"torch.nn.modules.normalization.LayerNorm", "diffusers.models.normalization.FP32LayerNorm"}
_RMS_NORMS = {"torch.nn.modules.normalization.RMSNorm", "diffusers.models.normalization.RMSNorm"}
_KNOWN = {_GROUP_NORM} | _LAYER_NORMS | _RMS_NORMS
# A subclass may be called anything.
_STOCK = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


def _counterpart(
    module: Any, also: Mapping[type[nn.Module], Counterpart], new_biases: bool
) -> NonScalingLayerNorm | str | None:
    """What takes the place of ``module``, or why it is kept, or None for what is no norm."""
    new: NonScalingLayerNorm | str | None
    if type(module) in also:
        new = _what_would_be_lost(module) or _asked_for(module, also[type(module)])
    elif _computed_by(module) in _KNOWN:
        new = _what_would_be_lost(module) or _what_is_more(module) or _without_scale(module, new_biases)
    else:
        return _why_unknown(module) if "Norm" in type(module).__name__ or isinstance(module, _STOCK) else None
    return new.train(module.training) if isinstance(new, nn.Module) else new


def _asked_for(norm: nn.Module, counterpart: Counterpart) -> NonScalingLayerNorm | str:
    new = counterpart(norm)
    if not (new is None or isinstance(new, NonScalingLayerNorm)):
        raise ValueError(f"also[{type(norm).__name__}] gave a {type(new).__name__}, not a NonScalingLayerNorm or None")
    return "also= keeps it" if new is None else new


def _without_scale(norm: Any, new_biases: bool) -> NonScalingLayerNorm:
    bias = getattr(norm, "bias", None)
    # A layer without parameters (inside an adaptive norm) gets none: its shift comes from the embedding.
    like = {} if norm.weight is None else {"device": norm.weight.device, "dtype": norm.weight.dtype}
    if bias is None:
        bias = new_biases and norm.weight is not None
    eps = norm.eps
    if eps is None:  # torch's RMSNorm: that of the precision it computes in
        eps = torch.finfo(torch.promote_types(like.get("dtype", torch.float32), torch.float32)).eps
    if _computed_by(norm) == _GROUP_NORM:
        return NonScalingLayerNorm(norm.num_channels, eps=eps, bias=bias, **like)
    return NonScalingLayerNorm(_shape(norm), eps=eps, layout="channels_last", bias=bias, **like)


def _computed_by(module: nn.Module) -> str:
    """The class whose ``forward`` runs, with its module."""
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    return f"{owner.__module__}.{owner.__qualname__}"


def _what_would_be_lost(module: nn.Module) -> str | None:
    """What stands around the forward of the class of ``module``."""
    if "forward" in vars(module) or type(module).__call__ is not nn.Module.__call__:
        return "its forward was replaced (an offloading tool does this): convert before"
    if parametrize.is_parametrized(module):
        return "its parameters are parametrized"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks, which would be lost: register them after the conversion"
    return None


def _what_is_more(norm: nn.Module) -> str | None:
    """What a subclass holds that the stock layer does not."""
    more = {*norm._parameters, *norm._buffers, *norm._modules} - {"weight", "bias"}
    if more:
        return f"it holds {', '.join(sorted(more))} besides weight and bias"
    bias = getattr(norm, "bias", None)
    return None if bias is None or isinstance(bias, nn.Parameter) else "its bias is no Parameter"


def _changed_by_design(norm: Any) -> str:
    """What technique 5 changes besides the scale, to be printed after what the layer was."""
    if _computed_by(norm) == _GROUP_NORM and norm.num_groups > 1:
        return f", {norm.num_groups} groups -> 1"
    return ", subtracts the mean now" if _computed_by(norm) in _RMS_NORMS else ""


def _as_designed(norm: Any) -> Any:
    """``norm`` changed to what technique 5 makes of it, the scale aside."""
    if _computed_by(norm) == _GROUP_NORM:
        norm.num_groups = 1
    elif _computed_by(norm) in _RMS_NORMS:
        last = tuple(range(-len(_shape(norm)), 0))
        norm.register_forward_pre_hook(lambda _, args: args[0] - args[0].mean(last, keepdim=True))
    return norm


def _shape(norm: Any) -> tuple[int, ...]:
    """What a LayerNorm or RMSNorm normalises over (diffusers calls it dim)."""
    return tuple(norm.normalized_shape if hasattr(norm, "normalized_shape") else norm.dim)


def _why_unknown(module: nn.Module) -> str:
    name = type(module).__name__
    if isinstance(module, nn.modules.batchnorm._NormBase | nn.LocalResponseNorm):
        return "normalises over the batch, or each channel by itself: no non-scaling LayerNorm counterpart"
    if isinstance(module, _STOCK):
        return f"overrides forward; if it has a counterpart, name it: also={{{name}: ...}}"
    if any(_computed_by(inner) in _KNOWN or isinstance(inner, NonScalingLayerNorm) for inner in module.modules()):
        return "its inner norm has a line of its own, what is around that stays"
    if "Ada" in name:
        return "normalises inside a function and modulates by an embedding; no layer to replace"
    return f"not known here; if it has a counterpart, name it: also={{{name}: ...}}"
