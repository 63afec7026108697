"""Whole networks compute the same after their conversion, train and are saved; the check that shows it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiTTransformer2DModel,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    FP32LayerNorm,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_norms_conversion import ActivatedGroupNorm, dit, randomised, run_dit, run_unet, unet
from torch import nn

from robustcm.norms import NonScalingLayerNorm, convert_norms

# --- Behind an optimizer ---------------------------------------------------------------------------------------------


def test_biases_are_the_same_objects_so_that_what_holds_them_trains_them(rng):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.Flatten(), nn.LayerNorm(8 * 4))
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    biases = [network[1].bias, network[3].bias]
    scales = [network[1].weight, network[3].weight]
    convert_norms(network)
    assert all(now is then for now, then in zip([network[1].bias, network[3].bias], biases, strict=True))
    then = [p.clone() for p in (*biases, *scales)]
    network(torch.randn(5, 3, 4, 4, generator=rng)).pow(4).sum().backward()
    optimizer.step()
    moved = [not torch.equal(p, q) for p, q in zip((*biases, *scales), then, strict=True)]
    assert moved == [True, True, False, False]  # the dropped scales get no gradient: the optimizer steps over them


def test_a_layer_without_bias_brings_no_parameter_that_an_optimizer_lacks():
    network = nn.Sequential(nn.RMSNorm(8), nn.LayerNorm(8, bias=False), nn.LayerNorm(8))
    held = {id(p) for p in network.parameters()}
    convert_norms(network)
    assert {id(p) for p in network.parameters()} <= held


def test_two_norms_with_one_bias_go_on_sharing_it():
    network = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8))
    network[1].bias = network[0].bias
    convert_norms(network)
    assert network[1].bias is network[0].bias


# --- Networks of torch and diffusers, in train and eval mode ----------------------------------------------------------


def waves(*shape: int) -> torch.Tensor:
    """Fixed numbers, none like another."""
    return torch.linspace(-1, 1, math.prod(shape)).sin().reshape(shape)


def encoder(**options: object) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8), enable_nested_tensor=not options)


PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


def conditional_unet() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        cross_attention_dim=8,
        attention_head_dim=8,
    )


def pixart() -> nn.Module:
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        cross_attention_dim=8,
        caption_channels=8,
        use_additional_conditions=False,
    )


def autoencoder() -> nn.Module:
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=1, latent_channels=4)


def normalised_attention() -> nn.Module:
    return Attention(8, heads=2, dim_head=4, qk_norm="layer_norm", norm_num_groups=1, residual_connection=True)


NETWORKS = {
    "encoder": (encoder, (waves(2, 5, 8),)),
    "encoder, norm first": (lambda: encoder(norm_first=True), (waves(2, 5, 8),)),
    "encoder without bias": (lambda: encoder(bias=False), (waves(2, 5, 8),)),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), waves(2, 5, 8)),
    "decoder layer": (
        lambda: nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True),
        (waves(2, 5, 8), waves(2, 3, 8)),
    ),
    "transformer": (lambda: nn.Transformer(8, 2, 1, 1, 16, 0.0, batch_first=True), (waves(2, 5, 8), waves(2, 3, 8))),
    "attention": (normalised_attention, (waves(2, 8, 3, 3),)),
    "basic block": (
        lambda: BasicTransformerBlock(8, 2, 4, cross_attention_dim=8),
        (waves(2, 5, 8), None, waves(2, 3, 8)),
    ),
    "ada block": (
        lambda: BasicTransformerBlock(8, 2, 4, num_embeds_ada_norm=4, norm_type="ada_norm"),
        {"hidden_states": waves(1, 5, 8), "timestep": torch.tensor(3)},
    ),
    "ada norm continuous": (lambda: AdaLayerNormContinuous(8, 8), (waves(2, 5, 8), waves(2, 8))),
    "DiT": (
        dit,
        {"hidden_states": waves(2, 4, 8, 8), "timestep": torch.tensor([1, 2]), "class_labels": torch.tensor([1, 2])},
    ),
    "PixArt": (
        pixart,
        {"hidden_states": waves(2, 4, 8, 8), "encoder_hidden_states": waves(2, 3, 8), "timestep": torch.tensor([1, 2])},
    ),
    "conditional U-Net": (conditional_unet, (waves(2, 4, 8, 8), torch.tensor([1, 2]), waves(2, 3, 8))),
    "autoencoder": (autoencoder, waves(2, 3, 8, 8)),
}


def outputs(network: nn.Module, example: object) -> torch.Tensor:
    if isinstance(example, dict):
        y = network(**example)
    else:
        y = network(*example) if isinstance(example, tuple) else network(example)
    return y if isinstance(y, torch.Tensor) else y.sample


@pytest.mark.parametrize(("build", "example"), NETWORKS.values(), ids=NETWORKS)
def test_a_network_works_in_every_mode_after_conversion_and_computes_the_same(build, example):
    network = randomised(build())
    report = convert_norms(network)
    assert report.converted
    assert "->" not in str(report)
    for training in (True, False):
        network.train(training)
        with torch.no_grad():
            without_gradient = outputs(network, example)
        y = outputs(network, example)
        if not isinstance(network, AutoencoderKL | DiTTransformer2DModel):  # these drop out or draw
            torch.testing.assert_close(without_gradient, y.detach(), rtol=1e-4, atol=1e-5)
        y.square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)
    assert report.max_difference(network, example) < 1e-4 * max(1.0, y.abs().max().item())
    layers = report.layer_differences(network, example)
    assert set(layers) == set(report.converted)
    assert max(layers.values()) < 1e-4


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padded_tokens_pass_on_every_path_of_torch(rng):
    """In eval mode torch packs them into nested tensors; a hook takes the fused path from a layer, not the packing."""
    network = randomised(encoder())
    example = {"src": torch.randn(2, 5, 8, generator=rng), "src_key_padding_mask": PADDING}
    report = convert_norms(network)
    expected = network(**example)[~PADDING]
    assert report.max_difference(network, example) < 1e-5
    assert max(report.layer_differences(network, example).values()) < 1e-5
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(**example)[~PADDING], expected)
        network.layers[1].norm1.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(network(**example)[~PADDING], expected)


@pytest.mark.parametrize("kind", ["layer_norm", "group_norm"])
def test_a_norm_whose_parent_asks_for_its_type_is_kept(kind):
    network = Attention(8, cross_attention_dim=8, cross_attention_norm=kind, cross_attention_norm_num_groups=2)
    network = nn.ModuleDict({"attention": network, "norm": nn.LayerNorm(8)})
    report = convert_norms(network)
    assert "asks for its type" in report.kept["attention.norm_cross"]
    network["attention"](waves(2, 5, 8), waves(2, 3, 8))


# --- The check that anyone can call ----------------------------------------------------------------------------------


def test_the_check_knows_the_design_from_a_fault_layer_by_layer(rng):
    network = randomised(nn.Sequential(nn.Conv1d(4, 8, 1), nn.GroupNorm(4, 8), nn.Conv1d(8, 8, 1), nn.RMSNorm(6)))
    stock, x = copy.deepcopy(network), torch.randn(3, 4, 6, generator=rng)
    report = convert_norms(network)
    assert report.converted["1"].endswith(", 4 groups -> 1")
    assert report.converted["3"].endswith(", subtracts the mean now")
    nn.init.ones_(stock[1].weight)
    nn.init.ones_(stock[3].weight)
    expected = (stock(x) - network(x)).abs().max().item()
    assert expected > 0.1
    assert report.max_difference(network, x) == pytest.approx(expected)
    assert max(report.layer_differences(network, x).values()) < 1e-5


LAYERS = st.sampled_from(
    [
        lambda: nn.Conv1d(6, 6, 1),
        lambda: nn.GroupNorm(1, 6),
        lambda: nn.GroupNorm(1, 6, affine=False),
        lambda: nn.LayerNorm(4, eps=1e-3),
        lambda: nn.LayerNorm((6, 4), bias=False),
        lambda: FP32LayerNorm(4),
        lambda: nn.Sequential(nn.GroupNorm(1, 6), ActivatedGroupNorm(2, 6)),
    ]
)


@given(st.lists(LAYERS, min_size=1, max_size=6), st.booleans(), st.integers(0, 9))
def test_whatever_stands_in_a_network_scales_at_one_give_the_same_output(makers, new_biases, seed):
    # A last layer to be converted, so that none is no error; after any norm numbers are of order 1.
    network = nn.Sequential(*[make() for make in makers], nn.LayerNorm(4))
    report = convert_norms(network, new_biases=new_biases)
    randomised(network)
    x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(seed))
    assert report.max_difference(network, x) < 1e-3
    assert all(difference < 1e-4 for difference in report.layer_differences(network, x).values())
    assert len(report.converted) + len(report.kept) == sum("Norm" in type(m).__name__ for m in network.modules())


def test_the_check_finds_a_counterpart_that_is_none(rng):
    network = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), ActivatedGroupNorm(1, 8))
    wrong = {ActivatedGroupNorm: lambda norm: NonScalingLayerNorm(8, bias=norm.bias)}
    report = convert_norms(network, also=wrong)
    x = torch.randn(4, 8, generator=rng)
    assert report.max_difference(network, x) > 0.5
    differences = report.layer_differences(network, x)
    assert (differences["1"] < 1e-6, differences["2"] > 0.5) == (True, True)


def test_the_check_follows_the_network_that_trains_moves_and_is_copied(rng):
    network = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.LayerNorm(8, bias=False))
    report = convert_norms(network, new_biases=True)
    randomised(network).double()
    x = torch.randn(4, 8, generator=rng).double()
    for each in (network, randomised(copy.deepcopy(network))):
        assert report.max_difference(each, x) < 1e-12


def test_the_check_leaves_no_trace_even_on_an_error(rng):
    network = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8).eval(), nn.Dropout(0.5))
    report = convert_norms(network)
    modes, modules, state = [m.training for m in network.modules()], list(network.modules()), torch.get_rng_state()
    for check in (report.max_difference, report.layer_differences):
        check(network, torch.randn(4, 8, generator=rng))
        with pytest.raises(RuntimeError):
            check(network, torch.randn(4, 9, generator=rng))
    assert [m.training for m in network.modules()] == modes
    assert all(now is then for now, then in zip(network.modules(), modules, strict=True))
    assert not network[1]._forward_hooks
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_the_check_refuses_a_network_that_was_not_converted():
    network = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    stock = copy.deepcopy(network)
    report = convert_norms(network)
    for other in (stock, nn.Linear(8, 8)):
        with pytest.raises(ValueError, match="1 is no NonScalingLayerNorm: give the network that was converted"):
            report.max_difference(other, torch.zeros(1, 8))


# --- Saving and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "run"), [(unet, run_unet), (dit, run_dit)])
def test_a_converted_diffusers_model_comes_back_from_its_folder(build, run, tmp_path):
    network = randomised(build()).eval()
    convert_norms(network)
    network.save_pretrained(tmp_path)
    loaded = type(network).from_config(type(network).load_config(tmp_path))
    convert_norms(loaded)
    loaded.load_state_dict(load_file(tmp_path / "diffusion_pytorch_model.safetensors"))
    assert torch.equal(run(loaded.eval()), run(network))


def test_stock_weights_come_in_before_the_conversion_and_lose_their_scales(tmp_path):
    stock = randomised(unet())
    stock.save_pretrained(tmp_path)
    network = UNet2DModel.from_pretrained(tmp_path)
    report = convert_norms(network)
    lost = {f"{name}.weight" for name in report.converted}
    assert stock.state_dict().keys() - network.state_dict().keys() == lost
    assert all(torch.equal(value, stock.state_dict()[key]) for key, value in network.state_dict().items())


def test_the_stock_network_does_not_take_converted_weights_in_silence():
    network = unet()
    convert_norms(network)
    with pytest.raises(RuntimeError, match=r"Missing key.*conv_norm_out\.weight"):
        unet().load_state_dict(network.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*conv_norm_out\.weight"):
        network.load_state_dict(unet().state_dict())
