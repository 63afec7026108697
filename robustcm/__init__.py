"""Robust training of latent consistency models: one short module a technique, all of them composable.

losses and barron (robust distances), early (diffusion loss at small noise), couplers and semidiscrete (OT) with gates,
scales (the scale c), teacher_input (the data's covariance kept), norms (Non-scaling LayerNorm), fences (outliers
clipped); noise and schedules (levels); consistency (f, temporal difference, sampler); robust (a distance with its
measured scale) and objective (all of it composed); flow_maps, flow_targets and trajectories (the other few-step
methods, of the same parts); guidance (by class); averages (of the weights); moments (samples given those of the data);
tails (outlier statistics) and sketch (streaming quantiles).

The names below can be had from here, ``from robustcm import RobustLoss, cauchy``; a module is imported when one of its
names is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from robustcm.averages import Exponential, PowerFunction, Profile, reconstruct
    from robustcm.barron import Barron, BarronOfR2, of_adaptive_weight
    from robustcm.consistency import sample, temporal_difference
    from robustcm.couplers import Entropic, WithinClasses, coupling_gain, exact, independent
    from robustcm.early import EarlyDiffusion
    from robustcm.fences import ConditionalClip, TukeyClip
    from robustcm.flow_maps import FlowMapObjective, LogitNormalTimes, sample_flow_map
    from robustcm.flow_targets import ConstantShare, Derivative, SigmoidShare, TwoPoint
    from robustcm.gates import (
        Above,
        AboveExplained,
        AnnealedAbove,
        ShareAbove,
        SoftAbove,
        coupled_noise,
        everywhere,
        explained_below,
        of_data_time,
        of_flow_time,
    )
    from robustcm.gaussian import (
        Blended,
        Gaussian,
        LinearSkip,
        Turned,
        flow_gain,
        noise_share,
        scalar_gain,
        wiener_gain,
    )
    from robustcm.guidance import Guided, hidden
    from robustcm.losses import (
        LikeSquares,
        PerElement,
        PerToken,
        cauchy,
        cauchy_of_r2,
        element_r2,
        fair,
        fair_of_r2,
        geman_mcclure,
        geman_mcclure_of_r2,
        pseudo_huber,
        pseudo_huber_of_r2,
        sample_r2,
        squared_l2,
        token_r2,
    )
    from robustcm.moments import MomentMap, match_moments
    from robustcm.noise import NoiseRange, TimestepIndex, data_time, flow_time
    from robustcm.norms import NonScalingLayerNorm, convert_norms
    from robustcm.objective import Objective, draw
    from robustcm.preconditioning import Preconditioned, Preconditioning, ScalarSkip
    from robustcm.robust import RobustLoss, all_ranks, robust_distance
    from robustcm.scales import ConstantC, MeasuredC, PowerLawC
    from robustcm.schedules import DenoiseFirst, DoublingCurriculum, LevelGrid, RatioLevels
    from robustcm.semidiscrete import Semidiscrete
    from robustcm.tails import TailStream, box_statistics
    from robustcm.teacher_input import KeepCovariance
    from robustcm.trajectories import TrajectoryObjective, UniformEnds, sample_trajectory
    from robustcm.turning import Turning

_MODULE_OF = {
    name: module
    for module, names in {
        "averages": "Exponential PowerFunction Profile reconstruct",
        "barron": "Barron BarronOfR2 of_adaptive_weight",
        "consistency": "sample temporal_difference",
        "couplers": "Entropic WithinClasses coupling_gain exact independent",
        "early": "EarlyDiffusion",
        "fences": "ConditionalClip TukeyClip",
        "flow_maps": "FlowMapObjective LogitNormalTimes sample_flow_map",
        "flow_targets": "ConstantShare Derivative SigmoidShare TwoPoint",
        "gates": "Above AboveExplained AnnealedAbove ShareAbove SoftAbove coupled_noise everywhere explained_below "
        "of_data_time of_flow_time",
        "gaussian": "Blended Gaussian LinearSkip Turned flow_gain noise_share scalar_gain wiener_gain",
        "guidance": "Guided hidden",
        "losses": "LikeSquares PerElement PerToken cauchy cauchy_of_r2 element_r2 fair fair_of_r2 geman_mcclure "
        "geman_mcclure_of_r2 pseudo_huber pseudo_huber_of_r2 sample_r2 squared_l2 token_r2",
        "moments": "MomentMap match_moments",
        "noise": "NoiseRange TimestepIndex data_time flow_time",
        "norms": "NonScalingLayerNorm convert_norms",
        "objective": "Objective draw",
        "preconditioning": "Preconditioned Preconditioning ScalarSkip",
        "robust": "RobustLoss all_ranks robust_distance",
        "scales": "ConstantC MeasuredC PowerLawC",
        "schedules": "DenoiseFirst DoublingCurriculum LevelGrid RatioLevels",
        "semidiscrete": "Semidiscrete",
        "tails": "TailStream box_statistics",
        "teacher_input": "KeepCovariance",
        "trajectories": "TrajectoryObjective UniformEnds sample_trajectory",
        "turning": "Turning",
    }.items()
    for name in names.split()
}

__all__ = [
    "Above",
    "AboveExplained",
    "AnnealedAbove",
    "Barron",
    "BarronOfR2",
    "Blended",
    "ConditionalClip",
    "ConstantC",
    "ConstantShare",
    "DenoiseFirst",
    "Derivative",
    "DoublingCurriculum",
    "EarlyDiffusion",
    "Entropic",
    "Exponential",
    "FlowMapObjective",
    "Gaussian",
    "Guided",
    "KeepCovariance",
    "LevelGrid",
    "LikeSquares",
    "LinearSkip",
    "LogitNormalTimes",
    "MeasuredC",
    "MomentMap",
    "NoiseRange",
    "NonScalingLayerNorm",
    "Objective",
    "PerElement",
    "PerToken",
    "PowerFunction",
    "PowerLawC",
    "Preconditioned",
    "Preconditioning",
    "Profile",
    "RatioLevels",
    "RobustLoss",
    "ScalarSkip",
    "Semidiscrete",
    "ShareAbove",
    "SigmoidShare",
    "SoftAbove",
    "TailStream",
    "TimestepIndex",
    "TrajectoryObjective",
    "TukeyClip",
    "Turned",
    "Turning",
    "TwoPoint",
    "UniformEnds",
    "WithinClasses",
    "all_ranks",
    "box_statistics",
    "cauchy",
    "cauchy_of_r2",
    "convert_norms",
    "coupled_noise",
    "coupling_gain",
    "data_time",
    "draw",
    "element_r2",
    "everywhere",
    "exact",
    "explained_below",
    "fair",
    "fair_of_r2",
    "flow_gain",
    "flow_time",
    "geman_mcclure",
    "geman_mcclure_of_r2",
    "hidden",
    "independent",
    "match_moments",
    "noise_share",
    "of_adaptive_weight",
    "of_data_time",
    "of_flow_time",
    "pseudo_huber",
    "pseudo_huber_of_r2",
    "reconstruct",
    "robust_distance",
    "sample",
    "sample_flow_map",
    "sample_r2",
    "sample_trajectory",
    "scalar_gain",
    "squared_l2",
    "temporal_difference",
    "token_r2",
    "wiener_gain",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULE_OF]
