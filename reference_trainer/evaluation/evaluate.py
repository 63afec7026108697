"""What a run is worth: metrics with their floor, bound and ceiling, and the pictures to look at."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from torch import Tensor
from tqdm import tqdm

from reference_trainer.data.codecs import notes_of
from reference_trainer.data.images import Digits, ImageSet
from reference_trainer.data.photographs import Photographs
from reference_trainer.data.stored import StoredImages
from reference_trainer.evaluation.beforehand import Beforehand, may_run_beside
from reference_trainer.evaluation.between_ranks import samples_between
from reference_trainer.evaluation.by_class import about_classes, panels_by_class, with_as_asked
from reference_trainer.evaluation.digit_classifier import DigitClassifier, load_digit_classifier
from reference_trainer.evaluation.features import Features, PooledLatents, tried
from reference_trainer.evaluation.latent_space import GROUPS, few_latents
from reference_trainer.evaluation.learned import what_was_learned
from reference_trainer.evaluation.manifest import manifest_of
from reference_trainer.evaluation.pictures import draw_classes, draw_learned, draw_losses, draw_sheet, draw_tails
from reference_trainer.evaluation.reference import Reference
from reference_trainer.evaluation.report import write_page
from reference_trainer.evaluation.rows import Missing, Row, attempt, known, small_samples
from reference_trainer.evaluation.sets import (
    LATENTS,
    SAMPLES,
    Drawn,
    Rows,
    figures,
    further_samples,
    image_rows,
    latent_rows,
    samplers,
)
from reference_trainer.evaluation.training_set import MAX_IMAGES, TrainingSet, training_images
from reference_trainer.evaluation.wavelets import Wavelets
from reference_trainer.files import as_json, write_atomically
from reference_trainer.model import TrainedModel
from reference_trainer.plotting import save_figure
from reference_trainer.ranks import Ranks
from reference_trainer.run import EVALUATIONS, RunFolder

OF_A_STORE = (
    "the images of a store are what its latents decode to: distances to them are those to the reconstructions, and do "
    "not compare with distances to images"
)
OFF = 1.15
"""Times the variance of the latents, or 1 over that: beyond it a note says so. The recipe itself is up to 1.14 off
(docs/evidence.md, larger latents)."""


def choose_features(given: Features | None, model: TrainedModel) -> Features:
    """Those the user has given, else the digit classifier for digits, wavelets for the photographs that packages ship,
    the autoencoder's latents for all others."""
    if given is not None:
        return given
    if isinstance(model.config.data, Digits):
        return load_digit_classifier()
    if isinstance(model.config.data, Photographs):
        return Wavelets()
    return PooledLatents(model.space.codec, model.device)


def evaluate(
    model: TrainedModel,
    images: ImageSet,
    features: Features,
    seed: int = 0,
    bounds: bool = True,
    n: int = MAX_IMAGES,
    cache: Path | None = None,
    ahead: Beforehand | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
) -> dict[str, Any]:
    """Compare samples at 1 and 2 evaluations, and what bounds them, with the training images.

    Every row is a set of images against the (up to n) training images; what was drawn also against their
    reconstructions, since through a lossy autoencoder the distance to the images is mostly the autoencoder's; and,
    under ``latents``, in the latent space. ``floor: ...`` rows are real images, ``bound: ...`` has the mean and the
    covariance of the latents and nothing else, ``ceiling: ...`` is white noise in the place of latents.
    ``reconstructions`` are the latents of the run decoded, outliers and clipping included: what a model that fits its
    data exactly would draw. What cannot be measured stands under ``left_out`` with the reason, and under ``manifest``
    how all of it was measured; with the bounds, under ``learned``, what f does by noise level (``what_was_learned``).

    Beyond 5000 images are drawn, decoded and measured batch by batch. Then Frechet distances are of all of them;
    kernel distances, precision, recall and what is compared in latents, and the rows that bound, are of the first 5000.

    Args:
        bounds: False leaves out all rows but the samples': they are the same for every model. Their time then goes to
            the samples and, about as much, to the reference.
        n: samples, and training images, as far as there are so many.
        cache: folder where the reference's features are kept, if they are not ours.
        ahead: what was measured before, of the same images, features and arguments.
        ranks: processes that draw the samples between them, which changes no digit; all call this. The leading one
            does the rest, the others return nothing.
    """
    drawn = None
    if ranks.world > 1:
        count = TrainingSet.of(images, seed, n, model.device).count
        drawn = samples_between(model, features, count, seed, ranks)
    if not ranks.leads:
        return {}
    done = ahead or Beforehand.of(model, images, features, seed, bounds, n, cache)
    train, reference = done.train, done.reference
    if drawn is None:
        further = further_samples(model, train.count, seed)
        drawn = Drawn.of(model, features, samplers(model, min(train.count, MAX_IMAGES), seed), further)
    rows = image_rows(drawn.vectors, reference, done.held_out_real)
    rows = with_as_asked(rows, drawn.vectors, model, features, seed) | done.rows
    of_latents = latent_rows(drawn.latents, reference, bounds=False) | done.of_latents
    sigmas = {name: attempt(partial(model.sigmas, i + 1)) for i, name in enumerate(SAMPLES)}
    other = ", which are not those the run was made from" if model.changes else ""
    out = {
        "step": model.step,
        **({"average": model.average} if model.average else {}),
        "seed": seed,
        "features": features.name,
        "reference": f"{train.count} training images of {images.name}{other}",
        "autoencoder": notes_of(model.space.codec),
        "manifest": manifest_of(model, train, features),
        "sigmas": {name: levels for name, levels in sigmas.items() if not isinstance(levels, Missing)},
        **figures(rows, of_latents, reference),
        "notes": [
            *([OF_A_STORE] if isinstance(images, StoredImages) else []),
            *about_moments(model, of_latents),
            *small_samples(rows, reference.images, len(done.held_out)),
            *few_latents(reference.components),
        ],
    }
    if bounds:
        learned = attempt(lambda: what_was_learned(model, images, known(reference.latents), seed))
        if isinstance(learned, Missing):
            out["left_out"]["what was learned"] = learned
        else:
            out["learned"] = learned
    if model.classes is not None:
        out["classes"] = about_classes(model, drawn.vectors, features, min(train.count, MAX_IMAGES), seed)
    if isinstance(features, DigitClassifier) and images.labels is not None:
        labels = images.labels[images.is_held_out]
        out["classifier_accuracy_held_out"] = features.accuracy(images.held_out, labels)
    return out


