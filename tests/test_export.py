"""A run as a folder of diffusers: stock classes alone draw the run's images, what has no stock form is refused."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, CMStochasticIterativeScheduler, PixArtTransformer2DModel, UNet2DModel
from exports import ADM, NETWORKS, SHAPE, TOKEN, TOKENS, UNET, generator, opened, trained
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import PixelSpace
from reference_trainer.data.codecs import Foreign
from reference_trainer.data.from_diffusers import Drawing
from reference_trainer.data.gaussian_skip import GaussianSkip
from reference_trainer.errors import UserError
from reference_trainer.export import folder, stock
from reference_trainer.export.few_step_pipeline import FewStepPipeline
from reference_trainer.export.folder import export, pipeline_of, without_nan
from reference_trainer.model import TrainedModel
from reference_trainer.networks import DiT, UNet
from reference_trainer.presets import flow_map, trajectory
from robustcm.consistency import Preconditioning
from robustcm.gaussian import Gaussian, LinearSkip
from robustcm.noise import NoiseRange
from robustcm.preconditioning import ScalarSkip
from robustcm.schedules import RatioLevels

ROOT = Path(__file__).parents[1]
HAS_FLOW_MAPS = pytest.mark.skipif(
    not hasattr(diffusers, "FlowMapEulerDiscreteScheduler"), reason="the oldest diffusers allowed has no flow maps"
)


def our_images(model: TrainedModel, z: Tensor, levels: tuple[float, ...], rng: torch.Generator) -> Tensor:
    """-1 .. 1, by the run's own sampler."""
    f = model.config.preconditioned(model.network)
    return model.space.codec.decode(model.space.undo(model.config.objective.sample(f, z, levels, rng)))


def stock_images(root: Path, z: Tensor, evaluations: int, rng: torch.Generator) -> Tensor:
    """The same by classes of diffusers alone, nothing of ours imported from the folder."""
    index = json.loads((root / "model_index.json").read_text())
    p, is_unet = index["patch"], index["unet"][0] is not None
    kind, name = (UNet2DModel, "unet") if is_unet else (PixArtTransformer2DModel, "transformer")
    network = kind.from_pretrained(root / name)
    scheduler = CMStochasticIterativeScheduler.from_pretrained(root / "scheduler")
    vae = AutoencoderKL.from_pretrained(root / "vae")
    scheduler.set_timesteps(timesteps=index["timesteps"][evaluations - 1])
    mean, std = (torch.tensor(index[part]).reshape(1, -1, 1, 1) for part in ("latents_mean", "latents_std"))
    with torch.no_grad():
        x = z * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            scaled, told = scheduler.scale_model_input(x, t), t.float().expand(len(x))
            if is_unet:
                output = F.pixel_shuffle(network(F.pixel_unshuffle(scaled, p), told).sample, p)
            else:
                output = network(scaled, timestep=index["time_scale"] * told).sample
            x = scheduler.step(output, t, x, generator=rng).prev_sample
        decoded = vae.decode(x * (std / index["sigma_data"]) + mean).sample
    return torch.tanh(index["vae_tanh"] * F.pixel_shuffle(decoded, index["vae_patch"]))


# The same images


@pytest.mark.parametrize("non_scaling_norm", [False, True])
@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_stock_classes_alone_draw_the_run_s_images(
    network: DiT | UNet, non_scaling_norm: bool, tmp_path: Path, rng: torch.Generator
):
    model = trained(network, non_scaling_norm=non_scaling_norm)
    done = export(model, tmp_path / "out")
    z = torch.randn(3, *SHAPE, generator=rng)
    for evaluations in (1, 2):
        ours = our_images(model, z, model.sigmas(evaluations), generator())
        theirs = stock_images(tmp_path / "out", z, evaluations, generator())
        assert float((ours - theirs).abs().max()) < 3e-5  # roundings, of another machine more than of one
        assert done.sigmas[evaluations - 1] == pytest.approx(model.sigmas(evaluations), rel=1e-9)
    assert {file.suffix for file in tmp_path.rglob("*") if file.is_file()} == {".json", ".py", ".safetensors"}


