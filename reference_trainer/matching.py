"""Samples of a run with the mean and covariance of its latents: the maps for that, measured once and kept with the run.

`evaluate --match-moments` measures them, `sample --match-moments` takes what it has kept. They belong to one state of
the weights: of another step, average or weight of guidance they are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from reference_trainer.data.covariance import mean_and_covariance
from reference_trainer.data.latents import Latents
from reference_trainer.data.statistics import MOST_ELEMENTS
from reference_trainer.errors import UserError
from reference_trainer.files import check_layout, load_tensors, save_tensors
from reference_trainer.model import TrainedModel
from reference_trainer.run import RunFolder
from robustcm.moments import MomentMap, match_moments

EVALUATIONS = (1, 2)
"""Numbers of network evaluations a map is measured for."""
DRAWN, AN_ELEMENT = 10_000, 20
"""Samples a map is measured on: as many as in docs/evidence.md, and at least so many an element of the latents. Of 4 an
element further samples of a Gaussian have 1.17 times its variance, of 20 1.03 times (tests/test_moments.py)."""
SEED = 2**40 + 1
"""Of these samples; far from the seeds that people take, so that no sample is moved by a map made of itself."""


def matched(model: TrainedModel, latents: Latents) -> TrainedModel:
    """``model`` with its samples moved to the moments of ``latents``, those it was trained on.

    Raises:
        UserError: moments that cannot be had.
    """
    require_matchable(model, len(latents))
    d = math.prod(model.shape)
    try:
        mean, covariance = mean_and_covariance(latents, model.space)
        n = max(DRAWN, AN_ELEMENT * d)
        maps = {
            count: match_moments(model.latents(n, model.sigmas(count), SEED), mean, covariance) for count in EVALUATIONS
        }
    except ValueError as error:
        raise UserError(f"--match-moments: {error}") from error
    return replace(model, moments=maps)


def require_matchable(model: TrainedModel, n: int) -> None:
    """See that ``matched`` is not asked for what it cannot do, before ``n`` images are encoded.

    Raises:
        UserError: latents that are too large or too few for a covariance, or no two evaluations to draw.
    """
    require_small(model.shape)
    d = math.prod(model.shape)
    if n <= d:
        raise UserError(f"--match-moments: {n} latents are too few for the covariance of {d} numbers")
    try:
        for count in EVALUATIONS:
            model.sigmas(count)
    except ValueError as error:
        raise UserError(f"--match-moments: {error}") from error


def require_small(shape: tuple[int, int, int]) -> None:
    """See that latents of ``shape`` (ch, h, w) are not too large for a covariance.

    Raises:
        UserError: just that.
    """
    if (d := math.prod(shape)) > MOST_ELEMENTS:
        raise UserError(f"--match-moments: latents of {d} elements, and covariances are of {MOST_ELEMENTS} at most")


def save_moments(run: RunFolder, model: TrainedModel) -> None:
    """Keep the maps of ``model``."""
    assert model.moments is not None
    tensors = {
        f"{count}.{name}": getattr(of, name) for count, of in model.moments.items() for name in _layout(model.shape)
    }
    save_tensors(run.moments_file, tensors, _state(model))


def with_kept_moments(run: RunFolder, model: TrainedModel) -> TrainedModel:
    """``model`` with the maps that ``run`` keeps.

    Raises:
        UserError: there are none, a damaged file, or maps of another state of the weights.
    """
    file = run.moments_file
    if not file.exists():
        raise UserError(f"no {file.name} in {run.root}: measure them first, with evaluate {run.root} --match-moments")
    tensors, about = load_tensors(file)
    now = _state(model)
    if other := [f"{name} {about.get(name)!r}, not {now[name]!r}" for name in now if about.get(name) != now[name]]:
        raise UserError(f"{file} was measured of {', '.join(other)}: evaluate anew, with --match-moments")
    layout = _layout(model.shape)
    try:
        check_layout(tensors, {f"{count}.{name}": of for count in EVALUATIONS for name, of in layout.items()})
    except UserError as error:
        raise UserError(f"{file}: {error}; evaluate anew, with --match-moments") from error
    maps = {count: MomentMap(**{name: tensors[f"{count}.{name}"] for name in layout}) for count in EVALUATIONS}
    return replace(model, moments=maps)


def _layout(shape: tuple[int, int, int]) -> Mapping[str, Tensor]:
    d = math.prod(shape)
    return {"centre": torch.empty(d), "target": torch.empty(d), "matrix": torch.empty(d, d)}


def _state(model: TrainedModel) -> dict[str, Any]:
    """What a map is of."""
    classes = model.config.classes
    return {"step": model.step, "average": model.average, "guidance": None if classes is None else classes.guidance}
