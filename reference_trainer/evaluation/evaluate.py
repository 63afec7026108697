"""What a run is worth: metrics with their floor and ceiling, and the pictures to look at.

What cannot be measured is a ``Missing``, the reason, in the place of the images, features or row it should have been:
it passes through all that would be made of it, and ends below the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from reference_trainer.data.images import Digits, ImageSet
from reference_trainer.data.stored import StoredImages
from reference_trainer.errors import UserError
from reference_trainer.evaluation.digit_classifier import DigitClassifier, load_digit_classifier
from reference_trainer.evaluation.features import Features, PooledLatents, tried, vectors_of
from reference_trainer.evaluation.metrics import frechet_distance, kernel_distance, precision_recall, psnr
from reference_trainer.evaluation.pictures import draw_losses, draw_sheet, draw_tails
from reference_trainer.files import as_json, write_atomically
from reference_trainer.model import TrainedModel
from reference_trainer.plotting import save_figure
from reference_trainer.run import EVALUATIONS, RunFolder

MAX_IMAGES = 5000
"""Most images a metric is computed from, on either side."""
SAMPLES = ("1 evaluation", "2 evaluations")
Row = dict[str, float]
T = TypeVar("T")


class Missing(str):
    """Why something could not be measured."""


def attempt(make: Callable[[], T]) -> T | Missing:
    """What ``make`` returns, or the message of the ``UserError`` it raises: one row that fails spares the others."""
    try:
        return make()
    except UserError as error:
        return Missing(error)


def choose_features(given: Features | None, model: TrainedModel) -> Features:
    """Those the user has given, else the digit classifier for digits, else the autoencoder's latents."""
    if given is not None:
        return given
    if isinstance(model.config.data, Digits):
        return load_digit_classifier()
    return PooledLatents(model.space.codec, model.device)


def evaluate(
    model: TrainedModel, images: ImageSet, features: Features, seed: int = 0, bounds: bool = True
) -> dict[str, Any]:
    """Compare samples at 1 and 2 evaluations, and what bounds them, with the training images.

    Every row is a set of images against the (up to 5000) training images. ``floor: ...`` rows are real images,
    ``ceiling: ...`` rows white noise in the place of latents. ``reconstructions`` are the training latents decoded,
    outliers and clipping included: what a model that fits its data exactly would draw. What cannot be measured stands
    under ``left_out`` with the reason.

    Args:
        bounds: False leaves out all rows but the samples': they cost twice as much and are the same for every model.
    """
    train, held_out = training_images(images, seed), images.held_out[:MAX_IMAGES]
    sets: dict[str, Callable[[], Tensor]] = {"held-out": lambda: vectors_of(held_out, features)}
    sets |= {name: partial(sampled, model, i + 1, len(train), seed, features) for i, name in enumerate(SAMPLES)}
    if bounds:
        noise = 0.5 * torch.randn(len(train), *model.shape, generator=torch.Generator().manual_seed(seed))
        reconstructed = cache(lambda: model.space.decode(model.latents_of(train).to(model.device)))
        if not isinstance(images, StoredImages):  # those are reconstructions themselves
            sets["reconstructions"] = lambda: vectors_of(reconstructed(), features)
        sets["ceiling: noise decoded"] = lambda: vectors_of(model.space.decode(noise.to(model.device)), features)
    with ThreadPoolExecutor(2) as pool:  # each image by itself, so two sets at a time change no digit
        found = pool.map(attempt, [lambda: reference_of(train, features), *sets.values()])
        bar = tqdm(found, desc="samples and features", unit="set", total=1 + len(sets), leave=False, delay=2)
        real, *others = bar
    vectors = dict(zip(sets, others, strict=True))
    held_out_real = vectors.pop("held-out")
    found_rows = {name: measure(those, real, features, held_out_real) for name, those in vectors.items()}
    if bounds:
        if (row := found_rows.get("reconstructions")) is not None and not isinstance(row, Missing):
            row["psnr"] = psnr(train, reconstructed())
        half = len(train) // 2
        first, second = (real, real) if isinstance(real, Missing) else (real[:half], real[half:])
        found_rows["floor: held-out images"] = measure(held_out_real, real, features)
        found_rows["floor: half against half"] = measure(first, second, features, held_out_real)
        found_rows["ceiling: noise decoded"] = found_rows.pop("ceiling: noise decoded")  # last in the table
    sigmas = {name: attempt(partial(model.sigmas, i + 1)) for i, name in enumerate(SAMPLES)}
    other = ", which are not those the run was made from" if model.changes else ""
    out = {
        "step": model.step,
        "seed": seed,
        "features": features.name,
        "reference": f"{len(train)} training images of {images.name}{other}",
        "sigmas": {name: levels for name, levels in sigmas.items() if not isinstance(levels, Missing)},
        **split_rows(found_rows),
        "notes": small_samples(found_rows, real, len(held_out)),
    }
    if isinstance(features, DigitClassifier) and images.labels is not None:
        labels = images.labels[images.is_held_out]
        out["classifier_accuracy_held_out"] = features.accuracy(images.held_out, labels)
    return out


