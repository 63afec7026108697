"""The skip that knows the covariance, for the latents of a run: measured, said where it cannot be, kept with the run.

The rule for what cannot be had: no more latents than components, components that are constant, values that are not
finite, and latents of more than ``MOST_ELEMENTS`` are said in one line, and the run takes the scalar skip. Its file
says so, too: a run never changes its skip.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from reference_trainer.data.covariance import mean_and_covariance
from reference_trainer.data.latents import InMemory, Latents, LatentSpace, some_of
from reference_trainer.data.statistics import SLOW
from reference_trainer.errors import UserError
from reference_trainer.files import as_written, check_layout, load_tensors, save_tensors
from robustcm.checks import need_whole
from robustcm.gaussian import Gain, Gaussian, LinearSkip, Turned
from robustcm.noise import NoiseRange
from robustcm.preconditioning import ScalarSkip
from robustcm.randomness import step_generator
from robustcm.turning import Turning

AnySkip = LinearSkip | ScalarSkip


@dataclass(frozen=True)
class Scalar:
    """The usual skip, c_skip(t) x_t: the same for all directions."""


@dataclass(frozen=True, kw_only=True)
class GaussianSkip:
    """A skip that knows mean and covariance of the latents: f is then the exact consistency function of a Gaussian with
    these, as far as ``gain`` says, and the network learns what is not Gaussian."""

    rank: int | None = None
    """Principal components that are told apart, 1 or more; the others share their mean variance. None: all."""
    gain: Gain | Turning = Turning()
    """By how much each component is scaled, by noise level. ``Turning`` measures on the latents, without training,
    where the Gaussian is right; ``flow_gain`` takes it for right everywhere; ``wiener_gain`` is the scalar skip with
    the variance of each component; ``Blended()`` goes from the scalar to the flow where noise hides a component."""

    def __post_init__(self) -> None:
        if self.rank is not None:
            need_whole(self, "rank", least=1)

    def measured(self, mean: Tensor, covariance: Tensor, some: Tensor, noise: NoiseRange) -> LinearSkip:
        """Of latents with this ``mean [d]`` and ``covariance [d, d]``, ``some [n, ch, h, w]`` of them at hand.

        Raises:
            ValueError: see ``Gaussian.of``.
        """
        gaussian = Gaussian.of(mean, covariance, None if self.rank is None else min(self.rank, len(mean)))
        if not isinstance(self.gain, Turning):
            return LinearSkip(gaussian, self.gain, noise)
        desc = "measuring where latents are Gaussian"
        with tqdm(total=self.gain.steps, desc=desc, unit="step", leave=False, delay=2) as bar:
            return LinearSkip(gaussian, self.gain.on(some, gaussian, step_generator(0, 2), noise, bar.update), noise)


def skip_for(
    asked: GaussianSkip, latents: Tensor | Latents, noise: NoiseRange, space: LatentSpace | None = None
) -> AnySkip:
    """The skip for normalised ``latents [n, ch, h, w]``; the scalar one, said, where there is no other.

    Args:
        space: that of ``latents``; with it the covariance that a store keeps is taken.
    """
    latents = InMemory(latents) if isinstance(latents, Tensor) else latents
    try:
        d = math.prod(latents.shape)
        if len(latents) <= (components := min(asked.rank or d, d)):
            raise ValueError(f"{len(latents)} latents are too few for {components} components")
        mean, covariance = mean_and_covariance(latents, space)
        if d > SLOW:
            tqdm.write(f"measuring principal components of {d} elements")
        return asked.measured(mean, covariance, some_of(latents), noise)
    except ValueError as error:
        tqdm.write(f"preconditioning=GaussianSkip cannot be had ({error}): the run takes the scalar skip")
        return ScalarSkip(noise)


def save_skip(file: Path, skip: AnySkip) -> None:
    """Keep the numbers of ``skip``; see ``save_tensors``."""
    if isinstance(skip, ScalarSkip):
        save_tensors(file, {}, {"scalar": True})
        return
    gaussian = skip.gaussian
    tensors = {"mean": gaussian.mean, "axes": gaussian.axes, "variances": gaussian.variances}
    tensors |= {"angles": skip.gain.angles} if isinstance(skip.gain, Turned) else {}
    save_tensors(file, tensors, {"scalar": False})


def load_skip(file: Path, asked: GaussianSkip, shape: tuple[int, int, int], noise: NoiseRange) -> AnySkip:
    """The inverse, for a run that is configured as ``asked``, on latents of ``shape``.

    Raises:
        UserError: the file is missing or damaged, or of another run.
    """
    try:
        tensors, about = load_tensors(file)
        with as_written(file):
            if about["scalar"]:
                return ScalarSkip(noise)
            d, k = math.prod(shape), tensors["axes"].shape[1]
            check_layout(
                {name: tensors[name] for name in ("mean", "axes", "variances")},
                {"mean": torch.empty(d), "axes": torch.empty(d, k), "variances": torch.empty(k + 1)},
            )
            gaussian = Gaussian(tensors["mean"], tensors["axes"], tensors["variances"])
            if not isinstance(asked.gain, Turning):
                return LinearSkip(gaussian, asked.gain, noise)
            check_layout({"angles": tensors["angles"]}, {"angles": torch.empty(asked.gain.levels, k + 1)})
            return LinearSkip(gaussian, Turned(tensors["angles"]), noise)
    except UserError as error:
        raise UserError(
            f"{error}; the run's weights mean nothing without it: put a copy back, or train anew"
        ) from error
