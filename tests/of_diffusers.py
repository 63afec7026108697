"""Networks of diffusers in folders, for tests of runs that start from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reference_trainer.config import TrainConfig
from reference_trainer.data.latents import GivenStatistics
from reference_trainer.model import build_network
from reference_trainer.pretrained import FromDiffusers

FILE = Path("unet") / "diffusion_pytorch_model.safetensors"
SHAPE = (3, 8, 8)


def unet(**options: Any) -> Any:
    """A stand-in for OpenAI's: their configuration for ImageNet 64, narrower; see diffusers' conversion script."""
    whole = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "attention_head_dim": 8,
        "norm_num_groups": 4,
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 4,
    }
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return UNet2DModel(**whole | options).eval().requires_grad_(False)


def saved(root: Path, scheduler: Any = None, **options: Any) -> Path:
    """A pipeline's folder."""
    unet(**options).save_pretrained(root / "unet")
    (root / "model_index.json").write_text("{}")
    if scheduler is not None:
        scheduler.save_pretrained(root / "scheduler")
    return root


def started(name: Path, classes: int = 0, base: TrainConfig | None = None, **options: Any) -> nn.Module:
    """The network that a run begins with."""
    network = FromDiffusers(name=str(name), **options)
    config = replace(base or TrainConfig(), network=network, statistics=GivenStatistics()).found()
    return build_network(config, SHAPE, classes, begin=True).eval().requires_grad_(False)


def change(root: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(root / FILE)
    edit(tensors)
    save_file(tensors, root / FILE, {"format": "pt"})
