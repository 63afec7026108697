"""Samples of a run trained by class: how many of each, and how often one is of the class asked for.

Axes: features [n, k], labels [n].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from reference_trainer.data.classes import spread_over
from reference_trainer.data.images import Digits, ImageSet
from reference_trainer.errors import UserError
from reference_trainer.evaluation.digit_classifier import DigitClassifier
from reference_trainer.evaluation.features import Features
from reference_trainer.evaluation.rows import Missing
from reference_trainer.evaluation.sets import SAMPLES, Rows
from reference_trainer.evaluation.statistics import Statistics
from reference_trainer.model import TrainedModel

ROWS, COLUMNS = 10, 10
"""Of the picture: classes, and images of each."""


def as_asked(
    vectors: Mapping[str, Statistics | Missing], model: TrainedModel, features: Features, seed: int
) -> dict[str, Tensor]:
    """Of the first 5000 samples of each set, bool ``[n]``: whether the classifier finds the digit asked for likeliest.

    Empty where the run is not trained by class, or not on the digits, or judged by other features.
    """
    classes = model.classes
    if classes is None or not isinstance(features, DigitClassifier) or not isinstance(model.config.data, Digits):
        return {}
    return {
        name: features.probabilities_of(those.some).argmax(1) == classes.proportional(len(those.some), seed)
        for name, those in vectors.items()
        if name in SAMPLES and isinstance(those, Statistics)
    }


def with_as_asked(
    rows: Rows, vectors: Mapping[str, Statistics | Missing], model: TrainedModel, features: Features, seed: int
) -> Rows:
    """``rows``, those of samples with ``as_asked``: the share that is of the class asked for."""
    shares = {name: float(right.float().mean()) for name, right in as_asked(vectors, model, features, seed).items()}
    return {
        name: row | {"as_asked": shares[name]} if name in shares and not isinstance(row, Missing) else row
        for name, row in rows.items()
    }


def about_classes(
    model: TrainedModel, vectors: Mapping[str, Statistics | Missing], features: Features, n: int, seed: int
) -> dict[str, Any]:
    """Guidance, and of each class its training images, its samples among ``n``, and which share is as asked."""
    assert model.classes is not None
    assert model.config.classes is not None
    labels, right = model.classes.proportional(n, seed), as_asked(vectors, model, features, seed)
    samples = torch.bincount(labels, minlength=len(model.classes.names)).tolist()
    rows: list[dict[str, Any]] = []
    for label, (name, images) in enumerate(zip(model.classes.names, model.classes.counts, strict=True)):
        row = {"label": label, "name": name, "images": images, "samples": samples[label]}
        if right and samples[label]:
            row["as_asked"] = {of: float(those[labels == label].float().mean()) for of, those in right.items()}
        rows.append(row)
    return {"guidance": model.config.classes.guidance, "rows": rows}


def panels_by_class(model: TrainedModel, images: ImageSet) -> tuple[list[str], list[tuple[str, Tensor]], int]:
    """Names, panels and columns of ``draw_classes``: samples at 1 and 2 evaluations, and real ones where there are.

    Raises:
        UserError: no class has samples; or see ``TrainedModel.images``.
    """
    classes = model.classes
    if classes is None or not any(classes.counts):
        raise UserError("there are no classes")
    shown = spread_over([label for label, count in enumerate(classes.counts) if count], ROWS)
    asked = torch.tensor(shown).repeat_interleave(COLUMNS)
    panels = [
        (name, model.images(len(asked), model.sigmas(i + 1), seed=1, labels=asked)) for i, name in enumerate(SAMPLES)
    ]
    if images.labels is not None:
        own = images.labels[~images.is_held_out]
        real = [images.train[torch.nonzero(own == label)[:COLUMNS, 0]] for label in shown]
        blank = [image.new_full((COLUMNS - len(image), *image.shape[1:]), 255) for image in real]
        panels.append(("real", torch.cat([part for pair in zip(real, blank, strict=True) for part in pair])))
    return [classes.called(label) for label in shown], panels, COLUMNS
