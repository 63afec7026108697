"""Statistics of the reference on disk, found again by what they are of."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from reference_trainer.data.latents import not_finite
from reference_trainer.errors import UserError
from reference_trainer.evaluation.features import PROBED, Features, identity_of, vectors_of
from reference_trainer.evaluation.identity import digest_of
from reference_trainer.evaluation.statistics import Statistics
from reference_trainer.evaluation.training_set import TrainingSet
from reference_trainer.files import load_tensors, save_tensors

FORMAT = 1
"""Of what is kept; another one, another name."""


@dataclass(frozen=True)
class Kept:
    """A folder, and what the statistics in it are of."""

    folder: Path
    key: str

    @staticmethod
    def of(folder: Path, train: TrainingSet, features: Features) -> Kept:
        """The key is made of the images (all of them, which are taken and in which order), of the network's digest, its
        resize, and of every bit of what it makes of a few of the images: another network, machine or version that
        rounds differently finds nothing.

        Raises:
            UserError: see ``vectors_of``.
        """
        few = train.first[:PROBED]
        identity = identity_of(features, few.shape[1:])
        made = digest_of({"pixels": few, "features": vectors_of(few, features)})
        said = repr([FORMAT, train.images.fingerprint(), train.count, train.seed, identity, made])
        return Kept(folder, hashlib.sha256(said.encode()).hexdigest())

    def also(self, tensor: Tensor) -> Kept:
        """Statistics that also depend on ``tensor``."""
        return Kept(self.folder, hashlib.sha256((self.key + digest_of({"": tensor})).encode()).hexdigest())

    def once(self, make: Callable[[], Statistics]) -> Statistics:
        """What is kept, else what ``make`` gives, kept from now on unless some of it is not finite."""
        file = self.folder / f"features-{self.key[:16]}.safetensors"
        if file.is_file():
            try:
                tensors, about = load_tensors(file)
                found = Statistics(int(about["count"]), **tensors)
                if about["key"] == self.key and _finite(found):
                    return found
                tqdm.write(f"computing again what {file} should hold")
            except (UserError, KeyError, TypeError, ValueError) as error:
                tqdm.write(f"computing the reference's features again: {error}")
        made = make()
        if _finite(made):
            try:
                save_tensors(file, made.tensors(), {"count": made.count, "key": self.key})
            except UserError as error:
                tqdm.write(f"the reference's features are not kept: {error}")
        return made


def _finite(statistics: Statistics) -> bool:
    return not any(not_finite(tensor.reshape(1, -1)) for tensor in statistics.tensors().values())
