"""Progress while training: the bar, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

from reference_trainer.errors import UserError
from reference_trainer.ranks import Ranks
from reference_trainer.run import METRICS, RunFolder


def logger_of(run: RunFolder, start: int, steps: int, ranks: Ranks) -> Logger | Silent:
    """The leading rank's writes; the others' are silent."""
    return Logger(run, start, steps) if ranks.leads else Silent()


class Silent:
    """The logger of a rank that writes nothing."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def advance(self) -> None:
        """See ``Logger``."""

    def log(self, step: int, row: dict[str, Any]) -> None:
        """See ``Logger``."""


class Logger:
    """One row a log: to the bar, to metrics.jsonl and to TensorBoard."""

    def __init__(self, run: RunFolder, start: int, steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.run = run
        # In a file, where every state of the bar stays, one a while is enough.
        interval = 0.5 if sys.stderr.isatty() else 20.0
        self.bar = tqdm(total=steps, initial=start, desc="training", unit="step", mininterval=interval)
        self.started = time.monotonic()
        try:
            self.events = SummaryWriter(str(run.root / "tensorboard"), purge_step=start + 1)
        except OSError as error:
            raise self._unwritable(error) from error

    def __enter__(self) -> Logger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        try:
            self.events.close()
        except OSError as error:
            if kind is None:
                raise self._unwritable(error) from error

    def advance(self) -> None:
        """One step done."""
        self.bar.update()

    def log(self, step: int, row: dict[str, Any]) -> None:
        """``row``: numbers, and ``by_level`` with one list a quantity."""
        self.run.append_row(METRICS, {"step": step, **row, "seconds": round(time.monotonic() - self.started, 2)})
        try:
            for name, value in row.items():
                if isinstance(value, (int, float)):
                    self.events.add_scalar(f"train/{name}", value, step)
            for sigma, loss in zip(row["by_level"]["sigma"], row["by_level"]["consistency"], strict=True):
                if loss is not None:
                    self.events.add_scalar(f"loss_at_sigma/{sigma:.3g}", loss, step)
        except OSError as error:
            raise self._unwritable(error) from error
        shown = {"loss": f"{row['consistency'] + row['extra']:.3g}", "N": row["num_levels"], "c": f"{row['c']:.2g}"}
        self.bar.set_postfix(shown, refresh=False)

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"cannot write {self.run.root / 'tensorboard'}: {error.strerror or error}")
