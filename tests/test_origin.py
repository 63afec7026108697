"""A run is tied to what it was made from: it keeps its own space, and a change behind the same names is refused."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from reference_trainer.__main__ import main
from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import KLAutoencoder, PretrainedAutoencoder
from reference_trainer.data.codecs import Foreign
from reference_trainer.data.images import ImageFolder, ImageSet
from reference_trainer.data.latents import encode_once, require_finite, spread
from reference_trainer.data.origin import LATENTS_MAY_DIFFER, Probe, differs_by
from reference_trainer.errors import UserError
from reference_trainer.files import load_tensors, save_tensors
from reference_trainer.model import load_model
from reference_trainer.networks import DiT
from reference_trainer.presets import ilct
from reference_trainer.run import RunFolder
from reference_trainer.training.loop import train

CPU = torch.device("cpu")


class Half:
    """Images at half their size, as ``change`` alters what it gives."""

    encoding = staticmethod(lambda latents: latents)
    decoding = staticmethod(lambda images: images)

    def encode(self, images: Tensor) -> Tensor:
        return self.encoding(nn.functional.avg_pool2d(images, 2))

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoding(nn.functional.interpolate(latents, scale_factor=2))


def load() -> Half:
    return Half()


def half(encoding=lambda latents: latents, decoding=lambda images: images) -> Foreign:
    made = Half()
    made.encoding, made.decoding = encoding, decoding
    return Foreign("half", made)


@pytest.fixture
def config(image_folder: Path) -> TrainConfig:
    """3 steps of a tiny network in the space of ``Half``."""
    return replace(
        ilct(),
        data=ImageFolder(path=str(image_folder), resolution=16),
        autoencoder=PretrainedAutoencoder(load="test_origin:load"),
        network=DiT(width=8, layers=1, heads=2, patch=4),
        batch_size=8,
        steps=3,
    )


@pytest.fixture
def fitted(config: TrainConfig) -> TrainConfig:
    """The same in the space of a fit of two steps."""
    part = KLAutoencoder(latent_channels=2, block_out_channels=(8, 8), norm_num_groups=4, steps=2, batch_size=4)
    return replace(config, autoencoder=part)


def run(config: TrainConfig, root: Path, new_data: bool = False, cache: str = "cache") -> RunFolder:
    folder = RunFolder(root)
    with folder.locked():
        folder.claim(config)
        train(config, folder, config.data.load(), root.parent / cache, CPU, new_data=new_data)
    return folder


def weights(folder: RunFolder) -> dict[str, Tensor]:
    return folder.latest_checkpoint()[1]


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def add_a_file(folder: Path) -> None:
    shutil.copy(folder / "03.png", folder / "zebra.png")


def turn_a_file(folder: Path) -> None:
    image = Image.open(folder / "03.png").rotate(90, expand=True)
    image.save(folder / "03.png")


def rename_two_files(folder: Path) -> None:
    (folder / "03.png").rename(folder / "x.png")
    (folder / "04.png").rename(folder / "03.png")
    (folder / "x.png").rename(folder / "04.png")


CHANGES = [
    (add_a_file, "36 training and 4 held-out images of 3 x 16 x 16 then, 37 training and 4 held-out"),
    (turn_a_file, "its 36 [+] 4 images are as many as they were, but other pixels"),
    (rename_two_files, "its 36 [+] 4 images are as many as they were, but other pixels"),
]


@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_images_that_changed_are_refused_in_a_line_and_nothing_is_touched(
    change, said: str, fitted: TrainConfig, image_folder: Path, tmp_path: Path
):
    folder = run(fitted, tmp_path / "run")
    before = {file: file.read_bytes() for file in folder.root.rglob("*") if file.is_file()}
    change(image_folder)
    for again in (lambda: run(fitted, folder.root), lambda: load_model(folder, CPU, fitted.data.load())):
        with pytest.raises(UserError, match=f"made from something else.*{said}.*--out.*--new-data") as caught:
            again()
        assert "\n" not in str(caught.value)
        assert before == {file: file.read_bytes() for file in folder.root.rglob("*") if file.is_file()}


def test_a_lost_cache_changes_nothing(fitted: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not even if a fit on the other machine would come out differently."""
    short = replace(fitted, steps=6, save_every=3)
    whole, begun = run(short, tmp_path / "whole"), run(short, tmp_path / "begun")
    begun.checkpoints()[0].unlink()  # as if it had stopped at step 3
    space = begun.space_file.read_bytes()
    monkeypatch.setattr(KLAutoencoder, "_fit", lambda *_: pytest.fail("the autoencoder is fitted again"))
    run(short, begun.root, cache="another machine")
    assert same(weights(whole), weights(begun))
    assert begun.space_file.read_bytes() == space


