"""Models to export, and folders opened, for tests of both."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import KLAutoencoder
from reference_trainer.data.classes import ByClass, Classes
from reference_trainer.data.latents import LatentSpace
from reference_trainer.model import TrainedModel, build_network, number_of
from reference_trainer.networks import DiT, UNet

CPU = torch.device("cpu")
SHAPE = (2, 4, 4)
TOKEN, TOKENS = (DiT(width=16, layers=2, heads=2, patch=patch) for patch in (4, 2))
UNET = UNet(block_out_channels=(8, 8), norm_num_groups=4, attention=(False, True))
ADM = replace(UNET, resnet_time_scale_shift="scale_shift", resampling="resnet")
NETWORKS = {"token": TOKEN, "tokens": TOKENS, "unet": UNET, "adm": ADM, "patched unet": replace(UNET, patch=2)}


def trained(
    network: DiT | UNet, base: TrainConfig | None = None, classes: int = 0, codec: Any = None, **changes: Any
) -> TrainedModel:
    """A model whose weights are all drawn, so that none is 0 by chance of its beginning."""
    by_class = ByClass(guidance=1.5) if classes else None
    config = replace(base or TrainConfig(), network=network, classes=by_class, **changes)
    named = Classes(tuple("abc"[:classes]), (3,) * classes, "") if classes else None
    made, rng = build_network(config, SHAPE, number_of(named)).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    if codec is None:
        codec = KLAutoencoder().build(1, KLAutoencoder()._network(1).state_dict())
    mean, std = torch.randn(SHAPE[0], generator=rng), 0.5 + torch.rand(SHAPE[0], generator=rng)
    return TrainedModel(
        config, made.requires_grad_(False), LatentSpace(codec, mean, std, 0.22), SHAPE, 4000, CPU, classes=named
    )


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def opened(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """By diffusers, from the folder alone; the code in it is copied to a place of the test."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(root.parent / "modules"))
    monkeypatch.syspath_prepend(str(root.parent / "modules"))
    for name in [name for name in sys.modules if name.startswith("diffusers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    pipe = DiffusionPipeline.from_pretrained(root, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe
