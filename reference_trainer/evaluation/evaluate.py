"""What a run is worth: metrics with their floor, bound and ceiling, and the pictures to look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from reference_trainer.data.codecs import notes_of
from reference_trainer.data.images import Digits, ImageSet
from reference_trainer.data.stored import StoredImages
from reference_trainer.evaluation.between_ranks import samples_between
from reference_trainer.evaluation.by_class import about_classes, panels_by_class, with_as_asked
from reference_trainer.evaluation.digit_classifier import DigitClassifier, load_digit_classifier
from reference_trainer.evaluation.features import Features, Imported, PooledLatents, tried
from reference_trainer.evaluation.kept import Kept
from reference_trainer.evaluation.latent_space import few_latents
from reference_trainer.evaluation.manifest import manifest_of
from reference_trainer.evaluation.pictures import draw_classes, draw_losses, draw_sheet, draw_tails
from reference_trainer.evaluation.reference import Reference, gathered
from reference_trainer.evaluation.rows import Missing, Row, attempt, known, small_samples
from reference_trainer.evaluation.sets import (
    FITTED,
    LATENTS,
    SAMPLES,
    Drawn,
    figures,
    floor_rows,
    further_samples,
    image_rows,
    latent_rows,
    samplers,
    without_training,
)
from reference_trainer.evaluation.training_set import BATCH, MAX_IMAGES, TrainingSet, training_images
from reference_trainer.files import as_json, write_atomically
from reference_trainer.model import TrainedModel
from reference_trainer.plotting import save_figure
from reference_trainer.ranks import Ranks
from reference_trainer.run import EVALUATIONS, RunFolder


def choose_features(given: Features | None, model: TrainedModel) -> Features:
    """Those the user has given, else the digit classifier for digits, else the autoencoder's latents."""
    if given is not None:
        return given
    if isinstance(model.config.data, Digits):
        return load_digit_classifier()
    return PooledLatents(model.space.codec, model.device)


def evaluate(
    model: TrainedModel,
    images: ImageSet,
    features: Features,
    seed: int = 0,
    bounds: bool = True,
    n: int = MAX_IMAGES,
    cache: Path | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
) -> dict[str, Any]:
    """Compare samples at 1 and 2 evaluations, and what bounds them, with the training images.

    Every row is a set of images against the (up to n) training images; what was drawn also against their
    reconstructions, since through a lossy autoencoder the distance to the images is mostly the autoencoder's; and,
    under ``latents``, in the latent space. ``floor: ...`` rows are real images, ``bound: ...`` has the mean and the
    covariance of the latents and nothing else, ``ceiling: ...`` is white noise in the place of latents.
    ``reconstructions`` are the latents of the run decoded, outliers and clipping included: what a model that fits its
    data exactly would draw. What cannot be measured stands under ``left_out`` with the reason, and under ``manifest``
    how all of it was measured.

    Beyond 5000 images are drawn, decoded and measured batch by batch. Then Frechet distances are of all of them;
    kernel distances, precision, recall and what is compared in latents, and the rows that bound, are of the first 5000.

    Args:
        bounds: False leaves out all rows but the samples': they are the same for every model. Their time then goes to
            the samples and, about as much, to the reference.
        n: samples, and training images, as far as there are so many.
        cache: folder where the reference's features are kept, if they are not ours.
        ranks: processes that draw the samples between them, which changes no digit; all call this. The leading one
            does the rest, the others return nothing.
    """
    train, held_out = TrainingSet.of(images, seed, n, model.device), images.held_out[:MAX_IMAGES]
    ahead = samples_between(model, features, train.count, seed, ranks) if ranks.world > 1 else None
    if not ranks.leads:
        return {}
    reference = Reference.of(model, train, features, _kept(cache, train, features))
    held_out_real = attempt(lambda: gathered(features, held_out.split(BATCH)))
    makers = without_training(model, reference, seed) if bounds else {}
    if ahead is None:
        makers = samplers(model, len(train.first), seed) | makers
    drawn = Drawn.of(model, features, makers, further_samples(model, train.count, seed))
    drawn = drawn if ahead is None else ahead | drawn
    stored = isinstance(images, StoredImages)  # the images of a store are reconstructions themselves
    vectors = drawn.vectors | ({FITTED: reference.fitted} if bounds and not stored else {})
    rows = image_rows(vectors, reference, held_out_real)
    rows = with_as_asked(rows, vectors, model, features, seed)
    if bounds:
        if not isinstance(row := rows.get(FITTED, Missing("")), Missing):
            row["psnr"] = known(reference.psnr)
        rows |= floor_rows(reference, held_out_real)
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
        **figures(rows, latent_rows(drawn.latents, reference, bounds), reference),
        "notes": [*small_samples(rows, reference.images, len(held_out)), *few_latents(reference.components)],
    }
    if model.classes is not None:
        out["classes"] = about_classes(model, vectors, features, len(train.first), seed)
    if isinstance(features, DigitClassifier) and images.labels is not None:
        labels = images.labels[images.is_held_out]
        out["classifier_accuracy_held_out"] = features.accuracy(images.held_out, labels)
    return out


def _kept(cache: Path | None, train: TrainingSet, features: Features) -> Kept | None:
    """Ours are computed as fast as they are read."""
    if cache is None or not isinstance(features, Imported):
        return None
    kept = attempt(lambda: Kept.of(cache, train, features))
    return None if isinstance(kept, Missing) else kept  # the features fail: the rows say why


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
    ) -> None:
        """``features``: as ``choose_features`` takes them; ``cache``: as ``evaluate``."""
        self.run, self.images, self.given, self.seed, self.cache = run, images, features, seed, cache
        self._reference: Reference | None = None
        self._count: int | None = None
        self._ahead: Drawn | None = None
        self._manifest: dict[str, Any] = {}

    def prepare(self, model: TrainedModel) -> None:
        """Try the features on two images.

        Raises:
            UserError: they cannot be computed.
        """
        tried(choose_features(self.given, model), self.images.pixels)

    def share(self, model: TrainedModel, ranks: Ranks, stopped: Callable[[], bool]) -> bool:
        """All ranks draw the samples between them, for the leading one to be called next; False: ``stopped`` first."""
        if ranks.world == 1:
            return True
        if self._count is None:
            self._count = TrainingSet.of(self.images, self.seed, device=model.device).count
        features = choose_features(self.given, model)
        self._ahead = samples_between(model, features, self._count, self.seed, ranks, stopped)
        return self._ahead is not None

    def __call__(self, model: TrainedModel) -> None:
        if self._reference is None:
            train = TrainingSet.of(self.images, self.seed, device=model.device)
            features = choose_features(self.given, model)
            self._reference = Reference.of(model, train, features, _kept(self.cache, train, features))
            self._manifest = manifest_of(model, train, features)
        reference = self._reference
        drawn, self._ahead = self._ahead, None
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
    """evaluation.json, then the sheet of images and the loss curves, as far as there are any; returns the files."""
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
    if rows := run.metrics():
        files.append(save_figure(draw_losses(rows), run.root / "losses.png"))
        files.append(save_figure(draw_tails(rows), run.root / "tails.png"))
    return files


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
