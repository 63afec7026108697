"""Backbones: shape in, shape out, weights from the seed alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from reference_trainer.model import build_network
from reference_trainer.networks import DiT, UNet
from reference_trainer.presets import digits

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


def test_by_default_the_attention_and_resampling_are_those_of_diffusers():
    """What there was before one could choose them: runs of then go on."""
    from diffusers import UNet2DModel

    ours = UNet(block_out_channels=(8, 16), attention=(False, True), norm_num_groups=4).build((3, 8, 8), seed=5)
    torch.manual_seed(5)
    stock = UNet2DModel(
        sample_size=(8, 8),
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    x, c_noise = torch.randn(2, 3, 8, 8), torch.tensor([-500.0, 100.0])
    assert torch.equal(ours(x, c_noise), stock(x, c_noise).sample)


@pytest.mark.parametrize("change", [{"resnet_time_scale_shift": "scale_shift"}, {"resampling": "resnet"}])
def test_what_adm_has_makes_another_network_of_the_same_signature(change: dict[str, Any]):
    plain = UNet(block_out_channels=(8, 16), attention=(False, True), norm_num_groups=4)
    x, c_noise = torch.randn(2, 3, 8, 8), torch.tensor([-500.0, 100.0])
    names, outputs = [], []
    for part in (plain, replace(plain, **change)):
        network = part.build((3, 8, 8), seed=0)
        names.append({name: value.shape for name, value in network.state_dict().items()})
        outputs.append(network(x, c_noise))
    assert outputs[0].shape == outputs[1].shape
    assert names[0] != names[1]


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


@pytest.mark.parametrize("part", [TINY, DiT(width=16, layers=2, heads=2, patch=4), DiT(width=16, heads=2, patch=2)])
def test_a_network_told_two_times_depends_on_both_and_has_a_derivative_in_each(part):
    network, (x, one, two) = part.build((3, 4, 4), seed=0, times=2), inputs(6)
    with torch.no_grad():
        for parameter in network.parameters():  # some start at 0
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    out = network(x, one, two)
    assert out.shape == x.shape
    assert not torch.allclose(out, network(x, two, one))
    # Forward mode against reverse mode: <w, J d> = <J^T w, d>.
    generator = torch.Generator().manual_seed(2)
    weight, directions = torch.randn(out.shape, generator=generator), inputs(6, seed=3)
    with sdpa_kernel(SDPBackend.MATH):
        _, slope = torch.func.jvp(network, (x, one, two), directions)
    given = [v.requires_grad_() for v in (x, one, two)]
    gradients = torch.autograd.grad((weight * network(*given)).sum(), [*given, *network.parameters()])
    backward = sum((g * d).sum() for g, d in zip(gradients[:3], directions, strict=True))
    torch.testing.assert_close((weight * slope).sum(), backward, rtol=1e-4, atol=1e-4)
    assert all(gradient.abs().sum() > 0 for gradient in gradients[:3])


def inputs(b: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(b, 3, 4, 4, generator=generator), *(5 * torch.randn(2, b, generator=generator))


def test_all_but_the_modulation_starts_the_same_whether_told_one_time_or_two():
    part = DiT(width=16, layers=2, heads=2, patch=4)
    one, two = (part.build((3, 4, 4), seed=0, times=times).state_dict() for times in (1, 2))
    assert one.keys() < two.keys()
    assert all("second" in name or "adaln" in name or torch.equal(one[name], two[name]) for name in two)


def test_patches_that_do_not_fit_are_said():
    with pytest.raises(ValueError, match="change patch"):
        DiT(patch=3).build((4, 8, 8), seed=0)


def test_the_shortcuts_give_what_the_whole_network_gives():
    """One token with an identity for its value; modulation once a noise level; the gradients too."""
    shape, x = (3, 4, 4), torch.randn(6, 3, 4, 4)
    c_noise = torch.tensor([-1500.0, 3.0, 3.0, 1100.0, -1500.0, 7.0])
    short = DiT(width=16, layers=3, heads=2, patch=4).build(shape, seed=0).network
    stock = type(short)(**short.config)
    missing, unexpected = stock.load_state_dict(short.state_dict(), strict=False)
    assert not unexpected
    assert {name.rsplit(".", 2)[1] for name in missing} == {"to_q", "to_k", "to_v"}
    for block in stock.transformer_blocks:
        torch.nn.init.eye_(block.attn1.to_v.weight)
        torch.nn.init.zeros_(block.attn1.to_v.bias)
    outputs = [n(x, encoder_hidden_states=None, timestep=c_noise).sample for n in (short, stock)]
    torch.testing.assert_close(*outputs)
    assert outputs[0].std() > 0.1
    for output in outputs:
        output.square().sum().backward()
    gradients = dict(stock.named_parameters())
    for name, parameter in short.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (DiT, {"heads": 0}, "heads"),
        (DiT, {"width": 6, "heads": 2}, "width must be a multiple of heads = 2 and of 4, got 6"),
        (DiT, {"width": 12, "heads": 5}, "width must be a multiple"),
        (DiT, {"layers": 0}, "layers"),
        (DiT, {"patch": 0}, "patch"),
        (DiT, {"dropout": 1.0}, "dropout"),
        (DiT, {"dropout": -0.1}, "dropout"),
        (DiT, {"time_scale": 0.0}, "time_scale"),
        (DiT, {"time_scale": math.nan}, "time_scale"),
        (UNet, {"dropout": 2}, "dropout"),
        (UNet, {"norm_num_groups": 0}, "norm_num_groups"),
        (UNet, {"norm_num_groups": 5}, "multiples of norm_num_groups = 5"),
        (UNet, {"block_out_channels": (), "attention": ()}, "block_out_channels"),
        (UNet, {"block_out_channels": (8,) * 17, "attention": (False,) * 17}, "block_out_channels"),
        (UNet, {"attention": (False,)}, "attention needs one entry"),
        (UNet, {"layers_per_block": 0}, "layers_per_block"),
        (UNet, {"patch": -1}, "patch"),
        (
            UNet,
            {"norm_num_groups": 4, "block_out_channels": (4, 8), "attention": (True, False)},
            "attention_head_dim = 8",
        ),
        (
            UNet,
            {"norm_num_groups": 4, "block_out_channels": (8, 4), "attention": (True, False)},
            "attention_head_dim = 8",
        ),
        (UNet, {"attention": (True, True), "attention_head_dim": 64}, "attention_head_dim = 64, got 32"),
        (UNet, {"attention_head_dim": 0}, "attention_head_dim"),
        (UNet, {"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift is 'default' or 'scale_shift'"),
        (UNet, {"resampling": "bilinear"}, "resampling is 'conv' or 'resnet'"),
    ],
)
def test_what_no_network_can_be_made_of_is_refused_by_name(part: type, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        part(**changes)


@pytest.mark.parametrize(
    "network", [DiT(width=16, layers=1, patch=2), UNet(block_out_channels=(8, 8), norm_num_groups=2)]
)
def test_norms_without_a_learned_scale_have_none_to_lose_and_a_run_says_so(network, capsys: pytest.CaptureFixture[str]):
    """A DiT's scales come from the time: NsLN is the network it was, to the last bit."""
    config, shape = replace(digits(), network=network), (2, 4, 4)
    plain = build_network(config, shape, begin=True)
    changed = build_network(replace(config, non_scaling_norm=True), shape, begin=True)
    same = [*plain.state_dict()] == [*changed.state_dict()]
    assert same == isinstance(network, DiT) == ("none has a learned scale" in capsys.readouterr().out)
    if same:
        x, t = torch.randn(3, *shape), torch.rand(3)
        assert torch.equal(plain(x, t), changed(x, t))
        assert plain(x, t).abs().max() > 0
