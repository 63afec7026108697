"""The classifier of digits whose features measure the samples; shipped with its weights, so that figures compare.

`python -m reference_trainer.evaluation.digit_classifier` fits it again (about two minutes) and overwrites the weights.
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from reference_trainer.data.images import Digits, ImageSet, to_unit
from reference_trainer.evaluation.identity import Identity, digest_of
from reference_trainer.files import load_tensors, save_tensors
from robustcm.randomness import step_generator

WEIGHTS = Path(__file__).with_name("digit_classifier.safetensors")


@dataclass(frozen=True)
class DigitClassifier:
    """A small convolutional classifier; the features are the 64 activations before its last layer."""

    network: nn.Sequential
    name: str = "64 features of the shipped digit classifier"

    @property
    def identity(self) -> Identity:
        """Of the weights."""
        return Identity(digest_of(self.network.state_dict()), "none")

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 ``[n, 1, 32, 32]`` -> ``[n, 64]``."""
        return torch.cat([self.network[:-1](to_unit(part)) for part in pixels.split(500)])

    @torch.no_grad()
    def probabilities(self, pixels: Tensor) -> Tensor:
        """uint8 ``[n, 1, 32, 32]`` -> ``[n, 10]``."""
        return self.probabilities_of(self(pixels))

    @torch.no_grad()
    def probabilities_of(self, features: Tensor) -> Tensor:
        """Features ``[n, 64]`` of this classifier -> ``[n, 10]``."""
        probabilities: Tensor = self.network[-1](features).softmax(1)
        return probabilities

    def accuracy(self, pixels: Tensor, labels: Tensor) -> float:
        """Share of ``pixels`` whose most probable class is the label."""
        return float((self.probabilities(pixels).argmax(1) == labels).float().mean())


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How the classifier is fitted: on the training digits, shifted, turned, scaled and sheared a little."""

    width: int = 32
    steps: int = 1200
    batch_size: int = 128
    lr: float = 3e-3
    weight_decay: float = 0.2
    dropout: float = 0.2
    seed: int = 0

    def __call__(self, images: ImageSet) -> DigitClassifier:
        assert images.labels is not None
        pixels, labels = images.train, images.labels[~images.is_held_out]
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            network = build(self.width, self.dropout)
            optimizer = torch.optim.AdamW(network.parameters(), lr=self.lr, weight_decay=self.weight_decay)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=self.steps, pct_start=0.2)
            for step in tqdm(range(self.steps), desc="fitting the digit classifier", unit="step"):
                generator = step_generator(self.seed, step)
                chosen = torch.randint(len(pixels), (self.batch_size,), generator=generator)
                logits = network(jittered(to_unit(pixels[chosen]), generator))
                optimizer.zero_grad()
                F.cross_entropy(logits, labels[chosen]).backward()
                optimizer.step()
                schedule.step()
        return DigitClassifier(network.eval().requires_grad_(False))


def build(width: int, dropout: float = 0.0) -> nn.Sequential:
    """The network: ``[n, 1, 32, 32]`` in -1 .. 1 -> logits ``[n, 10]``."""

    def block(before: int, after: int, kernel: int, stride: int = 1) -> list[nn.Module]:
        convolution = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
        return [convolution, nn.BatchNorm2d(after), nn.ReLU()]

    return nn.Sequential(
        *block(1, width, 5, stride=2),
        *block(width, 2 * width, 3),
        nn.MaxPool2d(2),
        *block(2 * width, 4 * width, 3),
        nn.MaxPool2d(2),
        nn.Dropout2d(dropout),
        nn.Flatten(),
        nn.Linear(4 * width * 16, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


@cache
def load_digit_classifier() -> DigitClassifier:
    """The shipped classifier."""
    tensors, about = load_tensors(WEIGHTS)
    network = build(about["width"])
    network.load_state_dict(tensors)
    return DigitClassifier(network.eval().requires_grad_(False))


def jittered(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turned by up to 12 degrees, scaled and sheared by up to 10 %, shifted by up to 2 pixels of 32; black outside."""
    u = 2 * torch.rand(len(images), 5, generator=generator) - 1
    angle, scale, shear, shift = u[:, 0] * math.radians(12), 1 + 0.1 * u[:, 1], 0.1 * u[:, 2], u[:, 3:] * (2 / 16)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = torch.stack([cos, shear - sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1).reshape(-1, 2, 3)
    grid = F.affine_grid(rows, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def main() -> int:
    """Fit, store, and print the accuracy on held-out digits."""
    images, fit = Digits().load(), Fit()
    assert images.labels is not None
    classifier = fit(images)
    accuracy = classifier.accuracy(images.held_out, images.labels[images.is_held_out])
    save_tensors(WEIGHTS, classifier.network.state_dict(), asdict(fit) | {"accuracy_held_out": accuracy})
    print(f"{accuracy:.1%} of {len(images.held_out)} held-out digits right; wrote {WEIGHTS.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
