"""An autoencoder of the user's: trained on, sampled from, encoded once, and named when it fails."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from reference_trainer.__main__ import main
from reference_trainer.data.autoencoders import KLAutoencoder, PretrainedAutoencoder
from reference_trainer.data.codecs import Foreign
from reference_trainer.data.images import ImageFolder, ImageSet, to_unit
from reference_trainer.data.latents import encode_once
from reference_trainer.errors import UserError
from reference_trainer.files import save_tensors
from reference_trainer.model import load_model
from reference_trainer.options import from_json, override, to_json
from reference_trainer.presets import digits
from reference_trainer.run import RunFolder

CPU = torch.device("cpu")


class Half:
    """Images at half their size; counts what it encodes."""

    def __init__(self, factor: float = 1.0) -> None:
        self.encoded, self.factor = 0, factor

    def encode(self, images: Tensor) -> Tensor:
        self.encoded += len(images)
        return self.factor * nn.functional.avg_pool2d(images, 2)

    def decode(self, latents: Tensor) -> Tensor:
        return nn.functional.interpolate(latents / self.factor, scale_factor=2)


class LikeDiffusers(nn.Module):
    """Returns what diffusers' autoencoders do, and has a weight that could be trained."""

    def __init__(self, wrap: Callable[[Tensor], SimpleNamespace]) -> None:
        super().__init__()
        self.wrap, self.gain = wrap, nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.9)

    def encode(self, images: Tensor) -> SimpleNamespace:
        return self.wrap(self.dropout(self.gain * images))

    def decode(self, latents: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.gain * latents)


def without_methods() -> object:
    return object()


def failing() -> Half:
    raise OSError("weights.safetensors is missing\nand so on")


def failing_without_a_word() -> Half:
    raise KeyError


def test_a_run_trains_on_it_and_samples_through_it(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("ROBUSTCM_CACHE", str(tmp_path / "cache"))
    options = ["autoencoder=PretrainedAutoencoder(load='test_autoencoders:Half')", "steps=2", "batch_size=4"]
    options += ["network=DiT(width=8,layers=1,heads=2,patch=4)", "coupling_pool=1", "data.resolution=16"]
    folder = tmp_path / "run"
    assert main(["--device=cpu", "--data", str(image_folder), "--run", str(folder), *options]) == 0
    model = load_model(RunFolder(folder), CPU)
    assert (model.shape, model.images(3, (80.0,), seed=0).shape) == ((3, 8, 8), (3, 3, 16, 16))
    assert "reconstructions" in capsys.readouterr().out


def test_training_images_are_encoded_once(image_folder: Path, tmp_path: Path):
    images = ImageFolder(path=str(image_folder), resolution=16).load()
    first = Half()
    raw = encode_once(Foreign("half", first), images, CPU, tmp_path)
    assert torch.equal(raw, nn.functional.avg_pool2d(images.train.float() / 127.5 - 1, 2))
    again = Half()
    assert torch.equal(encode_once(Foreign("half", again), images, CPU, tmp_path), raw)
    assert again.encoded == 16 < first.encoded
    other = Half(factor=2.0)  # the same name, other weights: not what is in the cache
    assert torch.equal(encode_once(Foreign("half", other), images, CPU, tmp_path), 2 * raw)


def test_a_damaged_cache_is_replaced(image_folder: Path, tmp_path: Path):
    images = ImageFolder(path=str(image_folder), resolution=16).load()
    raw = encode_once(Foreign("half", Half()), images, CPU, tmp_path)
    (file,) = tmp_path.glob("latents-*.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    assert torch.equal(encode_once(Foreign("half", Half()), images, CPU, tmp_path), raw)
    again = Half()
    encode_once(Foreign("half", again), images, CPU, tmp_path)
    assert again.encoded == 16


@pytest.mark.parametrize(
    "wrap",
    [
        lambda values: SimpleNamespace(latents=values),
        lambda values: SimpleNamespace(latent_dist=SimpleNamespace(mean=values)),
        lambda values: values.bfloat16(),
    ],
)
def test_what_diffusers_returns_is_understood(wrap: Callable[[Tensor], SimpleNamespace]):
    module = LikeDiffusers(wrap)
    codec, images = Foreign("vae", module).to(CPU), torch.ones(5, 3, 4, 4)
    assert torch.equal(codec.encode(images), images)  # in eval mode: no dropout
    assert codec.encode(images).dtype == torch.float32
    assert torch.equal(codec.decode(images), images)
    assert not any(weight.requires_grad for weight in module.parameters())


def test_large_images_go_through_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch):
    seen = []

    class Watched(Half):
        def encode(self, images: Tensor) -> Tensor:
            seen.append(len(images))
            return super().encode(images)

    monkeypatch.setattr(Foreign, "PIXELS", 40)
    codec, images = Foreign("watched", Watched()), torch.randn(5, 3, 4, 4)
    assert torch.equal(codec.encode(images), nn.functional.avg_pool2d(images, 2))
    assert seen == [2, 2, 1]


def test_what_it_is_called_survives_the_configuration_file():
    config = override(digits(), "autoencoder=PretrainedAutoencoder(load='my_vae:load')")
    assert from_json(to_json(config)).autoencoder == PretrainedAutoencoder(load="my_vae:load")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere_at_all:load", "expected module:function"),
        ("test_autoencoders:nothing", "expected module:function"),
        ("test_autoencoders:without_methods", "has no encode and decode"),
        ("test_autoencoders:failing", "OSError weights.safetensors is missing"),
        ("test_autoencoders:failing_without_a_word", "KeyError"),
    ],
)
def test_one_that_cannot_be_had_is_named(name: str, message: str):
    with pytest.raises(UserError, match=message) as caught:
        PretrainedAutoencoder(load=name).build(3, {})
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_values_it_fails_on_are_named():
    with pytest.raises(UserError, match=r"mine:vae: encode\(\) failed on values \[n, 3, 1, 1\]"):
        Foreign("mine:vae", Half()).encode(torch.zeros(2, 3, 1, 1))
    flat = SimpleNamespace(encode=lambda images: images.flatten(1), decode=None)
    with pytest.raises(UserError, match=r"must give \[n, ch, h, w\], got \[2, 48\]"):
        Foreign("mine:vae", flat).encode(torch.zeros(2, 3, 4, 4))


