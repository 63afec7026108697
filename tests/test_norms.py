"""Non-scaling LayerNorm equals the stock layers at weight 1, in every shape, layout and precision."""

from __future__ import annotations

import pytest
import torch
from test_norms_conversion import randomised
from torch import nn

from robustcm.norms import NonScalingLayerNorm


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


@pytest.mark.parametrize("layout", ["channel_first", "channels-first", "", None])
def test_another_layout_is_refused_and_not_taken_for_the_last(layout):
    with pytest.raises(ValueError, match="layout must be one of channels_first, channels_last, got "):
        NonScalingLayerNorm(8, layout=layout)
