"""Feature spaces in which samples are compared, each with a name that goes wherever its numbers go.

Axes: pixels uint8 [n, ch, h, w], features float32 [n, k].
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from reference_trainer.autoencoders import Codec
from reference_trainer.errors import UserError
from reference_trainer.images import ImageSet, to_unit
from reference_trainer.store import load_tensors, save_tensors
from robustcm.objective import step_generator


class Features(Protocol):
    """A named map from images to vectors."""

    @property
    def name(self) -> str: ...

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 ``[n, ch, h, w]`` -> ``[n, k]``."""
        ...


@dataclass(frozen=True)
class PooledLatents:
    """The autoencoder's own latents, averaged over a 4x4 grid: there for any images, but blind to fine detail."""

    codec: Codec
    name: str = "latents of the run's own autoencoder, pooled to 4x4"

    def __call__(self, pixels: Tensor) -> Tensor:
        parts = [F.adaptive_avg_pool2d(self.codec.encode(to_unit(part)), 4).flatten(1) for part in pixels.split(250)]
        return torch.cat(parts)


@dataclass(frozen=True)
class Imported:
    """``module:function``, a function of the user's that returns uint8 ``[n, ch, h, w]`` -> ``[n, k]``."""

    name: str
    function: Callable[[Tensor], Tensor]

    def __call__(self, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            parts = tqdm(pixels.split(250), desc="features", unit="batch", leave=False, delay=2)
            return torch.cat([self.function(part) for part in parts])

    @staticmethod
    def of(name: str) -> Imported:
        """Import ``module:factory`` and call the factory."""
        module, _, attribute = name.partition(":")
        try:
            factory = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"--features {name}: expected an importable module:function ({error})") from error
        return Imported(name, factory())


class DigitClassifier:
    """A small convolutional classifier of digits; features are the 64 activations before its last layer."""

    name = "64 features of a digit classifier fitted on the training digits"

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        return torch.cat([self.network[:-1](to_unit(part)) for part in pixels.split(500)])  # type: ignore[index]

    @torch.no_grad()
    def probabilities(self, pixels: Tensor) -> Tensor:
        """``[n, 10]``."""
        return torch.cat([self.network(to_unit(part)).softmax(1) for part in pixels.split(500)])


@dataclass(frozen=True, kw_only=True)
class DigitClassifierFit:
    """How the classifier is fitted: on the training digits, shifted, turned and scaled a little; then cached."""

    width: int = 16
    steps: int = 700
    batch_size: int = 128
    lr: float = 4e-3
    seed: int = 0

    def fit(self, images: ImageSet, cache: Path) -> DigitClassifier:
        """Load from ``cache``, or fit with a progress bar and store there."""
        key = json.dumps(asdict(self), sort_keys=True) + images.fingerprint()
        file = cache / f"classifier-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
        network = self._network()
        if file.is_file():
            try:
                network.load_state_dict(load_tensors(file)[0])
                return DigitClassifier(network)
            except (UserError, RuntimeError) as error:
                tqdm.write(f"fitting the digit classifier again: {error}")
        self._fit(network, images)
        save_tensors(file, network.state_dict(), {})
        return DigitClassifier(network)

    def _network(self) -> nn.Sequential:
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            w = self.width
            blocks: list[nn.Module] = []
            for before, after in ((1, w), (w, 2 * w), (2 * w, 4 * w)):
                blocks += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
            return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(4 * w * 16, 64), nn.ReLU(), nn.Linear(64, 10))

    def _fit(self, network: nn.Module, images: ImageSet) -> None:
        assert images.labels is not None
        pixels, labels = images.train, images.labels[~images.is_held_out]
        network.train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=self.steps)
        for step in tqdm(range(self.steps), desc="fitting the digit classifier", unit="step"):
            generator = step_generator(self.seed, step)
            chosen = torch.randint(len(pixels), (self.batch_size,), generator=generator)
            logits = network(jittered(to_unit(pixels[chosen]), generator))
            optimizer.zero_grad()
            F.cross_entropy(logits, labels[chosen], label_smoothing=0.0).backward()
            optimizer.step()
            schedule.step()


def jittered(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turned by up to 10 degrees, scaled by up to 10 %, shifted by up to 2 pixels of 32; black outside."""
    u = 2 * torch.rand(len(images), 4, generator=generator) - 1
    angle, scale, shift = u[:, 0] * math.radians(10), 1 + 0.1 * u[:, 1], u[:, 2:] * (2 / 16)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1).reshape(-1, 2, 3)
    grid = F.affine_grid(rows, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1