class Evaluator:
    """Shown a model, adds a row to the run's evaluations.jsonl: ``evaluate`` without floor and ceiling."""

    def __init__(self, run: RunFolder, images: ImageSet, features: Features | None = None, seed: int = 0) -> None:
        """``features``: as ``choose_features`` takes them."""
        self.run, self.images, self.given, self.seed = run, images, features, seed
        self._reference: tuple[Features, Tensor | Missing] | None = None  # it does not change while training

    def prepare(self, model: TrainedModel) -> None:
        """Try the features on two images.

        Raises:
            UserError: they cannot be computed.
        """
        tried(choose_features(self.given, model), self.images.pixels)

    def __call__(self, model: TrainedModel) -> None:
        train = training_images(self.images, self.seed)
        if self._reference is None:
            features = choose_features(self.given, model)
            self._reference = features, attempt(lambda: reference_of(train, features))
        features, real = self._reference
        rows = {}
        for i, name in enumerate(SAMPLES):
            vectors = attempt(partial(sampled, model, i + 1, len(train), self.seed, features))
            rows[name] = measure(vectors, real, features)
        about = {"step": model.step, "seed": self.seed, "features": features.name}
        record(self.run, about | split_rows(rows))


def record(run: RunFolder, evaluation: dict[str, Any]) -> None:
    """``brief(evaluation)`` as the last row of evaluations.jsonl.

    Takes the place of a row of the same step: a finished run that is started again is evaluated again.
    """
    run.keep_rows_until(evaluation["step"] - 1, [EVALUATIONS])
    run.append_row(EVALUATIONS, brief(evaluation))


def brief(evaluation: dict[str, Any]) -> dict[str, Any]:
    """What changes while training: the samples' part of what ``evaluate`` gives."""
    parts = (("rows", evaluation["rows"]), ("left_out", evaluation.get("left_out", {})))
    samples = {part: {name: row for name, row in found.items() if name in SAMPLES} for part, found in parts}
    if not samples["left_out"]:
        del samples["left_out"]
    return {key: evaluation[key] for key in ("step", "seed", "features")} | samples


def training_images(images: ImageSet, seed: int) -> Tensor:
    """What samples are compared with, uint8 ``[n, ch, h, w]``.

    Shuffled: data come sorted by class, and some metrics look at the first few thousand only.
    """
    order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(seed))
    return images.train[order[:MAX_IMAGES]]


def sampled(model: TrainedModel, evaluations: int, n: int, seed: int, features: Features) -> Tensor:
    """Features ``[n, k]`` of samples at that many network evaluations."""
    return vectors_of(model.images(n, model.sigmas(evaluations), seed), features)


def reference_of(train: Tensor, features: Features) -> Tensor:
    """Features ``[n, k]`` of the training images, which all else is compared with.

    Raises:
        UserError: they cannot be had, or they tell no image from another.
    """
    vectors = vectors_of(train, features)
    if (vectors == vectors[0]).all():
        raise UserError(f"the features are the same for all {len(train)} training images")
    return vectors