@pytest.mark.parametrize("autoencoder", ["fitted", "pretrained"])
def test_new_data_go_on_in_the_space_of_the_run(
    autoencoder: str, config: TrainConfig, fitted: TrainConfig, image_folder: Path, tmp_path: Path
):
    config = fitted if autoencoder == "fitted" else config
    folder = run(config, tmp_path / "run")
    before, about = load_tensors(folder.space_file)
    add_a_file(image_folder)
    run(config, folder.root, new_data=True)
    after, now = load_tensors(folder.space_file)
    kept = [name for name in before if not name.startswith("probe/")]
    assert same({n: before[n] for n in kept}, {n: after[n] for n in kept})
    assert about["recognised_at"] == now["recognised_at"]
    assert (about["origin"]["train"], now["origin"]["train"]) == (36, 37)
    run(config, folder.root)  # they are its images now


def test_an_evaluation_of_new_data_leaves_the_run_as_it_is(fitted: TrainConfig, image_folder: Path, tmp_path: Path):
    folder = run(fitted, tmp_path / "run")
    before = folder.space_file.read_bytes()
    add_a_file(image_folder)
    model = load_model(folder, CPU, fitted.data.load(), new_data=True)
    assert len(model.changes) == 1
    assert folder.space_file.read_bytes() == before


