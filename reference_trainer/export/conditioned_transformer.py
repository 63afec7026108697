"""A PixArtTransformer2DModel told a class, a second time or both. This file goes with a model; it needs diffusers.

Axes: b = batch; the embeddings of class and second time are added to that of the first time.
"""

from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormSingle
from torch import Tensor, nn


class TimeAndMore(AdaLayerNormSingle):
    """diffusers' time modulation of an embedding to which ``added_cond_kwargs["more"] [b, width]`` is added."""

    def forward(
        self,
        timestep: Tensor,
        added_cond_kwargs: Any = None,
        batch_size: int | None = None,
        hidden_dtype: torch.dtype | None = None,
    ) -> Any:
        nothing = {"resolution": None, "aspect_ratio": None}
        embedded = self.emb(timestep, **nothing, batch_size=batch_size, hidden_dtype=hidden_dtype)
        embedded = embedded + added_cond_kwargs["more"]
        return self.linear(self.silu(embedded)), embedded


class ConditionedTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """``F(x [b, ch, h, w], timestep [b], r_timestep [b], class_labels [b]) -> [b, ch, h, w]``.

    Args:
        pixart: the configuration of the PixArtTransformer2DModel inside.
        num_classes: it is told of; 0: none. The label ``num_classes`` says no class.
        second_time: whether it is told ``r_timestep``.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, pixart: dict, num_classes: int = 0, second_time: bool = False) -> None:
        super().__init__()
        transformer: Any = PixArtTransformer2DModel(**pixart)
        width = transformer.inner_dim
        transformer.adaln_single = TimeAndMore(width)
        self.transformer = transformer
        self.labels = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.second = TimestepEmbedding(in_channels=256, time_embed_dim=width) if second_time else None

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        r_timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        more = hidden_states.new_zeros(1)
        if self.labels is not None:
            more = more + self.labels(class_labels)
        if self.second is not None:
            features = self.transformer.adaln_single.emb.time_proj(r_timestep)
            more = more + self.second(features.to(hidden_states.dtype))
        told = {"more": more}
        output: Tensor = self.transformer(hidden_states, timestep=timestep, added_cond_kwargs=told).sample
        return output
