"""What a run is worth: metrics with their floor and ceiling, and the pictures to look at."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from reference_trainer.data.images import Digits, ImageSet
from reference_trainer.evaluation.digit_classifier import DigitClassifier, load_digit_classifier
from reference_trainer.evaluation.features import Features, Imported, PooledLatents
from reference_trainer.evaluation.metrics import frechet_distance, kernel_distance, precision_recall, psnr
from reference_trainer.evaluation.pictures import draw_losses, draw_sheet, draw_tails
from reference_trainer.files import write_atomically
from reference_trainer.model import TrainedModel
from reference_trainer.plotting import save_figure
from reference_trainer.run import EVALUATIONS, RunFolder

MAX_IMAGES = 5000
"""Most images a metric is computed from, on either side."""
SAMPLES = ("1 evaluation", "2 evaluations")


def choose_features(name: str | None, model: TrainedModel) -> Features:
    """The user's ``module:function``, else the digit classifier for digits, else the autoencoder's latents."""
    if name is not None:
        return Imported.of(name)
    if isinstance(model.config.data, Digits):
        return load_digit_classifier()
    return PooledLatents(model.space.codec)


def evaluate(
    model: TrainedModel, images: ImageSet, features: Features, seed: int = 0, bounds: bool = True
) -> dict[str, Any]:
    """Compare samples at 1 and 2 evaluations, and what bounds them, with the training images.

    Every row is a set of images against the (up to 5000) training images. ``floor: ...`` rows are real images,
    ``ceiling: ...`` rows white noise in the place of latents. ``reconstructions`` are the training latents decoded,
    outliers and clipping included: what a model that fits its data exactly would draw.

    Args:
        bounds: False leaves out all rows but the samples': they cost twice as much and are the same for every model.
    """
    train, held_out = training_images(images, seed), images.held_out[:MAX_IMAGES]
    sets: dict[str, Callable[[], Tensor]] = {"train": lambda: train, "held-out": lambda: held_out}
    sets |= samplers(model, len(train), seed)
    if bounds:
        noise = 0.5 * torch.randn(len(train), *model.shape, generator=torch.Generator().manual_seed(seed))
        reconstructed = cache(lambda: model.space.decode(model.latents_of(train).to(model.device)))
        sets["reconstructions"] = reconstructed
        sets["ceiling: noise decoded"] = lambda: model.space.decode(noise.to(model.device))
    with ThreadPoolExecutor(2) as pool:  # each image by itself, so two sets at a time change no digit
        found = pool.map(lambda make: features(make()), sets.values())
        bar = tqdm(found, desc="samples and features", unit="set", total=len(sets), leave=False, delay=2)
        vectors = dict(zip(sets, bar, strict=True))
    real, held_out_real = vectors.pop("train"), vectors.pop("held-out")
    rows = {name: measure(those, real, features, held_out_real) for name, those in vectors.items()}
    if bounds:
        rows["reconstructions"]["psnr"] = psnr(train, reconstructed())
        half = len(real) // 2
        rows["floor: held-out images"] = measure(held_out_real, real, features)
        rows["floor: half against half"] = measure(real[:half], real[half:], features, held_out_real)
        rows["ceiling: noise decoded"] = rows.pop("ceiling: noise decoded")  # last in the table
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


class Evaluator:
    """Shown a model, adds a row to the run's evaluations.jsonl: ``evaluate`` without floor and ceiling."""

    def __init__(self, run: RunFolder, images: ImageSet, features: str | None = None, seed: int = 0) -> None:
        """``features``: as ``choose_features`` takes it."""
        self.run, self.images, self.name, self.seed = run, images, features, seed
        self._reference: tuple[Features, Tensor] | None = None  # it does not change while training

    def __call__(self, model: TrainedModel) -> None:
        if self._reference is None:
            features = choose_features(self.name, model)
            self._reference = features, features(training_images(self.images, self.seed))
        features, vectors = self._reference
        draws = samplers(model, len(vectors), self.seed)
        rows = {name: measure(features(draw()), vectors, features) for name, draw in draws.items()}
        record(self.run, {"step": model.step, "seed": self.seed, "features": features.name, "rows": rows})


def record(run: RunFolder, evaluation: dict[str, Any]) -> None:
    """``brief(evaluation)`` as the last row of evaluations.jsonl.

    Takes the place of a row of the same step: a finished run that is started again is evaluated again.
    """
    run.keep_rows_until(evaluation["step"] - 1, [EVALUATIONS])
    run.append_row(EVALUATIONS, brief(evaluation))