def about_moments(model: TrainedModel, of_latents: Rows) -> list[str]:
    """That samples were moved, or that it would be worth a try."""
    if model.moments is not None:
        return ["samples are moved to the mean and the covariance of the latents"]
    row = of_latents.get(SAMPLES[0], Missing(""))
    if isinstance(row, Missing) or not (ratios := [row[name] for name in GROUPS if name in row]):
        return []
    furthest = max(ratios, key=lambda ratio: abs(math.log(max(ratio, 1e-6))))
    if 1 / OFF <= furthest <= OFF:
        return []
    return [
        f"samples have {furthest:.2f} times the variance of the latents in some components: train longer, or see what "
        "evaluate --match-moments gives"
    ]


class Evaluator:
    """Shown a model, adds a row to the run's evaluations.jsonl: ``evaluate`` without floor and ceiling.

    The first time costs about twice as much as each further: the training images are encoded, decoded, and go
    through the features twice, which is not done again.
    """

    def __init__(
        self,
        run: RunFolder,
        images: ImageSet,
        features: Features | None = None,
        seed: int = 0,
        cache: Path | None = None,
        bounds_beside: bool | None = None,
    ) -> None:
        """
        Args:
            features: as ``choose_features`` takes them.
            cache: as ``evaluate``.
            bounds_beside: measure what needs no weights while training goes on, where that takes nothing from it; True:
                with the rows that bound, for the last evaluation.
        """
        self.run, self.images, self.given, self.seed, self.cache = run, images, features, seed, cache
        self._bounds, self._ahead = bounds_beside, None if bounds_beside is None else ThreadPoolExecutor(1)
        self._measured: Future[Beforehand] | None = None
        self._broken = Event()
        self._reference: Reference | None = None
        self._count: int | None = None
        self._shared: Drawn | None = None
        self._manifest: dict[str, Any] = {}

    def prepare(self, model: TrainedModel) -> None:
        """Try the features on two images.

        Raises:
            UserError: they cannot be computed.
        """
        features = tried(choose_features(self.given, model), self.images.pixels)
        if self._bounds is not None and self._ahead is not None and may_run_beside(model, self.images, features):
            self._measured = self._ahead.submit(
                Beforehand.of,
                *(model, self.images, features, self.seed, self._bounds),
                cache=self.cache,
                broken=self._broken,
            )

    def close(self) -> None:
        """Leave what is still being measured: no process shall outlive its training for that."""
        self._broken.set()

    def beforehand(self) -> Beforehand | None:
        """What was measured while training went on, waited for; None: nothing was."""
        return None if self._measured is None else self._measured.result()

    def share(self, model: TrainedModel, ranks: Ranks, stopped: Callable[[], bool]) -> bool:
        """All ranks draw the samples between them, for the leading one to be called next; False: ``stopped`` first."""
        if ranks.world == 1:
            return True
        if self._count is None:
            self._count = TrainingSet.of(self.images, self.seed, device=model.device).count
        features = choose_features(self.given, model)
        self._shared = samples_between(model, features, self._count, self.seed, ranks, stopped)
        return self._shared is not None

    def __call__(self, model: TrainedModel) -> None:
        if self._reference is None:
            found = self.beforehand()
            if found is None:
                features = choose_features(self.given, model)
                found = Beforehand.of(model, self.images, features, self.seed, bounds=False, cache=self.cache)
            self._reference = found.reference
            self._manifest = manifest_of(model, found.train, found.reference.features)
        reference = self._reference
        drawn, self._shared = self._shared, None
        if drawn is None:
            drawn = Drawn.of(model, reference.features, samplers(model, reference.count, self.seed))
        rows, of_latents = image_rows(drawn.vectors, reference), latent_rows(drawn.latents, reference, bounds=False)
        about = {"step": model.step, "seed": self.seed, "features": reference.features.name}
        about |= {"manifest": self._manifest}
        rows = with_as_asked(rows, drawn.vectors, model, reference.features, self.seed)
        record(self.run, about | figures(rows, of_latents, reference))


