"""Backbones from diffusers behind one signature: ``F(x [b, ch, h, w], c_noise [b], labels=None) -> [b, ch, h, w]``.

Built for two times, as flow maps and trajectories are told, ``F(x, c_noise [b], c_noise_2 [b])``: the embedding of the
second is added to that of the first. Built for ``classes``, they take ``labels [b]`` (int64): the class of each sample,
or the number of classes for no class, which is also what they take without. Its embedding is added as well, and starts
at 0: the network starts as the one without classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from robustcm.checks import LARGEST, need_real, need_whole, need_wholes

MOST_CHANNELS, MOST_LAYERS, MOST_HALVINGS = 2**16, 1000, 15
NO_CLASSES = "the network is built without classes and takes no labels: build it with their number"
PLAIN_BLOCKS = {
    "conv": ("DownBlock2D", "UpBlock2D"),
    "resnet": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
}
"""diffusers' blocks without attention, down and up, by what resamples."""


class Convolutions(Protocol):
    """What the configurations of convolutional networks have in common."""

    @property
    def block_out_channels(self) -> tuple[int, ...]: ...
    @property
    def layers_per_block(self) -> int: ...
    @property
    def norm_num_groups(self) -> int: ...
    @property
    def patch(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class UNet:
    """diffusers' UNet2DModel, on latents whose ``patch`` x ``patch`` squares are laid into channels."""

    block_out_channels: tuple[int, ...] = (32, 64)
    """Channels at each resolution, the finest first; each further entry halves height and width."""
    layers_per_block: int = 1
    """Residual blocks at each resolution."""
    attention: tuple[bool, ...] = (False, False)
    """Self-attention at each resolution."""
    norm_num_groups: int = 8
    """Groups of the group norms; a divisor of every entry of block_out_channels."""
    dropout: float = 0.0
    """Share of activations dropped while training, 0 to 1."""
    patch: int = 1
    """Side of the squares that are laid into channels."""
    attention_head_dim: int = 8
    """Channels of one attention head; at most those of any resolution that is attended to."""
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    """How the time enters a residual block: ``default`` is added behind its first convolution, ``scale_shift`` scales
    and shifts its second norm, as in ADM."""
    resampling: Literal["conv", "resnet"] = "conv"
    """What halves and doubles height and width: ``conv`` a convolution, ``resnet`` a residual block, as in ADM."""

    def __post_init__(self) -> None:
        need_convolutions(self)
        need_real(self, "dropout", least=0, below=1)
        need_whole(self, "attention_head_dim", least=1, most=MOST_CHANNELS)
        if self.resnet_time_scale_shift not in ("default", "scale_shift"):
            got = repr(self.resnet_time_scale_shift)
            raise ValueError(f"resnet_time_scale_shift is 'default' or 'scale_shift', got {got}")
        if self.resampling not in PLAIN_BLOCKS:
            raise ValueError(f"resampling is 'conv' or 'resnet', got {self.resampling!r}")
        if len(self.attention) != len(self.block_out_channels):
            raise ValueError(
                f"attention needs one entry for each of block_out_channels, got {len(self.attention)} for "
                f"{len(self.block_out_channels)}"
            )
        attending = (*self.attention, any(self.attention))  # the smallest resolution is attended to once more
        channels = (*self.block_out_channels, self.block_out_channels[-1])
        least = self.attention_head_dim  # fewer channels would be no head
        if few := [ch for ch, attends in zip(channels, attending, strict=True) if attends and ch < least]:
            raise ValueError(f"block_out_channels must be at least attention_head_dim = {least}, got {few[0]}")

    def build(self, shape: tuple[int, int, int], seed: int, times: int = 1, classes: int = 0) -> nn.Module:
        """For latents of ``shape`` (ch, h, w), told 1 or 2 ``times``; the initial weights are a function of ``seed``.

        ``classes`` that it is told of; 0: none.

        Raises:
            ValueError: the shape cannot be patched or halved as often as asked.
        """
        from diffusers import UNet2DModel  # slow to import

        ch, h, w = shape
        if not halvings_fit(self, h, w):
            raise ValueError(
                f"latents of {h}x{w} cannot be patched by {self.patch} and halved "
                f"{len(self.block_out_channels) - 1} times: use fewer block_out_channels or a smaller patch"
            )
        patched = ch * self.patch**2
        plain_down, plain_up = PLAIN_BLOCKS[self.resampling]
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            network: Any = UNet2DModel(
                sample_size=(h // self.patch, w // self.patch),
                in_channels=patched,
                out_channels=patched,
                block_out_channels=self.block_out_channels,
                layers_per_block=self.layers_per_block,
                down_block_types=tuple("AttnDownBlock2D" if a else plain_down for a in self.attention),
                up_block_types=tuple("AttnUpBlock2D" if a else plain_up for a in reversed(self.attention)),
                downsample_type=self.resampling,
                upsample_type=self.resampling,
                norm_num_groups=self.norm_num_groups,
                attn_norm_num_groups=self.norm_num_groups,  # else, with scale_shift, the middle has none
                attention_head_dim=self.attention_head_dim,
                resnet_time_scale_shift=self.resnet_time_scale_shift,
                dropout=self.dropout,
                add_attention=any(self.attention),
                class_embed_type="timestep" if times == 2 else None,
            )
        return Patched(network, self.patch, Beside(network, classes) if classes else None)


@dataclass(frozen=True, kw_only=True)
class DiT:
    """A diffusion transformer: diffusers' PixArtTransformer2DModel (DiT with adaLN-single) without a text.

    A patch as large as the latents makes them one token, and the network a residual MLP with time modulation: for
    latents of a few dozen elements convolutions have nothing to share.
    """

    width: int = 128
    """Elements a token has inside; a multiple of heads."""
    layers: int = 4
    """Transformer blocks."""
    heads: int = 4
    """Attention heads."""
    patch: int = 4
    """Side of the square of latents that makes a token."""
    dropout: float = 0.0
    """Share of activations dropped while training, 0 to 1."""
    time_scale: float = 0.2
    """c_noise is multiplied by this before its Fourier features: at 1, neighbouring levels look unrelated."""

    def __post_init__(self) -> None:
        need_whole(self, "width", "heads", "patch", least=1, most=MOST_CHANNELS)
        need_whole(self, "layers", least=1, most=MOST_LAYERS)
        need_real(self, "dropout", least=0, below=1)
        need_real(self, "time_scale", above=0, most=LARGEST)
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width must be a multiple of heads = {self.heads} and of 4, got {self.width}")

    def build(self, shape: tuple[int, int, int], seed: int, times: int = 1, classes: int = 0) -> nn.Module:
        """For latents of ``shape`` (ch, h, w), square, told 1 or 2 ``times``; the initial weights are a function of
        ``seed``.

        ``classes`` that it is told of; 0: none.

        Raises:
            ValueError: the shape is not square or not a multiple of the patch.
        """
        from diffusers import PixArtTransformer2DModel  # slow to import

        ch, h, w = shape
        if h != w or h % self.patch:
            raise ValueError(f"latents of {h}x{w} cannot be cut into {self.patch}x{self.patch} patches: change patch")
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            network: Any = PixArtTransformer2DModel(
                sample_size=h,
                in_channels=ch,
                out_channels=ch,
                num_layers=self.layers,
                num_attention_heads=self.heads,
                attention_head_dim=self.width // self.heads,
                patch_size=self.patch,
                dropout=self.dropout,
                cross_attention_dim=None,
                caption_channels=None,
                use_additional_conditions=False,
                norm_num_groups=1,
                activation_fn="gelu",  # the tanh approximation is slower on a CPU
            )
            if times == 2:
                network.adaln_single = _two_times(network)
        if times == 1:
            network.adaln_single = _once_per_level(network)
        if classes:
            network.adaln_single = _ByLabel(network.adaln_single, classes)
        if h == self.patch:
            _leave_out_what_one_token_does_not_need(network)
        return _Timed(network, self.time_scale, classes)


def need_convolutions(owner: Convolutions) -> None:
    """Refuse what no stack of convolutions with group norms can be made of.

    Raises:
        ValueError: names the field, what is allowed, and the value.
    """
    need_wholes(owner, "block_out_channels", least=1, most=MOST_CHANNELS, entries=MOST_HALVINGS + 1)
    need_whole(owner, "patch", "norm_num_groups", least=1, most=MOST_CHANNELS)
    need_whole(owner, "layers_per_block", least=1, most=MOST_LAYERS)
    if any(ch % owner.norm_num_groups for ch in owner.block_out_channels):
        raise ValueError(
            f"block_out_channels must be multiples of norm_num_groups = {owner.norm_num_groups}, "
            f"got {owner.block_out_channels}"
        )


def halvings_fit(owner: Convolutions, h: int, w: int) -> bool:
    """Whether ``h`` x ``w`` can be cut into patches and halved from block to block."""
    divisor = owner.patch * 2 ** (len(owner.block_out_channels) - 1)
    return h % divisor == 0 and w % divisor == 0


def _once_per_level(network: Any) -> nn.Module:
    """Time modulation from a row for each noise level in the batch, not for each sample: N - 1 pairs share a batch."""
    from diffusers.models.normalization import AdaLayerNormSingle

    class OncePerLevel(AdaLayerNormSingle):
        def forward(
            self,
            timestep: Tensor,
            added_cond_kwargs: Any = None,
            batch_size: int | None = None,
            hidden_dtype: torch.dtype | None = None,
        ) -> Any:
            # How many levels there are is not known without waiting for the device, and no compiled shape.
            if timestep.device.type != "cpu" or torch.compiler.is_compiling():
                return super().forward(timestep, added_cond_kwargs, batch_size, hidden_dtype)
            levels, which = timestep.unique(return_inverse=True)
            rows = super().forward(levels, added_cond_kwargs, len(levels), hidden_dtype)
            return [row.index_select(0, which) for row in rows]

    once = OncePerLevel(network.inner_dim)
    once.load_state_dict(network.adaln_single.state_dict())
    return once


def _two_times(network: Any) -> nn.Module:
    """Time modulation of a network told ``[b, 2]``; without the shortcut of ``_once_per_level``: two times hardly ever
    come twice, and ``unique`` has no derivative."""
    from diffusers.models.embeddings import TimestepEmbedding
    from diffusers.models.normalization import AdaLayerNormSingle

    class TwoTimes(AdaLayerNormSingle):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.second = TimestepEmbedding(in_channels=256, time_embed_dim=width)

        def forward(
            self,
            timestep: Tensor,
            added_cond_kwargs: Any = None,
            batch_size: int | None = None,
            hidden_dtype: torch.dtype | None = None,
        ) -> Any:
            features = self.emb.time_proj(timestep.flatten()).to(hidden_dtype).unflatten(0, (-1, 2))
            embedded = self.emb.timestep_embedder(features[:, 0]) + self.second(features[:, 1])
            return self.linear(self.silu(embedded)), embedded

    return TwoTimes(network.inner_dim)


class _Labels(nn.Embedding):
    """A row for each class and one for none, all 0 at the start; drawn by nobody, so that no other weight changes."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__(classes + 1, width, _weight=torch.zeros(classes + 1, width))

    def or_none(self, labels: Tensor | None, x: Tensor) -> Tensor:
        """``labels [b]``; not given, no class for each of ``x [b, ...]``."""
        return x.new_full((len(x),), self.num_embeddings - 1, dtype=torch.long) if labels is None else labels


class _ByLabel(nn.Module):
    """Time modulation, ``_once_per_level`` or ``_two_times``, with the label added before its last, linear layer."""

    def __init__(self, timed: Any, classes: int) -> None:
        super().__init__()
        self.labels = _Labels(classes, timed.linear.in_features)
        self.silu, self.linear, timed.linear = timed.silu, timed.linear, nn.Identity()
        self.timed = timed

    def forward(
        self,
        timestep: Tensor,
        added_cond_kwargs: Any = None,
        batch_size: int | None = None,
        hidden_dtype: torch.dtype | None = None,
    ) -> Any:
        _, embedded = self.timed(timestep, None, batch_size, hidden_dtype)
        embedded = embedded + self.labels(added_cond_kwargs["labels"]).to(embedded.dtype)
        return self.linear(self.silu(embedded)), embedded


class Beside(nn.Module):
    """What a UNet2DModel with classes is told beside its first time, embedded: the label, and the second time."""

    def __init__(self, network: Any, classes: int) -> None:
        super().__init__()
        self.labels = _Labels(classes, network.time_embedding.linear_2.out_features)
        self.time_proj, self.second = network.time_proj, network.class_embedding
        network.class_embedding = nn.Identity()
        network.register_to_config(class_embed_type="identity")

    def forward(self, labels: Tensor, *times: Tensor) -> Tensor:
        embedded: Tensor = self.labels(labels)
        for time in times:
            embedded = embedded + self.second(self.time_proj(time))
        return embedded


def _leave_out_what_one_token_does_not_need(network: Any) -> None:
    """The same function in fewer operations: a single token has attention weight 1, whatever query and key say; two
    linear maps in a row, value and output, are one; and a convolution with one position is a product of matrices."""
    network.pos_embed.proj = _OnePosition(network.pos_embed.proj)
    for block in network.transformer_blocks:
        block.attn1 = _OneToken(block.attn1.to_out)


class _OneToken(nn.Module):
    """diffusers' attention where every sequence has one token, which is its own value."""

    def __init__(self, to_out: nn.ModuleList) -> None:
        super().__init__()
        self.to_out = to_out

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        project, dropout = self.to_out
        out: Tensor = dropout(project(hidden_states))
        return out


class _OnePosition(nn.Module):
    """A convolution whose kernel covers the whole map: ``[b, ch, h, w] -> [b, out, 1, 1]``."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.flatten(1), self.weight.flatten(1), self.bias)[..., None, None]


class _Timed(nn.Module):
    def __init__(self, network: Any, time_scale: float, classes: int) -> None:
        super().__init__()
        self.network = network
        self.time_scale = time_scale
        self.classes = classes

    def forward(self, x: Tensor, *c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
        told = None
        if self.classes:
            told = {"labels": self.network.adaln_single.labels.or_none(labels, x)}
        elif labels is not None:
            raise ValueError(NO_CLASSES)
        times = self.time_scale * (c_noise[0] if len(c_noise) == 1 else torch.stack(c_noise, 1))
        output: Tensor = self.network(x, encoder_hidden_states=None, timestep=times, added_cond_kwargs=told).sample
        return output


class Patched(nn.Module):
    """A UNet2DModel on latents laid into channels, square by square; ``beside`` it what else it is told."""

    def __init__(self, network: nn.Module, patch: int, beside: Beside | None) -> None:
        super().__init__()
        self.network = network
        self.patch = patch
        self.beside = beside

    def forward(self, x: Tensor, *c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
        p = self.patch
        told = c_noise[1] if len(c_noise) == 2 else None
        if self.beside is not None:
            told = self.beside(self.beside.labels.or_none(labels, x), *c_noise[1:])
        elif labels is not None:
            raise ValueError(NO_CLASSES)
        x = rearrange(x, "b ch (h p) (w q) -> b (ch p q) h w", p=p, q=p)
        x = self.network(x, c_noise[0], class_labels=told).sample
        return rearrange(x, "b (ch p q) h w -> b ch (h p) (w q)", p=p, q=p)


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The backbone's blocks, which are the modules of its lists."""
    for module in network.children():
        if isinstance(module, nn.ModuleList):
            yield from (block for block in module if block is not None)  # diffusers puts None where no attention is
        else:
            yield from blocks(module)