def brief(evaluation: dict[str, Any]) -> dict[str, Any]:
    """What changes while training: the samples' part of what ``evaluate`` gives."""
    rows = {name: evaluation["rows"][name] for name in SAMPLES}
    return {key: evaluation[key] for key in ("step", "seed", "features")} | {"rows": rows}


def training_images(images: ImageSet, seed: int) -> Tensor:
    """What samples are compared with, uint8 ``[n, ch, h, w]``.

    Shuffled: data come sorted by class, and some metrics look at the first few thousand only.
    """
    order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(seed))
    return images.train[order[:MAX_IMAGES]]


def samplers(model: TrainedModel, n: int, seed: int) -> dict[str, Callable[[], Tensor]]:
    """What draws uint8 ``[n, ch, h, w]``, by number of network evaluations."""
    return {name: partial(model.images, n, model.sigmas(i + 1), seed) for i, name in enumerate(SAMPLES)}


def measure(others: Tensor, vectors: Tensor, features: Features, held_out: Tensor | None = None) -> dict[str, float]:
    """All metrics of ``others [n, k]`` against ``vectors [m, k]``; of digits also which share looks like one.

    With enough ``held_out [l, k]`` for a covariance, also the Frechet distance to these: a model that memorises comes
    close to the training images alone.
    """
    row = compare(vectors, others)
    if held_out is not None and len(held_out) > held_out.shape[1]:
        row["frechet_held_out"] = frechet_distance(held_out, others)
    if isinstance(features, DigitClassifier):
        sure = features.probabilities_of(others).max(1).values >= 0.9
        row["sure_digits"] = float(sure.float().mean())
    return row


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
        f"against {evaluation['reference']}; precision and recall on up to 2000 of each, "
        "held-out: Frechet distance to the held-out images:",
        f"{'':26}{'n':>6}{'Frechet':>10}{'kernel':>9}{'precision':>11}{'recall':>8}"
        + "{:>10}".format("held-out")
        + ("{:>9}".format("p >= .9") if "classifier_accuracy_held_out" in evaluation else ""),
    ]
    for name, row in evaluation["rows"].items():
        line = f"{name:26}{row['n']:6d}{row['frechet']:10.2f}{row['kernel_x1000']:9.2f}{row['precision']:11.3f}"
        line += f"{row['recall']:8.3f}"
        line += f"{row['frechet_held_out']:10.2f}" if "frechet_held_out" in row else f"{'-':>10}"
        line += f"{row['sure_digits']:9.3f}" if "sure_digits" in row else ""
        lines.append(line)
    lines += about_autoencoder(evaluation)
    if "classifier_accuracy_held_out" in evaluation:
        lines.append(f"the classifier is right on {evaluation['classifier_accuracy_held_out']:.1%} of held-out digits")
    return "\n".join(lines)


def about_autoencoder(evaluation: dict[str, Any]) -> list[str]:
    """PSNR of the reconstructions, and that features of the autoencoder's own cannot judge it, as lines."""
    row, lines = evaluation["rows"].get("reconstructions", {}), []
    if "psnr" in row:
        lines.append(
            f"reconstructions: PSNR {row['psnr']:.1f} dB to the images themselves (pixels 0 .. 255, mean over the "
            f"{row['n']} images)"
        )
    if evaluation["features"] == PooledLatents.name:
        lines.append(
            "these features are the run's own autoencoder's and cannot judge it: what it loses, they do not see (PSNR "
            "and samples.png show it)"
        )
    return lines


def write_report(run: RunFolder, model: TrainedModel, images: ImageSet, evaluation: dict[str, Any]) -> list[Path]:
    """evaluation.json, the sheet of images and the loss curves; returns the files."""
    real = training_images(images, seed=0)
    latents = model.latents_of(real)[:64]
    sheet = draw_sheet(
        [
            ("1 evaluation", model.images(64, model.sigmas(1), seed=1)),
            ("2 evaluations", model.images(64, model.sigmas(2), seed=1)),
            ("real", real[:64]),
            ("reconstructed", model.space.decode(latents.to(model.device))),
        ]
    )
    files = [run.root / name for name in ("samples.png", "losses.png", "tails.png", "evaluation.json")]
    save_figure(sheet, files[0])
    if rows := run.metrics():
        save_figure(draw_losses(rows), files[1])
        save_figure(draw_tails(rows), files[2])
    write_evaluation(run, evaluation)
    return files


def write_evaluation(run: RunFolder, evaluation: dict[str, Any]) -> None:
    """evaluation.json."""
    write_atomically(run.root / "evaluation.json", (json.dumps(evaluation, indent=2) + "\n").encode())