def record(run: RunFolder, evaluation: dict[str, Any]) -> None:
    """``brief(evaluation)`` as the last row of evaluations.jsonl.

    Takes the place of a row of the same step: a finished run that is started again is evaluated again.
    """
    run.keep_rows_until(evaluation["step"] - 1, [EVALUATIONS])
    run.append_row(EVALUATIONS, brief(evaluation))


def brief(evaluation: dict[str, Any]) -> dict[str, Any]:
    """What changes while training: the samples' part of what ``evaluate`` gives."""
    out = {key: evaluation[key] for key in ("step", "seed", "features")} | {"rows": _samples(evaluation["rows"])}
    if "manifest" in evaluation:  # not of an earlier version
        out["manifest"] = evaluation["manifest"]
    if left_out := {
        name: why for name, why in evaluation.get("left_out", {}).items() if name.startswith((*SAMPLES, LATENTS))
    }:
        out["left_out"] = left_out
    if LATENTS in evaluation:
        out[LATENTS] = evaluation[LATENTS] | {"rows": _samples(evaluation[LATENTS]["rows"])}
    return out


def _samples(rows: Mapping[str, Row]) -> dict[str, Row]:
    return {name: row for name, row in rows.items() if name in SAMPLES}


def write_report(run: RunFolder, model: TrainedModel, images: ImageSet, evaluation: dict[str, Any]) -> list[Path]:
    """evaluation.json, the sheet of images and the curves, as far as there are any, and all of it as a page.

    Returns:
        The files, the page first.
    """
    files = [write_evaluation(run, evaluation)]
    stored = isinstance(images, StoredImages)
    sheet = attempt(lambda: draw_sheet(panels_of(model, training_images(images, seed=0), stored)))
    if isinstance(sheet, Missing):
        tqdm.write(f"no samples.png: {sheet}")
    else:
        files.append(save_figure(sheet, run.root / "samples.png"))
    if model.classes is not None:
        by_class = attempt(lambda: draw_classes(*panels_by_class(model, images)))
        if isinstance(by_class, Missing):
            tqdm.write(f"no classes.png: {by_class}")
        else:
            files.append(save_figure(by_class, run.root / "classes.png"))
    if "learned" in evaluation:
        files.append(save_figure(draw_learned(evaluation["learned"]), run.root / "learned.png"))
    if rows := run.metrics():
        files.append(save_figure(draw_losses(rows), run.root / "losses.png"))
        files.append(save_figure(draw_tails(rows), run.root / "tails.png"))
    return [write_page(run, evaluation, [file for file in files if file.suffix == ".png"]), *files]


def panels_of(model: TrainedModel, real: Tensor, stored: bool = False) -> list[tuple[str, Tensor]]:
    """64 samples at 1 and 2 evaluations, and ``real`` images with what the model would best make of them.

    Args:
        stored: ``real`` are latents of a store, decoded: reconstructions already, and no image to set beside them.
    """
    sampled_images = [(name, model.images(64, model.sigmas(i + 1), seed=1)) for i, name in enumerate(SAMPLES)]
    if stored:
        return [*sampled_images, ("the store's latents, decoded", real[:64])]
    reconstructed = model.space.decode(model.latents_of(real)[:64].to(model.device))
    return [*sampled_images, ("real", real[:64]), ("reconstructed", reconstructed)]


def write_evaluation(run: RunFolder, evaluation: dict[str, Any], name: str = "evaluation.json") -> Path:
    """The file ``name`` of the run."""
    file = run.root / name
    write_atomically(file, (as_json(evaluation, indent=2) + "\n").encode())
    return file
