"""A run written as a folder of diffusers, and compared with the run before it is there."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reference_trainer.data.autoencoders import LOGIT_SCALE, KLAutoencoder
from reference_trainer.data.codecs import Codec, Foreign, Pixels
from reference_trainer.data.from_diffusers import Drawing
from reference_trainer.data.images import to_pixels
from reference_trainer.data.latents import SIGMA_DATA
from reference_trainer.data.origin import PIXELS_MAY_DIFFER
from reference_trainer.errors import UserError, printable
from reference_trainer.export.few_step_pipeline import (
    ConsistencyPipeline,
    FewStepPipeline,
    FlowMapPipeline,
    TunedPipeline,
)
from reference_trainer.export.stock import stock_network
from reference_trainer.model import TrainedModel, number_of
from reference_trainer.networks import DiT
from reference_trainer.pretrained import FromDiffusers
from robustcm.flow_maps import FlowMapObjective
from robustcm.gaussian import LinearSkip
from robustcm.guidance import Guided
from robustcm.objective import Objective
from robustcm.randomness import Stream, step_generator
from robustcm.schedules import LevelGrid

MOST_EVALUATIONS = 4
"""So many the folder says the noise levels of."""
MAY_DIFFER, TUNED_MAY_DIFFER = 1e-4, 1e-3
"""A sample of the folder from the run's, of its size. What a tuned diffusion model draws is a difference of float32
numbers as large as sigma_max, whose rounding is that much."""
FINE = 10_000
"""Noise levels of the scheduler where training has no grid of them."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    pipeline: FewStepPipeline
    sigmas: tuple[tuple[float, ...], ...]
    """Noise levels, of a flow map flow times, of one evaluation, two, ..., as the scheduler has them."""
    difference: float
    """The largest between latents of the folder and of the run from the same noise, one and two evaluations, over their
    root mean square."""
    left_out: str
    """What is not in the folder, in a line; empty: nothing."""


def export(
    model: TrainedModel, folder: Path, beside: Callable[[Exported, Path], None] = lambda done, part: None
) -> Exported:
    """Write ``model`` into ``folder``, whole or not at all.

    Args:
        beside: writes what else belongs there, the card, into the folder that is about to become ``folder``.
    Raises:
        UserError: there is something in ``folder``; diffusers has no layers or scheduler for the run; it cannot be
            written; or what was written is not the same.
    """
    require_empty(folder)
    pipeline, sigmas, left_out = pipeline_of(model)
    part = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(part, ignore_errors=True)
        pipeline.save_pretrained(part, safe_serialization=True)
        _forget_where_it_came_from(part)
        again = reopened(pipeline, part)
        found = [differences(model, again, levels) for levels in sigmas[:2]]
        most = TUNED_MAY_DIFFER if isinstance(again, TunedPipeline) else MAY_DIFFER
        if wrong := [difference for difference in found if not difference <= most]:  # NaN is wrong, too
            raise UserError(
                f"the folder's samples differ from the run's by {wrong[0]:.2g}: nothing is written; this is a fault "
                "of ours, or of this version of diffusers"
            )
        far = images_apart(model, again, sigmas[0])
        if not far <= PIXELS_MAY_DIFFER:
            raise UserError(
                f"the folder's images differ from the run's by {far:.2g} of 255 grey levels: nothing is written; if "
                "the autoencoder is yours, let an object that is no model of diffusers decode, and it stays outside"
            )
        done = Exported(again, sigmas, max(found), left_out)
        beside(done, part)
        if folder.is_dir():
            folder.rmdir()
        part.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; give --out another folder") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return done


def require_empty(folder: Path) -> None:
    """Refuse a folder that has something in it, or that this process is in: a new one takes its place.

    Raises:
        UserError: just that.
    """
    if folder.resolve() == Path.cwd():
        raise UserError(f"{folder} is the folder that you are in, which export would replace: give --out another")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} is there and not an empty folder: give --out another, nothing is overwritten")


