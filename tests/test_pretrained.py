"""Runs that start from networks of diffusers: what they begin as, what is noted of them, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reference_trainer.__main__ import main
from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import PixelSpace
from reference_trainer.data.codecs import Pixels
from reference_trainer.data.latents import GivenStatistics, LatentSpace
from reference_trainer.errors import UserError
from reference_trainer.model import build_network
from reference_trainer.options import as_options, from_json, override, to_json
from reference_trainer.presets import digits, flow_map
from reference_trainer.pretrained import Denoising, FromDiffusers, Schedule
from reference_trainer.run import RunFolder
from reference_trainer.training.state import TrainState
from robustcm.consistency import Preconditioned, sample

CPU = torch.device("cpu")
FILE = Path("unet") / "diffusion_pytorch_model.safetensors"
SHAPE = (3, 8, 8)


def unet(**options: Any) -> Any:
    """A stand-in for OpenAI's: their configuration for ImageNet 64, narrower; see diffusers' conversion script."""
    whole = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "attention_head_dim": 8,
        "norm_num_groups": 4,
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 4,
    }
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return UNet2DModel(**whole | options).eval().requires_grad_(False)


def saved(root: Path, scheduler: Any = None, **options: Any) -> Path:
    """A pipeline's folder."""
    unet(**options).save_pretrained(root / "unet")
    (root / "model_index.json").write_text("{}")
    if scheduler is not None:
        scheduler.save_pretrained(root / "scheduler")
    return root


def started(name: Path, classes: int = 0, base: TrainConfig | None = None, **options: Any) -> nn.Module:
    """The network that a run begins with."""
    network = FromDiffusers(name=str(name), **options)
    config = replace(base or TrainConfig(), network=network).found()
    return build_network(config, SHAPE, classes, begin=True).eval().requires_grad_(False)


def change(root: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(root / FILE)
    edit(tensors)
    save_file(tensors, root / FILE, {"format": "pt"})


@pytest.fixture
def x(rng: torch.Generator) -> Tensor:
    return torch.randn(4, *SHAPE, generator=rng)


# Consistency models


@pytest.mark.parametrize("of_pipeline", [True, False])
def test_a_bare_unet_is_f_itself(of_pipeline: bool, tmp_path: Path, x: Tensor):
    root = saved(tmp_path)
    c_noise = torch.tensor([-1500.0, -3.25, 0.0, 1095.5])
    network = started(root if of_pipeline else root / "unet")
    assert torch.equal(network(x, c_noise), unet()(x, c_noise).sample)


def test_openai_s_consistency_models_draw_here_what_they_draw_in_diffusers(tmp_path: Path, rng: torch.Generator):
    saved(tmp_path, CMStochasticIterativeScheduler(num_train_timesteps=40), num_class_embeds=5)
    z, labels = torch.randn(4, *SHAPE, generator=rng), torch.tensor([0, 1, 4, 4])
    pipe = ConsistencyModelPipeline(unet(num_class_embeds=5), CMStochasticIterativeScheduler(num_train_timesteps=40))
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(4, latents=z, class_labels=labels, output_type="pt").images
    f = Preconditioned(started(tmp_path, classes=5))
    ours = LatentSpace.of(Pixels(), z, GivenStatistics()).undo(sample(f, z, conditions={"labels": labels}))
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), theirs, rtol=0, atol=1e-5)


def test_told_of_no_class_it_is_told_the_mean_of_all(tmp_path: Path, x: Tensor):
    saved(tmp_path, num_class_embeds=5)
    network, t = started(tmp_path, classes=5), torch.zeros(len(x))
    other = unet(num_class_embeds=5)
    other.class_embedding.weight.copy_(other.class_embedding.weight.mean(0).expand(5, -1))
    torch.testing.assert_close(network(x, t), other(x, t, torch.zeros(len(x), dtype=torch.long)).sample)


def test_a_table_with_one_row_more_is_one_of_our_own_whose_last_says_no_class(tmp_path: Path, x: Tensor):
    saved(tmp_path, num_class_embeds=5)
    network, t = started(tmp_path, classes=4), torch.zeros(len(x))
    assert torch.equal(network(x, t), unet(num_class_embeds=5)(x, t, torch.full((len(x),), 4)).sample)


def test_classes_that_it_never_knew_change_nothing_at_the_start(tmp_path: Path, x: Tensor):
    network, t = started(saved(tmp_path), classes=3), torch.ones(len(x))
    torch.testing.assert_close(network(x, t, labels=torch.tensor([0, 1, 2, 3])), unet()(x, t).sample)


def test_a_network_of_two_times_starts_a_flow_map(tmp_path: Path, x: Tensor):
    saved(tmp_path, class_embed_type="timestep")
    t, r = torch.linspace(1, 250, len(x)), torch.linspace(0, 40, len(x))
    for classes in (0, 2):
        network = started(tmp_path, classes=classes, base=flow_map())
        torch.testing.assert_close(network(x, t, r), unet(class_embed_type="timestep")(x, t, r).sample)


