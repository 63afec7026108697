"""Bad steps: seen and remembered on the device; at the next log named, their batches kept, too many in a row refused.

A step is bad if a residual, the loss or the gradient is NaN or infinite. It changes nothing (see ``TrainState``), so it
costs one step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from reference_trainer.config import TrainConfig
from reference_trainer.data.images import ImageSet
from reference_trainer.errors import UserError
from reference_trainer.files import save_tensors
from reference_trainer.optimizers import Muon
from reference_trainer.ranks import LeaderError, Ranks
from reference_trainer.run import BAD_STEPS, RunFolder
from reference_trainer.training.batches import Batches
from reference_trainer.training.state import TrainState
from robustcm.noise import FlowRange, sigma_of_flow_time
from robustcm.objective import Batch, Terms

NAMED = 4
"""Bad steps between two looks that are named, and have their batch kept; the others are counted."""
KEPT = 8
"""Batches that stay in a run folder, the newest."""


def not_finite(terms: Terms) -> Tensor:
    """Of which samples loss or residual are NaN or infinite, ``[b]`` bool on the device.

    Student and teacher have the data in them, so data that are not finite show in the residuals.
    """
    return ~(terms.consistency.detach().isfinite() & terms.extra.detach().isfinite() & terms.r.isfinite())


class Bad(NamedTuple):
    """What is known of one bad step."""

    step: int
    """0-based."""
    samples: int
    """How many have a loss or residual that is not finite."""
    first: int
    """The first of them, its place in the batch of all parts."""


class BadSteps:
    """Those since the last look."""

    def __init__(
        self,
        config: TrainConfig,
        run: RunFolder,
        batches: Batches,
        images: ImageSet,
        device: torch.device,
        ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
    ) -> None:
        """``batches`` is asked again for the batch of a bad step: none is held for the case."""
        self.config, self.run, self.batches, self.images, self.ranks = config, run, batches, images, ranks
        self._nothing = torch.zeros(1 + NAMED, 3, dtype=torch.int64, device=device)
        self._seen = self._nothing  # count, most in a row, 0; then one row a named step, see `Bad`
        self._slot = torch.arange(NAMED, device=device)

    def add(self, bad: Tensor, state: TrainState, wrong: Tensor) -> None:
        """Remember the present step of ``state`` if it is ``bad``; no synchronisation.

        Args:
            wrong: ``not_finite`` of the whole step's samples, of all parts and ranks.
        """
        wrong = wrong != 0
        this = torch.stack([torch.full_like(bad, state.step, dtype=torch.int64), wrong.sum(), wrong.int().argmax()])
        count, longest = self._seen[0, 0], self._seen[0, 1]
        in_a_row = torch.where(bad, state.step + 1 - state.first_bad_step, 0)
        head = torch.stack([count + bad, torch.maximum(longest, in_a_row), torch.zeros_like(count)])
        rows = torch.where(((self._slot == count) & bad)[:, None], this, self._seen[1:])
        self._seen = torch.cat([head[None], rows])

    def look(self, state: TrainState) -> None:
        """Read what is remembered, the one wait for the device, and start anew.

        Raises:
            UserError: too many in a row; before anything of these steps is saved.
        """
        (count, longest, _), *rows = self._seen.tolist()
        self._seen = self._nothing
        named = [Bad(*row) for row in rows[:count]]
        causes = [self._name(bad) for bad in named] if self.ranks.leads else []
        if count > len(named) and self.ranks.leads:
            tqdm.write(f"and {count - len(named)} more bad steps up to step {state.step}")
        if (most := self._most) is not None and longest >= most:
            if not self.ranks.leads:
                raise LeaderError
            step = "optimizer.size" if isinstance(self.config.optimizer, Muon) else "optimizer.max_norm"
            often = "a bad step" if longest == 1 else f"{longest} bad steps in a row"
            raise UserError(
                f"{often}, at {causes[-1]} (batches: {self.run.bad_folder}). The checkpoints are good. If it is the "
                f"data, mend them; else lower learning_rate.lr or {step} (in a new --out)"
            )

    @property
    def _most(self) -> int | None:
        """In a row that end the run; None: no number does."""
        by_policy = {"stop": 1, "skip": self.config.most_bad_steps, "zero": None}
        return by_policy[self.config.optimizer.on_nonfinite]

    def _name(self, bad: Bad) -> str:
        """Say, write down and keep what is known of ``bad``; returns its step and cause, in words."""
        part, place = divmod(bad.first, self.batches.rows)
        indices, batch = self.batches.again(bad.step, part)
        number = bad.step + 1  # as in the log: steps done
        row: dict[str, Any] = {"step": number, "samples": bad.samples}
        where = ""
        if 0 < bad.samples < self.config.batch_size:
            row["sample"] = int(indices[place])
            row["sigma"] = float(self._sigmas(batch.pairs.t_hi)[place])
            where = f" ({'first ' if bad.samples > 1 else ''}{self._called(row['sample'])} at sigma {row['sigma']:.3g})"
        cause = f"step {number}: {self._cause(bad, batch, part)}{where}"
        self.run.append_row(BAD_STEPS, row)
        done = "zeroed where it is not finite" if self.config.optimizer.on_nonfinite == "zero" else "skipped"
        tqdm.write(f"{done}: {cause}; {self._keep(number, part, batch, indices)}")
        return cause

    def _sigmas(self, t: Tensor) -> Tensor:
        return sigma_of_flow_time(t) if isinstance(self.config.objective.noise, FlowRange) else t

    def _cause(self, bad: Bad, batch: Batch, part: int) -> str:
        parts = self.config.micro_batches
        if latents := int((~batch.x.isfinite().flatten(1).all(1)).sum()):
            of = f" of part {part + 1} of {parts}" if parts > 1 else ""
            return f"{latents} of {len(batch.x)} latents{of} are NaN or infinite"
        if bad.samples:
            return f"the loss of {bad.samples} of {self.config.batch_size} samples is NaN or infinite"
        return "the gradient is NaN or infinite, though no loss is"

    def _called(self, sample: int) -> str:
        """A store's samples have no names, and are more than its images here."""
        known = len(self.images.train_places) == len(self.batches.latents)
        return self.images.train_name(sample) if known else f"latent {sample}"

    def _keep(self, number: int, part: int, batch: Batch, indices: Tensor) -> str:
        """Write the batch down for inspection; a run does not end for want of room for that."""
        file = self.run.bad_folder / f"step_{number:08d}.safetensors"
        levels = {name: getattr(batch.pairs, name) for name in ("t_hi", "t_lo", "depth")}
        try:
            save_tensors(
                file, {"x": batch.x, "z": batch.z, "indices": indices, **levels}, {"step": number, "part": part}
            )
            for old in sorted(file.parent.glob("step_*.safetensors"))[:-KEPT]:
                old.unlink()
        except (UserError, OSError) as error:
            return f"its batch is not kept ({error})"
        return f"its batch is {file}"
