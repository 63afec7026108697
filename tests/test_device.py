"""On a GPU: a step of training waits for the device nowhere, and computes what the CPU computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from reference_trainer.config import TrainConfig
from reference_trainer.networks import DiT
from reference_trainer.presets import PRESETS, digits
from reference_trainer.training.meters import LevelMeter, TailMeter
from reference_trainer.training.state import TrainState
from robustcm.gates import Above
from robustcm.objective import Batch, draw

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

SHAPE = (2, 8, 8)
CUDA = torch.device("cuda")


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def small(config: TrainConfig) -> TrainConfig:
    objective = replace(config.objective, gate=Above(1.0))
    return replace(config, network=DiT(width=32, layers=2, heads=2, patch=2), objective=objective, batch_size=16)


def batch_of(config: TrainConfig, device: torch.device) -> Batch:
    x = 0.5 * torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(0))
    return config.objective.prepare(x, draw(0, 0, x.shape), 10, 100).to(device)


def step(state: TrainState, config: TrainConfig, batch: Batch) -> torch.Tensor:
    """As the loop has it, without the log."""
    terms = config.objective(config.preconditioned(state.network), batch, state.c)
    terms.loss.backward()
    state.optimizer_step(config.optimizer, 1e-4)
    state.update_ema(config.ema_decay)
    state.c = terms.state
    state.meter = LevelMeter().add(state.meter, terms, batch.pairs)
    state.tails = TailMeter().add(state.tails, terms, batch.pairs)
    state.step += 1
    return terms.loss.detach()


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)
def test_a_step_waits_for_the_device_nowhere(preset, request):
    config = small(preset())
    state, batch = TrainState.create(config, SHAPE, CUDA), batch_of(config, CUDA)
    step(state, config, batch)  # what is set up once may wait
    request.getfixturevalue("waiting_is_an_error")
    for _ in range(3):
        step(state, config, batch)


def test_the_first_steps_on_the_device_are_those_on_the_cpu():
    """Later ones part ways: rounding grows through training."""
    config = small(digits())
    losses = []
    for device in (torch.device("cpu"), CUDA):
        state, batch = TrainState.create(config, SHAPE, device), batch_of(config, device)
        losses.append(torch.stack([step(state, config, batch) for _ in range(2)]).cpu())
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0)
