"""Exchanging layers of a network shows how far its outputs move, however they are wrapped, and changes nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from robustcm.swaps import layer_differences, output_difference


@dataclass
class Output:
    sample: Tensor
    about: str = "no tensor"


class Wrapping(nn.Module):
    """Doubles what ``layer`` makes of x and wraps it."""

    def __init__(self, wrap: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.wrap = wrap

    def forward(self, x: Tensor) -> object:
        return self.wrap(2 * self.layer(x))


class Plus(nn.Module):
    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: y,
        lambda y: (torch.zeros(1), [y], torch.zeros(1)),
        lambda y: {"zero": torch.zeros(1), "y": y, "name": "y"},
        lambda y: Output(y),
        lambda y: (Output(torch.zeros(1)), {"deep": [Output(y)]}, None),
        lambda y: y.to(torch.complex64) * 1j,
        lambda y: y.bfloat16(),
        lambda y: y.long(),
        lambda y: torch.nested.as_nested_tensor([y[0], y[1]]),
    ],
    ids=["tensor", "tuple", "dict", "dataclass", "deep", "complex", "bfloat16", "integer", "nested"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_difference_is_found_in_any_output(wrap):
    network = Wrapping(wrap)
    assert output_difference(network, {"layer": Plus(3.0)}, torch.ones(2, 4)) == 6.0
    assert output_difference(network, {"layer": nn.Identity()}, torch.ones(2, 4)) == 0.0


@pytest.mark.parametrize(
    "example", [torch.ones(2), (torch.ones(2),), {"x": torch.ones(2)}], ids=["tensor", "tuple", "dict"]
)
def test_an_example_is_what_the_network_is_called_with(example):
    assert output_difference(Wrapping(lambda y: y), {"layer": Plus(1.0)}, example) == 2.0
    assert layer_differences(Wrapping(lambda y: y), {"layer": Plus(1.0)}, example) == {"layer": 1.0}


def test_an_output_without_tensors_is_refused():
    with pytest.raises(ValueError, match="the output of Wrapping holds no tensor to compare"):
        output_difference(Wrapping(str), {"layer": nn.Identity()}, torch.ones(2))


def test_a_value_that_is_not_finite_shows():
    network = nn.Sequential(nn.Identity(), nn.Identity())
    assert torch.tensor(output_difference(network, {"0": Plus(float("nan"))}, torch.ones(2))).isnan()
    network = nn.Sequential(shared := nn.Identity(), Plus(float("nan")), shared, nn.ReLU(), shared)
    assert torch.tensor(layer_differences(network, {"0": Plus(1.0)}, torch.ones(2))["0"]).isnan()


def test_the_network_runs_as_for_evaluation():
    network = Wrapping(lambda y: y + network.training + torch.is_grad_enabled())
    seen = []
    network.register_forward_hook(lambda module, _, y: seen.append((module.training, y.tolist())))
    output_difference(network, {"layer": nn.Identity()}, torch.zeros(1))
    layer_differences(network, {"layer": nn.Identity()}, torch.zeros(1))
    assert seen == [(False, [0.0])] * 3


def test_both_runs_draw_the_same_noise_and_leave_the_generator_alone():
    network = Wrapping(lambda y: y + torch.randn_like(y))
    state = torch.get_rng_state()
    assert output_difference(network, {"layer": nn.Identity()}, torch.ones(100)) == 0.0
    assert torch.equal(torch.get_rng_state(), state)


def test_a_layer_called_twice_counts_its_largest_difference_and_one_never_called_is_left_out():
    network = nn.Sequential(shared := nn.Identity(), Plus(4.0), shared)
    network.add_module("unused", nn.ModuleDict({"layer": nn.Identity()}))
    network.forward = lambda x: network[2](network[1](network[0](x)))
    doubled = nn.Linear(1, 1, bias=False)
    nn.init.constant_(doubled.weight, 2.0)
    layers = {"0": doubled, "unused.layer": doubled}
    assert layer_differences(network, layers, torch.ones(3, 1)) == {"0": 5.0}


def test_afterwards_layers_modes_and_hooks_are_those_of_before_also_on_an_error():
    network = nn.Sequential(nn.Linear(3, 3), nn.ReLU().eval())
    before = [(module, module.training) for module in network.modules()]
    for compare in (output_difference, layer_differences):
        compare(network, {"1": nn.Tanh()}, torch.ones(2, 3))
        for example in (torch.ones(2, 4), torch.ones(2, 3)):
            with pytest.raises(RuntimeError):
                compare(network, {"1": nn.Linear(4, 4)}, example)
        assert [(module, module.training) for module in network.modules()] == before
        assert not any(module._forward_hooks for module in network.modules())
        assert torch.is_grad_enabled()
