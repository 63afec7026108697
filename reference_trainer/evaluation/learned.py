"""What the network learned, by noise level: is it the budget, the network or the recipe?

Held-out latents x are made noisy, x + t z, and f takes them back in one evaluation. Two things are asked of
f(x + t z, t) at each t: how far it is from x, beside the best linear denoiser and the consistency function of a
Gaussian with the data's covariance; and how far such outputs, as a set, are from the data. At small t the second says
whether small noise was learned at all; at sigma_max it is what a sample of one evaluation is worth; in between it shows
where quality is lost.

Axes: n = samples, d = elements of one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reference_trainer.data.images import ImageSet
from reference_trainer.data.latents import not_finite
from reference_trainer.errors import UserError
from reference_trainer.evaluation.metrics import precision_recall
from reference_trainer.evaluation.training_set import held_out_order, raw_latents
from reference_trainer.model import TrainedModel
from robustcm.gaussian import Gaussian, LinearSkip
from robustcm.noise import NoiseRange
from robustcm.objective import Objective
from robustcm.randomness import Stream, step_generator

SAMPLES = 500
"""That are made noisy, at most."""
MOST_REAL = 2000
"""That they are compared with."""
LEAST = 50
"""Held-out images, below which half of the training images are taken instead."""
LEVELS = 10
BATCH = 250


def what_was_learned(model: TrainedModel, images: ImageSet, latents: Tensor, seed: int) -> dict[str, Any]:
    """``compared`` for a trained model; a tenth to a third of the time that the samples of an evaluation take.

    Args:
        latents: ``[n, ch, h, w]``, normalised, of the training images, in the order of ``training_images(seed)``.
    Raises:
        UserError: it is no consistency function, latents are too few, or the network has diverged.
    """
    if not isinstance(model.config.objective, Objective):
        raise UserError("what was learned by noise level is asked of consistency functions alone")
    held_out = int(images.is_held_out.sum()) >= LEAST
    labels = None if model.classes is None or images.labels is None else images.labels
    if held_out:
        order = held_out_order(images, seed)[:SAMPLES]
        x = model.space.normalise(raw_latents(images, order, model.space.codec, model.device))
        told, data = None if labels is None else labels[order], latents
    else:
        order = torch.randperm(len(images.train_places), generator=torch.Generator().manual_seed(seed))
        x, data = latents[: len(latents) // 2][:SAMPLES], latents[len(latents) // 2 :]
        told = None if labels is None else labels[~images.is_held_out][order]
    if min(len(x), len(data)) < 8:
        raise UserError(f"{len(latents)} latents are too few to ask by noise level what was learned")
    f, device = model.function, model.device

    def on_device(x_t: Tensor, t: Tensor, rows: slice) -> Tensor:
        given = {} if told is None else {"labels": told[: len(x)][rows].to(device)}
        with torch.no_grad():
            out: Tensor = f(x_t.to(device), t.to(device), **given)
        return out.cpu()

    gaussian = gaussian_of(model, data)
    generator = step_generator(seed, 1, Stream.SAMPLING)  # 0 begins the samples
    found = compared(on_device, x, data, gaussian, model.config.objective.noise, generator)
    return found | {"held_out": held_out}


def gaussian_of(model: TrainedModel, data: Tensor) -> Gaussian:
    """The one that the run knows, else that of ``data [n, ...]``; of few as many components as half of them.

    Raises:
        UserError: constant components.
    """
    if isinstance(model.skip, LinearSkip):
        return model.skip.to("cpu").gaussian
    n, d = len(data), data[0].numel()
    try:
        return Gaussian.fit(data, None if n > d else max(1, n // 2))
    except ValueError as error:
        raise UserError(f"no Gaussian to compare with: {error}") from error


def compared(
    f: Callable[[Tensor, Tensor, slice], Tensor],
    x: Tensor,
    data: Tensor,
    gaussian: Gaussian,
    noise: NoiseRange,
    generator: torch.Generator,
) -> dict[str, Any]:
    """What ``f`` makes of ``x [n, ...]`` with noise, against x and against ``data [m, ...]``; all on the CPU.

    Args:
        f: ``(x_t [b, ...], t [b], which rows of x) -> [b, ...]``.
        gaussian: of the data; its denoiser and its consistency function are what f is compared with.
        generator: CPU; draws one noise for all levels.
    Returns:
        ``levels``, rows with ``sigma``; ``explained``, the share of the variance of x that the linear denoiser
        explains; ``error`` and ``error_gaussian``, the mean square errors of f and of the Gaussian's function over that
        denoiser's; ``kernel_x1000`` and ``kernel_gaussian_x1000``, distances of what they give to ``data``;
        ``precision`` and ``precision_gaussian``, the shares of it that lie among ``data``: a kernel distance of latents
        does not see that a Gaussian does not. ``floor`` and ``floor_precision``: of x itself; ``noise``: the standard
        deviation of such a distance.
    Raises:
        UserError: what f gives is not finite.
    """
    z, rows = torch.randn(x.shape, generator=generator), list[dict[str, float]]()
    distance = KernelDistance.to(data)

    def precision(samples: Tensor) -> float:
        return precision_recall(data.flatten(1), samples.flatten(1))[0]

    variance = _error(x, gaussian.mean.reshape(x[:1].shape))
    for sigma in torch.linspace(math.log(10 * noise.sigma_min), math.log(noise.sigma_max), LEVELS).exp().tolist():
        x_t, t = x + sigma * z, torch.full((len(x),), sigma)
        parts = [slice(start, start + BATCH) for start in range(0, len(x), BATCH)]
        ours = torch.cat([f(x_t[part], t[part], part) for part in parts])
        if bad := len(not_finite(ours)):
            raise UserError(f"{bad} of {len(x)} outputs at noise {sigma:.3g} are NaN or infinite: it has diverged")
        flowed, linear = gaussian.flow(x_t, t, noise), _error(gaussian.denoised(x_t, t), x)
        rows.append(
            {
                "sigma": sigma,
                "explained": 1 - linear / variance,
                "error": _error(ours, x) / linear,
                "error_gaussian": _error(flowed, x) / linear,
                "kernel_x1000": distance(ours),
                "kernel_gaussian_x1000": distance(flowed),
                "precision": precision(ours),
                "precision_gaussian": precision(flowed),
            }
        )
    floors = {"floor": distance(x), "noise": distance.noise(len(x)), "floor_precision": precision(x)}
    return {"n": len(x), **floors, "levels": rows}


@dataclass(frozen=True, eq=False)
class KernelDistance:
    """``kernel_distance`` to one set of latents again and again, of all of it at once: the kernel (x y / d + 1)^3."""

    real: Tensor
    """``[m, d]``, of mean square 1."""
    scale: float
    kernel: Tensor
    """``[m, m]``, of these with themselves, 0 on the diagonal."""

    @staticmethod
    def to(data: Tensor) -> KernelDistance:
        """To the first ``MOST_REAL`` of ``data [m, ...]``."""
        flat = data[:MOST_REAL].flatten(1)
        scale = float(flat.double().square().mean().sqrt())
        real = flat / scale
        return KernelDistance(real, scale, _kernel(real, real).fill_diagonal_(0))

    def __call__(self, samples: Tensor) -> float:
        """1000 x squared MMD of ``samples [n, ...]``, unbiased."""
        fake, m, n = samples.flatten(1) / self.scale, len(self.real), len(samples)
        own = _kernel(fake, fake).fill_diagonal_(0).sum() / (n * (n - 1))
        return 1000 * float(self.kernel.sum() / (m * (m - 1)) + own - 2 * _kernel(self.real, fake).mean())

    def noise(self, n: int) -> float:
        """Standard deviation of the distance of ``n`` samples of the data: of parts of it, at most quarters, to the
        rest; it falls as 1 / n."""
        m, found = len(self.real), list[float]()
        p = min(n, m // 4)
        for start in range(0, m - p + 1, p):
            part = torch.zeros(m, dtype=torch.double)
            part[start : start + p] = 1
            rest = 1 - part
            within, between = part @ self.kernel @ part, part @ self.kernel @ rest
            own = (rest @ self.kernel @ rest) / ((m - p) * (m - p - 1))
            found.append(1000 * float(own + within / (p * (p - 1)) - 2 * between / (p * (m - p))))
        return statistics.stdev(found) * p / n


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return ((x @ y.T).double() / x.shape[1] + 1) ** 3


def reading(learned: Mapping[str, Any]) -> list[str]:
    """What ``compared`` says, as sentences."""
    rows, floor, lines = learned["levels"], learned["floor_precision"], list[str]()
    small = [row for row in rows if row["explained"] >= 0.5]  # above, the right f is no better than a sample can be
    behind = [row["sigma"] for row in small if row["error"] > 1.02 * max(1.0, row["error_gaussian"])]
    ahead = [row["sigma"] for row in rows if row["error"] < 0.98 * min(1.0, row["error_gaussian"])]
    if behind:
        lines.append(
            f"at noise {_between(behind)} the error is above that of the linear denoiser and of the Gaussian's "
            "function: not learned there yet, by too few steps or too small a network"
        )
    if ahead:
        lines.append(f"at noise {_between(ahead)} it is below both: what no linear function has was learned there")
    last = f"outputs from noise {rows[-1]['sigma']:.3g}"
    lost = floor - rows[-1]["precision"]
    if lost > 3 * math.sqrt(0.5 / learned["n"]):  # of a difference of shares, at most
        half = next(row["sigma"] for row in rows if floor - row["precision"] > lost / 2)
        lines.append(
            f"of the latents {floor:.0%} lie among the data (precision), of {last} {rows[-1]['precision']:.0%}; half "
            f"of that is lost from noise {half:.2g} on"
        )
    away = rows[-1]["kernel_x1000"] - learned["floor"]
    if away > 3 * learned["noise"]:
        half = next(row["sigma"] for row in rows if row["kernel_x1000"] - learned["floor"] > away / 2)
        lines.append(
            f"{last} lie {away:.2g} farther from the data (kernel x1000) than the latents they are made of; half of "
            f"that is there from noise {half:.2g} on"
        )
    return lines


def _error(found: Tensor, x: Tensor) -> float:
    return float((found.double() - x.double()).square().mean())


def _between(levels: list[float]) -> str:
    return f"{levels[0]:.2g}" if len(levels) == 1 else f"{levels[0]:.2g} to {levels[-1]:.2g}"
