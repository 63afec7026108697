"""Backbones: shape in, shape out, weights from the seed alone."""

from __future__ import annotations

import pytest
import torch

from reference_trainer.networks import DiT, ResidualMLP, UNet

TINY = UNet(block_out_channels=(8, 8), attention=(False, False), norm_num_groups=4)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_shape_in_shape_out(patch: int):
    network = UNet(block_out_channels=(8,), attention=(True,), norm_num_groups=4, patch=patch).build((3, 8, 8), seed=0)
    assert network(torch.randn(2, 3, 8, 8), torch.tensor([0.0, -5.0])).shape == (2, 3, 8, 8)


def test_weights_are_a_function_of_the_seed_and_leave_the_ambient_generator_alone():
    torch.manual_seed(3)
    expected_next = torch.rand(1)
    torch.manual_seed(3)
    one, two, other = (TINY.build((4, 8, 8), seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected_next)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_latent_that_cannot_be_halved_is_said():
    with pytest.raises(ValueError, match="cannot be patched"):
        TINY.build((4, 7, 8), seed=0)


@pytest.mark.parametrize("patch", [2, 4])
def test_a_transformer_keeps_the_shape(patch: int):
    network = DiT(width=16, layers=2, heads=2, patch=patch).build((3, 4, 4), seed=0)
    out = network(torch.randn(2, 3, 4, 4), torch.tensor([0.0, -5.0]))
    assert out.shape == (2, 3, 4, 4)
    out.square().sum().backward()
    unused = [name for name, p in network.named_parameters() if p.grad is None]
    assert not unused


def test_patches_that_do_not_fit_are_said():
    with pytest.raises(ValueError, match="change patch"):
        DiT(patch=3).build((4, 8, 8), seed=0)


def test_an_mlp_keeps_the_shape_uses_all_its_weights_and_starts_at_zero():
    network = ResidualMLP(width=8, layers=2).build((3, 4, 5), seed=0)
    x, c_noise = torch.randn(6, 3, 4, 5), torch.linspace(-1500, 1100, 6)
    assert torch.equal(network(x, c_noise), torch.zeros_like(x))
    with torch.no_grad():
        network.leave.weight.normal_(generator=torch.Generator().manual_seed(0))
    out = network(x, c_noise)
    out.square().sum().backward()
    assert out.shape == x.shape
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    moved = network(x, c_noise + 5)
    assert not torch.equal(moved, out)  # sees the noise level


def test_an_mlp_of_no_width_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        ResidualMLP(width=0)