def test_the_average_begins_there_too_and_a_checkpoint_needs_no_folder(tmp_path: Path):
    config = replace(TrainConfig(), network=FromDiffusers(name=str(saved(tmp_path / "it")))).found()
    state = TrainState.create(config, SHAPE, CPU)
    for name, tensor in unet().state_dict().items():
        assert torch.equal(state.network.state_dict()[f"network.{name}"], tensor)
        assert torch.equal(state.ema.state_dict()[f"network.{name}"], tensor)
    shutil.rmtree(tmp_path / "it")
    other = TrainState.create(config, SHAPE, CPU, begin=False)
    assert other.network.state_dict().keys() == state.network.state_dict().keys()


# Diffusion models: consistency tuning


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


def test_at_sigma_min_f_is_the_identity_and_its_network_finite(tmp_path: Path, x: Tensor):
    network = started(saved(tmp_path, DDPMScheduler()))
    low = torch.full((len(x),), 0.002)
    assert torch.equal(Preconditioned(network)(x, low), x)
    assert network(x, 250 * low.log()).isfinite().all()


def test_timesteps_are_found_by_their_noise_and_go_no_further_than_the_last(x: Tensor):
    schedule = Schedule.of(dict(DDPMScheduler().config))
    network = Denoising(nn.Identity(), schedule, 1.0, 0.002)  # type: ignore[arg-type]
    sigmas = torch.tensor(schedule.sigmas)
    assert len(sigmas) == 1000
    torch.testing.assert_close(network.timestep(sigmas), torch.arange(1000.0), rtol=0, atol=2e-3)
    between = (sigmas[100] * sigmas[101]).sqrt()
    torch.testing.assert_close(network.timestep(between[None]), torch.tensor([100.5]), rtol=0, atol=2e-3)
    assert network.timestep(torch.tensor([1e-6, 1e6])).tolist() == [0, 999]


def test_a_schedule_without_signal_at_its_end_ends_before_it():
    schedule = Schedule.of(dict(DDPMScheduler(rescale_betas_zero_snr=True).config))
    assert len(schedule.sigmas) in (999, 1000)
    assert all(sigma < 1e6 for sigma in schedule.sigmas[:999])


def test_of_a_learned_variance_only_the_mean_is_taken(tmp_path: Path, x: Tensor):
    saved(tmp_path, DDPMScheduler(variance_type="learned_range"), out_channels=6)
    network, t = started(tmp_path), torch.ones(len(x))
    output = unet(out_channels=6)((x * 0.5).contiguous(), network.timestep(t.fill_(3**0.5))).sample
    torch.testing.assert_close(network.epsilon(x, t), output[:, :3])


