"""Non-scaling LayerNorm equals the stock layers at weight 1, and whole networks convert to it and still train."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from diffusers.models.normalization import AdaGroupNorm, AdaLayerNorm, AdaLayerNormZero, FP32LayerNorm
from diffusers.models.normalization import RMSNorm as DiffusersRMSNorm
from torch import nn

from robustcm.norms import NonScalingLayerNorm, convert_norms

STOCK = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, DiffusersRMSNorm)


def unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )


def dit() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        norm_num_groups=2,
        num_embeds_ada_norm=10,
    )


def run_unet(network: nn.Module) -> torch.Tensor:
    return network(torch.ones(2, 4, 8, 8), torch.tensor([1.0, 2.0])).sample


def run_dit(network: nn.Module) -> torch.Tensor:
    labels = torch.tensor([1, 2])
    return network(torch.ones(2, 4, 8, 8), timestep=torch.tensor([1, 2]), class_labels=labels).sample


def randomised(module: nn.Module) -> nn.Module:
    """No parameter at 0 or 1, so that one that gets lost is missed."""
    torch.manual_seed(0)
    for p in module.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    return module


# --- The layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_the_bias_is_all_there_is_to_learn(layout):
    layer = NonScalingLayerNorm(6, layout=layout)
    assert {k: v.shape for k, v in layer.state_dict().items()} == {"bias": (6,)}
    assert [k for k, _ in layer.named_parameters()] == ["bias"]
    assert not NonScalingLayerNorm(6, layout=layout, bias=False).state_dict()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trailing", [(5, 4), (7,), ()], ids=str)
def test_channels_first_equals_group_norm_of_one_group_at_weight_one(trailing, dtype, device, rng):
    ours = randomised(NonScalingLayerNorm(6, eps=1e-3)).to(device, dtype)
    stock = nn.GroupNorm(1, 6, eps=1e-3).to(device, dtype)
    stock.load_state_dict({"weight": torch.ones(6), "bias": ours.bias})
    (x, upstream) = (5 * torch.randn(2, 3, 6, *trailing, generator=rng, dtype=torch.float64)).to(device, dtype)
    gradients = []
    for layer in (ours, stock):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        assert y.dtype == dtype
        y.backward(upstream)
        gradients.append((y.detach(), leaf.grad, layer.bias.grad))
    for ours_, stocks in zip(*gradients, strict=True):
        tolerance = {torch.bfloat16: 0.05, torch.float32: 2e-5, torch.float64: 1e-12}[dtype]
        torch.testing.assert_close(ours_, stocks, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [6, (5, 6)], ids=str)
def test_channels_last_equals_the_layer_norm_of_a_transformer_at_weight_one(shape, rng):
    ours = randomised(NonScalingLayerNorm(shape, eps=1e-3, layout="channels_last"))
    stock = nn.LayerNorm(shape, eps=1e-3)
    stock.load_state_dict({"weight": torch.ones(shape), "bias": ours.bias})
    x = torch.randn(3, 5, 6, generator=rng)
    (ours_x, stock_x) = (x.clone().requires_grad_() for _ in range(2))
    torch.testing.assert_close(ours(ours_x), stock(stock_x))
    ours(ours_x).square().sum().backward()
    stock(stock_x).square().sum().backward()
    torch.testing.assert_close(ours_x.grad, stock_x.grad)
    torch.testing.assert_close(ours.bias.grad, stock.bias.grad)


def test_no_input_however_scaled_gets_out_with_another_scale(rng):
    x = torch.randn(3, 6, 4, 4, generator=rng)
    layer = NonScalingLayerNorm(6, eps=0.0)
    torch.testing.assert_close(layer(1000 * x), layer(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(x).square().mean((1, 2, 3)), torch.ones(3))


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_input_of_lower_precision_than_the_bias_keeps_its_dtype_as_in_the_stock_layers(layout):
    x = torch.randn(2, 6, 6).bfloat16()
    assert NonScalingLayerNorm(6, layout=layout)(x).dtype == nn.GroupNorm(1, 6)(x).dtype == torch.bfloat16


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"expected \[b, 6, \.\.\.\], got \(2, 5, 6\)"):
        NonScalingLayerNorm(6)(torch.zeros(2, 5, 6))
    with pytest.raises(ValueError, match=r"expected \[\.\.\., 6\], got \(2, 6, 5\)"):
        NonScalingLayerNorm(6, layout="channels_last")(torch.zeros(2, 6, 5))
    with pytest.raises(ValueError, match=r"channels_first takes the number of channels, got the shape \(5, 6\)"):
        NonScalingLayerNorm((5, 6))


# --- Conversion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "run"), [(unet, run_unet), (dit, run_dit)])
def test_a_converted_network_has_no_stock_norm_left_and_trains(build, run):
    network = build()
    stock = {name for name, m in network.named_modules() if isinstance(m, STOCK)}
    report = convert_norms(network)
    assert set(report.converted) == stock
    assert not [m for m in network.modules() if isinstance(m, STOCK)]
    run(network).square().sum().backward()
    ours = [m for m in network.modules() if isinstance(m, NonScalingLayerNorm)]
    assert len(ours) == len(stock)
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)
    assert all(m.bias.grad is not None for m in ours if m.bias is not None)


def test_report_on_a_unet_counts_every_learned_scale():
    before, network = unet(), unet()
    report = convert_norms(network)
    scales = sum(m.weight.numel() for m in before.modules() if isinstance(m, nn.GroupNorm))
    assert report.scales_removed == scales > 0
    assert not report.kept
    lost = {k for k in before.state_dict() if k not in network.state_dict()}
    assert lost == {f"{name}.weight" for name in report.converted}
    assert str(report).startswith(f"{len(lost)} layers converted, {scales} learned scales removed\n")


def test_report_on_a_dit_says_that_the_modulation_stays():
    network = dit()
    report = convert_norms(network)
    assert report.scales_removed == 0
    assert {name: why.split(":")[0] for name, why in report.kept.items()} == {
        "transformer_blocks.0.norm1": "AdaLayerNormZero",
        "transformer_blocks.1.norm1": "AdaLayerNormZero",
    }
    assert "its inner norm is converted" in report.kept["transformer_blocks.0.norm1"]


def test_a_network_whose_scales_are_one_computes_the_same_after_conversion():
    network = unet()
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.GroupNorm):
            new = nn.GroupNorm(1, module.num_channels, eps=module.eps)
            nn.init.normal_(new.bias)
            parent, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(parent), attribute, new)
    before = run_unet(network)
    convert_norms(network)
    torch.testing.assert_close(run_unet(network), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [AdaLayerNormZero, lambda d: AdaLayerNorm(d, num_embeddings=4)])
def test_an_adaptive_norm_without_learned_scale_computes_the_same_after_conversion(make):
    network = nn.ModuleDict({"norm": randomised(make(8))})
    x, t = torch.randn(2, 3, 8), torch.tensor(3)

    def run() -> torch.Tensor:
        if isinstance(network["norm"], AdaLayerNorm):
            return network["norm"](x, t)
        network["norm"].emb = None  # a given embedding in place of one of timestep and label
        return network["norm"](x, emb=torch.ones(2, 8))[0]

    before = run()
    report = convert_norms(network)
    assert list(report.converted) == ["norm.norm"]
    torch.testing.assert_close(run(), before)


@pytest.mark.parametrize(
    "layer",
    [nn.RMSNorm(8), nn.RMSNorm((8,), eps=1e-2), DiffusersRMSNorm(8, eps=1e-4), nn.LayerNorm(8, bias=False)],
    ids=repr,
)
def test_a_norm_without_bias_gets_one_at_zero_and_loses_its_scale(layer):
    network = nn.Sequential(nn.Linear(8, 8), copy.deepcopy(layer))
    report = convert_norms(network)
    assert report.scales_removed == 8
    assert torch.equal(network[1].bias, torch.zeros(8))
    stock = nn.LayerNorm(8, eps=layer.eps or torch.finfo(torch.float32).eps, elementwise_affine=False)
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(network[1](x), stock(x))


@pytest.mark.parametrize(
    "layer",
    [
        nn.GroupNorm(2, 8, affine=False),
        nn.LayerNorm(8, elementwise_affine=False),
        nn.RMSNorm(8, elementwise_affine=False),
    ],
)
def test_a_norm_without_parameters_gets_none(layer):
    network = nn.Sequential(layer)
    assert convert_norms(network).scales_removed == 0
    assert not list(network.parameters())


def test_bias_eps_dtype_mode_and_freezing_carry_over():
    network = (
        nn.Sequential(randomised(nn.GroupNorm(2, 8, eps=3e-4)), randomised(FP32LayerNorm(8, eps=2e-4))).double().eval()
    )
    network[1].bias.requires_grad_(False)
    before = copy.deepcopy(network)
    convert_norms(network)
    for ours, stock in zip(network, before, strict=True):
        assert torch.equal(ours.bias, stock.bias)
        assert (ours.eps, ours.bias.dtype, ours.training) == (stock.eps, torch.float64, False)
        assert ours.bias.requires_grad == stock.bias.requires_grad
    assert (network[0].layout, network[1].layout) == ("channels_first", "channels_last")


def test_a_layer_in_two_places_stays_one_layer_and_is_counted_once():
    norm = nn.GroupNorm(2, 8)
    network = nn.ModuleDict({"a": nn.Sequential(norm), "b": nn.Sequential(norm)})
    report = convert_norms(network)
    assert network["a"][0] is network["b"][0]
    assert isinstance(network["a"][0], NonScalingLayerNorm)
    assert (set(report.converted), report.scales_removed) == ({"a.0", "b.0"}, 8)


def test_norms_that_cannot_be_converted_are_reported_and_kept():
    network = nn.ModuleDict(
        {"batch": nn.BatchNorm2d(4), "instance": nn.InstanceNorm2d(4), "ada": AdaGroupNorm(4, 4, 2)}
    )
    report = convert_norms(network)
    assert not report.converted
    assert "over the batch" in report.kept["batch"]
    assert "instance" in report.kept
    assert "normalises inside a function" in report.kept["ada"]
    assert isinstance(network["batch"], nn.BatchNorm2d)


def test_converting_twice_is_converting_once():
    network = unet()
    convert_norms(network)
    before = copy.deepcopy(network.state_dict())
    report = convert_norms(network)
    assert (report.converted, report.kept, report.scales_removed) == ({}, {}, 0)
    assert before.keys() == network.state_dict().keys()


def test_a_norm_by_itself_has_no_parent_and_is_refused():
    with pytest.raises(ValueError, match="GroupNorm is itself a norm: build a NonScalingLayerNorm in its place"):
        convert_norms(nn.GroupNorm(2, 8))
