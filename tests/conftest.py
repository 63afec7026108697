"""What all tests share: tolerances by dtype, the devices, and deterministic hypothesis in CI."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from torch import Tensor

# CI replays the same examples each time; a person's runs keep looking for new ones.
settings.register_profile("person", deadline=None, max_examples=50)
settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True)
# benchmarks/faults/fuzz_long.py says how many.
settings.register_profile("long", deadline=None, max_examples=int(os.environ.get("FUZZ_EXAMPLES", "50")))
settings.load_profile("long" if "FUZZ_EXAMPLES" in os.environ else "ci" if os.environ.get("CI") else "person")

torch.set_num_threads(1)  # the tensors are small: threads only wait for each other, above all under pytest-xdist

RELATIVE_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8}


@pytest.fixture(autouse=True)
def ambient_seed() -> None:
    """What a test draws without a generator, networks' first weights above all, does not depend on the tests before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def drawn() -> Iterator[Callable[..., None]]:
    """Figures are made, and blank ones saved in their place: to draw them is most of the time of runs of a few steps.

    A test that is about a picture takes ``drawn_pictures``; processes of their own draw, too. Gives what saves them.
    """
    from matplotlib.figure import Figure

    save = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda _, *where, **options: save(Figure((1, 1)), *where, **options))
        yield save


@pytest.fixture
def drawn_pictures(drawn: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are saved as a user has them."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", drawn)


@pytest.fixture(scope="session")
def assert_close() -> Callable[..., None]:
    """``assert_close(actual, expected, dtype=actual.dtype, atol=0)``: equal to the rounding of ``dtype``."""

    def check(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None, atol: float = 0.0) -> None:
        rtol = RELATIVE_TOLERANCE[dtype or actual.dtype]
        torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)

    return check


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def rng() -> torch.Generator:
    """A generator with a fixed seed."""
    return torch.Generator().manual_seed(0)


def squares_in(folder: Path) -> Path:
    """40 small colour PNGs: squares at different places."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(40):
        picture = np.full((20, 24, 3), 30, np.uint8)
        top, left = generator.integers(0, 12, 2)
        picture[top : top + 8, left : left + 8] = generator.integers(100, 255, 3)
        Image.fromarray(picture).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """40 small colour PNGs, to do with as one likes."""
    return squares_in(tmp_path / "images")


@pytest.fixture(scope="session")
def kept_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same 40, which no test changes: what is trained on them can be shared."""
    return squares_in(tmp_path_factory.mktemp("kept") / "images")


@pytest.fixture
def photos(image_folder: Path) -> Path:
    """The 40 images in three class folders."""
    for number, file in enumerate(sorted(image_folder.iterdir())):
        folder = image_folder / ("cats", "dogs", "eels")[number % 3]
        folder.mkdir(exist_ok=True)
        file.rename(folder / file.name)
    return image_folder


@pytest.fixture(scope="session")
def noise_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pictures of 8x8 coloured noise."""
    folder, rng = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="session")
def tiny(noise_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """A run of 25 steps on the pixels of that noise, its images, its configuration, the folder it is cached in."""
    from analysis import baselines, inputs  # as what it trains with, for those who ask for it
    from reference_trainer.data.autoencoders import PixelSpace
    from reference_trainer.data.images import ImageFolder, to_unit

    cache, data = tmp_path_factory.mktemp("cache"), ImageFolder(path=str(noise_folder), resolution=8)
    config = baselines.baseline_config(data, PixelSpace(), (3, 8, 8), 5, 25)
    config = replace(config, network=replace(config.network, width=16, layers=1), log_every=5)
    images = inputs.load_images(data)
    run = baselines.baseline_run(config, images, to_unit(images.train), cache, torch.device("cpu"))
    return run, images, config, cache
