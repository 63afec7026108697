"""What `ablate` compares: the arms, each a configuration in a visible line or two, and the data they are tried on.

All arms share data, network, optimiser, batch and budget; they differ in technique alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import KLAutoencoder
from reference_trainer.data.latents import ImpulsiveOutliers
from reference_trainer.errors import UserError
from reference_trainer.options import override
from reference_trainer.presets import PRESETS, digits, ilct, on_data, paper
from robustcm.couplers import exact, independent
from robustcm.early import EarlyDiffusion
from robustcm.fences import ConditionalClip, TukeyClip
from robustcm.gates import AboveExplained, everywhere
from robustcm.losses import PerElement, cauchy, geman_mcclure, geman_mcclure_of_r2, pseudo_huber
from robustcm.scales import ConstantC, MeasuredC, PowerLawC


@dataclass(frozen=True)
class Arm:
    """One line of the table."""

    name: str
    build: Callable[[], TrainConfig]


def changed(config: TrainConfig, **parts: Any) -> TrainConfig:
    """``config`` with parts of its objective exchanged."""
    return replace(config, objective=replace(config.objective, **parts))


def per_element() -> TrainConfig:
    """The recipe of this repository with a distance that sees every element of a sample by itself."""
    return changed(digits(), distance=PerElement(geman_mcclure_of_r2))


BASELINE = "iLCT"

ARMS: tuple[Arm, ...] = (
    # The baseline plus one technique each ...
    Arm(BASELINE, ilct),
    Arm("iLCT + Cauchy", lambda: changed(ilct(), distance=cauchy)),
    Arm("iLCT + Geman-McClure", lambda: changed(ilct(), distance=geman_mcclure)),
    Arm("iLCT + early diffusion", lambda: changed(ilct(), extra=EarlyDiffusion(weight=5.0, start=0.75))),
    Arm("iLCT + coupling", lambda: changed(ilct(), coupler=exact, gate=everywhere)),
    Arm("iLCT + gated coupling", lambda: changed(ilct(), coupler=exact, gate=AboveExplained())),
    Arm("iLCT + the authors' c", lambda: changed(ilct(), c=PowerLawC())),
    Arm("iLCT + measured c", lambda: changed(ilct(), c=MeasuredC())),
    Arm("iLCT + clip", lambda: replace(ilct(), clip=ConditionalClip())),
    Arm("iLCT + NsLN", lambda: replace(ilct(), non_scaling_norm=True)),
    # ... two of them together, all five, and the recipe of this repository ...
    Arm("iLCT + Cauchy, measured c", lambda: changed(ilct(), distance=cauchy, c=MeasuredC())),
    Arm("paper", paper),
    Arm("paper + clip", lambda: replace(paper(), clip=ConditionalClip())),
    Arm("ours", digits),
    # ... and that recipe with one part taken out.
    Arm("ours, Pseudo-Huber", lambda: changed(digits(), distance=pseudo_huber)),
    Arm("ours, Cauchy", lambda: changed(digits(), distance=cauchy)),
    Arm("ours, constant c", lambda: changed(digits(), c=ConstantC())),
    Arm("ours, c doubled", lambda: changed(digits(), c=MeasuredC(multiple=1.4, bins=8, at_least_pooled=True))),
    Arm("ours, one c", lambda: changed(digits(), c=MeasuredC(multiple=0.7))),
    Arm("ours, c per level", lambda: changed(digits(), c=MeasuredC(multiple=0.7, bins=8))),
    Arm("ours, no coupling", lambda: changed(digits(), coupler=independent)),
    Arm("ours, coupling without gate", lambda: changed(digits(), gate=everywhere)),
    Arm("ours, pool of two batches", lambda: replace(digits(), coupling_pool=2)),
    Arm("ours, per element", per_element),
    Arm("ours, per element, no clip", lambda: replace(per_element(), clip=None)),
    Arm("ours + early diffusion", lambda: changed(digits(), extra=EarlyDiffusion(weight=5.0, start=0.75))),
    Arm("ours, no clip", lambda: replace(digits(), clip=None)),
    Arm("ours, clip at Tukey's fences", lambda: replace(digits(), clip=TukeyClip())),
    Arm("ours + NsLN", lambda: replace(digits(), non_scaling_norm=True)),
)


def arm_from_words(words: Sequence[str], data: Path | None = None) -> Arm:
    """An arm typed by hand: a preset and what differs from it, ``["digits", "objective.c=MeasuredC(bins=8)"]``.

    Its name is the words, without ``objective.``; ``data`` as ``on_data`` takes it.

    Raises:
        UserError: an unknown preset or option.
    """
    presets = {preset.__name__: preset for preset in PRESETS}
    if words[0] not in presets:
        raise UserError(f"--arm begins with a preset ({', '.join(presets)}), got {words[0]!r}")
    config = with_options(on_data(presets[words[0]](), data), words[1:])
    return Arm(" ".join(word.removeprefix("objective.") for word in words), lambda: config)


def with_options(config: TrainConfig, options: Sequence[str]) -> TrainConfig:
    """``config`` with every option applied.

    Raises:
        UserError: an option that does not fit.
    """
    for option in options:
        config = override(config, option)
    return config


@dataclass(frozen=True)
class Suite:
    """Data of known tails: what is done to the latents of every arm."""

    name: str
    change: Callable[[TrainConfig], TrainConfig]


def with_outliers(share: float) -> Callable[[TrainConfig], TrainConfig]:
    """``share`` of all latent elements ten times as far from their mean; judged against clean images."""
    return lambda config: replace(config, outliers=ImpulsiveOutliers(share=share))


def heavy_tailed(config: TrainConfig) -> TrainConfig:
    """Latents of 8 x 8 x 8 from a fit whose tails are heavy by nature: most positions of a digit show background.

    Their box plot: ``analysis/td_outliers.py --autoencoder 'KLAutoencoder(latent_channels=8, patch=2,
    block_out_channels=(16,32), attention=True, steps=700, kl_weight=0.1)' --steps 0``.
    """
    autoencoder = KLAutoencoder(
        latent_channels=8, patch=2, block_out_channels=(16, 32), attention=True, steps=700, kl_weight=0.1
    )
    return replace(config, autoencoder=autoencoder, network=replace(config.network, patch=8))


SUITES: tuple[Suite, ...] = (
    Suite("clean", lambda config: config),
    Suite("outliers-0.1%", with_outliers(0.001)),
    Suite("outliers-1%", with_outliers(0.01)),
    Suite("outliers-5%", with_outliers(0.05)),
    Suite("heavy", heavy_tailed),
)
