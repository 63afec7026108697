"""Autoencoders of diffusers: loaded whole or not at all, known by their weights, drawn from repeatably."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from reference_trainer.__main__ import main
from reference_trainer.data.codecs import Codec, Foreign
from reference_trainer.data.encode import Encoding, encode_folder
from reference_trainer.data.from_diffusers import DiffusersAutoencoder, looks_like_one
from reference_trainer.data.images import ImageFolder
from reference_trainer.data.store import INDEX, Index
from reference_trainer.data.stored import LatentStore, autoencoder_from_dict, autoencoder_to_dict
from reference_trainer.errors import UserError
from reference_trainer.model import load_model
from reference_trainer.options import autoencoder_option, from_json, override, to_json
from reference_trainer.presets import digits, on_folder
from reference_trainer.run import RunFolder

CPU = torch.device("cpu")
FILE = "diffusion_pytorch_model.safetensors"


def kl() -> Any:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def tiny() -> Any:
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), **blocks)


def dc() -> Any:
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {
            "block_out_channels": (8, 8),
            "layers_per_block": (1, 1),
            "block_types": "ResBlock",
            "qkv_multiscales": ((), ()),
        }.items()
    }
    return AutoencoderDC(latent_channels=4, attention_head_dim=8, downsample_block_type="conv", **sides)


KINDS = {"AutoencoderKL": kl, "AutoencoderTiny": tiny, "AutoencoderDC": dc}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each kind; nobody writes there."""
    root = tmp_path_factory.mktemp("autoencoders")
    for name, make in KINDS.items():
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            make().save_pretrained(root / name)
    return root


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the AutoencoderKL, to be spoilt."""
    return Path(shutil.copytree(saved / "AutoencoderKL", tmp_path / "vae"))


def load(folder: Path, **options: Any) -> Codec:
    return DiffusersAutoencoder(name=str(folder), **options).build(3, {})


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / FILE)
    edit(tensors)
    save_file(tensors, folder / FILE, {"format": "pt"})


@pytest.fixture
def images(rng: torch.Generator) -> Tensor:
    pixels = torch.randint(0, 256, (6, 3, 16, 16), generator=rng)
    return pixels.float() / 127.5 - 1


# Loaded whole


@pytest.mark.parametrize("kind", KINDS)
def test_it_encodes_and_decodes_as_diffusers_does(kind: str, saved: Path, images: Tensor):
    network = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny, "AutoencoderDC": AutoencoderDC}[kind]
    other = network.from_pretrained(saved / kind).eval()
    codec = load(saved / kind)
    with torch.no_grad():
        out = other.encode(images)
        raw = out.latent_dist.mean if kind == "AutoencoderKL" else out.latents if kind == "AutoencoderTiny" else out[0]
        close = {"rtol": 1e-5, "atol": 1e-5}  # the same numbers are not always the same bits: where they lie counts
        torch.testing.assert_close(codec.encode(images), raw, **close)
        torch.testing.assert_close(codec.decode(raw), other.decode(raw).sample, **close)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("decoder.conv_in.weight"), r"1 missing \(decoder.conv_in.weight\)"),
        (lambda t: t.update({"pool.weight": torch.ones(2)}), r"1 unexpected \(pool.weight\)"),
        (lambda t: t.update({"decoder.conv_in.bias": torch.ones(3)}), "decoder.conv_in.bias"),
    ],
)
def test_weights_that_do_not_fit_are_an_error(edit: Callable, message: str, folder: Path):
    change(folder, edit)
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_a_pickle_is_refused(folder: Path):
    (folder / FILE).rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"are a pickle \(diffusion_pytorch_model.bin\).*never loaded: save it as safe"):
        load(folder)


def test_damaged_weights_are_one_line(folder: Path):
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-7])
    with pytest.raises(UserError, match="cannot be loaded as AutoencoderKL") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_of_a_pipeline_the_part_is_named(folder: Path):
    folder.rename(folder.with_name("pipe"))
    pipe = folder.with_name("pipe")
    (pipe / "vae").mkdir()
    for file in (FILE, "config.json"):
        (pipe / file).rename(pipe / "vae" / file)
    with pytest.raises(UserError, match=r"of a pipeline take a part: DiffusersAutoencoder\(name=.*subfolder='vae'\)"):
        load(pipe)
    assert isinstance(load(pipe, subfolder="vae"), Foreign)


def test_a_network_that_is_no_autoencoder_is_refused(tmp_path: Path):
    UNet2DModel(block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
                norm_num_groups=4).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(UserError, match="names the class UNet2DModel, which is no autoencoder"):
        load(tmp_path)


@pytest.mark.parametrize("config", ["{", '{"_class_name": "os.system"}', "{}"])
def test_a_config_of_something_else_is_one_line(config: str, folder: Path):
    (folder / "config.json").write_text(config)
    with pytest.raises(UserError, match=r"config.json") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_without_network_a_hub_name_gets_one_line_that_says_how_to_give_a_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"no folder of this name.*hub it cannot be had.*name='path/to/folder'"
    ) as caught:
        load(Path("nobody/no-such-autoencoder"))
    assert "\n" not in str(caught.value)


def test_what_can_be_no_hub_name_is_not_looked_for_there(tmp_path: Path):
    with pytest.raises(UserError, match="no such folder"):
        load(tmp_path / "nowhere")


def test_it_computes_in_the_dtype_asked_for_and_gives_float32(saved: Path, images: Tensor):
    codec = load(saved / "AutoencoderKL", dtype="bfloat16")
    assert isinstance(codec, Foreign)
    assert {weight.dtype for weight in codec.autoencoder.parameters()} == {torch.bfloat16}
    assert codec.encode(images).dtype == torch.float32


# Drawn


def test_draws_are_a_function_of_seed_and_image_alone(saved: Path, images: Tensor):
    whole = load(saved / "AutoencoderKL", latents="sample").encode(images)
    codec = load(saved / "AutoencoderKL", latents="sample")
    for order in ([5, 2, 0], [1], [0, 0]):
        torch.testing.assert_close(codec.encode(images[order]), whole[order], rtol=1e-5, atol=1e-5)
    other = load(saved / "AutoencoderKL", latents="sample", seed=1).encode(images)
    assert not torch.isclose(other, whole).any(0).all()


def test_draws_are_those_of_the_distribution(saved: Path, rng: torch.Generator):
    images = torch.randint(0, 256, (200, 3, 8, 8), generator=rng).float() / 127.5 - 1
    with torch.no_grad():
        posterior = AutoencoderKL.from_pretrained(saved / "AutoencoderKL").encode(images).latent_dist
    noise = (load(saved / "AutoencoderKL", latents="sample").encode(images) - posterior.mean) / posterior.std
    assert abs(float(noise.mean())) < 0.05
    assert abs(float(noise.std()) - 1) < 0.05
    assert abs(float((noise[:100] * noise[100:]).mean())) < 0.05  # each image has its own


@pytest.mark.parametrize("kind", ["AutoencoderTiny", "AutoencoderDC"])
def test_of_an_encoder_without_a_distribution_no_draws_are_taken(kind: str, saved: Path, images: Tensor):
    with pytest.raises(UserError, match=f"^autoencoder {kind}: its encoder gives latents, .*take latents='mean'$"):
        load(saved / kind, latents="sample").encode(images)


# In stores and runs


def encoding(images: Path, vae: Path, **options: Any) -> Encoding:
    part = DiffusersAutoencoder(name=str(vae), **options)
    return Encoding(source=ImageFolder(path=str(images), resolution=16), autoencoder=part, flips=True, shard=15)


def test_a_resumed_encode_of_draws_ends_with_the_same_bytes(image_folder: Path, saved: Path, tmp_path: Path):
    asked, out = encoding(image_folder, saved / "AutoencoderKL", latents="sample"), tmp_path / "store"
    encode_folder(asked, out, CPU, tmp_path)
    files = [out / INDEX, *sorted(out.glob("*.safetensors"))]
    before = [file.read_bytes() for file in files]
    for file in (files[0], files[2], files[3]):  # as if it had been killed behind the first shard
        file.unlink()
    encode_folder(asked, out, CPU, tmp_path)
    assert [file.read_bytes() for file in files] == before


def test_the_index_knows_its_class_and_its_weights(image_folder: Path, folder: Path, tmp_path: Path):
    encode_folder(encoding(image_folder, folder), tmp_path / "store", CPU, tmp_path)
    known = Index.read(tmp_path / "store").codec
    assert known is not None
    assert (known["class"], known["scaling_factor"]) == ("AutoencoderKL", 0.18215)
    change(folder, lambda tensors: tensors["decoder.conv_in.bias"].add_(1e-6))  # too little for any image to show
    with pytest.raises(UserError, match=f"has other weights .sha256 {known['weights_sha256'][:8]} then"):
        LatentStore(path=str(tmp_path / "store")).load()


def test_training_takes_it_and_sees_that_its_weights_have_changed(
    image_folder: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv("ROBUSTCM_CACHE", str(tmp_path / "cache"))
    words = ["--data", str(image_folder), "--out", str(tmp_path / "run"), "--device=cpu", "--brief", "steps=2"]
    words += ["batch_size=4", "coupling_pool=1", "network=DiT(width=8,layers=1,heads=2,patch=4)", "data.resolution=16"]
    words += [f"autoencoder=DiffusersAutoencoder(name={str(folder)!r})"]
    assert main(words) == 0
    report = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert report["autoencoder"]["class"] == "AutoencoderKL"
    assert load_model(RunFolder(tmp_path / "run"), CPU).shape == (3, 8, 8)
    change(folder, lambda tensors: tensors["decoder.conv_in.bias"].add_(1e-6))
    assert main(words) == 2
    assert "has other weights" in capsys.readouterr().err
    assert main([*words, "--new-data"]) == 0


# How it is named


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("stabilityai/sd-vae-ft-ema", "DiffusersAutoencoder(name='stabilityai/sd-vae-ft-ema'"),
        ("my_vae:load", "PretrainedAutoencoder(load='my_vae:load')"),
        ("DiffusersAutoencoder(name='a:b', subfolder='vae')", "DiffusersAutoencoder(name='a:b', subfolder='vae')"),
        ("KLAutoencoder", "KLAutoencoder"),
    ],
)
def test_a_word_on_the_command_line_says_which_kind_it_is(word: str, part: str):
    assert autoencoder_option(word).startswith(f"autoencoder={part}")


def test_a_field_of_the_autoencoder_that_would_be_fitted_is_changed_alone():
    before = on_folder(digits(), "photos")
    for word, field in (
        ("steps=1100", {"steps": 1100}),
        ("block_out_channels=(16,32)", {"block_out_channels": (16, 32)}),
    ):
        assert override(before, autoencoder_option(word)).autoencoder == replace(before.autoencoder, **field)


def test_a_folder_is_named_in_full(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder.parent)
    config = override(digits(), autoencoder_option("vae"))
    assert config.autoencoder == DiffusersAutoencoder(name=str(folder))
    assert looks_like_one(folder)
    assert not looks_like_one(folder.parent)


def test_it_survives_the_configuration_file_and_the_index():
    part = DiffusersAutoencoder(name="a/b", subfolder="vae", revision="v1", dtype="float16", latents="sample", seed=3)
    config = override(digits(), "autoencoder=DiffusersAutoencoder(name='a/b', subfolder='vae', revision='v1', "
                      "dtype='float16', latents='sample', seed=3)")  # fmt: skip
    assert config.autoencoder == part == from_json(to_json(config)).autoencoder
    assert autoencoder_from_dict(json.loads(json.dumps(autoencoder_to_dict(part)))) == part


@pytest.mark.parametrize("changes", [{"name": " "}, {"dtype": "float64"}, {"latents": "mode"}, {"seed": -1}], ids=str)
def test_what_cannot_be_is_refused_by_name(changes: dict[str, Any]):
    (name,) = changes
    with pytest.raises(ValueError, match=name):
        DiffusersAutoencoder(**{"name": "a/b"} | changes)
