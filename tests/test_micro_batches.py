"""A step in parts is the step of all its rows at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import PixelSpace
from reference_trainer.data.images import ImageFolder
from reference_trainer.networks import DiT
from reference_trainer.optimizers import Adam
from reference_trainer.run import RunFolder
from reference_trainer.training import loop
from reference_trainer.training.batches import Batches
from reference_trainer.training.loop import train
from robustcm.couplers import exact
from robustcm.gates import Above
from robustcm.objective import Batch, Objective
from robustcm.scales import MeasuredC
from robustcm.schedules import LevelPairs

PARTS = 4


@pytest.fixture
def config(kept_images: Path) -> TrainConfig:
    """One step, whose gradient is not clipped."""
    return TrainConfig(
        data=ImageFolder(path=str(kept_images), resolution=16),
        autoencoder=PixelSpace(),
        clip=None,
        network=DiT(width=8, layers=1, heads=2, patch=8),
        objective=Objective(c=MeasuredC(bins=2), coupler=exact, gate=Above(0.5)),
        optimizer=Adam(max_norm=float("inf")),
        batch_size=16,
        steps=1,
    )


class Joined(Batches):
    """The rows, levels, noise and pairing of a step in ``PARTS`` parts, as one."""

    def __init__(self, config: TrainConfig, *others: Any) -> None:
        super().__init__(config, *others)
        self.parted = Batches(replace(config, micro_batches=PARTS), *others[:-1])

    def _made(self, step: int, part: int) -> Batch:
        batches = [self.parted(step, part) for part in range(PARTS)]
        x, z = (torch.cat(rows) for rows in zip(*(batch[:2] for batch in batches), strict=True))
        levels = (torch.cat(rows) for rows in zip(*(batch.pairs[:3] for batch in batches), strict=True))
        return batches[0]._replace(x=x, z=z, pairs=LevelPairs(*levels, batches[0].pairs.num_levels))


def after(config: TrainConfig, root: Path) -> dict[str, Tensor]:
    """The checkpoint of the run."""
    folder = RunFolder(root)
    folder.claim(config)
    train(config, folder, config.data.load(), root.parent / "cache", torch.device("cpu"))
    found = folder.latest_checkpoint()
    assert found is not None
    return found[1]


def test_the_gradient_of_a_step_is_the_mean_of_its_parts(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Seen in the first moment: a weight moves as far whatever the size of the gradient."""
    parted = after(replace(config, micro_batches=PARTS), tmp_path / "parted")
    monkeypatch.setattr(loop, "Batches", Joined)
    whole = after(config, tmp_path / "whole")
    moments = [name for name in whole if name.endswith("/exp_avg")]
    assert max(float(whole[name].abs().max()) for name in moments) > 1e-3
    for name in [*moments, "c", "meter", "tails"]:
        torch.testing.assert_close(parted[name], whole[name], rtol=1e-4, atol=1e-7, msg=name)