def pipeline_of(model: TrainedModel) -> tuple[FewStepPipeline, tuple[tuple[float, ...], ...], str]:
    """The pipeline that samples as ``model`` does, the levels of one evaluation, two, ..., and what it lacks.

    Raises:
        UserError: diffusers has no layers or scheduler for it.
    """
    config, space = model.config, model.space
    kind, scheduler, timesteps, sigmas = _scheduler_of(model)
    vae, about_vae, left_out = _vae_of(space.codec)
    classes = number_of(model.classes)
    network = stock_network(model)
    tuned: dict[str, Any] = {}
    if isinstance(config.network, FromDiffusers) and config.network.diffusion is not None:
        kind = TunedPipeline
        tuned = {"noise_schedule": config.network.noise_schedule(), "data_scale": config.network.scale}
    is_transformer = isinstance(config.network, DiT)
    pipeline = kind(
        scheduler,
        **{"transformer" if is_transformer else "unet": network},
        vae=vae,
        latents_mean=space.mean.tolist(),
        latents_std=space.std.tolist(),
        sigma_data=SIGMA_DATA,
        patch=1 if is_transformer else config.network.patch,
        time_scale=config.network.time_scale if isinstance(config.network, DiT) else 1.0,
        guidance_scale=1.0 if config.classes is None else config.classes.guidance,
        num_classes=classes,
        class_counts=None if model.classes is None else list(model.classes.counts),
        id2label=None if model.classes is None else {str(i): name for i, name in enumerate(model.classes.names)},
        timesteps=timesteps,
        **about_vae,
        **tuned,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, sigmas, left_out


def _scheduler_of(model: TrainedModel) -> tuple[type[FewStepPipeline], Any, Any, tuple[tuple[float, ...], ...]]:
    """Pipeline, scheduler, its indices for one evaluation, two, ..., and the levels that these are."""
    import diffusers

    objective = model.config.objective
    if isinstance(objective, FlowMapObjective):
        made = getattr(diffusers, "FlowMapEulerDiscreteScheduler", None)
        if made is None:
            raise UserError(
                f"diffusers {diffusers.__version__} has no FlowMapEulerDiscreteScheduler, which flow maps need: "
                "pip install -U diffusers"
            )
        counts = range(1, MOST_EVALUATIONS + 1)
        return FlowMapPipeline, made(), None, tuple(model.sigmas(count) for count in counts)
    if not isinstance(objective, Objective):
        raise UserError("diffusers has no scheduler for consistency trajectories: export a consistency model")
    if isinstance(model.skip, LinearSkip):
        raise UserError(
            "diffusers has no scheduler with a skip that knows the latents' covariance (preconditioning=GaussianSkip): "
            "export a run of preconditioning=Scalar()"
        )
    noise, levels = objective.noise, objective.levels
    count = FINE
    if isinstance(levels, LevelGrid):
        count = levels.curriculum(max(0, model.step - 1), model.config.steps)
    grid = noise.levels(count)
    timesteps = []
    for evaluations in range(1, MOST_EVALUATIONS + 1):
        try:
            asked = torch.tensor(model.sigmas(evaluations), dtype=torch.float64)
        except UserError:  # more than there are levels
            break
        timesteps.append([int(i) for i in (grid.log() - asked.log()[:, None]).abs().argmin(1)][::-1])
    scheduler = diffusers.CMStochasticIterativeScheduler(
        num_train_timesteps=count,
        sigma_min=without_nan(noise.sigma_min),
        sigma_max=noise.sigma_max,
        sigma_data=SIGMA_DATA,
        rho=noise.rho,
        clip_denoised=False,
    )
    return ConsistencyPipeline, scheduler, timesteps, tuple(tuple(grid[chosen[::-1]].tolist()) for chosen in timesteps)


def without_nan(sigma_min: float) -> float:
    """``sigma_min``, lowered in its last bits where diffusers' scheduler would make NaN of it.

    It takes the root of a float32 sigma_min^2 less the one it is given, which rounding makes negative for a quarter of
    all numbers; not for 0.002.
    """
    while (torch.tensor(sigma_min, dtype=torch.float32).clamp(min=sigma_min) ** 2 - sigma_min**2) < 0:
        sigma_min *= 1 - 2**-26
    return sigma_min


def _vae_of(codec: Codec) -> tuple[Any, dict[str, Any], str]:
    """The autoencoder, if it is one of diffusers; what the pipeline is told of it; and what is left out.

    What wraps such a one, or inherits from it, may encode and decode otherwise: it stays outside.
    """
    from diffusers import ModelMixin

    if isinstance(codec, Pixels):
        return None, {"pixels": True}, ""
    if isinstance(codec, Foreign):
        made = codec.autoencoder.network if isinstance(codec.autoencoder, Drawing) else codec.autoencoder
        if isinstance(made, ModelMixin) and type(made).__module__.startswith("diffusers."):
            return made, {}, ""
        where = printable(codec.name)
        return None, {}, f"autoencoder {where} is none of diffusers and stays outside: ask for output_type='latent'"
    fitted: Any = codec
    config: KLAutoencoder = fitted.config
    tanh = LOGIT_SCALE / 2 if config.likelihood == "bernoulli" else 0.0
    return fitted.network, {"vae_patch": config.patch, "vae_tanh": tanh}, ""


def _forget_where_it_came_from(folder: Path) -> None:
    """Take out what diffusers notes of the folder that a part, such as a pretrained autoencoder, was loaded from."""
    for file in folder.glob("*/*.json"):
        found = json.loads(file.read_text())
        if found.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")


def drawn(exported: Exported, n: int = 16) -> Tensor | None:
    """Images uint8 ``[2 n, ch, h, w]``, ``n`` of one evaluation, then as many of two; None where no vae draws them."""
    if exported.left_out:
        return None
    parts = []
    for steps in (1, min(2, len(exported.sigmas))):
        generator = torch.Generator().manual_seed(0)
        asked: dict[str, Any] = {"num_inference_steps": steps, "generator": generator, "output_type": "pt"}
        parts.append(to_pixels(2 * exported.pipeline(batch_size=n, **asked).images - 1))
    return torch.cat(parts)


def reopened(pipeline: FewStepPipeline, folder: Path) -> FewStepPipeline:
    """``pipeline`` with its parts as they are read from ``folder``, each by its own class and in its own dtype."""
    parts: dict[str, Any] = {}
    for name, part in pipeline.components.items():
        told = {"torch_dtype": part.dtype} if isinstance(part, nn.Module) else {}
        parts[name] = None if part is None else type(part).from_pretrained(folder / name, **told)
    config = {name: value for name, value in pipeline.config.items() if name not in parts and not name.startswith("_")}
    again = type(pipeline)(**parts, **config)
    again.set_progress_bar_config(disable=True)
    return again


def differences(model: TrainedModel, pipeline: FewStepPipeline, levels: tuple[float, ...], n: int = 2) -> float:
    """The largest difference of ``n`` samples of ``pipeline`` from those of ``model``, over their root mean square."""
    sampled, given = _of_both(model, pipeline, levels, n, "latent")
    return float((model.space.normalise(given) - sampled).abs().max() / sampled.square().mean().sqrt())


def images_apart(model: TrainedModel, pipeline: FewStepPipeline, levels: tuple[float, ...], n: int = 2) -> float:
    """Root mean square difference of the worst of ``n`` images, in grey levels of 255; 0 where no vae draws them.

    Raises:
        UserError: images of ``model`` that are not finite.
    """
    if pipeline.vae is None and not pipeline.config["pixels"]:
        return 0.0
    sampled, given = _of_both(model, pipeline, levels, n, "pt")
    ours = model.space.decode(sampled.to(model.device))
    if given.shape != ours.shape:
        return math.inf
    return float((255 * given.cpu() - ours).square().flatten(1).mean(1).sqrt().max())


def _of_both(
    model: TrainedModel, pipeline: FewStepPipeline, levels: tuple[float, ...], n: int, output_type: str
) -> tuple[Tensor, Tensor]:
    """From the same noise: normalised latents ``[n, ch, h, w]`` of ``model``, and what ``pipeline`` gives."""
    objective = model.config.objective
    z, ours, theirs = _noise(model, n)
    labels, f = None, model.function
    if model.classes is not None and model.config.classes is not None:
        labels = torch.tensor([i % number_of(model.classes) for i in range(n)])
        f = Guided(f, model.config.classes.guidance, number_of(model.classes))
    told = {} if labels is None else {"labels": labels.to(model.device)}
    sampled: Tensor = objective.sample(f, z.to(model.device), levels, ours, told).cpu()
    given = pipeline(
        latents=z, class_labels=labels, num_inference_steps=len(levels), generator=theirs, output_type=output_type
    ).images
    return sampled, given


def _noise(model: TrainedModel, n: int) -> tuple[Tensor, torch.Generator, torch.Generator]:
    """Noise, and twice the generator of what comes behind it."""
    ours, theirs = (step_generator(0, 0, Stream.SAMPLING) for _ in range(2))
    shape = (n, *model.shape)
    return torch.randn(shape, generator=ours), ours, (torch.randn(shape, generator=theirs), theirs)[1]