@pytest.mark.parametrize(
    ("method", "change", "said"),
    [
        ("encoding", lambda z: z * 1.2, r"encodes differently \(by"),
        ("encoding", lambda z: z + 0.1, r"encodes differently \(by"),
        ("encoding", lambda z: torch.full_like(z, torch.nan), r"encodes differently \(NaN or infinite"),
        ("encoding", lambda z: z[:, :2], r"gave latents \[3, 8, 8\], now \[2, 8, 8\]"),
        ("decoding", lambda x: -x, r"decodes differently \(by"),
        ("decoding", lambda x: x / 0, r"decodes differently|NaN"),
        ("decoding", lambda x: x[..., :8], r"decoded to \[3, 16, 16\], now \[3, 16, 8\]"),
    ],
)
def test_an_autoencoder_replaced_under_its_name_is_refused(
    method: str, change, said: str, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = run(config, tmp_path / "run")
    monkeypatch.setattr(Half, method, staticmethod(change))
    for again in (lambda: run(config, folder.root), lambda: load_model(folder, CPU)):
        with pytest.raises(UserError, match=f"autoencoder test_origin:load {said}") as caught:
            again()
        assert "\n" not in str(caught.value)


def test_one_that_differs_on_a_few_images_alone_is_seen(config: TrainConfig, tmp_path: Path):
    images = config.data.load()
    probe = Probe.of(half(), images.train, CPU)
    last = spread(images.train)[-1].float().mean() / 127.5 - 1

    def mended(latents: Tensor) -> Tensor:
        return torch.where((latents.mean((1, 2, 3)) - last).abs()[:, None, None, None] < 1e-3, -latents, latents)

    assert probe.changes(half(), CPU) == []
    assert "encodes differently" in probe.changes(half(mended), CPU)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_change(dtype: torch.dtype, config: TrainConfig):
    pixels = config.data.load().train
    probe = Probe.of(half(), pixels, CPU)
    rounded = half(lambda z: z.to(dtype).float(), lambda x: x.to(dtype).float())
    assert probe.changes(rounded, CPU) == []


@given(st.floats(1e-3, 1e3), st.floats(-100, 100), st.floats(0, 1))
def test_whether_a_codec_has_changed_does_not_depend_on_the_units_of_its_latents(unit: float, shift: float, far: float):
    assume(abs(far - LATENTS_MAY_DIFFER) > 1e-9)  # at the bound itself rounding decides
    then = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    now = then.clone()
    now[1] += far
    apart = differs_by(unit * now + shift, unit * then + shift, LATENTS_MAY_DIFFER * unit)
    assert apart == pytest.approx(unit * far if far > LATENTS_MAY_DIFFER else 0, rel=1e-6, abs=1e-9 * unit)


def test_an_autoencoder_that_draws_its_latents_differs_by_more_than_it_draws(config: TrainConfig):
    pixels = config.data.load().train

    def noisy(latents: Tensor) -> Tensor:
        return latents + 0.1 * torch.randn_like(latents)

    probe = Probe.of(half(noisy), pixels, CPU)
    assert probe.changes(half(noisy), CPU) == []
    assert "encodes differently" in probe.changes(half(lambda z: noisy(z) + 1), CPU)[0]


@pytest.mark.parametrize(
    ("decoding", "said"),
    [
        (lambda x: x[:, :1], r"decode.*\[1, 16, 16\].*\[3, 16, 16\]"),
        (lambda x: nn.functional.interpolate(x, scale_factor=2), r"decode.*\[3, 32, 32\]"),
        (lambda x: x.clone().index_fill_(0, torch.tensor([0]), torch.inf), "decode.*NaN"),
    ],
)
def test_a_decoder_that_cannot_serve_is_refused_before_the_images_are_encoded(
    decoding, said: str, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    encoded = []
    monkeypatch.setattr(Half, "decoding", staticmethod(decoding))
    monkeypatch.setattr(Half, "encoding", staticmethod(lambda z: encoded.append(len(z)) or z))
    with pytest.raises(UserError, match=said):
        run(config, tmp_path / "run")
    assert max(encoded) <= 16 < len(config.data.load().train)
    assert not (tmp_path / "run" / "autoencoder.safetensors").exists()


def test_a_decoder_that_fails_on_one_image_of_many_is_seen(config: TrainConfig):
    pixels = config.data.load().train
    with pytest.raises(UserError, match="decodes 1 of 16 images to NaN"):
        Probe.of(half(decoding=lambda x: x.clone().index_fill_(0, torch.tensor([15]), torch.nan)), pixels, CPU)


def as_of_an_earlier_version(folder: RunFolder, *missing: str) -> None:
    tensors, about = load_tensors(folder.space_file)
    for name in missing:
        del about[name]
    save_tensors(folder.space_file, {n: t for n, t in tensors.items() if not n.startswith("probe/")}, about)


def test_a_run_that_does_not_say_what_it_was_made_from_is_taken_once(
    config: TrainConfig, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = run(config, tmp_path / "run")
    tensors, about = load_tensors(folder.space_file)
    for take in (lambda: run(config, folder.root), lambda: load_model(folder, CPU, config.data.load())):
        as_of_an_earlier_version(folder, "origin")
        take()
        assert "does not say what it was made from" in capsys.readouterr().out
        assert same(load_tensors(folder.space_file)[0], tensors)
        assert load_tensors(folder.space_file)[1] == about
        take()
        assert "does not say" not in capsys.readouterr().out
    add_a_file(image_folder)
    with pytest.raises(UserError, match="made from something else"):
        run(config, folder.root)


def test_what_an_earlier_version_did_not_measure_is_measured_in_the_space_of_the_run(
    fitted: TrainConfig, tmp_path: Path
):
    folder = run(fitted, tmp_path / "run")
    tensors, about = load_tensors(folder.space_file)
    as_of_an_earlier_version(folder, "origin", "recognised_at")
    run(fitted, folder.root)
    after, now = load_tensors(folder.space_file)
    assert now["recognised_at"] == pytest.approx(about["recognised_at"], rel=1e-4)
    assert same(tensors, after)


def test_a_run_without_its_space_is_not_given_another(fitted: TrainConfig, tmp_path: Path):
    folder = run(fitted, tmp_path / "run")
    folder.space_file.unlink()
    with pytest.raises(UserError, match="has checkpoints, but no autoencoder"):
        run(fitted, folder.root)
    folder.space_file.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"cannot read .*put a copy back"):
        run(fitted, folder.root)
    assert folder.space_file.read_bytes() == b"damaged"


def test_the_command_line_goes_on_with_new_data_if_asked(
    fitted: TrainConfig, image_folder: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("ROBUSTCM_CACHE", str(tmp_path / "cache"))
    folder = run(fitted, tmp_path / "run")
    turn_a_file(image_folder)
    assert main(["evaluate", str(folder.root), "--device=cpu"]) == 2
    assert main(["train", f"--run={folder.root}", "--brief", "--device=cpu"]) == 2
    capsys.readouterr()
    assert main(["evaluate", str(folder.root), "--device=cpu", "--new-data"]) == 0
    assert "which are not those the run was made from" in capsys.readouterr().out
    assert main(["train", f"--run={folder.root}", "--brief", "--device=cpu", "--new-data"]) == 0
    assert main(["evaluate", str(folder.root), "--device=cpu"]) == 0
    assert "which are not those" not in capsys.readouterr().out


def nan_for_dark(latents: Tensor) -> Tensor:
    dark = latents.mean((1, 2, 3)) < -0.6
    return torch.where(dark[:, None, None, None], torch.nan, latents)


def test_latents_that_are_not_finite_are_not_cached_and_their_files_are_named(config: TrainConfig, tmp_path: Path):
    images = config.data.load()
    images = replace(images, names=tuple(f"{i}.jpg" for i in range(len(images.pixels))))
    raw = encode_once(half(nan_for_dark), images, CPU, tmp_path / "cache")
    bad = [i for i, latents in enumerate(raw) if not latents.isfinite().all()]
    assert 3 < len(bad) < len(raw)
    assert not (tmp_path / "cache").exists()
    train_files = [name for name, held_out in zip(images.names, images.is_held_out, strict=True) if not held_out]
    with pytest.raises(UserError, match=f"^{len(bad)} of {len(raw)} images") as caught:
        require_finite(raw, images)
    named = ", ".join(train_files[i] for i in bad[:3])
    assert f"({named} and {len(bad) - 3} more)" in str(caught.value)


def test_a_cache_that_is_not_finite_is_ignored(config: TrainConfig, tmp_path: Path, capsys):
    images = config.data.load()
    raw = encode_once(half(), images, CPU, tmp_path)
    (file,) = tmp_path.glob("latents-*.safetensors")
    bad = raw.clone()
    bad[7, 0, 0, 0] = -math.inf
    save_tensors(file, {"raw": bad}, {})
    assert torch.equal(encode_once(half(), images, CPU, tmp_path), raw)
    assert "encoding again" in capsys.readouterr().out
    assert torch.equal(load_tensors(file)[0]["raw"], raw)


def test_after_an_autoencoder_was_mended_the_same_command_trains(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr(Half, "encoding", staticmethod(nan_for_dark))
        with pytest.raises(UserError, match=r"latents that are NaN or infinite \(00\.png"):
            run(config, tmp_path / "run")
    assert run(config, tmp_path / "run").latest_checkpoint()[0] == 3


@given(st.integers(1, 200), st.integers(1, 40))
def test_a_spread_reaches_from_the_first_to_the_last_in_even_steps(n: int, most: int):
    chosen = spread(torch.arange(n), most).tolist()
    assert len(set(chosen)) == len(chosen) == min(n, most)
    assert chosen[0] == 0
    assert chosen[-1] == (n - 1 if most > 1 else 0)
    steps = {b - a for a, b in pairwise(chosen)}
    assert max(steps, default=1) - min(steps, default=1) <= 1


def test_names_are_no_part_of_the_fingerprint():
    images = ImageSet("x", torch.zeros(2, 3, 8, 8, dtype=torch.uint8), None, torch.tensor([False, True]))
    assert replace(images, names=("a", "b")).fingerprint() == images.fingerprint()
    assert (images.train_name(0), replace(images, names=("a", "b")).train_name(0)) == ("image 0", "a")
