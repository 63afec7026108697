"""What a run is made of: frozen dataclasses, one tree, every leaf an option."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from reference_trainer.computing import Computing
from reference_trainer.data.autoencoders import Autoencoder, KLAutoencoder
from reference_trainer.data.classes import ByClass
from reference_trainer.data.gaussian_skip import GaussianSkip, Scalar
from reference_trainer.data.images import Digits, ImageFolder, ImageSet
from reference_trainer.data.latents import GivenStatistics, ImpulsiveOutliers
from reference_trainer.data.photographs import Photographs
from reference_trainer.data.stored import LatentStore
from reference_trainer.errors import UserError, require
from reference_trainer.networks import DiT, UNet
from reference_trainer.optimizers import Adam, Muon, RAdam
from reference_trainer.pretrained import FromDiffusers
from robustcm.averages import Average, PowerFunction
from robustcm.couplers import Coupler, WithinClasses, exact, independent
from robustcm.fences import ConditionalClip, TukeyClip
from robustcm.flow_maps import FlowMapObjective
from robustcm.gates import AboveExplained
from robustcm.losses import geman_mcclure
from robustcm.objective import Objective
from robustcm.preconditioning import Network, Skip
from robustcm.scales import MeasuredC
from robustcm.schedules import DoublingCurriculum, LevelGrid
from robustcm.semidiscrete import Semidiscrete
from robustcm.teacher_input import KeepCovariance
from robustcm.trajectories import TrajectoryObjective

Data: TypeAlias = Digits | Photographs | ImageFolder | LatentStore

MOST_THREADS = 1024


class LearningRate(Protocol):
    """``(step, total_steps) -> learning rate``."""

    def __call__(self, step: int, total_steps: int) -> float: ...


@dataclass(frozen=True, kw_only=True)
class ConstantLR:
    """Linear warm-up, then constant: the paper's choice, with lr 1e-4."""

    lr: float = 1e-4
    """Learning rate behind the warm-up, above 0."""
    warmup_steps: int = 0
    """Steps in which it rises linearly to ``lr``."""

    def __post_init__(self) -> None:
        require(0 < self.lr < math.inf and self.warmup_steps >= 0, f"need lr > 0, warmup_steps >= 0, got {self}")

    def __call__(self, step: int, total_steps: int) -> float:
        return self.lr * min(1.0, (step + 1) / (self.warmup_steps + 1))


