"""What an evaluation measures that no weight changes: the reference and the rows that bound, before training ends."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from threading import Event

from torch import Tensor

from reference_trainer.data.codecs import Foreign
from reference_trainer.data.images import ImageSet
from reference_trainer.data.stored import StoredImages
from reference_trainer.evaluation.features import Features, Imported
from reference_trainer.evaluation.kept import Kept
from reference_trainer.evaluation.reference import Reference, gathered, unbroken
from reference_trainer.evaluation.rows import Missing, attempt, known
from reference_trainer.evaluation.sets import (
    FITTED,
    Drawn,
    Rows,
    floor_rows,
    image_rows,
    latent_rows,
    without_training,
)
from reference_trainer.evaluation.statistics import Statistics
from reference_trainer.evaluation.training_set import BATCH, MAX_IMAGES, TrainingSet, held_out_images
from reference_trainer.machine import cores
from reference_trainer.model import TrainedModel


@dataclass(frozen=True)
class Beforehand:
    """All of ``evaluate`` but the samples; the same for every model of one run."""

    train: TrainingSet
    reference: Reference
    held_out: Tensor
    """uint8 ``[n, ch, h, w]``, at most ``MAX_IMAGES``."""
    held_out_real: Statistics | Missing
    """Their features."""
    rows: Rows
    """That bound; none where they were not asked for."""
    of_latents: Rows

    @staticmethod
    def of(
        model: TrainedModel,
        images: ImageSet,
        features: Features,
        seed: int = 0,
        bounds: bool = True,
        n: int = MAX_IMAGES,
        cache: Path | None = None,
        broken: Event | None = None,
    ) -> Beforehand:
        """Arguments as those of ``evaluate``; of ``model`` the weights are not looked at.

        Raises:
            Broken: ``broken`` was set meanwhile.
        """
        train, held_out = TrainingSet.of(images, seed, n, model.device), held_out_images(images, seed)
        broken = broken or Event()
        reference = Reference.of(model, train, features, kept_of(cache, train, features), broken)
        held_out_real = attempt(lambda: gathered(features, unbroken(held_out.split(BATCH), broken)))
        rows, of_latents = Rows(), Rows()
        if bounds:
            drawn = Drawn.of(model, features, without_training(model, reference, seed), broken=broken)
            decoded = reference.fitted is reference.images  # of a store, of which no latent is changed
            vectors = drawn.vectors | ({} if decoded else {FITTED: reference.fitted})
            rows = image_rows(vectors, reference, held_out_real)
            if not isinstance(row := rows.get(FITTED, Missing("")), Missing):
                row["psnr"] = known(reference.psnr)
            rows |= floor_rows(reference, held_out_real)
            of_latents = latent_rows(drawn.latents, reference, bounds=True)
        return Beforehand(train, reference, held_out, held_out_real, rows, of_latents)


def kept_of(cache: Path | None, train: TrainingSet, features: Features) -> Kept | None:
    """Ours are computed as fast as they are read."""
    if cache is None or not isinstance(features, Imported):
        return None
    kept = attempt(lambda: Kept.of(cache, train, features))
    return None if isinstance(kept, Missing) else kept  # the features fail: the rows say why


def may_run_beside(model: TrainedModel, images: ImageSet, features: Features) -> bool:
    """Whether all of it may be measured on another core while a model is trained.

    Not where it would take memory or time from the training on a GPU, nor with a network of the user's, which may not
    be made for that or draw from torch's own generators.
    """
    of_the_users = isinstance(features, Imported) or isinstance(model.space.codec, Foreign)
    return model.device.type == "cpu" and cores() > 1 and not of_the_users and not isinstance(images, StoredImages)
