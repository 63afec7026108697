"""An autoencoder of the user's gets what it needs, gives what it may, and fails in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from reference_trainer.data.autoencoders import PretrainedAutoencoder
from reference_trainer.data.codecs import Foreign, Pixels, check_codec
from reference_trainer.data.images import ImageFolder
from reference_trainer.errors import UserError

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def same(values: Tensor) -> Any:
    return values


def made_of(encode: Callable[[Tensor], Any] = same, decode: Callable[[Tensor], Any] = same) -> Foreign:
    return Foreign("mine:vae", SimpleNamespace(encode=encode, decode=decode))


def raising(error: BaseException) -> Callable[[Tensor], Any]:
    def method(values: Tensor) -> Any:
        raise error

    return method


# --- diffusers --------------------------------------------------------------------------------------------------------


def kl(**changes: Any) -> nn.Module:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return diffusers.AutoencoderKL(**blocks | {"block_out_channels": (8, 8), "norm_num_groups": 4} | changes)


def tiny() -> nn.Module:
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    return diffusers.AutoencoderTiny(**widths, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))


def dc() -> nn.Module:
    halves: dict[str, Any] = {}
    for half in ("encoder", "decoder"):
        halves |= {f"{half}_block_types": "ResBlock", f"{half}_block_out_channels": (8, 8)}
        halves |= {f"{half}_layers_per_block": (1, 1), f"{half}_qkv_multiscales": ((), ())}
    return diffusers.AutoencoderDC(**halves, latent_channels=4, attention_head_dim=4)


def vq() -> nn.Module:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.VQModel(**blocks, block_out_channels=(8, 8), norm_num_groups=4, num_vq_embeddings=16)


def asymmetric() -> nn.Module:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    widths = {"down_block_out_channels": (8, 8), "up_block_out_channels": (8, 8)}
    return diffusers.AsymmetricAutoencoderKL(**blocks, **widths, norm_num_groups=4)


def video() -> nn.Module:
    return diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2
    )


@pytest.mark.parametrize("build", [kl, tiny, dc, vq, asymmetric])
def test_diffusers_autoencoders_go_there_and_back(build: Callable[[], nn.Module]):
    codec = Foreign("vae", build())
    check_codec(codec, IMAGES)
    latents = codec.encode(IMAGES)
    assert latents.shape[2:] == (8, 8)
    assert torch.equal(codec.encode(IMAGES), latents)


def test_a_video_decoder_is_refused_in_a_line():
    with pytest.raises(UserError, match=r"decode\(\) failed on values \[n, 4, 8, 8\]: TypeError .*num_frames"):
        check_codec(Foreign("vae", video()), IMAGES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_dtype_see_their_own_and_give_float32(dtype: torch.dtype):
    network = kl()
    codec = Foreign("vae", network)
    expected = codec.decode(codec.encode(IMAGES))
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    out = codec.decode(codec.encode(IMAGES))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5 if dtype == torch.float64 else 0.1)


# --- What it is given ------------------------------------------------------------------------------------------------


class Halves(nn.Module):
    """An encoder and a decoder of different dtypes, none of the first parameter's."""

    def __init__(self, encoder: torch.dtype, decoder: torch.dtype) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 3, 1, dtype=encoder)
        self.decoder = nn.Conv2d(3, 3, 1, dtype=decoder)

    def encode(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)


@pytest.mark.parametrize("wrapped", [False, True], ids=["module", "held by an object"])
def test_each_half_computes_in_its_own_dtype(wrapped: bool):
    network: Any = Halves(torch.bfloat16, torch.float64)
    if wrapped:  # a plain object that holds them is looked into
        network = SimpleNamespace(
            encoder=network.encoder, decoder=network.decoder, encode=network.encode, decode=network.decode
        )
    codec = Foreign("vae", network).to(torch.device("cpu"))
    check_codec(codec, IMAGES)
    assert codec.encode(IMAGES).dtype == codec.decode(IMAGES).dtype == torch.float32
    assert not network.encoder.weight.requires_grad
    assert not network.encoder.training


