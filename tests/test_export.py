"""A run as a folder of diffusers: stock classes alone draw the run's images, what has no stock form is refused."""

from __future__ import annotations

import ast
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
import yaml
from diffusers import (
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    DiffusionPipeline,
    FlowMapEulerDiscreteScheduler,
    PixArtTransformer2DModel,
    UNet2DModel,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from reference_trainer.__main__ import main
from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import KLAutoencoder, PixelSpace
from reference_trainer.data.classes import ByClass, Classes
from reference_trainer.data.codecs import Foreign
from reference_trainer.data.from_diffusers import DiffusersAutoencoder
from reference_trainer.data.latents import LatentSpace
from reference_trainer.errors import UserError
from reference_trainer.evaluation.evaluate import Evaluator, choose_features, evaluate, write_evaluation
from reference_trainer.export import few_step_pipeline, folder, stock
from reference_trainer.export.card import _shortened
from reference_trainer.export.folder import export, pipeline_of, without_nan
from reference_trainer.model import TrainedModel, build_network, load_model, number_of
from reference_trainer.networks import DiT, UNet
from reference_trainer.presets import flow_map, trajectory
from reference_trainer.run import RunFolder
from reference_trainer.training.loop import train
from robustcm.consistency import Preconditioning
from robustcm.noise import NoiseRange
from robustcm.schedules import RatioLevels

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SHAPE = (2, 4, 4)

TOKEN, TOKENS = (DiT(width=16, layers=2, heads=2, patch=patch) for patch in (4, 2))
UNET = UNet(block_out_channels=(8, 8), norm_num_groups=4, attention=(False, True))
ADM = replace(UNET, resnet_time_scale_shift="scale_shift", resampling="resnet")
NETWORKS = {"token": TOKEN, "tokens": TOKENS, "unet": UNET, "adm": ADM, "patched unet": replace(UNET, patch=2)}


def python_in(document: Path) -> list[str]:
    """Its blocks of Python."""
    return re.findall(r"^```python\n(.*?)^```$", document.read_text(), re.DOTALL | re.MULTILINE)


def trained(
    network: DiT | UNet, base: TrainConfig | None = None, classes: int = 0, codec: Any = None, **changes: Any
) -> TrainedModel:
    """A model whose weights are all drawn, so that none is 0 by chance of its beginning."""
    by_class = ByClass(guidance=1.5) if classes else None
    config = replace(base or TrainConfig(), network=network, classes=by_class, **changes)
    named = Classes(tuple("abc"[:classes]), (3,) * classes, "") if classes else None
    made, rng = build_network(config, SHAPE, number_of(named)).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    if codec is None:
        codec = KLAutoencoder().build(1, KLAutoencoder()._network(1).state_dict())
    mean, std = torch.randn(SHAPE[0], generator=rng), 0.5 + torch.rand(SHAPE[0], generator=rng)
    return TrainedModel(
        config, made.requires_grad_(False), LatentSpace(codec, mean, std, 0.22), SHAPE, 4000, CPU, classes=named
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


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def opened(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """By diffusers, from the folder alone; the code in it is copied to a place of the test."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(root.parent / "modules"))
    monkeypatch.syspath_prepend(str(root.parent / "modules"))
    for name in [name for name in sys.modules if name.startswith("diffusers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    pipe = DiffusionPipeline.from_pretrained(root, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


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
        assert float((ours - theirs).abs().max()) < 1e-5
        assert done.sigmas[evaluations - 1] == pytest.approx(model.sigmas(evaluations), rel=1e-9)
    assert {file.suffix for file in tmp_path.rglob("*") if file.is_file()} == {".json", ".py", ".safetensors"}


@pytest.mark.parametrize(
    ("network", "base", "classes"),
    [
        (TOKEN, None, 3),
        (TOKENS, None, 3),
        (UNET, None, 3),
        (TOKENS, flow_map(), 0),
        (TOKENS, flow_map(), 3),
        (UNET, flow_map(), 0),
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


# What is refused


def test_trajectories_are_refused_in_a_line(tmp_path: Path):
    with pytest.raises(UserError, match="no scheduler for consistency trajectories"):
        export(trained(TOKEN, trajectory()), tmp_path / "out")


def test_a_unet_told_two_times_and_a_class_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="takes a class or a second time, not both"):
        export(trained(UNET, flow_map(), 3), tmp_path / "out")


def test_without_the_scheduler_of_flow_maps_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(vars(diffusers), "FlowMapEulerDiscreteScheduler", None)
    with pytest.raises(UserError, match=r"has no FlowMapEulerDiscreteScheduler.*install -U"):
        export(trained(TOKEN, flow_map()), tmp_path / "out")
    assert FlowMapEulerDiscreteScheduler is not None


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
    with pytest.raises(UserError, match="differ from the run's by"):
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


# The command


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default run on a few digits, in three steps, with an export of it beside it."""
    root = tmp_path_factory.mktemp("exported")
    config = replace(
        TrainConfig(), network=DiT(width=16, layers=1), autoencoder=KLAutoencoder(steps=2), steps=3, batch_size=32,
        clip=None, second_sigma=0.5,
    )  # fmt: skip
    run, digits = RunFolder(root / "run"), config.data.load()
    pick = torch.randperm(len(digits.pixels), generator=generator())[:100]
    few = replace(digits, pixels=digits.pixels[pick], labels=digits.labels[pick], is_held_out=digits.is_held_out[pick])
    with run.locked():
        run.claim(config)
        train(config, run, few, root / "cache", CPU, Evaluator(run, few))
    model = load_model(run, CPU)
    write_evaluation(run, evaluate(model, few, choose_features(None, model), bounds=False))
    assert main(["export", str(run.root), "--out", str(root / "digits-export"), "--device=cpu"]) == 0
    return root


def test_the_card_says_what_it_is_and_how_it_was_measured(exported: Path):
    text = (exported / "digits-export" / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["library_name"] == "diffusers"
    assert "consistency-model" in header["tags"]
    measured = json.loads((exported / "run" / "evaluation.json").read_text())
    assert json.dumps(measured["manifest"], indent=1) in text
    assert f"{measured['rows']['1 evaluation']['frechet']:.2f}" in text
    assert "steps=3" in text
    assert f"{measured['manifest']['reference']['n']} training images (" in text
    assert (exported / "digits-export" / "samples.png").stat().st_size > 100
    recipe = json.loads((exported / "digits-export" / "recipe.json").read_text())
    assert recipe == json.loads((exported / "run" / "config.json").read_text())


def test_a_card_of_other_weights_has_no_figures(exported: Path, tmp_path: Path):
    words = ["export", str(exported / "run"), "--out", str(tmp_path / "out"), "--average", "Exponential(decay=0)"]
    assert main([*words, "--device=cpu"]) == 0
    assert "not evaluated before the export" in (tmp_path / "out" / "README.md").read_text()


def test_no_path_of_the_machine_stands_in_the_folder(exported: Path, tmp_path: Path):
    vae = AutoencoderKL(latent_channels=SHAPE[0], norm_num_groups=4, block_out_channels=(8,))
    vae.save_pretrained(tmp_path / "vae")
    codec = DiffusersAutoencoder(name=str(tmp_path / "vae")).build(3, {})
    export(trained(TOKEN, codec=codec), tmp_path / "out")
    folders = exported / "digits-export", tmp_path / "out"
    files = [file for root in folders for file in root.rglob("*") if file.suffix in (".json", ".md", ".py")]
    assert len(files) > 8
    found = [file.name for file in files if re.search(f"{exported}|{tmp_path}|_name_or_path", file.read_text())]
    assert found == []


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("data=ImageFolder(path='/home/me/photos', resolution=64)", "data=ImageFolder(path='photos', resolution=64)"),
        ("autoencoder=DiffusersAutoencoder(name='stabilityai/sd-vae')", None),
        ('"path": "/home/me/my photos"', '"path": "my photos"'),
    ],
)
def test_paths_are_shortened_and_names_on_the_hub_are_not(text: str, short: str | None):
    assert _shortened(text) == (short or text)


def test_the_document_s_snippets_run_and_draw_the_run_s_images(exported: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(exported)
    opened(exported / "digits-export", monkeypatch)  # for the place of its code
    names: dict[str, Any] = {}
    for snippet in python_in(ROOT / "docs" / "export.md"):
        exec(snippet, names)
    pipe = opened(exported / "digits-export", monkeypatch)
    z, rng = names["z"], torch.Generator().manual_seed(0)
    torch.randn(16, 2, 4, 4, generator=rng)
    images = pipe(latents=z, num_inference_steps=2, generator=rng, output_type="pt").images
    torch.testing.assert_close(images, (names["images"] / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


def test_the_card_s_snippet_runs(exported: Path, monkeypatch: pytest.MonkeyPatch):
    (snippet,) = re.findall(
        r"^```python\n(.*?)^```$", (exported / "digits-export" / "README.md").read_text(), re.S | re.M
    )
    opened(exported / "digits-export", monkeypatch)
    monkeypatch.chdir(exported / "digits-export")
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert [image.size for image in names["images"]] == [(32, 32)] * 4


def test_the_shipped_class_is_what_the_index_names(exported: Path):
    index = json.loads((exported / "digits-export" / "model_index.json").read_text())
    module, name = index["_class_name"]
    assert getattr(few_step_pipeline, name).__module__.endswith(module)
