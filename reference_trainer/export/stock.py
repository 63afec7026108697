"""Our networks as those of diffusers, in stock layers: the same function up to rounding, or one line of refusal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reference_trainer.errors import UserError
from reference_trainer.export.conditioned_transformer import ConditionedTransformer
from reference_trainer.model import TrainedModel, number_of
from reference_trainer.networks import DiT
from reference_trainer.pretrained import Denoising

OF_THE_TIMES = "adaln_single.timed."
"""Where the time modulation of a network told of classes is kept."""


def stock_network(model: TrainedModel) -> Any:
    """``model.network`` as a UNet2DModel, a PixArtTransformer2DModel or a ConditionedTransformer, on the CPU.

    What stands around it stays to be done: the UNet's patches laid into channels, the transformer's times scaled, a
    diffusion model's output made F.

    Raises:
        UserError: there is no such network in stock layers.
    """
    outer: Any = model.network.network if isinstance(model.network, Denoising) else model.network
    inner = outer.network
    state = {name: tensor.detach().cpu() for name, tensor in outer.state_dict().items()}
    times, classes = model.config.objective.num_times, number_of(model.classes)
    make = _transformer if isinstance(model.config.network, DiT) else _unet
    with torch.random.fork_rng([]):
        stock, weights = make(inner, state, times, classes)
    _fill(stock, weights)
    return stock.eval().requires_grad_(False)


def _unet(inner: Any, state: dict[str, Tensor], times: int, classes: int) -> tuple[Any, dict[str, Tensor]]:
    from diffusers import UNet2DModel

    if classes and times == 2:
        raise UserError(
            "diffusers' UNet2DModel takes a class or a second time, not both: export a run with network=DiT, or one "
            "trained without classes"
        )
    config = _plain(inner.config)
    if classes:  # the label that says no class is the last
        config |= {"class_embed_type": None, "num_class_embeds": classes + 1}
    if "conv_norm_out.weight" not in _below("network.", state):  # non-scaling norms: over the whole sample
        config |= {"norm_num_groups": 1, "attn_norm_num_groups": 1}
    weights = _below("network.", state)
    if classes:
        weights["class_embedding.weight"] = state["beside.labels.weight"]
    return UNet2DModel.from_config(config), weights


def _transformer(inner: Any, state: dict[str, Tensor], times: int, classes: int) -> tuple[Any, dict[str, Tensor]]:
    from diffusers import PixArtTransformer2DModel

    weights = _below("network.", state)
    weights = {name.replace(OF_THE_TIMES, "adaln_single."): tensor for name, tensor in weights.items()}
    weights |= _attention_of_one_token(weights, inner.inner_dim)
    config = _plain(inner.config)
    if times == 1 and not classes:
        return PixArtTransformer2DModel.from_config(config), weights
    stock = ConditionedTransformer(pixart=config, num_classes=classes, second_time=times == 2)
    labels, second = weights.pop("adaln_single.labels.weight", None), _below("adaln_single.second.", weights)
    weights = {f"transformer.{name}": tensor for name, tensor in weights.items() if ".second." not in name}
    weights |= {f"second.{name}": tensor for name, tensor in second.items()}
    return stock, weights | ({} if labels is None else {"labels.weight": labels})


def _attention_of_one_token(weights: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """What stock attention has more where a token is alone: whatever asks and answers, its value is itself."""
    added = {}
    for name in weights:
        if name.endswith("attn1.to_out.0.weight"):
            attention = name.removesuffix("to_out.0.weight")
            if f"{attention}to_v.weight" not in weights:
                for part, matrix in (("q", torch.zeros), ("k", torch.zeros), ("v", torch.eye)):
                    added[f"{attention}to_{part}.weight"] = matrix(width, width)
                    added[f"{attention}to_{part}.bias"] = torch.zeros(width)
    return added


def _fill(stock: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put ``weights`` in ``stock``; scales of norms that are missing are 1."""
    norms = {f"{name}.weight": module for name, module in stock.named_modules() if isinstance(module, nn.GroupNorm)}
    missing = stock.state_dict().keys() - weights.keys()
    if any(norms[name].num_groups != 1 for name in missing & norms.keys()):
        raise UserError("a norm without a scale has several groups, which no layer of diffusers has: train without it")
    stock.load_state_dict(weights | {name: torch.ones(norms[name].num_channels) for name in missing & norms.keys()})


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without diffusers' own notes: it takes defaults for what they list, whatever is given."""
    return {name: value for name, value in config.items() if not name.startswith("_")}
