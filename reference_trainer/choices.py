"""What each exchangeable part of a configuration can be, by the names that a command line and config.json take."""

from __future__ import annotations

import math
from typing import Any

from reference_trainer.computing import Computing
from reference_trainer.config import ConstantLR, CosineLR, TrainConfig
from reference_trainer.data.autoencoders import KLAutoencoder, PixelSpace, PretrainedAutoencoder
from reference_trainer.data.classes import ByClass
from reference_trainer.data.from_diffusers import DiffusersAutoencoder
from reference_trainer.data.gaussian_skip import GaussianSkip, Scalar
from reference_trainer.data.images import Digits, ImageFolder
from reference_trainer.data.latents import GivenStatistics, ImpulsiveOutliers
from reference_trainer.data.photographs import Photographs
from reference_trainer.data.stored import LatentStore
from reference_trainer.networks import DiT, UNet
from reference_trainer.optimizers import Adam, Muon, RAdam
from reference_trainer.pretrained import FromDiffusers
from reference_trainer.published import NETWORKS
from robustcm import (
    averages,
    barron,
    couplers,
    early,
    fences,
    flow_maps,
    flow_targets,
    gates,
    gaussian,
    losses,
    noise,
    objective,
    scales,
    schedules,
    semidiscrete,
    sketch,
    teacher_input,
    trajectories,
    turning,
)

RHOS = (
    *(losses.pseudo_huber_of_r2, losses.cauchy_of_r2, losses.geman_mcclure_of_r2),
    *(losses.fair_of_r2, losses.squared_l2_of_r2, barron.BarronOfR2),
)

CHOICES: dict[tuple[type, str], tuple[Any, ...]] = {
    (TrainConfig, "data"): (Digits, Photographs, ImageFolder, LatentStore),
    (TrainConfig, "autoencoder"): (KLAutoencoder, DiffusersAutoencoder, PretrainedAutoencoder, PixelSpace),
    (TrainConfig, "outliers"): (None, ImpulsiveOutliers),
    (TrainConfig, "clip"): (None, fences.ConditionalClip, fences.TukeyClip),
    (TrainConfig, "statistics"): (None, GivenStatistics),
    (TrainConfig, "network"): (DiT, UNet, FromDiffusers),
    (TrainConfig, "objective"): (
        *(objective.Objective, flow_maps.FlowMapObjective),
        trajectories.TrajectoryObjective,
    ),
    (TrainConfig, "preconditioning"): (Scalar, GaussianSkip),
    (GaussianSkip, "gain"): (
        *(turning.Turning, gaussian.flow_gain, gaussian.wiener_gain, gaussian.scalar_gain),
        gaussian.Blended,
    ),
    (gaussian.Blended, "first"): (gaussian.flow_gain, gaussian.wiener_gain),
    (gaussian.Blended, "second"): (gaussian.scalar_gain, gaussian.wiener_gain),
    (gaussian.Blended, "share"): (gaussian.noise_share,),
    (TrainConfig, "classes"): (None, ByClass),
    (TrainConfig, "averages"): (averages.Exponential, averages.PowerFunction),
    (TrainConfig, "computing"): (Computing,),
    (TrainConfig, "optimizer"): (Adam, RAdam, Muon),
    (TrainConfig, "learning_rate"): (CosineLR, ConstantLR),
    (objective.FewStepObjective, "distance"): (
        *(losses.pseudo_huber, losses.cauchy, losses.geman_mcclure, losses.fair, losses.squared_l2, barron.Barron),
        *(losses.PerToken, losses.PerElement),
    ),
    (objective.FewStepObjective, "c"): (scales.ConstantC, scales.PowerLawC, scales.MeasuredC),
    (objective.Objective, "levels"): (schedules.LevelGrid, schedules.RatioLevels, schedules.DenoiseFirst),
    (trajectories.TrajectoryObjective, "levels"): (schedules.LevelGrid, schedules.RatioLevels, schedules.DenoiseFirst),
    (schedules.DenoiseFirst, "then"): (schedules.LevelGrid, schedules.RatioLevels),
    (flow_maps.FlowMapObjective, "levels"): (flow_maps.LogitNormalTimes,),
    (flow_maps.FlowMapObjective, "target"): (flow_targets.TwoPoint, flow_targets.Derivative),
    (flow_targets.TwoPoint, "share"): (flow_targets.SigmoidShare, flow_targets.ConstantShare),
    (trajectories.TrajectoryObjective, "ends"): (trajectories.UniformEnds,),
    (objective.FewStepObjective, "weight"): (
        *(schedules.inverse_gap, schedules.equal_weight),
        *(schedules.BoundedInverseGap, schedules.SnrPlusWeight),
    ),
    (objective.FewStepObjective, "coupler"): (
        *(couplers.independent, couplers.exact),
        *(couplers.Entropic, couplers.WithinClasses, semidiscrete.Semidiscrete),
    ),
    (objective.FewStepObjective, "gate"): (
        *(gates.everywhere, gates.Above, gates.SoftAbove, gates.AnnealedAbove, gates.ShareAbove),
        gates.AboveExplained,
    ),
    (objective.Objective, "extra"): (None, early.EarlyDiffusion),
    (objective.Objective, "teacher_input"): (None, teacher_input.KeepCovariance),
    (trajectories.TrajectoryObjective, "teacher_input"): (None, teacher_input.KeepCovariance),
    (couplers.WithinClasses, "coupler"): (couplers.exact, couplers.Entropic),
    (scales.PowerLawC, "constant"): (scales.ConstantC,),
    (scales.MeasuredC, "histogram"): (sketch.LogHistogram,),
    (losses.PerToken, "rho"): RHOS,
    (losses.PerElement, "rho"): RHOS,
    (schedules.LevelGrid, "noise"): (noise.NoiseRange,),
    (schedules.RatioLevels, "noise"): (noise.NoiseRange,),
    (schedules.LevelGrid, "curriculum"): (
        *(schedules.DoublingCurriculum, schedules.ProgressiveCurriculum),
        schedules.FixedCurriculum,
    ),
    (schedules.LevelGrid, "law"): (schedules.LognormalLaw, schedules.UniformLaw),
}
"""For each exchangeable field, the parts the command line and config.json know. From Python any callable goes.

What a field of a class takes, its subclasses' take, where they say nothing else.
"""

VOCABULARY: dict[str, Any] = {part.__name__: part for parts in CHOICES.values() for part in parts if part is not None}
VOCABULARY |= {"inf": math.inf, "-inf": -math.inf}  # JSON has no literals for them
VOCABULARY |= NETWORKS


def offer(part: Any, owner: type, field: str) -> None:
    """Let the command line and config.json know ``part`` of yours, by its name, as a value of ``owner.field``.

    ::

        offer(welsch, FewStepObjective, "distance")    # then: objective.distance=welsch

    A function, or a frozen dataclass whose fields are options. Call it before ``main``, wherever runs of the part are
    trained, sampled or evaluated.

    Raises:
        ValueError: no such exchangeable field, or the name is another part's.
    """
    if (owner, field) not in CHOICES:
        there = ", ".join(f"{place.__name__}.{name}" for place, name in CHOICES)
        raise ValueError(f"{owner.__name__}.{field} takes no part of yours; these do: {there}")
    if VOCABULARY.get(part.__name__, part) is not part:
        raise ValueError(f"{part.__name__} is the name of another part: give yours another name")
    VOCABULARY[part.__name__] = part
    if part not in CHOICES[owner, field]:
        CHOICES[owner, field] += (part,)
