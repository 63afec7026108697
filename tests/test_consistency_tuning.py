"""Diffusion models turned into consistency functions: at the start f is their denoiser."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDPMScheduler,
)
from of_diffusers import SHAPE, saved, started, unet
from torch import Tensor, nn

from reference_trainer.config import TrainConfig
from reference_trainer.data.classes import ByClass, Classes
from reference_trainer.data.codecs import Pixels
from reference_trainer.data.latents import GivenStatistics, LatentSpace
from reference_trainer.errors import UserError
from reference_trainer.export.few_step_pipeline import TunedPipeline
from reference_trainer.export.folder import export
from reference_trainer.model import TrainedModel, build_network
from reference_trainer.pretrained import Denoising, FromDiffusers, Schedule
from robustcm.consistency import Preconditioned


@pytest.fixture
def x(rng: torch.Generator) -> Tensor:
    return torch.randn(4, *SHAPE, generator=rng)


@pytest.mark.parametrize(
    ("prediction", "schedule", "scale"),
    [
        ("epsilon", "linear", 1.0),
        ("epsilon", "scaled_linear", 2.0),
        ("v_prediction", "scaled_linear", 1.0),
        ("v_prediction", "squaredcos_cap_v2", 2.0),
        ("sample", "linear", 2.0),
    ],
)
def test_f_begins_as_the_denoiser(prediction: str, schedule: str, scale: float, tmp_path: Path, x: Tensor):
    """At every timestep: f + sigma_min epsilon is what diffusers' own scheduler predicts for the clean sample."""
    scheduler = DDPMScheduler(beta_schedule=schedule, prediction_type=prediction, clip_sample=False)
    network = started(saved(tmp_path, scheduler), scale=scale)
    assert isinstance(network, Denoising)
    f, m = Preconditioned(network), 0.002
    for timestep in (1, 30, 400, 900):
        alpha = scheduler.alphas_cumprod[timestep].double()
        t = ((1 - alpha) / alpha).sqrt() / scale
        x_t, at = (t * x.double()).float(), t.float().expand(len(x))
        assert m < t < 80
        preserved = (scale * x_t.double() * alpha.sqrt()).float()
        output = unet()(preserved, timestep).sample
        expected = scheduler.step(output, timestep, preserved).pred_original_sample / scale
        epsilon = (x_t - expected) / t
        torch.testing.assert_close(f(x_t, at), x_t - (t - m) * epsilon, rtol=1e-5, atol=1e-5 * max(1.0, float(t)))


def test_without_a_scale_of_its_data_a_diffusion_model_is_refused(tmp_path: Path):
    network = FromDiffusers(name=str(saved(tmp_path, DDPMScheduler())))
    with pytest.raises(UserError, match=r"one scale for all channels: give statistics=GivenStatistics for pixels"):
        replace(TrainConfig(), network=network).found()


def test_at_sigma_min_f_is_the_identity_and_its_network_finite(tmp_path: Path, x: Tensor):
    network = started(saved(tmp_path, DDPMScheduler()))
    low = torch.full((len(x),), 0.002)
    assert torch.equal(Preconditioned(network)(x, low), x)
    assert network(x, 250 * low.log()).isfinite().all()


def test_timesteps_are_found_by_their_noise_and_go_no_further_than_the_last(x: Tensor):
    schedule = Schedule.of(DDPMScheduler())
    network = Denoising(nn.Identity(), schedule, 1.0, 0.002)  # type: ignore[arg-type]
    sigmas = torch.tensor(schedule.sigmas)
    assert len(sigmas) == 1000
    torch.testing.assert_close(network.timestep(sigmas), torch.arange(1000.0), rtol=0, atol=2e-3)
    between = (sigmas[100] * sigmas[101]).sqrt()
    torch.testing.assert_close(network.timestep(between[None]), torch.tensor([100.5]), rtol=0, atol=2e-3)
    assert network.timestep(torch.tensor([1e-6, 1e6])).tolist() == [0, 999]


def test_a_schedule_without_signal_at_its_end_ends_before_it():
    schedule = Schedule.of(DDPMScheduler(rescale_betas_zero_snr=True))
    assert len(schedule.sigmas) == 999
    assert all(0 < sigma < 1e6 for sigma in schedule.sigmas)


def test_of_a_learned_variance_only_the_mean_is_taken(tmp_path: Path, x: Tensor):
    saved(tmp_path, DDPMScheduler(variance_type="learned_range"), out_channels=6)
    network, t = started(tmp_path), torch.ones(len(x))
    output = unet(out_channels=6)((x * 0.5).contiguous(), network.timestep(t.fill_(3**0.5))).sample
    torch.testing.assert_close(network.epsilon(x, t), output[:, :3])


def test_gradients_reach_every_weight(tmp_path: Path, x: Tensor):
    network = FromDiffusers(name=str(saved(tmp_path, DDPMScheduler())))
    config = replace(TrainConfig(), network=network, statistics=GivenStatistics())
    network = build_network(config.found(), SHAPE, begin=True)
    Preconditioned(network)(x, torch.full((len(x),), 2.0)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("classes", [0, 2])
@pytest.mark.parametrize(("prediction", "outputs"), [("epsilon", 6), ("v_prediction", 3), ("sample", 3)])
def test_a_tuned_model_is_exported(prediction: str, outputs: int, classes: int, tmp_path: Path, x: Tensor):
    saved(tmp_path / "it", DDPMScheduler(prediction_type=prediction), out_channels=outputs)
    network = FromDiffusers(name=str(tmp_path / "it"), scale=2.0)
    by_class = ByClass(guidance=1.5) if classes else None
    config = replace(TrainConfig(), network=network, statistics=GivenStatistics(), classes=by_class).found()
    made = build_network(config, SHAPE, classes, begin=True).eval().requires_grad_(False)
    space = replace(LatentSpace.of(Pixels(), x, GivenStatistics()), recognised_at=0.22)
    named = Classes(("a", "b"), (1, 1), "") if classes else None
    model = TrainedModel(config, made, space, SHAPE, 4000, torch.device("cpu"), classes=named)
    done = export(model, tmp_path / "out")
    c_noise, labels = torch.tensor(1000.0, dtype=torch.float64), torch.tensor([0, 1, 2, 0]) if classes else None
    done.pipeline.unet.double()
    ours = made.double()(x.double(), c_noise.expand(len(x)), labels=labels)
    theirs = done.pipeline._told(x.double(), labels, c_noise)
    torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-6 * float(ours.abs().max()))
    assert isinstance(done.pipeline, TunedPipeline)
    assert done.pipeline.noise_schedule.config.prediction_type == prediction