@dataclass(frozen=True, kw_only=True)
class CosineLR:
    """Linear warm-up, then half a cosine down to ``final`` times the peak."""

    lr: float = 3e-3
    """Learning rate at the peak, above 0."""
    warmup_steps: int = 100
    """Steps in which it rises linearly."""
    final: float = 0.005
    """Learning rate of the last step as a share of the peak, 0 to 1."""

    def __post_init__(self) -> None:
        require(
            0 < self.lr < math.inf and self.warmup_steps >= 0 and 0 <= self.final <= 1,
            f"need lr > 0, warmup_steps >= 0 and 0 <= final <= 1, got {self}",
        )

    def __call__(self, step: int, total_steps: int) -> float:
        warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
        cosine = 0.5 * (1 + math.cos(math.pi * (step + 1) / total_steps))
        return self.lr * warm * (self.final + (1 - self.final) * cosine)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. The same config and seed give the same weights, bit for bit, on the same machine."""

    data: Data = Digits()
    """Where the images come from; ``--data PATH`` is ImageFolder, or LatentStore, and what goes with it."""
    autoencoder: Autoencoder = KLAutoencoder()
    """What makes latents of images, and images of latents."""
    outliers: ImpulsiveOutliers | None = None
    """Put into the latents to study what they do; the samples are still compared with the clean images."""
    clip: ConditionalClip | TukeyClip | None = ConditionalClip()
    """Take impulsive outliers out of the latents before they are normalised."""
    statistics: GivenStatistics | None = None
    """By what latents are normalised; None: by mean and std of each channel, measured. For a pretrained network that is
    used to others."""
    network: DiT | UNet | FromDiffusers = DiT()
    """The backbone; ``ADM``, ``DIT_S2``, ``DIT_B2`` and ``DIT_L2`` are published ones, ``FromDiffusers`` a pretrained
    one to start from."""
    non_scaling_norm: bool = False
    """Convert every norm of the backbone to NonScalingLayerNorm (technique 5)."""
    objective: Objective | FlowMapObjective | TrajectoryObjective = Objective(
        distance=geman_mcclure,
        c=MeasuredC(multiple=0.7, bins=8, at_least_pooled=True),
        levels=LevelGrid(curriculum=DoublingCurriculum(s0=10, s1=40)),
        coupler=exact,
        gate=AboveExplained(),
        teacher_input=KeepCovariance(),
    )
    """The loss: what is compared, at which noise levels, how robustly."""
    preconditioning: Scalar | GaussianSkip = Scalar()
    """What a consistency function is while the network gives nothing: ``c_skip(t) x_t``, or one that knows the latents'
    mean and covariance, kept with the run."""
    classes: ByClass | None = None
    """Tell the network the class of each sample, so that samples can be asked for by class; None: it is not told."""
    coupling_pool: int = 1
    """Micro-batches whose samples and noise are paired in one problem: the same part of so many steps. A larger pool
    pairs closer; an exact one of n samples takes time of order n^3 once in as many steps."""
    optimizer: Adam | RAdam | Muon = Adam()
    """How gradients become steps; Muon on folders, stores and `photographs`."""
    learning_rate: ConstantLR | CosineLR = CosineLR()
    """Its size over the run."""
    ema_decay: float = 0.99
    """Of the weights that sample; ramped up as min(ema_decay, (step + 1) / (step + 10))."""
    averages: tuple[Average, ...] = ()
    """Further averages of the weights, any number: for ``sample --average`` and ``evaluate --averages``. Each takes the
    memory of the weights once more, here and in a checkpoint; they change no weight."""
    snapshot_every: int = 250
    """Steps between two snapshots of the power-function averages among them, 1 or more. Of these any sigma_rel is
    reconstructed after training. One file each, 4 bytes a weight and power function, none deleted; at most 1000."""
    batch_size: int = 256
    """Samples a step over all processes, 1 or more."""
    micro_batches: int = 1
    """Parts that a step's batch is cut into, 1 or more, a divisor of batch_size. Gradients are added up over the parts;
    processes share them out (``torchrun``), so at least one a process. Each part has noise and coupling of its own:
    another number is another run, another number of processes is the same."""
    steps: int = 4000
    """Training steps, 1 or more; schedules and curricula stretch over them."""
    seed: int = 0
    """Of the weights, the noise and the order of the samples."""
    threads: int = 1
    """Of torch on the CPU. Part of the run, since another number changes the last bits. For networks as small as the
    digits' a second thread pays while nothing else runs (``benchmarks/step_time.py --threads 2`` times it); but torch's
    threads wait for each other by spinning, and beside other busy processes a step then takes many times as long."""
    computing: Computing = Computing()
    """Precision, compilation, memory: how the network is computed while training."""
    second_sigma: float | None = None
    """Noise level of the second evaluation when sampling with two; the nearest level of training is taken. None: up to
    which the training latents show with weight 0.9 which sample they were (measured; 0.22 for the digits). iCT:
    0.821. Flow maps and trajectories go on in equal steps instead."""
    log_every: int = 50
    """Steps between two rows of metrics.jsonl, 1 or more."""
    save_every: int = 500
    """Steps between two checkpoints, 1 or more."""
    evaluate_every: int = 0
    """Steps between two looks at the samples of the averaged weights, a row of evaluations.jsonl each; 0: only at the
    end. Takes time (a few thousand samples each), changes no weight. Such a step is saved first, as one of
    ``save_every`` is."""
    most_bad_steps: int = 10
    """So many steps in a row that are not finite end the run at the next log, with advice; 1 or more. See
    ``optimizer.on_nonfinite``."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay, 1 or more."""

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "micro_batches",
            "steps",
            "coupling_pool",
            "threads",
            "log_every",
            "save_every",
            "keep_checkpoints",
        ):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        require(self.most_bad_steps >= 1, f"most_bad_steps must be at least 1, got {self.most_bad_steps}")
        require(
            self.batch_size % self.micro_batches == 0,
            f"micro_batches must divide batch_size = {self.batch_size}, got {self.micro_batches}",
        )
        require(self.threads <= MOST_THREADS, f"threads must be at most {MOST_THREADS}, got {self.threads}")
        require(self.evaluate_every >= 0, f"evaluate_every must be 0 (at the end) or more, got {self.evaluate_every}")
        require(0 <= self.ema_decay < 1, f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if self.classes is not None and self.classes.coupled_within:
            require(
                not isinstance(self.objective.coupler, Semidiscrete),
                "objective.coupler=Semidiscrete pairs noise with images of any class: with classes=ByClass take exact "
                "or Entropic, or classes.coupled_within=False",
            )
        require(
            isinstance(self.network, (UNet, FromDiffusers)) or not self.computing.channels_last,
            "computing.channels_last is of convolutions: leave it out, or take network=UNet",
        )
        require(
            isinstance(self.objective, Objective) or isinstance(self.preconditioning, Scalar),
            "preconditioning=GaussianSkip is of consistency functions: take Scalar with this objective",
        )
        require(
            not isinstance(self.network, FromDiffusers) or isinstance(self.preconditioning, Scalar),
            "network=FromDiffusers is, or is made, F beside the scalar skip: take preconditioning=Scalar",
        )
        require(len({*self.averages}) == len(self.averages), f"averages must differ, got {self.averages}")
        require(self.snapshot_every >= 1, f"snapshot_every must be at least 1, got {self.snapshot_every}")
        if self.second_sigma is not None:
            require(isinstance(self.objective, Objective), "second_sigma is of consistency functions: leave it None")
            low, high = self.objective.noise.sigma_min, self.objective.noise.sigma_max
            require(
                low < self.second_sigma < high,
                f"second_sigma must be None or lie between {low} and {high}, got {self.second_sigma}",
            )

    @property
    def coupler(self) -> Coupler:
        """What pairs noise and data: the objective's, within each class where classes are trained."""
        coupler = self.objective.coupler
        if self.classes is None or not self.classes.coupled_within or coupler is independent:
            return coupler
        return coupler if isinstance(coupler, WithinClasses) else WithinClasses(coupler)

    @property
    def power_functions(self) -> tuple[PowerFunction, ...]:
        """Those among ``averages``."""
        return tuple(average for average in self.averages if isinstance(average, PowerFunction))

    def found(self, noted: Callable[[FromDiffusers], FromDiffusers] = FromDiffusers.found) -> TrainConfig:
        """The same with what a pretrained network is noted, see ``FromDiffusers.found``; before a run is begun.

        Args:
            noted: how; for many configurations of one network a cache of the same, which loads it once.
        Raises:
            UserError: it cannot be had; a diffusion model without ``statistics``.
        """
        if not isinstance(self.network, FromDiffusers):
            return self
        network = self.network if self.network.sha256 else noted(self.network)  # that of a run is noted already
        if network.diffusion is not None and self.statistics is None:
            raise UserError(
                "a diffusion model knows its data in one scale for all channels: give statistics=GivenStatistics for "
                "pixels, for latents statistics=GivenStatistics(...) and network.scale, see docs/export.md"
            )
        return replace(self, network=network)

    def load_images(self, device: torch.device) -> ImageSet:
        """The images, or of a store some that ``device`` decodes.

        Raises:
            UserError: see ``load`` of the data.
        """
        if isinstance(self.data, LatentStore):
            return self.data.decoded(self.autoencoder, device)
        return self.data.load()

    def prepare_latents(self, raw_latents: Tensor) -> Tensor:
        """``[n, ch, h, w] -> [n, ch, h, w]``: with outliers put in and clipped, as far as asked; not normalised.

        Raises:
            UserError: latents the clip is not made for.
        """
        try:
            for change in (self.outliers, self.clip):
                raw_latents = raw_latents if change is None else change(raw_latents)
        except ValueError as error:
            raise UserError(str(error)) from error
        return raw_latents

    def preconditioned(self, network: Network, skip: Skip | None = None) -> Callable[..., Tensor]:
        """The function the objective trains, around ``network``: consistency function, flow map or trajectories.

        Args:
            skip: where ``preconditioning`` is no ``Scalar``, that of the run.
        """
        if isinstance(self.preconditioning, Scalar) or not isinstance(self.objective, Objective):
            return self.objective.function_of(network)
        if skip is None:
            raise ValueError(f"{self.preconditioning} is measured on latents: pass the skip of the run")
        return self.objective.function_of(network, skip)

    def evaluates_at(self, step: int) -> bool:
        """Whether training stops behind ``step`` steps to evaluate; the end is evaluated anyway, and more fully."""
        return self.evaluate_every > 0 and step % self.evaluate_every == 0 and step < self.steps

    def keeps_snapshot_at(self, step: int) -> bool:
        """Whether the power functions are kept as they are behind ``step`` steps; the end is in the checkpoint."""
        return bool(self.power_functions) and step % self.snapshot_every == 0 and step < self.steps
