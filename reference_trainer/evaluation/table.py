"""An evaluation as lines for a terminal: images, latents, and what could not be measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reference_trainer.errors import printable
from reference_trainer.evaluation.features import PooledLatents
from reference_trainer.evaluation.learned import reading
from reference_trainer.evaluation.manifest import in_words
from reference_trainer.evaluation.rows import in_digits

NAME = 32
"""Width of the first column."""
DISTANCE = "distance"
"""In the place of a format: ``in_digits``."""
IMAGES = (
    ("n", "n", 6, "d"),
    ("frechet", "Frechet", 10, DISTANCE),
    ("kernel_x1000", "kernel", 9, ".2f"),
    ("frechet_rec", "Frechet rec", 13, DISTANCE),
    ("kernel_rec_x1000", "kernel rec", 12, ".2f"),
    ("precision", "precision", 11, ".3f"),
    ("recall", "recall", 8, ".3f"),
    ("frechet_held_out", "held-out", 10, DISTANCE),
)
"""Key of a row, heading, width, format."""
SURE = ("sure_digits", "p >= .9", 9, ".3f")
AS_ASKED = ("as_asked", "as asked", 10, ".3f")
MOST_CLASSES = 20
"""Lines about classes."""
LATENTS = (
    ("n", "n", 6, "d"),
    ("whitened_frechet", "Frechet", 10, DISTANCE),
    ("kernel_x1000", "kernel", 9, ".2f"),
    ("precision", "precision", 11, ".3f"),
    ("recall", "recall", 8, ".3f"),
    ("variance_first_4", "var 1-4", 10, ".2f"),
    ("variance_next_12", "5-16", 7, ".2f"),
    ("variance_rest", "17-", 7, ".2f"),
)
Column = tuple[str, str, int, str]


def as_table(evaluation: Mapping[str, Any]) -> str:
    """The evaluation as lines; a figure that it lacks, made by an earlier version or not measured, is a dash."""
    lines = [
        f"step {evaluation['step']}, in {evaluation['features']},",
        *([f"averaged weights: {evaluation['average']},"] if "average" in evaluation else []),
        f"against {evaluation['reference']}; rec: against their reconstructions, encoded and decoded; precision and "
        "recall on up to 2000 of each, held-out: Frechet distance to the held-out images:",
        *_lines(evaluation["rows"], columns_of(evaluation)),
        *about_autoencoder(evaluation),
        *_about_latents(evaluation.get("latents")),
        *_about_classes(evaluation.get("classes")),
        *(reading(evaluation["learned"]) if "learned" in evaluation else []),
        *remarks(evaluation),
    ]
    if "manifest" in evaluation:
        lines.append(f"measured with: {in_words(evaluation['manifest'])}")
    return "\n".join(lines)


def columns_of(evaluation: Mapping[str, Any]) -> tuple[Column, ...]:
    """The columns of images that this evaluation has."""
    columns = (*IMAGES, *((SURE,) if "classifier_accuracy_held_out" in evaluation else ()))
    return columns + ((AS_ASKED,) if any("as_asked" in row for row in evaluation["rows"].values()) else ())


def remarks(evaluation: Mapping[str, Any]) -> list[str]:
    """What stands below the tables: how good the classifier is, what was left out and why, what to know of it."""
    lines = []
    if "classifier_accuracy_held_out" in evaluation:
        lines.append(f"the classifier is right on {evaluation['classifier_accuracy_held_out']:.1%} of held-out digits")
    left_out = evaluation.get("left_out", {})
    for why in dict.fromkeys(left_out.values()):
        lines.append(f"left out: {', '.join(name for name in left_out if left_out[name] == why)} ({why})")
    return lines + [f"note: {note}" for note in evaluation.get("notes", [])]


def formatted(value: float | None, form: str) -> str:
    """``value`` by the format of its column; a dash for what was not measured."""
    if value is None:
        return "-"
    return in_digits(value) if form == DISTANCE else f"{value:{form}}"


def _lines(rows: Mapping[str, Mapping[str, float]], columns: tuple[Column, ...]) -> list[str]:
    lines = [" " * NAME + "".join(f"{heading:>{width}}" for _, heading, width, _ in columns)]
    for name, row in rows.items():
        cells = (f"{formatted(row.get(key), form):>{width}}" for key, _, width, form in columns)
        lines.append(f"{name:{NAME}}" + "".join(cells))
    return lines


def _about_latents(latents: Mapping[str, Any] | None) -> list[str]:
    if not latents or not latents["rows"]:
        return []
    d, k = latents["dimensions"], latents["components"]
    left_out = f", {d - k} components of (nearly) no variance left out" if k < d else ""
    return [
        f"latents, d = {d}, against those of the training images: Frechet distance of whitened latents{left_out}; "
        "kernel, precision and recall; variance over the data's in the first 4 principal components, the next 12, the "
        "rest:",
        *_lines(latents["rows"], LATENTS),
    ]


def _about_classes(classes: Mapping[str, Any] | None) -> list[str]:
    """Images of each class, how many samples were asked for, and how often one is of the class asked for."""
    if not classes:
        return []
    rows = classes["rows"]
    judged = list(dict.fromkeys(name for row in rows for name in row.get("as_asked", {})))
    lines = [
        f"{len(rows)} classes, samples in the proportions of the training images, guidance {classes['guidance']:g}"
        + ("; as asked: the classifier's most probable class is the one asked for:" if judged else ":"),
        f"{'class':{NAME}}{'images':>10}{'samples':>10}" + "".join(f"{f'{name}':>16}" for name in judged),
    ]
    for row in rows[:MOST_CLASSES]:
        shares = (row.get("as_asked", {}).get(name) for name in judged)
        cells = "".join(f"{'-':>16}" if share is None else f"{share:16.3f}" for share in shares)
        lines.append(f"{printable(row['name']):{NAME}}{row['images']:10d}{row['samples']:10d}{cells}")
    if len(rows) > MOST_CLASSES:
        counts = [row["images"] for row in rows]
        lines.append(
            f"and {len(rows) - MOST_CLASSES} more, in evaluation.json; of all, {min(counts)} to {max(counts)} images"
        )
    return lines


def about_autoencoder(evaluation: Mapping[str, Any]) -> list[str]:
    """PSNR of the reconstructions, and that features of the autoencoder's own cannot judge it, as lines."""
    row, lines = evaluation["rows"].get("reconstructions", {}), []
    if "psnr" in row:
        lines.append(
            f"reconstructions: PSNR {row['psnr']:.1f} dB to the images themselves (pixels 0 .. 255, mean over the "
            f"{row['n']} images)"
        )
    if evaluation["features"] == PooledLatents.name:
        shown = "PSNR and samples.png show it" if "psnr" in row else "reconstructions beside the images show it"
        lines.append(
            "these features are the run's own autoencoder's and cannot judge it: what it loses, they do not see "
            f"({shown})"
        )
    return lines
