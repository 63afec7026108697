"""What there is to train on and how: presets of data, and recipes, each technique a visible line.

A preset of data is a function that returns a configuration: data, network and budget, with the recipe of this
repository. A recipe is a function from a configuration to one that differs in technique alone: `paper(celebahq())`.
Without an argument it is the recipe on the digits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import KLAutoencoder, PixelSpace
from reference_trainer.data.classes import ByClass
from reference_trainer.data.images import ImageFolder
from reference_trainer.data.index import is_store
from reference_trainer.data.photographs import Photographs
from reference_trainer.data.sources import require_no_archive
from reference_trainer.data.stored import LatentStore
from reference_trainer.networks import DiT
from reference_trainer.optimizers import Muon
from reference_trainer.published import DATA_SETS
from robustcm.couplers import exact, independent
from robustcm.early import EarlyDiffusion
from robustcm.fences import TukeyClip
from robustcm.flow_maps import FlowMapObjective
from robustcm.flow_targets import TwoPoint
from robustcm.gates import everywhere
from robustcm.losses import cauchy, pseudo_huber
from robustcm.objective import Objective
from robustcm.scales import ConstantC, MeasuredC, PowerLawC
from robustcm.trajectories import TrajectoryObjective

DIGITS = TrainConfig()


def digits() -> TrainConfig:
    """The best recipe measured on the embedded digits in a few minutes of two cores."""
    return DIGITS


def digits_by_class() -> TrainConfig:
    """The recipe of `digits`, told which digit each image shows, lightly guided: `sample RUN --label 3`."""
    return replace(DIGITS, classes=ByClass(guidance=1.25))


def photographs() -> TrainConfig:
    """Patches of six photographs that two packages ship, 32x32, in colour: nothing to download."""
    return on_images(DIGITS, Photographs())


def ilct(config: TrainConfig = DIGITS) -> TrainConfig:
    """The baseline, iCT on latents: Pseudo-Huber, constant c, nothing else."""
    objective = replace(config.objective, distance=pseudo_huber, c=ConstantC(), coupler=independent)
    if isinstance(objective, Objective):
        objective = replace(objective, teacher_input=None)
    return replace(config, objective=objective, clip=None)


def paper(config: TrainConfig = DIGITS) -> TrainConfig:
    """The five techniques as published."""
    config = ilct(config)
    assert isinstance(config.objective, Objective)
    objective = replace(
        config.objective,
        distance=cauchy,  # 1
        extra=EarlyDiffusion(weight=5.0, start=0.75),  # 2
        coupler=exact,  # 3
        gate=everywhere,
        c=PowerLawC(),  # 4
    )
    return replace(config, objective=objective, non_scaling_norm=True)  # 5


def pixels() -> TrainConfig:
    """The recipe of `digits` on the pixels themselves: no autoencoder."""
    return replace(digits(), autoencoder=PixelSpace(), network=DiT(patch=8), clip=None)


def flow_map(config: TrainConfig = DIGITS) -> TrainConfig:
    """A flow map (average velocity) by alpha-Flow's target, robust, with the coupling of `digits`."""
    objective = FlowMapObjective(
        distance=cauchy,
        c=MeasuredC(),
        target=TwoPoint(),  # Derivative(): MeanFlow's
        coupler=config.objective.coupler,
        gate=config.objective.gate,
    )
    return replace(config, objective=objective)


def trajectory(config: TrainConfig = DIGITS) -> TrainConfig:
    """Consistency trajectories, from any noise level to any below, with all else as in `digits`."""
    names = ("distance", "c", "levels", "weight", "coupler", "gate", "teacher_input")
    shared = {name: getattr(config.objective, name) for name in names}
    return replace(config, objective=TrajectoryObjective(**shared))


PRESETS: tuple[Callable[[], TrainConfig], ...] = (digits, digits_by_class, ilct, paper, pixels, flow_map, trajectory)
"""On the embedded digits; the first is the default."""

DATA: tuple[Callable[..., TrainConfig], ...] = (digits, digits_by_class, pixels, photographs, *DATA_SETS)
RECIPES: tuple[Callable[[TrainConfig], TrainConfig], ...] = (ilct, paper, flow_map, trajectory)


def on_data(config: TrainConfig, path: str | Path | None) -> TrainConfig:
    """``config`` on what ``--data`` names, ``on_folder`` or ``on_store``; without it as it is.

    The trainer and the analysis both ask here, so that they mean one configuration by one folder. A configuration
    made for a store, as those of ``DATA_SETS``, keeps all its settings and takes its path alone.

    Raises:
        UserError: it has to be encoded first.
    """
    if path is None:
        return config
    whole = Path(path).expanduser().resolve()
    if isinstance(config.data, LatentStore):
        return _encoded_by_its_own(replace(config, data=replace(config.data, path=str(whole))))
    if is_store(whole):
        return on_store(config, str(whole))
    require_no_archive(whole)
    return on_folder(config, str(whole))


def on_folder(config: TrainConfig, path: str) -> TrainConfig:
    """``config`` on a folder of images, at 64x64."""
    return on_images(config, ImageFolder(path=path))


def on_images(config: TrainConfig, data: ImageFolder | Photographs) -> TrainConfig:
    """``config`` on images in colour: more latent channels, and squared error for photographs.

    Many tokens a sample where the digits have one, so smaller batches, and the coupling's pool kept. A larger c, too:
    latents of photographs are a mixture of flat patches and rich ones, whose residuals a small c takes for outliers.
    Gradients of this distance are small then, so that the optimizer's eps has to be. Muon, which learns more in as many
    steps. A c, an optimizer or an autoencoder that is not that of `digits` stays.
    """
    config = replace(config, data=data, batch_size=64, coupling_pool=4)
    if config.optimizer == DIGITS.optimizer:
        config = replace(config, optimizer=Muon())
    if config.objective.c == DIGITS.objective.c:
        c = MeasuredC(multiple=2.0, bins=8, at_least_pooled=True)
        config = replace(config, objective=replace(config.objective, c=c))
    if config.clip is not None:  # of extreme values only: whether a decoder needs the others is not known
        config = replace(config, clip=TukeyClip(k=3.0))
    if isinstance(config.autoencoder, KLAutoencoder):
        autoencoder = replace(config.autoencoder, latent_channels=4, likelihood="gaussian", kl_weight=1e-3, steps=None)
        config = replace(config, autoencoder=autoencoder, network=DiT(patch=2))
    return config


def on_store(config: TrainConfig, path: str) -> TrainConfig:
    """``config`` on a store of latents: as on a folder, with the autoencoder that the store says they are of.

    Raises:
        UserError: its index cannot be read.
    """
    return _encoded_by_its_own(replace(on_folder(config, path), data=LatentStore(path=path), network=DiT(patch=2)))


def _encoded_by_its_own(config: TrainConfig) -> TrainConfig:
    """``config`` with the autoencoder of its store, if that names one."""
    assert isinstance(config.data, LatentStore)
    found = config.data.autoencoder()
    return config if found is None else replace(config, autoencoder=found)
