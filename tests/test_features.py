"""Whatever a feature network of the user's returns or raises: float32 vectors, or one line before the first step."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reference_trainer.data.autoencoders import PixelSpace
from reference_trainer.data.codecs import Foreign
from reference_trainer.errors import UserError
from reference_trainer.evaluation.digit_classifier import load_digit_classifier
from reference_trainer.evaluation.features import Imported, PooledLatents, tried, vectors_of
from reference_trainer.evaluation.reference import at_once
from reference_trainer.evaluation.rows import Missing

PIXELS = torch.arange(4 * 12, dtype=torch.uint8).reshape(4, 3, 2, 2)


class Output(NamedTuple):
    pooled: Tensor
    logits: Tensor


def plain(pixels: Tensor) -> Tensor:
    return pixels.float().flatten(1)


WRAPPED: list[Callable[[Tensor], object]] = [
    lambda v: v.reshape(*v.shape, 1, 1),
    lambda v: v.numpy(),
    lambda v: v.numpy().astype(np.float64),
    lambda v: v.reshape(*v.shape, 1, 1).numpy(),
    lambda v: (v, None),
    lambda v: [v.numpy(), "more"],
    lambda v: Output(v, torch.zeros(1)),
    lambda v: v.half(),
    lambda v: v.bfloat16(),
    lambda v: v.double(),
    lambda v: v.long(),
    lambda v: v.clone().requires_grad_(),
]


@pytest.mark.parametrize("wrap", WRAPPED)
def test_what_a_network_returns_becomes_float32_vectors(wrap: Callable[[Tensor], object]):
    vectors = vectors_of(PIXELS, Imported("f", lambda pixels: wrap(plain(pixels))))
    assert torch.equal(vectors, plain(PIXELS))
    assert (vectors.dtype, vectors.device.type, vectors.requires_grad) == (torch.float32, "cpu", False)


def test_images_go_through_a_few_at_a_time_and_stay_in_order():
    seen = []
    pixels = torch.randint(0, 255, (600, 1, 1, 2), dtype=torch.uint8)
    vectors = Imported("f", lambda part: seen.append(len(part)) or plain(part))(pixels)
    assert torch.equal(vectors, plain(pixels))
    assert seen == [250, 250, 100]


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda v: {"features": v}, "gives a dict"),
        (lambda v: None, "gives a NoneType"),
        (lambda v: (), "gives a tuple"),
        (lambda v: v[0], r"gives \[12\], expected"),
        (lambda v: v[1:], r"gives \[1, 12\], expected"),
        (lambda v: v[:, :0], r"gives \[2, 0\], expected"),
        (lambda v: v.reshape(2, 3, 2, 2), r"gives \[2, 3, 2, 2\], expected \[n, k\] or"),
        (lambda v: torch.tensor(1.0), r"gives \[\], expected"),
        (lambda v: v.to(torch.complex64), "real numbers"),
        (lambda v: np.array(["a", "b"]), "failed: TypeError"),
        (lambda v: v / 0, "2 of 2 images have NaN or infinite features"),
        (lambda v: v.sum("nonsense"), "failed: TypeError"),
        (lambda v: sys.exit(3), "failed: SystemExit 3"),
        (lambda v: (_ for _ in ()).throw(KeyError("no weights\nat all")), "failed: KeyError"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_line(returned: Callable[[Tensor], object], said: str):
    with pytest.raises(UserError, match=f"mine:f.*{said}|{said}.*mine:f") as caught:
        tried(Imported("mine:f", lambda pixels: returned(plain(pixels))), PIXELS)
    assert "\n" not in str(caught.value)


@given(
    shape=st.lists(st.integers(0, 4), max_size=5),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.int8, torch.bool, torch.complex64]),
    wrap=st.sampled_from([lambda x: x, lambda x: x.numpy(), lambda x: [x], lambda x: (x, x), lambda x: {0: x}]),
)
def test_any_output_is_two_vectors_or_a_line(shape: list[int], dtype: torch.dtype, wrap: Callable[[Tensor], object]):
    said = ""
    try:
        vectors = vectors_of(PIXELS[:2], Imported("f", lambda pixels: wrap(torch.ones(shape, dtype=dtype))))
    except UserError as error:
        said = str(error)
    assert "\n" not in said
    assert said or (vectors.shape, vectors.dtype) == ((2, shape[1]), torch.float32)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    made = ModuleType("module_of_a_user")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        (lambda: 1 / 0, "failed: ZeroDivisionError"),
        (lambda: sys.exit("no weights"), "failed: SystemExit no weights"),
        (lambda needed: None, "failed: TypeError"),
        (lambda: None, "must return a map from images to features, it returns a NoneType"),
        (7, "failed: TypeError"),
    ],
)
def test_a_factory_that_fails_is_said_in_a_line(factory: object, said: str, module: ModuleType):
    module.factory = factory
    with pytest.raises(UserError, match=f"--features module_of_a_user:factory.*{said}"):
        Imported.of("module_of_a_user:factory")


@pytest.mark.parametrize("name", ["", ":", "module_of_a_user", "module_of_a_user:", "no.such:f", ".:f", "os:nothing"])
def test_a_name_that_leads_nowhere_is_said_in_a_line(name: str, module: ModuleType):
    with pytest.raises(UserError, match="expected an importable module:function") as caught:
        Imported.of(name)
    assert "\n" not in str(caught.value)


def test_the_features_of_the_trainer_pass_the_same_trial():
    digits = torch.zeros(2, 1, 32, 32, dtype=torch.uint8)
    classifier = load_digit_classifier()
    assert tried(classifier, digits) is classifier
    codec = PixelSpace().build(3, {})
    assert vectors_of(PIXELS, PooledLatents(codec, torch.device("cpu"))).shape == (4, 48)


def test_code_of_the_users_is_entered_by_one_thread_at_a_time():
    inside, most = 0, 0

    def counted(values: Tensor) -> Tensor:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.01)
        inside -= 1
        return values.flatten(1).float()

    features, pixels = Imported("mine", counted, batch=2), torch.zeros(8, 1, 4, 4, dtype=torch.uint8)
    codec = Foreign("mine", SimpleNamespace(encode=lambda x: counted(x)[:, :, None, None], decode=lambda x: x))
    codec._budget["encode"] = 1  # an image at a time
    both = {"features": lambda: features(pixels), "latents": lambda: codec.encode(pixels.float())}
    found = at_once(both | {f"{name} again": maker for name, maker in both.items()}, "both")
    assert not any(isinstance(one, Missing) for one in found.values())
    assert most == 1