@pytest.mark.parametrize(
    ("network", "base", "classes"),
    [
        (TOKEN, None, 3),
        (TOKENS, None, 3),
        (UNET, None, 3),
        pytest.param(TOKENS, flow_map(), 0, marks=HAS_FLOW_MAPS),
        pytest.param(TOKENS, flow_map(), 3, marks=HAS_FLOW_MAPS),
        pytest.param(UNET, flow_map(), 0, marks=HAS_FLOW_MAPS),
    ],
    ids=["token by class", "tokens by class", "unet by class", "flow map", "flow map by class", "unet flow map"],
)
def test_the_pipeline_draws_the_run_s_latents(
    network: DiT | UNet, base: TrainConfig | None, classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = trained(network, base, classes)
    done = export(model, tmp_path / "out")
    pipe = opened(tmp_path / "out", monkeypatch)
    assert "reference_trainer" not in type(pipe).__module__
    for evaluations in (1, 2):
        levels = done.sigmas[evaluations - 1]
        assert folder.differences(model, pipe, levels) < 1e-5
        if classes:
            assert folder.differences(model.guided(1.0), pipe, levels) > 1e-3


def test_saved_again_it_opens_again_and_draws_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    export(trained(TOKENS, classes=3), tmp_path / "out")
    pipe = opened(tmp_path / "out", monkeypatch)
    pipe.save_pretrained(tmp_path / "again")
    again = opened(tmp_path / "again", monkeypatch)
    asked = {"batch_size": 2, "num_inference_steps": 2, "output_type": "pt"}
    one, two = (made(**asked, generator=generator()).images for made in (pipe, again))
    assert torch.equal(one, two)
    index, index_again = (json.loads((tmp_path / name / "model_index.json").read_text()) for name in ("out", "again"))
    assert index_again.pop("_name_or_path") == str(tmp_path / "out")
    assert index_again == index


def test_pixels_are_images_without_a_vae(tmp_path: Path, rng: torch.Generator):
    model = trained(UNET, codec=PixelSpace().build(1, {}), autoencoder=PixelSpace())
    done, z = export(model, tmp_path / "out"), torch.randn(2, *SHAPE, generator=rng)
    theirs = done.pipeline(latents=z, output_type="pt").images
    ours = our_images(model, z, (80.0,), generator())
    torch.testing.assert_close(theirs, (ours / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


def test_where_training_has_no_grid_the_second_level_is_the_nearest_of_a_fine_one(tmp_path: Path):
    base = TrainConfig()
    base = replace(base, objective=replace(base.objective, levels=RatioLevels()))
    model = trained(TOKEN, base)
    done = export(model, tmp_path / "out")
    assert done.sigmas[1] == pytest.approx(model.sigmas(2), rel=1e-3)


# The scheduler


@given(st.floats(1e-4, 0.1), st.floats(5, 200), st.integers(3, 200), st.data())
def test_the_scheduler_has_our_coefficients_and_levels(low: float, high: float, count: int, data: st.DataObject):
    noise = NoiseRange(sigma_min=low, sigma_max=high)
    scheduler = CMStochasticIterativeScheduler(
        num_train_timesteps=count, sigma_min=without_nan(low), sigma_max=high, clip_denoised=False
    )
    index = data.draw(st.integers(1, count - 2))
    scheduler.set_timesteps(timesteps=[index, 0])
    p, t = Preconditioning(noise=noise), noise.levels(count)[[0, index]].float()
    torch.testing.assert_close(scheduler.sigmas[:2], t)
    torch.testing.assert_close(scheduler.timesteps.float(), p.c_noise(t), rtol=0, atol=3e-4)
    close = {"rtol": 1e-5, "atol": 1e-6}
    for i, at in enumerate(scheduler.timesteps):
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition(scheduler.sigmas[i])
        torch.testing.assert_close(c_skip, p.c_skip(t)[i], **close)
        torch.testing.assert_close(c_out, p.c_out(t)[i], **close)
        x = torch.ones(1, 1)
        torch.testing.assert_close(scheduler.scale_model_input(x, at)[0, 0], p.c_in(t)[i], **close)
        following = scheduler.step(torch.zeros(1, 1), at, 0 * x, generator=generator()).prev_sample
        expected = torch.randn(1, 1, generator=generator()) * (0.0 if i else (t[1] ** 2 - low**2).sqrt())
        torch.testing.assert_close(following, expected, rtol=1e-4, atol=1e-5)  # NaN unless sigma_min is made for it


def test_sigma_min_stays_where_it_does_no_harm():
    assert without_nan(0.002) == 0.002


# What goes into the folder


def test_non_scaling_norms_are_group_norms_of_one_group_and_weight_one():
    network = stock.stock_network(trained(ADM, non_scaling_norm=True))
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    assert len(norms) > 5
    assert all(norm.num_groups == 1 and bool((norm.weight == 1).all()) for norm in norms)


@pytest.mark.parametrize("name", ["few_step_pipeline", "conditioned_transformer"])
def test_what_goes_with_a_model_needs_diffusers_alone(name: str):
    tree = ast.parse((ROOT / "reference_trainer" / "export" / f"{name}.py").read_text())
    found = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    found |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    tops = {str(module).partition(".")[0] for module in found}
    assert {"torch", "diffusers"} <= tops <= {"torch", "diffusers", *sys.stdlib_module_names}


def test_labels_that_are_none_are_refused():
    pipe, _, _ = pipeline_of(trained(TOKEN, classes=3))
    with pytest.raises(ValueError, match=r"must be 1 or 2 of 0 .. 2 \(3: none\)"):
        pipe(batch_size=2, class_labels=[0, 4])
    with pytest.raises(ValueError, match="without classes"):
        pipeline_of(trained(TOKEN))[0](class_labels=1)


def test_without_labels_classes_come_in_the_proportions_of_the_training_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = trained(TOKEN, classes=3)
    assert model.classes is not None
    export(replace(model, classes=replace(model.classes, counts=(30, 0, 10))), tmp_path / "out")
    pipe = opened(tmp_path / "out", monkeypatch)
    counts = torch.bincount(pipe._labels(None, 4000, generator()), minlength=3)
    assert int(counts[1]) == 0
    assert int(counts[0]) == pytest.approx(3000, abs=150)
    index = tmp_path / "out" / "model_index.json"
    about = json.loads(index.read_text())
    del about["class_counts"]  # as folders were written before
    index.write_text(json.dumps(about))
    counts = torch.bincount(opened(tmp_path / "out", monkeypatch)._labels(None, 3000, generator()), minlength=3)
    assert int(counts.min()) > 850


# What is refused


def test_trajectories_are_refused_in_a_line(tmp_path: Path):
    with pytest.raises(UserError, match="no scheduler for consistency trajectories"):
        export(trained(TOKEN, trajectory()), tmp_path / "out")


def test_a_skip_that_knows_the_covariance_is_refused_before_anything_is_written_and_its_fall_back_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base = TrainConfig(preconditioning=GaussianSkip())
    gaussian = Gaussian.fit(torch.randn(40, *SHAPE, generator=generator()))
    model = replace(trained(TOKEN, base), skip=LinearSkip(gaussian))
    with monkeypatch.context() as patched:
        patched.setattr(FewStepPipeline, "save_pretrained", None)
        with pytest.raises(UserError, match=r"GaussianSkip.*run of preconditioning=Scalar"):
            export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert export(replace(trained(TOKEN, base), skip=ScalarSkip()), tmp_path / "out").difference < 1e-5


def test_the_folder_one_is_in_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for same in (Path(), tmp_path):
        with pytest.raises(UserError, match="the folder that you are in"):
            export(trained(TOKEN), same)


@HAS_FLOW_MAPS
def test_a_unet_told_two_times_and_a_class_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="takes a class or a second time, not both"):
        export(trained(UNET, flow_map(), 3), tmp_path / "out")


def test_without_the_scheduler_of_flow_maps_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(vars(diffusers), "FlowMapEulerDiscreteScheduler", None)
    with pytest.raises(UserError, match=r"has no FlowMapEulerDiscreteScheduler.*install -U"):
        export(trained(TOKEN, flow_map()), tmp_path / "out")


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(UserError, match="not an empty folder"):
        export(trained(TOKEN), tmp_path / "out")
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "mine"]


def test_weights_that_give_other_samples_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fill = stock._fill

    def spoilt(network: nn.Module, weights: dict[str, Tensor]) -> None:
        fill(network, weights)
        next(network.parameters()).data.mul_(1.01)

    monkeypatch.setattr(stock, "_fill", spoilt)
    with pytest.raises(UserError, match=r"differ from the run's by"):
        export(trained(TOKENS), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def tiny_vae() -> AutoencoderKL:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=SHAPE[0])
    return vae.eval().requires_grad_(False)


class Halved(AutoencoderKL):
    """As somebody's own: its latents are twice as large."""

    def decode(self, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().decode(z / 2, *args, **kwargs)


class Scaled:
    """The same around one of diffusers."""

    def __init__(self) -> None:
        self.network = tiny_vae()

    def decode(self, latents: Tensor) -> Any:
        return self.network.decode(latents / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrap", [lambda vae: vae, lambda vae: Drawing(vae, 0)], ids=["mean", "sample"])
def test_an_autoencoder_of_diffusers_goes_with_the_model_and_draws_the_run_s_images(
    wrap: Callable[[Any], Any], dtype: torch.dtype, tmp_path: Path, rng: torch.Generator
):
    model = trained(TOKEN, codec=Foreign("x", wrap(tiny_vae().to(dtype))))
    done, z = export(model, tmp_path / "out"), torch.randn(2, *SHAPE, generator=rng)
    assert done.left_out == ""
    ours = our_images(model, z, (80.0,), generator())
    theirs = done.pipeline(latents=z, output_type="pt").images
    torch.testing.assert_close(
        theirs, (ours / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5 if dtype is torch.float32 else 0.01
    )


@pytest.mark.parametrize("made", [Scaled, lambda: Halved.from_config(tiny_vae().config)], ids=["wrapper", "subclass"])
def test_what_decodes_otherwise_than_the_one_of_diffusers_in_it_stays_outside(made: Callable[[], Any], tmp_path: Path):
    done = export(trained(TOKEN, codec=Foreign("mine:load", made())), tmp_path / "out")
    assert "mine:load is none of diffusers and stays outside" in done.left_out
    assert not (tmp_path / "out" / "vae").exists()


def test_images_that_differ_are_not_written_though_the_latents_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    vae = tiny_vae()
    monkeypatch.setattr(vae, "decode", lambda latents: AutoencoderKL.decode(vae, -latents))
    with pytest.raises(UserError, match=r"images differ from the run's by .* of 255 grey levels: nothing is written"):
        export(trained(TOKEN, codec=Foreign("mine:load", vae)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("found", [[1e-6, float("nan")], [float("nan"), 1e-6], [1e-6, float("inf")]])
def test_a_difference_that_is_no_number_is_no_small_one(
    found: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    measured = iter(found)
    monkeypatch.setattr(folder, "differences", lambda *_: next(measured))
    with pytest.raises(UserError, match=r"differ from the run's by (nan|inf): nothing is written"):
        export(trained(TOKENS), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_autoencoder_of_the_user_s_stays_outside(tmp_path: Path, rng: torch.Generator):
    class Mine:
        def decode(self, latents: Tensor) -> Tensor:
            return latents

    model = trained(TOKEN, codec=Foreign("mine:load", Mine()))
    done = export(model, tmp_path / "out")
    assert "mine:load is none of diffusers and stays outside" in done.left_out
    assert folder.drawn(done) is None
    with pytest.raises(ValueError, match="ask for output_type='latent'"):
        done.pipeline()
