"""Non-scaling LayerNorm equals the stock layers at weight 1, and whole networks convert to it and still train."""

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
    AdaGroupNorm,
    AdaLayerNorm,
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    FP32LayerNorm,
)
from diffusers.models.normalization import RMSNorm as DiffusersRMSNorm
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ("channels_first", (3, 6)),
        ("channels_first", (3, 6, 7)),
        ("channels_first", (3, 6, 5, 4)),
        ("channels_first", (3, 6, 2, 5, 4)),
        ("channels_last", (3, 6)),
        ("channels_last", (3, 5, 6)),
    ],
    ids=["vector", "audio", "map", "video", "vector", "tokens"],
)
def test_any_shape_in_any_precision_comes_back_normalised(layout, shape, dtype, device, rng):
    layer = NonScalingLayerNorm(6, layout=layout, eps=1e-12).to(device, dtype)
    y = layer((7 + 5 * torch.randn(shape, generator=rng)).to(device, dtype).requires_grad_())
    assert (y.shape, y.dtype) == (shape, dtype)
    samples = y.double().flatten(1) if layout == "channels_first" else y.double().flatten(0, -2)
    tolerance = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
    torch.testing.assert_close(samples.mean(1), torch.zeros_like(samples[:, 0]), rtol=0, atol=tolerance)
    torch.testing.assert_close(samples.square().mean(1), torch.ones_like(samples[:, 0]), rtol=0, atol=tolerance)
    y.sum().backward()
    assert torch.isfinite(layer.bias.grad).all()


@pytest.mark.parametrize("shape", [(2, 6, 7), (2, 6, 5, 4), (2, 6, 3, 5, 4)], ids=["audio", "map", "video"])
def test_channels_innermost_in_memory_stay_so_forward_and_backward(shape, rng):
    x = torch.randn(shape, generator=rng).requires_grad_()
    innermost = x.detach().movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_()
    layer = randomised(NonScalingLayerNorm(6))
    y, expected = layer(innermost), layer(x)
    torch.testing.assert_close(y, expected)
    assert y.stride() == innermost.stride() != x.stride() == expected.stride()
    upstream = torch.randn(shape, generator=rng)
    y.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(innermost.grad, x.grad)


def test_a_memory_format_of_torch_is_kept_through_a_convolution():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), NonScalingLayerNorm(8), nn.Conv2d(8, 4, 3))
    network = network.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    y = network[1](network[0](x))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert not y.is_contiguous()
    assert network(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels_last_in_memory", [False, True])
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_the_layer_compiles_into_one_graph(layout, channels_last_in_memory, rng):
    layer = randomised(NonScalingLayerNorm(6, layout=layout))
    x = torch.randn(2, 6, 6, 6, generator=rng)
    if channels_last_in_memory:
        x = x.to(memory_format=torch.channels_last)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    torch.testing.assert_close(y, layer(x))
    assert y.stride() == layer(x).stride()
    (gradient,) = torch.autograd.grad(y.sum(), [layer.bias])
    torch.testing.assert_close(gradient, torch.autograd.grad(layer(x).sum(), [layer.bias])[0])


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("ours", "stock"),
    [
        (NonScalingLayerNorm(6), nn.GroupNorm(1, 6)),
        (NonScalingLayerNorm(6, layout="channels_last"), nn.LayerNorm(6)),
    ],
    ids=["channels_first", "channels_last"],
)
def test_under_autocast_it_is_as_precise_as_the_stock_layer(ours, stock, x_dtype, device, rng):
    x = torch.randn(4, 6, 6, generator=rng).to(device, x_dtype)
    with torch.autocast(device.type, torch.bfloat16):
        y, expected = ours.to(device)(x), stock.to(device)(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)


def test_its_weight_is_one_wherever_the_layer_is_and_cannot_be_set():
    layer = NonScalingLayerNorm(6, dtype=torch.bfloat16)
    torch.testing.assert_close(layer.weight, torch.ones(6, dtype=torch.bfloat16), rtol=0, atol=0)  # the dtype as well
    assert torch.equal(NonScalingLayerNorm(6, bias=False).weight, torch.ones(6))
    with pytest.raises(KeyError):
        layer.weight = nn.Parameter(torch.zeros(6))
    with pytest.raises(AttributeError):
        layer.weight = torch.zeros(6)


def test_a_parameter_given_as_bias_is_taken_as_it_is():
    bias = nn.Parameter(torch.ones(6), requires_grad=False)
    assert NonScalingLayerNorm(6, bias=bias).bias is bias
    with pytest.raises(ValueError, match=r"the bias has shape \(5,\), the layer \(6,\)"):
        NonScalingLayerNorm(6, bias=nn.Parameter(torch.ones(5)))


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_a_bias_of_another_precision_is_cast_to_that_of_the_input(layout, device, rng):
    """As FP32LayerNorm does; layer_norm itself refuses most pairs of dtypes."""
    layer = NonScalingLayerNorm(6, layout=layout, dtype=torch.bfloat16, device=device)
    x = torch.randn(4, 6, 6, generator=rng, dtype=torch.float64).to(device)
    torch.testing.assert_close(layer(x), layer.double()(x))


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
