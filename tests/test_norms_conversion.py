"""Stock norms are converted, or kept for a reason that is said; nothing else of the network changes."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    UNet2DModel,
)
from diffusers.models.normalization import (
    AdaGroupNorm,
    AdaLayerNorm,
    AdaLayerNormZero,
    FP32LayerNorm,
)
from diffusers.models.normalization import RMSNorm as DiffusersRMSNorm
from torch import nn
from torch.nn.utils import parametrize

from robustcm.norms import NonScalingLayerNorm, convert_norms

WITHOUT_BIAS = (
    lambda: nn.RMSNorm(8),
    lambda: nn.RMSNorm((8,), eps=1e-2),
    lambda: DiffusersRMSNorm(8, eps=1e-4),
    lambda: nn.LayerNorm(8, bias=False),
)


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
    assert "its inner norm has a line of its own" in report.kept["transformer_blocks.0.norm1"]
    assert "transformer_blocks.0.norm1.norm" in report.converted


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


@pytest.mark.parametrize("make", WITHOUT_BIAS, ids=lambda make: repr(make()))
def test_a_norm_without_bias_loses_its_scale_and_gets_nothing_new(make, rng):
    network = nn.Sequential(nn.Linear(8, 8), make())
    eps = network[1].eps or torch.finfo(torch.float32).eps
    report = convert_norms(network)
    assert (report.scales_removed, report.new_biases, network[1].bias) == (8, (), None)
    x = torch.randn(2, 3, 8, generator=rng)
    torch.testing.assert_close(network[1](x), nn.LayerNorm(8, eps=eps, elementwise_affine=False)(x))


@pytest.mark.parametrize("make", WITHOUT_BIAS, ids=lambda make: repr(make()))
def test_asked_for_new_biases_are_at_zero_and_named_for_the_optimizer(make):
    network = nn.Sequential(nn.Linear(8, 8), make(), nn.LayerNorm(8)).double()
    report = convert_norms(network, new_biases=True)
    assert torch.equal(network[1].bias, torch.zeros(8, dtype=torch.float64))
    assert report.new_biases == ("1.bias",)
    assert "new       1.bias: a parameter for the optimizer" in str(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_rms_norm_that_leaves_eps_to_torch_keeps_the_one_of_its_precision(dtype, rng):
    network = nn.Sequential(nn.RMSNorm(8)).to(dtype)
    x = 1e-6 * torch.randn(4, 8, generator=rng).to(dtype)  # so small that eps shows
    x -= x.mean(1, keepdim=True)
    before = network(x)
    convert_norms(network)
    torch.testing.assert_close(network(x), before)


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
    assert convert_norms(network, new_biases=True).scales_removed == 0
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
        {
            "batch": nn.BatchNorm2d(4),
            "instance": nn.InstanceNorm2d(4),
            "ada": AdaGroupNorm(4, 4, 2),
            "layer": nn.LayerNorm(4),
        }
    )
    report = convert_norms(network)
    assert list(report.converted) == ["layer"]
    assert "over the batch" in report.kept["batch"]
    assert "each channel by itself" in report.kept["instance"]
    assert "normalises inside a function" in report.kept["ada"]
    assert isinstance(network["batch"], nn.BatchNorm2d)


class ActivatedGroupNorm(nn.GroupNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(super().forward(x))


class ChannelsFirstLayerNorm(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class HalvedByCall(nn.RMSNorm):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return super().__call__(x) / 2


class Mixin:
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class MixedLayerNorm(Mixin, nn.LayerNorm):
    """Its forward comes from a class that is no norm."""


class RMSNorm(nn.Module):
    """Of another code base, by the name and the attributes of diffusers'."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.eps, self.weight, self.bias = (dim,), 1e-5, nn.Parameter(torch.zeros(dim)), None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (1 + self.weight) * nn.functional.rms_norm(x, self.dim, eps=self.eps)


class TwoBiases(nn.LayerNorm):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.second = nn.Parameter(torch.zeros(dim))


class BufferedBias(nn.LayerNorm):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        del self.bias
        self.register_buffer("bias", torch.ones(dim))


def hooked(register: str) -> nn.Module:
    layer = nn.LayerNorm(8)
    getattr(layer, register)(lambda *_: None)
    return layer


