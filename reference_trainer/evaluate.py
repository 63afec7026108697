"""What a run is worth: metrics with their floor and ceiling, and the pictures to look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from reference_trainer.digit_classifier import DigitClassifier, load_digit_classifier
from reference_trainer.features import Features, Imported, PooledLatents
from reference_trainer.images import Digits, ImageSet
from reference_trainer.latents import encode
from reference_trainer.metrics import frechet_distance, kernel_distance, precision_recall
from reference_trainer.report import draw_losses, draw_sheet, draw_tails, save_figure
from reference_trainer.run import RunFolder
from reference_trainer.sample import TrainedModel
from reference_trainer.store import write_atomically

MAX_IMAGES = 5000
"""Most images a metric is computed from, on either side."""


def choose_features(name: str | None, model: TrainedModel) -> Features:
    """The user's ``module:function``, else the digit classifier for digits, else the autoencoder's latents."""
    if name is not None:
        return Imported.of(name)
    if isinstance(model.config.data, Digits):
        return load_digit_classifier()
    return PooledLatents(model.space.codec)


def evaluate(model: TrainedModel, images: ImageSet, features: Features, seed: int = 0) -> dict[str, Any]:
    """Compare samples at 1 and 2 evaluations, and what bounds them, with the training images.

    Every row is a set of images against the (up to 5000) training images. ``floor: ...`` rows are real images,
    ``ceiling: ...`` rows white noise in the place of latents.
    """
    # Shuffled: data come sorted by class, and some metrics look at the first few thousand only.
    order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(seed))
    train, held_out = images.train[order[:MAX_IMAGES]], images.held_out[:MAX_IMAGES]
    half = len(train) // 2
    noise = 0.5 * torch.randn(len(train), *model.shape, generator=torch.Generator().manual_seed(seed))
    latents = encode(model.space.codec, train, model.device)
    sets: dict[str, Tensor] = {
        "1 evaluation": model.images(len(train), model.sigmas(1), seed),
        "2 evaluations": model.images(len(train), model.sigmas(2), seed),
        "reconstructions": model.space.decode(model.space.normalise(latents).to(model.device)),
        "floor: held-out images": held_out,
        "floor: half against half": train[:half],
        "ceiling: noise decoded": model.space.decode(noise.to(model.device)),
    }
    vectors = features(train)
    rows = {}
    for name, pixels in tqdm(sets.items(), desc="comparing", unit="set", leave=False, delay=2):
        others = features(pixels)
        reference = vectors[half:] if name.startswith("floor: half") else vectors
        rows[name] = compare(reference, others)
        if isinstance(features, DigitClassifier):
            sure = features.probabilities_of(others).max(1).values >= 0.9
            rows[name]["sure_digits"] = float(sure.float().mean())
    out = {
        "step": model.step,
        "seed": seed,
        "features": features.name,
        "reference": f"{len(train)} training images of {images.name}",
        "sigmas": {"1 evaluation": model.sigmas(1), "2 evaluations": model.sigmas(2)},
        "rows": rows,
    }
    if isinstance(features, DigitClassifier) and images.labels is not None:
        labels = images.labels[images.is_held_out]
        out["classifier_accuracy_held_out"] = features.accuracy(images.held_out, labels)
    return out


def compare(real: Tensor, fake: Tensor) -> dict[str, float]:
    """All metrics of one set of features against another."""
    precision, recall = precision_recall(real, fake)
    return {
        "n": len(fake),
        "frechet": frechet_distance(real, fake),
        "kernel_x1000": kernel_distance(real, fake),
        "precision": precision,
        "recall": recall,
    }


def as_table(evaluation: dict[str, Any]) -> str:
    """The evaluation as lines for a terminal."""
    lines = [
        f"step {evaluation['step']}, in {evaluation['features']},",
        f"against {evaluation['reference']}; precision and recall on up to 2000 of each:",
        f"{'':26}{'n':>6}{'Frechet':>10}{'kernel':>9}{'precision':>11}{'recall':>8}"
        + ("{:>9}".format("p >= .9") if "classifier_accuracy_held_out" in evaluation else ""),
    ]
    for name, row in evaluation["rows"].items():
        line = f"{name:26}{row['n']:6d}{row['frechet']:10.2f}{row['kernel_x1000']:9.2f}{row['precision']:11.3f}"
        line += f"{row['recall']:8.3f}" + (f"{row['sure_digits']:9.3f}" if "sure_digits" in row else "")
        lines.append(line)
    if "classifier_accuracy_held_out" in evaluation:
        lines.append(f"the classifier is right on {evaluation['classifier_accuracy_held_out']:.1%} of held-out digits")
    return "\n".join(lines)


def write_report(run: RunFolder, model: TrainedModel, images: ImageSet, evaluation: dict[str, Any]) -> list[Path]:
    """evaluation.json, the sheet of images and the loss curves; returns the files."""
    real = images.train[torch.linspace(0, len(images.train) - 1, 64).long()]
    latents = model.space.normalise(encode(model.space.codec, real, model.device))
    sheet = draw_sheet(
        [
            ("1 evaluation", model.images(64, model.sigmas(1), seed=1)),
            ("2 evaluations", model.images(64, model.sigmas(2), seed=1)),
            ("real", real),
            ("reconstructed", model.space.decode(latents.to(model.device))),
        ]
    )
    names = ("samples.png", "losses.png", "tails.png", "evaluation.json")
    files = [run.root / name for name in names]
    save_figure(sheet, files[0])
    if rows := run.metrics():
        save_figure(draw_losses(rows), files[1])
        save_figure(draw_tails(rows), files[2])
    write_atomically(files[3], (json.dumps(evaluation, indent=2) + "\n").encode())
    return files
