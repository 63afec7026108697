"""Every number a field of a configuration takes works, or its owner refuses it in one line that names the field.

What works is what one step of training of a tiny network with it shows: finite loss, finite weights.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import typing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from reference_trainer.choices import CHOICES
from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import KLAutoencoder, PretrainedAutoencoder
from reference_trainer.data.codecs import Pixels
from reference_trainer.data.from_diffusers import DiffusersAutoencoder
from reference_trainer.data.gaussian_skip import GaussianSkip, Scalar, skip_for
from reference_trainer.data.images import Digits, ImageFolder, ImageSet, to_unit
from reference_trainer.data.latents import LatentSpace
from reference_trainer.data.photographs import Photographs
from reference_trainer.errors import UserError
from reference_trainer.networks import DiT, UNet
from reference_trainer.pretrained import FromDiffusers
from robustcm.averages import Exponential, PowerFunction
from robustcm.flow_maps import FlowMapObjective
from robustcm.gates import AboveExplained, AnnealedAbove
from robustcm.losses import PerElement, PerToken, cauchy_of_r2
from robustcm.objective import FewStepObjective, Objective, draw
from robustcm.semidiscrete import Semidiscrete
from robustcm.sketch import LogHistogram
from robustcm.teacher_input import KeepCovariance
from robustcm.turning import Turning

PARTS = tuple(dict.fromkeys(p for parts in CHOICES.values() for p in parts if isinstance(p, type)))
NEEDED: dict[type, dict[str, Any]] = {
    FromDiffusers: {"name": "a/network"},
    GaussianSkip: {"gain": Turning(clusters=2, levels=2)},  # whose own numbers are drawn by itself
    AnnealedAbove: {"start": 8.0, "end": 0.5},
    ImageFolder: {"path": "photos"},
    PretrainedAutoencoder: {"load": "my_vae:load"},
    DiffusersAutoencoder: {"name": "my/vae"},
    KLAutoencoder: {"steps": 2, "most_steps": 2, "block_out_channels": (8,), "norm_num_groups": 4},
    PerToken: {"rho": cauchy_of_r2},
    PerElement: {"rho": cauchy_of_r2},
}
"""What a part has no default for, or what makes it small."""

COSTLY = 100
"""Whole numbers above this are built, not run: they may be right and take a large machine or long."""

WHOLE = st.sampled_from([-1, 0, 1, 2, 20, 2**31, 2**63, 10**400]) | st.integers(-2, 50)
REAL = (
    st.sampled_from([math.nan, math.inf, -math.inf, 5e-324, -1e-9, 1e300, 1.0, 0.0])
    | st.floats(0, 1)
    | st.floats(-330, 308).map(lambda power: 10.0**power)
    | WHOLE
)


def numeric(part: type) -> dict[str, Any]:
    """The fields of ``part`` that hold numbers, and what to draw for each."""
    hints = typing.get_type_hints(part)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(part):
        hint = hints[field.name]
        if hint in (float, float | None):
            found[field.name] = REAL
        elif hint in (int, int | None):
            found[field.name] = WHOLE
        elif hint == tuple[int, ...]:
            found[field.name] = st.lists(WHOLE, max_size=3).map(tuple)
    return found


FEWER = settings.default.max_examples * 2 // 5
"""Examples of a part: most of them take two training steps."""

ELSEWHERE = "reference_trainer.config"  # see test_options.py; and a large lr ends a run, which says so
WITH_NUMBERS = tuple(part for part in PARTS if numeric(part) and part.__module__ != ELSEWHERE)


def in_a_config(part: Any) -> TrainConfig:
    """A configuration in which ``part`` is in use, by way of the part that holds it."""
    if isinstance(part, TrainConfig):
        return part
    (owner, field), *_ = (place for place, parts in CHOICES.items() if type(part) in parts)
    kept = TrainConfig().objective if owner in (FewStepObjective, Objective) else owner(**NEEDED.get(owner, {}))
    return in_a_config(replace(kept, **{field: part}))


class Tiny(nn.Module):
    """A network with one weight and one matrix in a block, told one time or two."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.blocks = nn.ModuleList([nn.Linear(2, 2, bias=False)])
        nn.init.eye_(self.blocks[0].weight)

    def forward(self, x: Tensor, *c_noise: Tensor) -> Tensor:
        return self.gain * self.blocks[0](x) + 0.001 * torch.tanh(sum(c_noise)).reshape(-1, 1, 1, 1)


