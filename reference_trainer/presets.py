"""Complete configurations, each a function and each technique a visible line. The first is the default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from reference_trainer.autoencoders import PixelSpace
from reference_trainer.config import TrainConfig
from robustcm.couplers import exact
from robustcm.early import EarlyDiffusion
from robustcm.losses import cauchy, pseudo_huber
from robustcm.objective import Objective
from robustcm.scales import ConstantC, PowerLawC


def digits() -> TrainConfig:
    """The best recipe measured on the embedded digits in a few minutes of two cores."""
    return TrainConfig()


def ilct() -> TrainConfig:
    """The baseline: iCT on latents. Pseudo-Huber, constant c, nothing else; budget and network of `digits`."""
    return replace(digits(), objective=Objective(distance=pseudo_huber, c=ConstantC()))


def paper() -> TrainConfig:
    """The five techniques as published, on the budget and the network of `digits`."""
    return replace(
        digits(),
        objective=Objective(
            distance=cauchy,  # 1
            extra=EarlyDiffusion(weight=5.0, start=0.75),  # 2
            coupler=exact,  # 3
            c=PowerLawC(),  # 4
        ),
        non_scaling_norm=True,  # 5
    )


def pixels() -> TrainConfig:
    """Consistency training on pixels: `digits` without the autoencoder."""
    return replace(digits(), autoencoder=PixelSpace(), network=replace(digits().network, patch=4))


PRESETS: tuple[Callable[[], TrainConfig], ...] = (digits, ilct, paper, pixels)