def patched() -> nn.Module:
    layer = nn.LayerNorm(8)
    layer.forward = lambda x: 2 * x
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (ActivatedGroupNorm(2, 8), "overrides forward"),
        (ChannelsFirstLayerNorm(8), "overrides forward"),
        (MixedLayerNorm(8), "overrides forward"),
        (HalvedByCall(8), "its forward was replaced"),
        (patched(), "its forward was replaced"),
        (RMSNorm(8), "not known here; if it has a counterpart, name it: also={RMSNorm: ...}"),
        (hooked("register_forward_hook"), "hooks"),
        (hooked("register_forward_pre_hook"), "hooks"),
        (hooked("register_full_backward_hook"), "hooks"),
        (hooked("register_full_backward_pre_hook"), "hooks"),
        (parametrize.register_parametrization(nn.LayerNorm(8), "bias", nn.Tanh()), "parametrized"),
        (TwoBiases(8), "holds second besides weight and bias"),
        (BufferedBias(8), "its bias is no Parameter"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_layer_that_may_compute_something_else_is_kept_with_the_reason(layer, reason, rng):
    network = nn.Sequential(nn.LayerNorm(8), layer)
    x = torch.randn(4, 8, 8, generator=rng)
    before = network(x)
    report = convert_norms(network)
    assert (list(report.converted), list(report.kept)) == (["0"], ["1"])
    assert reason in report.kept["1"]
    assert network[1] is layer
    torch.testing.assert_close(network(x), before)


@pytest.mark.parametrize("stock", [nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.BatchNorm2d])
def test_a_subclass_with_a_forward_of_its_own_is_reported_whatever_it_is_called(stock: type[nn.Module]):
    own = type("GN", (stock,), {"forward": lambda self, x: torch.relu(stock.forward(self, x))})
    network = nn.Sequential(nn.LayerNorm(8), own(*((2, 8) if stock is nn.GroupNorm else (8,))))
    assert list(convert_norms(network).kept) == ["1"]


def test_a_subclass_that_leaves_forward_alone_is_converted():
    class Renamed(nn.GroupNorm):
        def __init__(self, ch: int) -> None:
            super().__init__(1, ch)

    network = nn.Sequential(Renamed(8))
    report = convert_norms(network)
    assert report.max_difference(network, torch.randn(2, 8, 4)) < 1e-6


def test_also_names_the_counterpart_of_a_norm_of_another_code_base(rng):
    shared = RMSNorm(8)
    network = nn.Sequential(shared, shared, ActivatedGroupNorm(1, 8), RMSNorm(8).eval())

    def counterpart(norm: RMSNorm) -> NonScalingLayerNorm:
        return NonScalingLayerNorm(norm.dim, eps=norm.eps, layout="channels_last", bias=False)

    report = convert_norms(network, also={RMSNorm: counterpart, ActivatedGroupNorm: lambda _: None})
    assert list(report.converted) == ["0", "1", "3"]
    assert report.kept == {"2": "ActivatedGroupNorm: also= keeps it"}
    assert (network[0] is network[1], network[0].training, network[3].training) == (True, True, False)
    assert report.scales_removed == 16
    x = torch.randn(4, 8, generator=rng)
    torch.testing.assert_close(network[0](x), nn.functional.layer_norm(x, (8,), eps=1e-5))


def test_also_goes_before_what_is_known_and_a_wrong_answer_changes_nothing():
    network = nn.Sequential(nn.LayerNorm(8), nn.GroupNorm(2, 8))
    assert list(convert_norms(copy.deepcopy(network), also={nn.LayerNorm: lambda _: None}).converted) == ["1"]
    with pytest.raises(ValueError, match=r"also\[GroupNorm\] gave a Identity, not a NonScalingLayerNorm or None"):
        convert_norms(network, also={nn.GroupNorm: lambda _: nn.Identity()})
    assert isinstance(network[0], nn.LayerNorm)


def test_the_parts_of_a_converted_layer_go_with_it():
    class Composed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.LayerNorm(8)

    network = nn.Sequential(Composed())
    report = convert_norms(network, also={Composed: lambda norm: NonScalingLayerNorm(8, bias=norm.inner.bias)})
    assert list(report.converted) == ["0"]
    assert not list(network[0].children())


def test_converting_none_is_an_error_that_says_why():
    with pytest.raises(ValueError, match=r"no norm of Sequential was converted: it holds none"):
        convert_norms(nn.Sequential(nn.Linear(4, 4)))
    message = r"no norm of Sequential was converted: 0 is kept, BatchNorm1d: .*; 1 is kept, .*: overrides forward"
    with pytest.raises(ValueError, match=message):
        convert_norms(nn.Sequential(nn.BatchNorm1d(8), ActivatedGroupNorm(2, 8)))


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