class EightBit(nn.Module):
    """Stores its weight in 8 bits, another elsewhere, and counts; computes in the dtype of its last buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 1, 1).to(torch.float8_e4m3fn), requires_grad=False)
        self.register_buffer("offloaded", torch.zeros((), device="meta"))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("shift", torch.zeros((), dtype=torch.bfloat16))

    def encode(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.bfloat16
        return images * self.weight.to(images.dtype) + self.shift

    decode = encode


def test_a_dtype_no_one_computes_in_is_passed_over():
    check_codec(Foreign("vae", EightBit()), IMAGES)


def test_a_module_without_weights_sees_float32_and_no_one_sees_gradients():
    seen = []

    class Free(nn.Module):
        def encode(self, images: Tensor) -> Tensor:
            seen.append((images.dtype, torch.is_grad_enabled()))
            with torch.enable_grad():
                return images * nn.Parameter(torch.ones(()))

        decode = encode

    assert not Foreign("vae", Free()).encode(IMAGES).requires_grad
    assert seen == [(torch.float32, False)]


def test_what_moves_in_place_or_not_at_all_stays():
    moved = []
    in_place = SimpleNamespace(to=moved.append, encode=same, decode=same)
    codec = Foreign("mine:vae", in_place).to(torch.device("cpu"))
    assert moved == [torch.device("cpu")]
    assert torch.equal(codec.encode(IMAGES), IMAGES)
    stuck = SimpleNamespace(to=raising(ValueError("`.to` is not supported for 4-bit\nmodels")))
    with pytest.raises(
        UserError, match=r"mine:vae: cannot be moved to cpu: ValueError `.to` is not supported for 4-bit$"
    ):
        Foreign("mine:vae", stuck).to(torch.device("cpu"))


# --- What it gives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (lambda x: None, "must give a tensor .*; got None"),
        (lambda x: {"z": x}, "or hold one as latent_dist, latents, .*; got a dict of z"),
        (lambda x: x.flatten(1), r"must give \[n, ch, h, w\], got \[2, 768\] for \[2, 3, 16, 16\]"),
        (lambda x: x.flatten(2).mT, r"got \[2, 256, 3\] for"),
        (lambda x: x[:1], r"got \[1, 3, 16, 16\] for \[2, 3, 16, 16\]"),
        (lambda x: x[:, :0], r"got \[2, 0, 16, 16\] for"),
        (lambda x: x[:, :, None], r"got \[2, 3, 1, 16, 16\]"),
        (lambda x: (127.5 * (x + 1)).to(torch.uint8), "must give numbers with a fraction, .*; got torch.uint8"),
        (lambda x: x.to(torch.complex64), "got torch.complex64"),
        (lambda x: np.array(["a"]), r"failed on values \[n, 3, 16, 16\]: TypeError"),
    ],
)
def test_what_are_no_latents_is_named(encode: Callable[[Tensor], Any], message: str):
    with pytest.raises(UserError, match=rf"^autoencoder mine:vae: encode\(\) .*{message}") as caught:
        check_codec(made_of(encode), IMAGES)
    assert "\n" not in str(caught.value)


def test_latents_whose_size_changes_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Foreign, "PIXELS", 256)
    sizes = iter((8, 4))
    with pytest.raises(UserError, match=r"gives \[3, 8, 8\] for some and \[3, 4, 4\] for others"):
        made_of(lambda x: F.adaptive_avg_pool2d(x, next(sizes))).encode(IMAGES)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_comes_through_unchanged(bad: float):
    values = IMAGES.clone()
    values[1, 2, 3, 4] = bad
    codec = made_of()
    for out in (codec.encode(values), codec.decode(values)):
        torch.testing.assert_close(out, values, rtol=0, atol=0, equal_nan=True)


@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-1e3, 1e3))
def test_any_scale_and_shift_of_the_latents_is_taken(scale: float, shift: float):
    check_codec(made_of(lambda x: x.double() * scale + shift, lambda z: (z - shift) / scale), IMAGES)


# --- What it raises --------------------------------------------------------------------------------------------------


class Unforeseen(BaseException):
    """Not even an Exception."""


@pytest.mark.parametrize(
    "error",
    [
        KeyError("conv_in"),
        AssertionError("flash attention needs CUDA\nand more"),
        OSError("no space left"),
        SystemExit("license not accepted"),
        Unforeseen("something else"),
        NotImplementedError(),
        RecursionError("maximum depth"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("method", ["encode", "decode"])
def test_whatever_it_raises_is_said_in_a_line(error: BaseException, method: str):
    with pytest.raises(UserError, match=rf"^autoencoder mine:vae: {method}\(\) failed on values") as caught:
        check_codec(made_of(**{method: raising(error)}), IMAGES)
    first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
    assert first_line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ctrl_c_is_the_users_own():
    with pytest.raises(KeyboardInterrupt):
        made_of(raising(KeyboardInterrupt())).encode(IMAGES)


def exits() -> Any:
    raise SystemExit("no licence")


class Odd(nn.Module):
    """Its ``encode`` cannot even be looked up."""

    @property
    def encode(self) -> Any:
        raise KeyError("backend")


@pytest.mark.parametrize(("name", "message"), [("exits", "SystemExit no licence"), ("Odd", "KeyError 'backend'")])
def test_one_that_ends_the_program_or_cannot_be_looked_at_is_refused(name: str, message: str):
    with pytest.raises(UserError, match=message):
        PretrainedAutoencoder(load=f"test_codecs:{name}").build(3, {})


@pytest.mark.parametrize("room", [1, 2, 3, 5, 100])
def test_where_memory_runs_out_fewer_are_tried_and_nothing_changes(room: int):
    seen: list[int] = []

    def crowded(values: Tensor) -> Tensor:
        seen.append(len(values))
        if len(values) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 2 * values

    images = torch.randn(11, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    codec = made_of(crowded, crowded)
    assert torch.equal(codec.encode(images), 2 * images)
    assert torch.equal(codec.decode(images), 2 * images)
    seen.clear()
    codec.encode(images)
    assert max(seen) <= room  # what fits is remembered


# --- Seen before training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decode", "shape"),
    [
        (lambda z: F.interpolate(z, scale_factor=2), "[3, 32, 32]"),
        (lambda z: z[:, :, 1:], "[3, 15, 16]"),
        (lambda z: z.mean(1, keepdim=True), "[1, 16, 16]"),
        (lambda z: torch.cat([z, z[:, :1]], 1), "[4, 16, 16]"),
    ],
)
def test_images_of_another_shape_are_refused_with_both(decode: Callable[[Tensor], Tensor], shape: str):
    with pytest.raises(UserError, match=r"gives images \[\d, \d+, \d+\] for images \[3, 16, 16\]") as caught:
        check_codec(made_of(decode=decode), IMAGES)
    assert shape in str(caught.value)


def test_grey_images_before_a_colour_autoencoder_are_told_what_to_do_and_the_other_way_round():
    with pytest.raises(
        UserError, match=r"the images are grey and it takes 3 channels: let encode\(\) take images.expand"
    ):
        check_codec(Foreign("vae", kl()), IMAGES[:, :1])
    with pytest.raises(UserError, match="the images have 3 channels and it takes 1"):
        check_codec(Foreign("vae", kl(in_channels=1, out_channels=1)), IMAGES)
    with pytest.raises(UserError, match=r"\[3, 16, 16\] for images \[1, 16, 16\] \(the images are grey\)"):
        check_codec(made_of(lambda x: x.expand(-1, 3, -1, -1)), IMAGES[:, :1])
    for broken in (made_of(raising(OSError("disk"))), made_of(decode=raising(OSError("disk")))):
        for images in (IMAGES, IMAGES[:, :1]):
            with pytest.raises(UserError, match=r"disk$"):  # colours have nothing to do with it
                check_codec(broken, images)


def test_a_decoder_that_gives_nan_is_refused_and_latents_that_are_nan_are_left_to_those_who_name_images(capsys):
    with pytest.raises(UserError, match=r"decode\(\) gives NaN or infinite values"):
        check_codec(made_of(decode=lambda z: z / 0), IMAGES)
    check_codec(made_of(lambda x: x * torch.nan), IMAGES)
    told = capsys.readouterr()
    assert "draws" not in told.out + told.err
    assert "each time" not in told.out + told.err


def test_an_encoder_that_draws_is_said_and_repeats(capsys: pytest.CaptureFixture[str]):
    codec = made_of(lambda x: x + torch.randn_like(x))
    torch.manual_seed(0)
    ambient = torch.random.get_rng_state()
    check_codec(codec, IMAGES)
    assert torch.equal(torch.random.get_rng_state(), ambient)
    told = capsys.readouterr()
    assert (told.out + told.err).count("encode() draws random numbers; each image is encoded once") == 1
    assert torch.equal(codec.encode(IMAGES), codec.encode(IMAGES))
    alike = codec.encode(torch.zeros(2, 3, 4, 4))
    assert not torch.equal(alike[0], alike[1])


def test_images_of_different_batches_draw_different_numbers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Foreign, "PIXELS", 16)
    first, second = made_of(lambda x: x + torch.randn_like(x)).encode(torch.zeros(2, 3, 4, 4))
    assert not torch.equal(first, second)


def test_one_that_never_repeats_is_said_and_one_that_does_is_not(capsys: pytest.CaptureFixture[str]):
    generator = np.random.default_rng(0)
    check_codec(made_of(lambda x: x.numpy() + generator.normal(size=x.shape)), IMAGES)
    told = capsys.readouterr()
    assert "other latents each time" in told.out + told.err
    check_codec(made_of(), IMAGES)
    check_codec(Pixels(), IMAGES)
    told = capsys.readouterr()
    assert told.out + told.err == ""


def twice_as_large() -> Any:
    return SimpleNamespace(encode=same, decode=lambda z: F.interpolate(z, scale_factor=2))


def test_it_is_seen_when_the_autoencoder_is_fitted(image_folder: Path, tmp_path: Path):
    images = ImageFolder(path=str(image_folder), resolution=16).load()
    with pytest.raises(UserError, match=r"test_codecs:twice_as_large: decode\(\) gives images \[3, 32, 32\]"):
        PretrainedAutoencoder(load="test_codecs:twice_as_large").fit(images, torch.device("cpu"), tmp_path)
