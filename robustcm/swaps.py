"""A network against itself with some of its layers exchanged: how far its outputs, or those of the layers, move."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from robustcm.consistency import replayed_rng


def put(network: nn.Module, name: str, layer: nn.Module) -> None:
    """Let ``layer`` stand at ``name`` (``blocks.0.norm1``) inside ``network``."""
    parent, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(parent), attribute, layer)


def output_difference(network: nn.Module, layers: Mapping[str, nn.Module], example: object) -> float:
    """The largest absolute difference of the output of ``network`` when ``layers``, by name, stand in it.

    Both runs are in eval mode, without gradient, on the same random numbers. All is as before afterwards, also on an
    error.

    Args:
        network: takes ``example``.
        layers: name -> the layer to put there for the second run.
        example: a tensor, a tuple of arguments or a dict of named ones.
    Returns:
        Over all tensors of the output, whatever they are wrapped in; NaN if one of them is.
    Raises:
        ValueError: the output holds no tensor.
    """
    with _evaluating(network):
        without = list(_tensors(_call(network, example)))
        with _in_place(network, layers):
            within = list(_tensors(_call(network, example)))
    if not without:
        raise ValueError(f"the output of {type(network).__name__} holds no tensor to compare")
    return _largest(_differences(without, within))


def layer_differences(network: nn.Module, layers: Mapping[str, nn.Module], example: object) -> dict[str, float]:
    """The largest absolute difference of each of ``layers`` to the layer of that name, on the same input.

    The input is the one that ``example`` brings to the layer of ``network``, which runs once, in eval mode. A layer
    that is not reached is left out.
    """
    found: dict[str, list[Tensor]] = {}

    def compare(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
            other = layers[name](*args, **kwargs)
            found.setdefault(name, []).extend(_differences(list(_tensors(output)), list(_tensors(other))))

        return hook

    with _evaluating(network), ExitStack() as hooks:
        for name in layers:
            handle = network.get_submodule(name).register_forward_hook(compare(name), with_kwargs=True)
            hooks.callback(handle.remove)
        _call(network, example)
    return {name: _largest(differences) for name, differences in found.items()}


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in network.modules()}
    try:
        with torch.no_grad():
            network.eval()
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def _in_place(network: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    before = {name: network.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            put(network, name, layer)
        yield
    finally:
        for name, layer in before.items():
            put(network, name, layer)


def _call(network: nn.Module, example: Any) -> object:
    device = next((tensor.device for tensor in chain(network.parameters(), network.buffers())), torch.device("cpu"))
    with replayed_rng(device):
        if isinstance(example, Mapping):
            return network(**example)
        return network(*example) if isinstance(example, tuple) else network(example)


def _tensors(output: Any) -> Iterator[Tensor]:
    """All tensors in ``output``, through tuples, lists, dicts and dataclasses (diffusers' outputs are both)."""
    if isinstance(output, Tensor):
        yield from output.unbind() if output.is_nested else (output,)
    elif isinstance(output, Mapping):
        yield from _tensors(list(output.values()))
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)
    elif is_dataclass(output):
        yield from _tensors([getattr(output, each.name) for each in fields(output)])


def _differences(some: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    def exact(x: Tensor) -> Tensor:
        return x.to(torch.promote_types(x.dtype, torch.float64))

    return [(exact(a) - exact(b)).abs().max() for a, b in zip(some, others, strict=True)]


def _largest(differences: list[Tensor]) -> float:
    return torch.stack(differences).max().item()  # of tensors: Python's max forgets a NaN
