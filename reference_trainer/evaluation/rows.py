"""A row of the table: a set of images against what it is compared with, or the reason why it could not be.

What cannot be measured is a ``Missing``, the reason, in the place of the images, features or row it should have been:
it passes through all that would be made of it, and ends below the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from reference_trainer.errors import UserError
from reference_trainer.evaluation.digit_classifier import DigitClassifier
from reference_trainer.evaluation.features import Features, scales_kernel
from reference_trainer.evaluation.metrics import frechet_distance, kernel_distance, precision_recall
from reference_trainer.evaluation.statistics import Statistics

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


def known(value: T | Missing) -> T:
    """``value``; inside ``attempt``, what is made of something missing is missing for the same reason.

    Raises:
        UserError: it is missing.
    """
    if isinstance(value, Missing):
        raise UserError(value)
    return value


def measure(
    others: Statistics | Missing,
    real: Statistics | Missing,
    features: Features,
    held_out: Statistics | Missing | None = None,
) -> Row | Missing:
    """All metrics of ``others`` against ``real``; of digits also which share looks like one.

    With enough ``held_out`` for a covariance, also the Frechet distance to these: a model that memorises comes
    close to the training images alone.
    """
    if isinstance(real, Missing):
        return Missing(f"nothing to compare with: {real}")
    if isinstance(others, Missing):
        return others
    row = attempt(lambda: compare(real, others, scales_kernel(features)))
    if isinstance(row, Missing):
        return row
    if isinstance(held_out, Statistics) and held_out.count > held_out.size:
        distance = frechet_distance(held_out, others)
        row |= {"frechet_held_out": distance} if math.isfinite(distance) else {}
    if isinstance(features, DigitClassifier):
        sure = features.probabilities_of(others.some).max(1).values >= 0.9
        row["sure_digits"] = float(sure.float().mean())
    return row


def compare(real: Statistics, fake: Statistics, scaled: bool = True) -> Row:
    """All metrics of one set of features against another; ``scaled``: see ``kernel_distance``.

    The Frechet distance is of all vectors, the rest of the first of each set, which it has kept.

    Raises:
        UserError: a single vector on a side, or features so far apart that a metric is not finite.
    """
    if (least := min(real.count, fake.count)) < 2:
        raise UserError(f"{least} image: a distance between sets needs 2 of each")
    precision, recall = precision_recall(real.some, fake.some)
    row = {
        "n": fake.count,
        "frechet": frechet_distance(real, fake),
        "kernel_x1000": kernel_distance(real.some, fake.some, scaled=scaled),
        "precision": precision,
        "recall": recall,
    }
    return _finite(row, fake)


def to_reconstructions(reconstructions: Statistics, fake: Statistics, scaled: bool = True) -> Row:
    """The distances of one set of features to that of the reconstructions; ``scaled``: see ``kernel_distance``.

    Raises:
        UserError: see ``compare``.
    """
    distance = frechet_distance(reconstructions, fake)
    kernel = kernel_distance(reconstructions.some, fake.some, scaled=scaled)
    return _finite({"frechet_rec": distance, "kernel_rec_x1000": kernel}, fake)


def _finite(row: Row, fake: Statistics) -> Row:
    if bad := [name for name, value in row.items() if not math.isfinite(value)]:
        raise UserError(f"{', '.join(bad)} not finite: the features go up to {float(fake.some.abs().max()):.1g}")
    return row


def in_digits(value: float, digits: int = 2) -> str:
    """A distance: of features that lie in 0 .. 1 all are below 1, and have three digits behind the point."""
    return f"{value:.{digits if abs(value) >= 1 or value == 0 else max(digits, 3)}f}"


def split_rows(rows: Mapping[str, Row | Missing]) -> dict[str, Any]:
    """What was measured under ``rows``, the reasons why not under ``left_out``."""
    return {
        "rows": {name: row for name, row in rows.items() if not isinstance(row, Missing)},
        "left_out": {name: row for name, row in rows.items() if isinstance(row, Missing)},
    }


def small_samples(rows: Mapping[str, Row | Missing], real: Statistics | Missing, held_out: int) -> list[str]:
    """What to know of figures from few images, as sentences."""
    if isinstance(real, Missing):
        return []
    n, k, notes = real.count, real.size, list[str]()
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
