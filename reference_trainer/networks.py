"""Backbones from diffusers behind one signature: ``F(x [b, ch, h, w], c_noise [b]) -> [b, ch, h, w]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class UNet:
    """diffusers' UNet2DModel, on latents whose ``patch`` x ``patch`` squares are laid into channels."""

    block_out_channels: tuple[int, ...] = (32, 64)
    layers_per_block: int = 1
    attention: tuple[bool, ...] = (False, False)
    """Self-attention at each resolution."""
    norm_num_groups: int = 8
    dropout: float = 0.0
    patch: int = 1

    def __post_init__(self) -> None:
        if len(self.attention) != len(self.block_out_channels):
            raise ValueError(
                f"attention needs one entry for each of block_out_channels, got {len(self.attention)} for "
                f"{len(self.block_out_channels)}"
            )

    def build(self, shape: tuple[int, int, int], seed: int) -> nn.Module:
        """For latents of ``shape`` (ch, h, w); the initial weights are a function of ``seed``.

        Raises:
            ValueError: the shape cannot be patched or halved as often as asked.
        """
        from diffusers import UNet2DModel  # slow to import

        ch, h, w = shape
        divisor = self.patch * 2 ** (len(self.block_out_channels) - 1)
        if h % divisor or w % divisor:
            raise ValueError(
                f"latents of {h}x{w} cannot be patched by {self.patch} and halved "
                f"{len(self.block_out_channels) - 1} times: use fewer block_out_channels or a smaller patch"
            )
        patched = ch * self.patch**2
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            network: Any = UNet2DModel(
                sample_size=(h // self.patch, w // self.patch),
                in_channels=patched,
                out_channels=patched,
                block_out_channels=self.block_out_channels,
                layers_per_block=self.layers_per_block,
                down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in self.attention),
                up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(self.attention)),
                norm_num_groups=self.norm_num_groups,
                dropout=self.dropout,
                add_attention=any(self.attention),
            )
        return _Patched(network, self.patch)


class _Patched(nn.Module):
    def __init__(self, network: nn.Module, patch: int) -> None:
        super().__init__()
        self.network = network
        self.patch = patch

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        p = self.patch
        x = rearrange(x, "b ch (h p) (w q) -> b (ch p q) h w", p=p, q=p)
        x = self.network(x, c_noise).sample
        return rearrange(x, "b (ch p q) h w -> b ch (h p) (w q)", p=p, q=p)