# --- The one that is fitted -------------------------------------------------------------------------------------------

SMALL = KLAutoencoder(block_out_channels=(8,), norm_num_groups=4, steps=2, likelihood="gaussian")


def brightness(n: int = 6, size: int = 8) -> ImageSet:
    pixels = torch.randint(0, 256, (n, 1, size, size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return ImageSet("noise", pixels, None, torch.arange(n) == n - 1)


@pytest.mark.parametrize("steps", [1, 2, 19, 20, 21])
def test_it_is_fitted_in_any_number_of_steps(steps: int, tmp_path: Path):
    images = brightness()
    codec = replace(SMALL, steps=steps).fit(images, CPU, tmp_path)
    assert codec.encode(to_unit(images.pixels)).isfinite().all()


def test_a_fit_that_diverges_is_refused_and_not_kept(tmp_path: Path):
    with pytest.raises(UserError, match=r"became NaN or infinite in its fit: lower autoencoder.lr=1e\+30"):
        replace(SMALL, lr=1e30).fit(brightness(), CPU, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_stored_fit_that_is_not_finite_is_made_again(tmp_path: Path):
    good = SMALL.fit(brightness(), CPU, tmp_path).tensors()
    (file,) = tmp_path.iterdir()
    save_tensors(file, {name: tensor * torch.nan for name, tensor in good.items()}, {})
    again = SMALL.fit(brightness(), CPU, tmp_path).tensors()
    assert all(torch.equal(again[name], good[name]) for name in good)
    with pytest.raises(UserError, match="not all finite"):
        SMALL.build(1, {name: tensor * torch.nan for name, tensor in good.items()})


@pytest.mark.parametrize("changes", [{"patch": 3}, {"patch": 16}, {"block_out_channels": (8, 8, 8, 8)}], ids=str)
def test_images_it_cannot_halve_are_named_before_it_is_fitted(changes: dict[str, Any], tmp_path: Path):
    with pytest.raises(UserError, match="images of 8x8 cannot be patched by"):
        replace(SMALL, **changes).fit(brightness(), CPU, tmp_path)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_it_hides_no_nan(likelihood: Literal["bernoulli", "gaussian"], tmp_path: Path):
    codec = replace(SMALL, likelihood=likelihood).fit(brightness(), CPU, tmp_path)
    images = to_unit(brightness(2).pixels)
    images[1] = torch.nan
    latents = codec.encode(images)
    assert latents.isnan().flatten(1).all(1).tolist() == [False, True]
    assert codec.decode(latents).isnan().flatten(1).all(1).tolist() == [False, True]


@pytest.mark.parametrize(
    "changes",
    [
        {"block_out_channels": ()},
        {"block_out_channels": (0,)},
        {"norm_num_groups": 0},
        {"norm_num_groups": 3},
        {"latent_channels": 0},
        {"layers_per_block": 0},
        {"patch": 0},
        {"steps": 0},
        {"most_steps": 0},
        {"latents": "mode"},
        {"batch_size": 0},
        {"kl_weight": -0.1},
        {"kl_weight": math.nan},
        {"lr": 0.0},
        {"lr": math.inf},
        {"seed": -1},
        {"seed": 2**64},
        {"likelihood": "laplace"},
    ],
    ids=str,
)
def test_what_no_autoencoder_can_be_made_of_is_refused_by_name(changes: dict[str, Any]):
    (name,) = changes
    with pytest.raises(ValueError, match=name):
        KLAutoencoder(**changes)
