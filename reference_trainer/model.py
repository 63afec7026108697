"""A trained run as something to sample from."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from reference_trainer.averages import averaged_weights, check_average
from reference_trainer.config import TrainConfig
from reference_trainer.data.classes import Classes
from reference_trainer.data.gaussian_skip import AnySkip, Scalar, load_skip
from reference_trainer.data.images import ImageSet
from reference_trainer.data.latents import LatentSpace, encode
from reference_trainer.data.origin import reopen
from reference_trainer.errors import UserError
from reference_trainer.files import check_layout
from reference_trainer.pretrained import FromDiffusers
from reference_trainer.run import RunFolder
from robustcm.averages import Average
from robustcm.guidance import Guided
from robustcm.moments import MomentMap
from robustcm.norms import convert_norms
from robustcm.randomness import Stream, step_generator


@dataclass(frozen=True)
class TrainedModel:
    """The averaged weights of a run and the space they live in."""

    config: TrainConfig
    network: nn.Module
    space: LatentSpace
    shape: tuple[int, int, int]
    """(ch, h, w) of the latents."""
    step: int
    device: torch.device
    changes: tuple[str, ...] = ()
    """In what the images at hand and the autoencoder are not what the run was made from, in words."""
    classes: Classes | None = None
    """That the network is told of."""
    average: str = ""
    """Which average of the weights, in words; empty: the one that samples."""
    skip: AnySkip | None = None
    """Around the network, see ``TrainConfig.preconditioned``; on ``device``."""
    moments: Mapping[int, MomentMap] | None = None
    """By number of evaluations, what moves samples to the moments of the data; None: they stay as they are drawn."""

    @property
    def function(self) -> Callable[..., Tensor]:
        """What samples: consistency function, flow map or trajectories."""
        return self.config.preconditioned(self.network, self.skip)

    def sigmas(self, evaluations: int) -> tuple[float, ...]:
        """Levels of the sampler, as the objective has them: noise levels, of a flow map flow times.

        Of a consistency function: sigma_max, the run's second sigma, then halving it each time. Each but the first
        is the level nearest to that which the run was training at.

        Raises:
            UserError: fewer than 1, or more evaluations than there are levels to halve through.
        """
        if evaluations < 1:
            raise UserError(f"need at least 1 evaluation, got {evaluations}")
        config, last = self.config, max(0, self.step - 1)
        second = config.second_sigma or min(self.space.recognised_at, config.objective.noise.sigma_max / 2)
        try:
            return config.objective.sampling_levels(evaluations, second, last, config.steps)
        except ValueError as error:
            raise UserError(str(error)) from error

    def guided(self, weight: float) -> TrainedModel:
        """The same, with another weight of guidance.

        Raises:
            UserError: see ``with_guidance``.
        """
        return replace(self, config=with_guidance(self.config, weight))

    def latents(
        self,
        n: int,
        sigmas: tuple[float, ...],
        seed: int,
        batch_size: int = 250,
        labels: Tensor | None = None,
        first: int = 0,
    ) -> Tensor:
        """``[n, ch, h, w]``, normalised, CPU. Image i depends on (seed, i) only through its batch of 250.

        Args:
            labels: ``[n]`` int64, the classes to draw; None: where there are classes, in their proportions.
            first: number of the first image, a multiple of ``batch_size``: many can be drawn part by part.
        Raises:
            UserError: moments that were not measured for so many evaluations.
        """
        if first % batch_size:
            raise ValueError(f"first must be a multiple of {batch_size}, got {first}")
        if self.moments is not None and len(sigmas) not in self.moments:
            known = " and ".join(map(str, sorted(self.moments)))
            raise UserError(f"moments are matched at {known} evaluations, not at {len(sigmas)}")
        f = self.function
        if self.classes is not None and self.config.classes is not None:
            f = Guided(f, self.config.classes.guidance, number_of(self.classes))
            labels = self.classes.proportional(n, seed) if labels is None else labels
        parts = []
        bar = tqdm(total=n, desc=f"sampling ({len(sigmas)} NFE)", unit="img", leave=False, delay=2)
        for index, start in enumerate(range(0, n, batch_size), first // batch_size):
            generator = step_generator(seed, index, Stream.SAMPLING)
            z = torch.randn(batch_size, *self.shape, generator=generator)[: n - start].to(self.device)
            told = {} if labels is None else {"labels": labels[start : start + len(z)].to(self.device)}
            parts.append(self.config.objective.sample(f, z, sigmas, generator, told).cpu())
            bar.update(len(z))
        bar.close()
        drawn = torch.cat(parts)
        return drawn if self.moments is None else self.moments[len(sigmas)](drawn)

    def latents_of(self, pixels: Tensor) -> Tensor:
        """uint8 ``[n, ch, h, w]`` -> what the run trains on: with outliers, clipped, normalised; CPU.

        What is clipped depends on the other images: give it all of them.
        """
        return self.space.normalise(self.config.prepare_latents(encode(self.space.codec, pixels, self.device)))

    def images(self, n: int, sigmas: tuple[float, ...], seed: int, labels: Tensor | None = None) -> Tensor:
        """uint8 ``[n, ch, h, w]``; see ``latents``."""
        return self.space.decode(self.latents(n, sigmas, seed, labels=labels).to(self.device))


def with_guidance(config: TrainConfig, weight: float) -> TrainConfig:
    """That of a run, with another weight of guidance.

    Raises:
        UserError: it was trained without classes, or without the samples that guidance needs.
    """
    if config.classes is None:
        raise UserError("the run was trained without classes: leave --guidance out, or train with classes=ByClass")
    try:
        return replace(config, classes=replace(config.classes, guidance=weight))
    except ValueError as error:
        raise UserError(f"--guidance {weight:g}: {error}") from error


def load_model(
    run: RunFolder,
    device: torch.device,
    images: ImageSet | None = None,
    new_data: bool = False,
    average: Average | None = None,
) -> TrainedModel:
    """The newest readable checkpoint of ``run``.

    Args:
        images: are compared with those the run was made from.
        new_data: go on although they, or the user's autoencoder, have changed.
        average: of the weights, see ``averaged_weights``; None: the one with ``ema_decay``.
    Raises:
        UserError: no run, no checkpoint, or one that does not fit; something has changed; no such average.
    """
    config = run.config()
    check_average(config, average)
    found = run.latest_checkpoint()
    if found is None:
        raise UserError(f"no checkpoint in {run.root}: train it first, with the same --out")
    kept, changes = reopen(run.space_file, config.autoencoder, images, device, new_data)
    if math.isnan(kept.space.recognised_at):
        raise UserError(f"{run.root} is of an earlier version: the train command, given again, brings it up to date")
    classes = kept_classes(config, run)
    network, about = averaged_network(run, config, kept.shape, found, average, number_of(classes))
    return TrainedModel(
        config=config,
        network=network.to(device),
        space=kept.space,
        shape=kept.shape,
        step=found[0],
        device=device,
        changes=changes,
        classes=classes,
        average="" if average is None else about,
        skip=kept_skip(config, run, kept.shape, device),
    )


def averaged_network(
    run: RunFolder,
    config: TrainConfig,
    shape: tuple[int, int, int],
    checkpoint: tuple[int, dict[str, Tensor]],
    average: Average | None,
    classes: int = 0,
) -> tuple[nn.Module, str]:
    """The network of a checkpoint's step and tensors with ``average`` for its weights, on the CPU, and which it is.

    Raises:
        UserError: see ``averaged_weights``; or the checkpoint is of another network.
    """
    step, tensors = checkpoint
    weights, about = averaged_weights(run, config, step, tensors, average)
    network = build_network(config, shape, classes)
    try:
        check_layout(weights, network.state_dict())
    except UserError as error:
        raise UserError(f"the checkpoint of step {step} in {run.root} does not fit its config.json: {error}") from error
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False), about


def kept_skip(config: TrainConfig, run: RunFolder, shape: tuple[int, int, int], device: torch.device) -> AnySkip | None:
    """The skip of a trained ``run``, for latents of ``shape``; None where it is the scalar one that all begin with.

    Raises:
        UserError: see ``load_skip``.
    """
    if isinstance(config.preconditioning, Scalar):
        return None
    return load_skip(run.skip_file, config.preconditioning, shape, config.objective.noise).to(device)


def kept_classes(config: TrainConfig, run: RunFolder) -> Classes | None:
    """The classes of a trained ``run``; None if it is trained without."""
    return None if config.classes is None else Classes.load(run.classes_file)


def number_of(classes: Classes | None) -> int:
    """How many there are; the label that says no class."""
    return 0 if classes is None else len(classes.names)


def build_network(config: TrainConfig, shape: tuple[int, int, int], classes: int = 0, begin: bool = False) -> nn.Module:
    """The backbone of ``config`` for latents of ``shape`` (ch, h, w), told of ``classes``, norms converted if asked.

    Args:
        begin: with the weights that a run begins with: of a pretrained one they are read from its folder.
    """
    asked, times = config.network, config.objective.num_times
    try:
        if isinstance(asked, FromDiffusers):
            network = asked.build(shape, config.seed, times, classes, config.objective.noise.sigma_min)
        else:
            network = asked.build(shape, config.seed, times, classes)
    except ValueError as error:
        raise UserError(f"network: {error}") from error
    if begin and isinstance(asked, FromDiffusers):
        asked.start(network)
    if config.non_scaling_norm:
        report = convert_norms(network)
        if begin and not report.scales_removed and os.environ.get("RANK", "0") == "0":
            tqdm.write(
                f"non_scaling_norm=True takes nothing away: of the {len(report.converted)} norms of this "
                f"{type(network).__name__} none has a learned scale (a DiT's come from the time, and stay)"
            )
    return network
