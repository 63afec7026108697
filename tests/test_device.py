"""On a GPU: a step of training waits for the device nowhere, and computes what the CPU computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from reference_trainer.computing import Computing
from reference_trainer.config import TrainConfig
from reference_trainer.networks import DiT
from reference_trainer.presets import PRESETS, digits, photographs
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


def stepper(state: TrainState, config: TrainConfig, batch: Batch) -> Callable[[], torch.Tensor]:
    """A step as the loop has it, without the log; gives its loss."""
    passes = config.computing.on(batch.x.device)
    f = config.preconditioned(passes.of(state.network))
    meter, tails = LevelMeter(), TailMeter()

    def step() -> torch.Tensor:
        terms = config.objective(f, batch, state.c)
        passes.backward(terms.loss)
        state.optimizer_step(config.optimizer, 1e-4)
        state.update_ema(config.ema_decay)
        state.c = terms.state
        state.meter = meter.add(state.meter, terms, batch.pairs)
        state.tails = tails.add(state.tails, terms, batch.pairs)
        state.step += 1
        return terms.loss.detach()

    return step


@pytest.mark.parametrize(
    "computing",
    [Computing(precision="float32"), Computing(precision="tf32"), Computing(), Computing(checkpointing=True)],
)
@pytest.mark.parametrize("preset", [*PRESETS, photographs], ids=lambda preset: preset.__name__)
def test_a_step_waits_for_the_device_nowhere(preset, computing, request):
    config = replace(small(preset()), computing=computing)
    step = stepper(TrainState.create(config, SHAPE, CUDA), config, batch_of(config, CUDA))
    step()  # what is set up once may wait
    request.getfixturevalue("waiting_is_an_error")
    for _ in range(3):
        step()


def test_the_first_steps_on_the_device_are_those_on_the_cpu():
    """Later ones part ways: rounding grows through training."""
    config = replace(small(digits()), computing=Computing(precision="float32"))
    losses = []
    for device in (torch.device("cpu"), CUDA):
        step = stepper(TrainState.create(config, SHAPE, device), config, batch_of(config, device))
        losses.append(torch.stack([step() for _ in range(2)]).cpu())
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0)