def measure(
    others: Tensor | Missing, real: Tensor | Missing, features: Features, held_out: Tensor | Missing | None = None
) -> Row | Missing:
    """All metrics of ``others [n, k]`` against ``real [m, k]``; of digits also which share looks like one.

    With enough ``held_out [l, k]`` for a covariance, also the Frechet distance to these: a model that memorises comes
    close to the training images alone.
    """
    if isinstance(real, Missing):
        return Missing(f"nothing to compare with: {real}")
    if isinstance(others, Missing):
        return others
    row = attempt(lambda: compare(real, others))
    if isinstance(row, Missing):
        return row
    if isinstance(held_out, Tensor) and len(held_out) > held_out.shape[1]:
        distance = frechet_distance(held_out, others)
        row |= {"frechet_held_out": distance} if math.isfinite(distance) else {}
    if isinstance(features, DigitClassifier):
        sure = features.probabilities_of(others).max(1).values >= 0.9
        row["sure_digits"] = float(sure.float().mean())
    return row


def compare(real: Tensor, fake: Tensor) -> Row:
    """All metrics of one set of features against another.

    Raises:
        UserError: a single vector on a side, or features so far apart that a metric is not finite.
    """
    if min(len(real), len(fake)) < 2:
        raise UserError(f"{min(len(real), len(fake))} image: a distance between sets needs 2 of each")
    precision, recall = precision_recall(real, fake)
    row = {
        "n": len(fake),
        "frechet": frechet_distance(real, fake),
        "kernel_x1000": kernel_distance(real, fake),
        "precision": precision,
        "recall": recall,
    }
    if bad := [name for name, value in row.items() if not math.isfinite(value)]:
        raise UserError(f"{', '.join(bad)} not finite: the features go up to {float(fake.abs().max()):.1g}")
    return row


def split_rows(rows: Mapping[str, Row | Missing]) -> dict[str, Any]:
    """What was measured under ``rows``, the reasons why not under ``left_out``."""
    return {
        "rows": {name: row for name, row in rows.items() if not isinstance(row, Missing)},
        "left_out": {name: row for name, row in rows.items() if isinstance(row, Missing)},
    }


def small_samples(rows: Mapping[str, Row | Missing], real: Tensor | Missing, held_out: int) -> list[str]:
    """What to know of figures from few images, as sentences."""
    if isinstance(real, Missing):
        return []
    (n, k), notes = real.shape, []
    few = [name for name, row in rows.items() if not isinstance(row, Missing) and min(row["n"], n) <= k]
    if few:
        notes.append(
            f"no more images than the {k} features in {', '.join(few) if n > k else 'every row'}: covariances are "
            "singular there and Frechet distances come out too high, most of all between sets of different size"
        )
    if held_out <= k:
        count = "1 held-out image" if held_out == 1 else f"{held_out} held-out images"
        notes.append(f"{count} and {k} features: too few for Frechet distances to the held-out images")
    return notes


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
    left_out = evaluation.get("left_out", {})
    for why in dict.fromkeys(left_out.values()):
        lines.append(f"left out: {', '.join(name for name in left_out if left_out[name] == why)} ({why})")
    lines += [f"note: {note}" for note in evaluation.get("notes", [])]
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
    """evaluation.json, then the sheet of images and the loss curves, as far as there are any; returns the files."""
    files = [write_evaluation(run, evaluation)]
    sheet = attempt(lambda: draw_sheet(panels_of(model, training_images(images, seed=0))))
    if isinstance(sheet, Missing):
        tqdm.write(f"no samples.png: {sheet}")
    else:
        files.append(save_figure(sheet, run.root / "samples.png"))
    if rows := run.metrics():
        files.append(save_figure(draw_losses(rows), run.root / "losses.png"))
        files.append(save_figure(draw_tails(rows), run.root / "tails.png"))
    return files


def panels_of(model: TrainedModel, real: Tensor) -> list[tuple[str, Tensor]]:
    """64 samples at 1 and 2 evaluations, and ``real`` images with what the model would best make of them."""
    reconstructed = model.space.decode(model.latents_of(real)[:64].to(model.device))
    sampled_images = [(name, model.images(64, model.sigmas(i + 1), seed=1)) for i, name in enumerate(SAMPLES)]
    return [*sampled_images, ("real", real[:64]), ("reconstructed", reconstructed)]


def write_evaluation(run: RunFolder, evaluation: dict[str, Any]) -> Path:
    """evaluation.json."""
    file = run.root / "evaluation.json"
    write_atomically(file, (as_json(evaluation, indent=2) + "\n").encode())
    return file