def test_gradients_reach_every_weight(tmp_path: Path, x: Tensor):
    config = replace(TrainConfig(), network=FromDiffusers(name=str(saved(tmp_path, DDPMScheduler()))))
    network = build_network(config.found(), SHAPE, begin=True)
    Preconditioned(network)(x, torch.full((len(x),), 2.0)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


# What is noted


def test_it_is_noted_where_from_and_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(saved(tmp_path / "it", DDPMScheduler()).parent)
    config = override(digits(), "network=FromDiffusers(name='it')").found()
    noted = config.network
    assert isinstance(noted, FromDiffusers)
    assert noted.name == str(tmp_path / "it")
    assert len(noted.sha256) == 64
    assert json.loads(noted.model)["block_out_channels"] == [8, 16]
    assert json.loads(noted.scheduler)["beta_schedule"] == "linear"
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    again = digits()
    for option in as_options(config):
        again = override(again, option)
    assert again == config == config.found()


def test_other_weights_are_another_configuration_and_no_beginning(tmp_path: Path):
    asked = replace(digits(), network=FromDiffusers(name=str(saved(tmp_path / "it"))))
    config, run = asked.found(), RunFolder(tmp_path / "run")
    run.claim(config)
    change(tmp_path / "it", lambda tensors: tensors["conv_in.bias"].add_(1e-6))
    with pytest.raises(UserError, match=r"network\.sha256: "):
        run.claim(asked.found())
    with pytest.raises(UserError, match=r"has other weights than when the run was begun \(sha256 "):
        build_network(config, SHAPE, begin=True)


# What is refused


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("conv_in.weight"), r"1 missing \(conv_in.weight\)"),
        (lambda t: t.update({"more": torch.ones(2)}), r"1 unexpected \(more\)"),
        (lambda t: t.update({"conv_in.bias": torch.ones(3)}), "conv_in.bias"),
    ],
)
def test_weights_that_do_not_fit_are_an_error(edit: Callable, message: str, tmp_path: Path):
    change(saved(tmp_path), edit)
    with pytest.raises(UserError, match=message) as caught:
        started(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_pickle_is_refused(tmp_path: Path):
    (saved(tmp_path) / FILE).rename(tmp_path / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"network .*are a pickle \(diffusion_pytorch_model.bin\).*never loaded"):
        started(tmp_path)


def test_what_is_no_unet_is_refused(tmp_path: Path):
    saved(tmp_path)
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(UserError, match=r"AutoencoderKL, which is no network of diffusers .*: name a UNet2DModel"):
        started(tmp_path)


@pytest.mark.parametrize(
    ("options", "scheduler", "classes", "base", "message"),
    [
        ({"in_channels": 4, "out_channels": 4}, None, 0, None, "takes 4 channels and gives 4, the latents have 3"),
        ({"out_channels": 6}, None, 0, None, "takes 3 channels and gives 6"),
        ({"num_class_embeds": 7}, None, 0, None, "told of 7 classes, the run is trained without classes"),
        ({"num_class_embeds": 7}, None, 3, None, "told of 7 classes, the run is trained by class on 3"),
        ({}, None, 0, flow_map(), "told one time, flow maps and trajectories need two"),
        ({}, DDPMScheduler(), 0, flow_map(), "told one time, flow maps and trajectories need two"),
        ({"class_embed_type": "timestep"}, None, 0, None, "more than a time and a class"),
        ({"time_embedding_type": "fourier"}, None, 0, None, "its time embedding is 'fourier'"),
        ({}, FlowMatchEulerDiscreteScheduler(), 0, None, "beside FlowMatchEulerDiscreteScheduler .* is no"),
        ({}, CMStochasticIterativeScheduler(sigma_data=1.0), 0, None, "has sigma_data 1.0, here it is 0.5"),
        ({"block_out_channels": (8, 8, 8, 8, 8), "down_block_types": ("DownBlock2D",) * 5,
          "up_block_types": ("UpBlock2D",) * 5}, None, 0, None, "multiples of 16, these are 8x8"),
    ],
)  # fmt: skip
def test_what_training_cannot_start_from_is_refused_in_a_line(
    options: dict[str, Any], scheduler: Any, classes: int, base: TrainConfig | None, message: str, tmp_path: Path
):
    saved(tmp_path, scheduler, **options)
    with pytest.raises(UserError, match=message) as caught:
        started(tmp_path, classes, base)
    assert "\n" not in str(caught.value)


def test_a_hub_name_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"network nobody/no-such-network/unet: .*hub it cannot be had") as caught:
        FromDiffusers(name="nobody/no-such-network").found()
    assert "\n" not in str(caught.value)


# Statistics that are given


def test_given_statistics_leave_pixels_as_they_are(x: Tensor):
    space = LatentSpace.of(Pixels(), x, GivenStatistics())
    assert torch.equal(space.normalise(x), x)
    assert torch.equal(space.undo(x), x)


def test_they_are_one_for_all_or_one_each(x: Tensor):
    space = LatentSpace.of(Pixels(), x, GivenStatistics(mean=(1.0, 2.0, 3.0), std=(2.0,)))
    torch.testing.assert_close(space.normalise(x), (x - torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)) / 4)
    with pytest.raises(UserError, match=r"statistics.std has 2 numbers for 3 channels"):
        LatentSpace.of(Pixels(), x, GivenStatistics(std=(1.0, 2.0)))


@pytest.mark.parametrize("changes", [{"std": (0.0,)}, {"std": ()}, {"mean": (float("nan"),)}, {"mean": ()}], ids=str)
def test_statistics_that_cannot_be_are_refused_by_name(changes: dict[str, Any]):
    (name,) = changes
    with pytest.raises(ValueError, match=name):
        GivenStatistics(**changes)


# From end to end


def test_a_run_starts_from_an_export_of_a_run_and_outlives_the_folder(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ROBUSTCM_CACHE", str(tmp_path / "cache"))
    saved(tmp_path / "it", CMStochasticIterativeScheduler())
    words = ["--data", str(image_folder), "--device=cpu", "--brief", "steps=1", "batch_size=4", "coupling_pool=1"]
    words += ["data.resolution=8", "autoencoder=PixelSpace", "statistics=GivenStatistics", "clip=None"]
    first, second, out = (str(tmp_path / name) for name in ("first", "second", "out"))
    assert main([*words, f"network=FromDiffusers(name='{tmp_path / 'it'}')", "--out", first]) == 0
    assert main(["export", first, "--out", out, "--device=cpu"]) == 0
    assert main([*words, f"network=FromDiffusers(name='{out}')", "--out", second]) == 0
    shutil.rmtree(out)
    assert main(["sample", second, "--n", "4", "--device=cpu"]) == 0
    config = RunFolder(tmp_path / "second").config()
    assert config.autoencoder == PixelSpace()
    assert isinstance(config.network, FromDiffusers)
    assert json.loads(config.network.scheduler)["_class_name"] == "CMStochasticIterativeScheduler"
