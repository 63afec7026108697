"""The tensor is found in whatever an autoencoder returns, and what holds none is described."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution, EncoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from reference_trainer.data.outputs import described, tensor_in

VALUES = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
POSTERIOR = DiagonalGaussianDistribution(torch.cat([VALUES, torch.zeros_like(VALUES)], 1))
NORMAL = Normal(VALUES, 1.0)


class WithMode:
    """A distribution whose mode and mean differ; ``sample`` draws, and must not be asked."""

    mean = VALUES + 1

    def mode(self) -> torch.Tensor:
        return VALUES

    def sample(self) -> torch.Tensor:
        raise AssertionError


class WithMean:
    """As some libraries have it: the mean is a method."""

    def mean(self) -> torch.Tensor:
        return VALUES


@pytest.mark.parametrize(
    "output",
    [
        VALUES,
        VALUES.numpy(),
        VALUES.flip(3).numpy()[..., ::-1],
        POSTERIOR,
        NORMAL,
        Independent(NORMAL, 3),
        MixtureSameFamily(Categorical(torch.ones(1)), Normal(VALUES[..., None], 1.0)),  # to ask for its mode raises
        WithMode(),
        WithMean(),
        EncoderOutput(latent=VALUES),
        DecoderOutput(sample=VALUES),
        AutoencoderKLOutput(latent_dist=POSTERIOR),
        AutoencoderKLOutput(latent_dist=VALUES),
        SimpleNamespace(latents=VALUES),
        SimpleNamespace(latent_dist=SimpleNamespace(mean=VALUES)),
        SimpleNamespace(mean=VALUES, logvar=0 * VALUES),
        (VALUES, torch.tensor(0.3), None),  # a VQGAN: quantised, loss, indices
        [POSTERIOR],
        (SimpleNamespace(sample=VALUES),),
        {"loss": torch.tensor(0.3), "latents": VALUES},
        {"latent_dist": NORMAL},
        {"mean": VALUES, "logvar": 0 * VALUES},
        namedtuple("Out", "loss latent")(torch.tensor(0.3), VALUES),
    ],
    ids=lambda output: type(output).__name__,
)
def test_the_tensor_is_found(output):
    found = tensor_in(output)
    assert found is not None
    assert torch.equal(found, VALUES)


@pytest.mark.parametrize(
    ("output", "name"),
    [
        (None, "None"),
        ("latents", "a str"),
        ({"z": VALUES, 3: 1}, "a dict of z, 3"),
        ({}, "a dict of nothing"),
        ((), "a tuple of nothing"),
        ([None, 1], "a list of NoneType, int"),
        (SimpleNamespace(sample=lambda: VALUES), "a SimpleNamespace"),
    ],
)
def test_what_holds_none_is_described(output, name: str):
    assert tensor_in(output) is None
    assert described(output) == name