def one_step(config: TrainConfig) -> None:
    """Latents, levels, coupling, loss, gradient and update as in training: all finite."""
    raw = torch.randn(40, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    latents = config.prepare_latents(raw)
    x = LatentSpace.of(Pixels(), latents).normalise(latents)[:16]
    objective = config.objective
    if isinstance(objective.gate, AboveExplained):
        objective = replace(objective, gate=objective.gate.on(x))
    if isinstance(objective, Objective) and isinstance(objective.teacher_input, KeepCovariance):
        objective = replace(objective, teacher_input=objective.teacher_input.on(x))
    network, asked = Tiny(), config.preconditioning
    skip = None if isinstance(asked, Scalar) else skip_for(asked, x, objective.noise)
    optimizer = config.optimizer.build(list(network.parameters()), network)
    state = objective.init()
    for step in (0, 3):
        labels = torch.arange(len(x)) % 2
        batch = objective.prepare(x, draw(config.seed, step, x.shape), step, 4, labels=labels)
        low, high = batch.pairs.t_lo, batch.pairs.t_hi
        assert (low <= high if isinstance(objective, FlowMapObjective) else low < high).all()
        terms = objective(config.preconditioned(network, skip), batch, state)
        assert terms.loss.isfinite()
        terms.loss.backward()
        state = terms.state
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate(step, 4)
        optimizer.step()
    assert all(weight.isfinite().all() for weight in network.parameters())


def attempt(build: Callable[[], Any]) -> tuple[Any, str]:
    """What ``build`` makes, or the line in which it is refused."""
    try:
        return build(), ""
    except (ValueError, UserError) as error:
        return None, str(error)


def works(part: Any, changed: dict[str, Any]) -> None:
    """What is done with ``part`` in training, where that is cheap."""
    entries = [v for value in changed.values() for v in (value if isinstance(value, tuple) else (value,))]
    if any(isinstance(v, int) and v > COSTLY for v in entries):
        return
    if isinstance(part, (DiT, UNet)):
        shape = (1, 16, 16)
        network, refusal = attempt(lambda: part.build(shape, seed=0))
        if refusal:
            assert "latents of 16x16" in refusal
        else:
            assert network(torch.randn(2, *shape), torch.tensor([-2000.0, 1000.0])).isfinite().all()
    elif isinstance(part, KLAutoencoder):
        pixels = torch.randint(0, 256, (6, 1, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        images = ImageSet("noise", pixels, None, torch.arange(6) == 5)
        codec, refusal = attempt(lambda: part.fit(images, torch.device("cpu"), Path(os.devnull)))
        if refusal:
            assert re.search("images of 16x16 cannot be patched|lower autoencoder.lr", refusal)
        else:
            decoded = codec.decode(codec.encode(to_unit(pixels)))
            assert decoded.isfinite().all()
            assert decoded.shape == pixels.shape
    elif isinstance(part, Semidiscrete):
        x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
        assert part.fit(x, torch.Generator().manual_seed(0)).potential.isfinite().all()
    elif isinstance(part, (Exponential, PowerFunction)):
        assert all(0 <= part(step) <= 1 for step in (0, 1, 10, 10**9))
    elif not isinstance(part, (Digits, ImageFolder, Photographs)):
        one_step(in_a_config(part))


@pytest.mark.parametrize("part", WITH_NUMBERS, ids=lambda part: part.__name__)
@settings(max_examples=FEWER)
@given(data=st.data())
def test_any_number_works_or_is_refused_by_its_owner(part: type, data: st.DataObject):
    drawable = numeric(part)
    names = data.draw(st.lists(st.sampled_from(sorted(drawable)), min_size=1, max_size=2, unique=True))
    changed = {name: data.draw(drawable[name], label=name) for name in names}
    made, refusal = attempt(lambda: part(**NEEDED.get(part, {}) | changed))
    if refusal:
        assert any(name in refusal for name in names)
        assert "\n" not in refusal
    elif part is LogHistogram:  # whoever holds it may want another range
        assert made.quantile(made.count(torch.tensor([0.5, 2.0])), 0.5) > 0
    else:
        works(made, changed)
