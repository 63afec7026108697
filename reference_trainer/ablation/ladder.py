"""What `ablate` compares: the arms, each a recipe in a visible line or two, and what is done to the data.

All arms share data, network, optimiser, batch and budget, those of the configuration they are built on, with the recipe
of this repository; they differ in technique alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import KLAutoencoder
from reference_trainer.data.latents import ImpulsiveOutliers
from reference_trainer.data.photographs import SIDE
from reference_trainer.data.stored import LatentStore
from reference_trainer.errors import UserError
from reference_trainer.presets import ilct, paper
from reference_trainer.words import NAMES, Chosen, names_in, with_options
from robustcm.couplers import exact, independent
from robustcm.early import EarlyDiffusion
from robustcm.fences import ConditionalClip, TukeyClip
from robustcm.gates import AboveExplained, everywhere
from robustcm.losses import PerElement, cauchy, geman_mcclure, geman_mcclure_of_r2, pseudo_huber
from robustcm.scales import ConstantC, MeasuredC, PowerLawC
from robustcm.schedules import DenoiseFirst, DoublingCurriculum, LevelGrid
from robustcm.teacher_input import KeepCovariance


@dataclass(frozen=True)
class Arm:
    """One line of the table."""

    name: str
    build: Callable[[TrainConfig], TrainConfig]
    """From a configuration with the recipe of this repository."""


def changed(config: TrainConfig, **parts: Any) -> TrainConfig:
    """``config`` with parts of its objective exchanged."""
    return replace(config, objective=replace(config.objective, **parts))


def per_element(config: TrainConfig) -> TrainConfig:
    """The recipe of this repository with a distance that sees every element of a sample by itself."""
    return changed(config, distance=PerElement(geman_mcclure_of_r2))


BASELINE = "iLCT"
DENOISER_FIRST = DenoiseFirst(share=0.4, then=LevelGrid(curriculum=DoublingCurriculum(s0=10, s1=160)))
"""Two steps of five to a denoiser; from there, up to 161 levels: the best of five tried at d = 256 (docs/log.md)."""

ARMS: tuple[Arm, ...] = (
    # The baseline plus one technique each ...
    Arm(BASELINE, ilct),
    Arm("iLCT + Cauchy", lambda config: changed(ilct(config), distance=cauchy)),
    Arm("iLCT + Geman-McClure", lambda config: changed(ilct(config), distance=geman_mcclure)),
    Arm("iLCT + early diffusion", lambda config: changed(ilct(config), extra=EarlyDiffusion(weight=5.0, start=0.75))),
    Arm("iLCT + coupling", lambda config: changed(ilct(config), coupler=exact, gate=everywhere)),
    Arm("iLCT + gated coupling", lambda config: changed(ilct(config), coupler=exact, gate=AboveExplained())),
    Arm("iLCT + the authors' c", lambda config: changed(ilct(config), c=PowerLawC())),
    Arm("iLCT + measured c", lambda config: changed(ilct(config), c=MeasuredC())),
    Arm("iLCT + clip", lambda config: replace(ilct(config), clip=ConditionalClip())),
    Arm("iLCT + covariance kept", lambda config: changed(ilct(config), teacher_input=KeepCovariance())),
    Arm("iLCT + denoiser first", lambda config: changed(ilct(config), levels=DENOISER_FIRST)),
    Arm("iLCT + NsLN", lambda config: replace(ilct(config), non_scaling_norm=True)),
    # ... two of them together, all five, and the recipe of this repository ...
    Arm("iLCT + Cauchy, measured c", lambda config: changed(ilct(config), distance=cauchy, c=MeasuredC())),
    Arm("paper", paper),
    Arm("paper + covariance kept", lambda config: changed(paper(config), teacher_input=KeepCovariance())),
    Arm("paper + clip", lambda config: replace(paper(config), clip=ConditionalClip())),
    Arm("ours", lambda config: config),
    # ... and that recipe with one part taken out.
    Arm("ours, Pseudo-Huber", lambda config: changed(config, distance=pseudo_huber)),
    Arm("ours, Cauchy", lambda config: changed(config, distance=cauchy)),
    Arm("ours, constant c", lambda config: changed(config, c=ConstantC())),
    Arm("ours, c doubled", lambda config: changed(config, c=MeasuredC(multiple=1.4, bins=8, at_least_pooled=True))),
    Arm("ours, one c", lambda config: changed(config, c=MeasuredC(multiple=0.7))),
    Arm("ours, c per level", lambda config: changed(config, c=MeasuredC(multiple=0.7, bins=8))),
    Arm("ours, no coupling", lambda config: changed(config, coupler=independent)),
    Arm("ours, covariance not kept", lambda config: changed(config, teacher_input=None)),
    Arm("ours, coupling without gate", lambda config: changed(config, gate=everywhere)),
    Arm("ours, pool of two batches", lambda config: replace(config, coupling_pool=2)),
    Arm("ours, per element", per_element),
    Arm("ours, per element, no clip", lambda config: replace(per_element(config), clip=None)),
    Arm("ours + denoiser first", lambda config: changed(config, levels=DENOISER_FIRST)),
    Arm("ours + early diffusion", lambda config: changed(config, extra=EarlyDiffusion(weight=5.0, start=0.75))),
    Arm("ours, no clip", lambda config: replace(config, clip=None)),
    Arm("ours, clip at Tukey's fences", lambda config: replace(config, clip=TukeyClip())),
    Arm("ours + NsLN", lambda config: replace(config, non_scaling_norm=True)),
)


def arm_from_words(words: Sequence[str], path: Path | None = None) -> Arm:
    """An arm typed by hand: presets and what differs from them, ``["digits", "objective.c=MeasuredC(bins=8)"]``.

    Its name is the words, without ``objective.``. With a preset of data it has the network and the settings of that, on
    what ``--data`` names, ``path``; with a recipe alone, those of the configuration it is built on.

    Raises:
        UserError: an unknown preset or option, or a data set without its store.
    """
    named, options = names_in(words), [word for word in words if "=" in word]
    if words[0] not in NAMES:
        raise UserError(f"--arm begins with a preset ({', '.join(NAMES)}), got {words[0]!r}")
    if unknown := [name for name in named if name not in NAMES]:
        raise UserError(f"--arm: unknown preset {unknown[0]}: there are {', '.join(NAMES)}")
    name, chosen = " ".join(word.removeprefix("objective.") for word in words), Chosen.of(named)
    if chosen.data.__name__ not in named:
        return Arm(name, lambda config: with_options(chosen.technique(config), options))
    whole = chosen.configured(options, path)
    chosen.require_data(whole)
    return Arm(name, lambda config: whole)


@dataclass(frozen=True)
class Suite:
    """Other latents for every arm: of known tails, or of another size."""

    name: str
    change: Callable[[TrainConfig], TrainConfig]
    sized: bool = False
    """Whether the latents are of another size, whatever it was."""


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


SIZES = {64: (4, 4), 128: (8, 4), 256: (4, 8), 512: (8, 8), 1024: (16, 8)}
"""Channels and side of the latents of a suite, by their size d."""


def of_size(d: int) -> Callable[[TrainConfig], TrainConfig]:
    """Latents of ``d`` elements, of a small autoencoder fitted to whatever images there are.

    The network stays as it is: with ``network.patch=2``, as images in colour have it, 4 tokens for the latents of 4 x 4
    and 16 for those of 8 x 8.
    """

    def change(config: TrainConfig) -> TrainConfig:
        channels, side = SIZES[d]
        fitted, resolution = config.autoencoder, getattr(config.data, "resolution", SIDE)
        if not isinstance(fitted, KLAutoencoder) or isinstance(config.data, LatentStore):
            raise UserError(f"suite d{d} fits an autoencoder to images: leave out the store, or autoencoder=")
        halvings = int(math.log2(resolution // side)) - int(math.log2(fitted.patch))
        if halvings < 0 or side * fitted.patch * 2**halvings != resolution:
            raise UserError(f"suite d{d} is for images of 32, 64, 128 .. px, not {resolution}: data.resolution=32")
        widths = (16, *(32,) * halvings)
        return replace(config, autoencoder=replace(fitted, latent_channels=channels, block_out_channels=widths))

    return change


SUITES: tuple[Suite, ...] = (
    Suite("clean", lambda config: config),
    Suite("outliers-0.1%", with_outliers(0.001)),
    Suite("outliers-1%", with_outliers(0.01)),
    Suite("outliers-5%", with_outliers(0.05)),
    Suite("heavy", heavy_tailed),
    *(Suite(f"d{d}", of_size(d), sized=True) for d in SIZES),
)
