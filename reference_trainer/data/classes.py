"""Classes of a data set: what a configuration says of them, and their names and counts, kept with the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from reference_trainer.command import did_you_mean
from reference_trainer.data.images import ImageSet
from reference_trainer.errors import UserError, printable
from reference_trainer.files import as_json, write_atomically
from robustcm.checks import LARGEST, need_real
from robustcm.randomness import Stream, step_generator

FEW = 12
"""Names that a message lists."""


@dataclass(frozen=True, kw_only=True)
class ByClass:
    """The network is told the class of each sample: the digits', the class folders', those of the store."""

    dropout: float = 0.1
    """Share of the labels that training hides, 0 to 1: the network learns the unconditional samples, too, which
    guidance needs."""
    guidance: float = 1.0
    """Weight w of classifier-free guidance where samples are drawn, 0 or more: f = unconditional + w (conditional -
    unconditional). 1: none, at half the cost of any other but 0. Above 1 it extrapolates outputs, see
    robustcm.guidance."""
    coupled_within: bool = True
    """Pair noise and data within each class: paired across classes, the noise tells the class, and samples asked for
    by class come out of noise that does not."""

    def __post_init__(self) -> None:
        need_real(self, "dropout", least=0, below=1)
        need_real(self, "guidance", least=0, most=LARGEST)
        if self.guidance != 1 and not self.dropout:
            raise ValueError(f"guidance={self.guidance:g} needs samples without a class to learn from: dropout above 0")


@dataclass(frozen=True)
class Classes:
    """The classes that a run is trained on."""

    names: tuple[str, ...]
    """Of the labels 0, 1, ...."""
    counts: tuple[int, ...]
    """Training images of each."""
    fingerprint: str
    """Of the labels of all training images, in their order."""

    @staticmethod
    def of(images: ImageSet) -> Classes:
        """Those of the training images.

        Raises:
            UserError: they have no labels, or labels that are no class.
        """
        labels, names = images.train_labels, images.classes
        if labels is None:
            raise UserError(f"{printable(images.name)} has no labels to train by class on")
        if strange := sorted({int(label) for label in labels.unique() if not 0 <= int(label) < len(names)}):
            raise UserError(
                f"{printable(images.name)} has the label {strange[0]}, expected 0 to {len(names) - 1}: mend the labels"
            )
        counts = torch.bincount(labels, minlength=len(names)).tolist()
        return Classes(names, tuple(counts), hashlib.sha256(labels.numpy().tobytes()).hexdigest()[:16])

    def save(self, file: Path) -> None:
        """See ``write_atomically``."""
        write_atomically(file, (as_json(asdict(self), indent=1) + "\n").encode())

    @staticmethod
    def load(file: Path) -> Classes:
        """The inverse.

        Raises:
            UserError: it is missing, or none of ours.
        """
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            names, counts = tuple(map(str, found["names"])), tuple(map(int, found["counts"]))
            if len(names) != len(counts) or min(counts) < 0 or not sum(counts):
                raise ValueError("its names and counts do not fit")
            return Classes(names, counts, str(found["fingerprint"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"cannot read the classes of the run in {file} ({' '.join(str(error).split())}): put a copy back"
            ) from error

    @property
    def empty(self) -> tuple[int, ...]:
        """Labels without a training image."""
        return tuple(label for label, count in enumerate(self.counts) if not count)

    def called(self, label: int) -> str:
        """The class as a message names it."""
        name = printable(self.names[label])
        return name if name == str(label) else f"{label} ({name})"

    def about_empty(self) -> str:
        """A line on the classes that have no training images; nothing where there are none."""
        if not (empty := self.empty):
            return ""
        shown = ", ".join(self.called(label) for label in empty[:3])
        more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
        return f"no training images of class {shown}{more}: no samples will be drawn of it"

    def label(self, word: str) -> int:
        """The label of what a user calls a class: its name, or its number.

        Raises:
            UserError: there is none, or nothing of it was trained on.
        """
        found = self.names.index(word) if word in self.names else -1
        if found < 0 and word.isdecimal() and len(word) < 10 and int(word) < len(self.names):
            found = int(word)
        if found < 0:
            few = map(printable, self.names[:FEW])
            there = f"{', '.join(few)}{', ...' if len(self.names) > FEW else ''}"
            hint = did_you_mean(word, self.names) or f": there are {there}"
            raise UserError(f"--label {printable(word)[:60]}: the run has no such class{hint}")
        if not self.counts[found]:
            raise UserError(f"--label {printable(word)}: the run had no training images of class {self.called(found)}")
        return found

    def proportional(self, n: int, seed: int) -> Tensor:
        """Labels ``[n]`` int64 in the proportions of the training images, shuffled; a function of ``seed``.

        Each class gets its share of n rounded down, and those that lost most by that one more; of equal ones the
        seed picks.
        """
        generator = step_generator(seed, 0, Stream.CLASSES)
        total, ties = sum(self.counts), torch.randperm(len(self.counts), generator=generator).tolist()
        drawn = [n * count // total for count in self.counts]
        lost = [n * count % total for count in self.counts]
        order = sorted(range(len(drawn)), key=lambda label: (-lost[label], ties[label]))
        for label in order[: n - sum(drawn)]:
            drawn[label] += 1
        labels = torch.repeat_interleave(torch.arange(len(drawn)), torch.tensor(drawn))
        return labels[torch.randperm(n, generator=generator)]

    def rows(self, n: int) -> list[tuple[int, int]]:
        """Which labels a picture of ``n`` images shows, and how many of each: as even as can be, the first ones more.

        Of more classes than images some, evenly over all.
        """
        there = [label for label, count in enumerate(self.counts) if count]
        kept = spread_over(there, n)
        each, more = divmod(n, len(kept))
        return [(label, each + (i < more)) for i, label in enumerate(kept)]


def spread_over(labels: Sequence[int], most: int) -> list[int]:
    """Up to ``most`` of ``labels``, evenly over all of them."""
    count = min(most, len(labels))
    return [labels[i * len(labels) // count] for i in range(count)]
