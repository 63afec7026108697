"""The run folder: one configuration, its checkpoints, its logs, its pictures."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import require_elsewhere
from reference_trainer.errors import UserError
from reference_trainer.files import as_json, load_tensors, remove_unfinished, save_tensors, write_atomically
from reference_trainer.options import differences, filled, from_json, strange_fields, to_json
from robustcm import __version__

METRICS, EVALUATIONS, BAD_STEPS = "metrics.jsonl", "evaluations.jsonl", "bad_steps.jsonl"
COMPUTING = "computing.jsonl"


@dataclass(frozen=True)
class RunFolder:
    """Paths and files below ``root``::

    config.json                what was asked for
    autoencoder.safetensors    codec and normalisation, so that the folder is complete by itself, and what they were
                               made from
    checkpoints/step_*.safetensors
    skip.safetensors           of a run with preconditioning=GaussianSkip: mean and covariance of the latents
    classes.json               of a run trained by class: their names, and how many training images each has
    snapshots/step_*.safetensors
                               the power-function averages, float32, every ``snapshot_every`` steps
    metrics.jsonl              one row a log
    evaluations.jsonl          one row an evaluation: what ``evaluate_every`` asked for, and the end
    bad_steps.jsonl            one row a step that was not finite: which sample, at which noise level
    computing.jsonl            from which step on on which device and in which precision, a row for each change
    bad/step_*.safetensors     the batches of the newest of them
    tensorboard/events.*, evaluation.json, *.png
    report.html                what a run came to, pictures and all, in one file
    """

    root: Path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second process out of this folder, where the file system can lock; where not, say so.

        Raises:
            UserError: another process trains here, or the folder cannot be made.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = (self.root / ".lock").open("w")
        except OSError as error:
            raise UserError(f"cannot write to {self.root}: {error.strerror}; give another folder with --out") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"another process is training in {self.root}: wait for it, or give --out") from error
            except OSError as error:  # some network file systems
                tqdm.write(f"{self.root} is not locked ({error.strerror}): start no second process in it")
            else:
                for folder in (self.root, *(self.root / name for name in ("checkpoints", "snapshots", "bad"))):
                    remove_unfinished(folder)
            yield

    def claim(self, config: TrainConfig) -> None:
        """Make this the folder of ``config``: write config.json, or check the one that is there.

        A field that an earlier version did not have counts there as its default now.

        Raises:
            UserError: it belongs to another configuration or to another version, its config.json is none, or code for
                the autoencoder lies here.
        """
        require_elsewhere(config.autoencoder, self.root)  # else it could be trained, and never opened again
        file = self.root / "config.json"
        asked = json.loads(as_json(to_json(config)))
        if file.exists():
            there = self._json(file)
            if not isinstance(there, dict) or there.get("part") != asked["part"]:
                raise UserError(f"{file} is no configuration of a run: give --out another folder")
            if strange := list(strange_fields(there)):
                raise UserError(
                    f"{self.root} holds a run of another version of the trainer: {', '.join(strange[:4])} is no field "
                    f"in version {__version__}; continue it with the version that made it, or give --out another folder"
                )
            if changed := list(differences(json.loads(as_json(filled(there))), asked)):
                shown = "; ".join(changed[:4]) + (f"; and {len(changed) - 4} more" if len(changed) > 4 else "")
                raise UserError(
                    f"{self.root} holds a run of another configuration ({shown}): give --out another folder, or '--out "
                    f"{self.root}' alone, without data or options, to go on with that one"
                )
            return
        write_atomically(file, (as_json(asked, indent=2) + "\n").encode())

    def config(self) -> TrainConfig:
        """The configuration of the run.

        Raises:
            UserError: no run here, no configuration in its config.json, or code in this folder for its autoencoder.
        """
        file = self.root / "config.json"
        if not file.exists():
            raise UserError(f"no run at {self.root}: it has no config.json; train one there first")
        data = self._json(file)
        try:
            found = from_json(data)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
        require_elsewhere(found.autoencoder, self.root)
        return found

    @property
    def space_file(self) -> Path:
        """Where ``KeptSpace`` is kept."""
        return self.root / "autoencoder.safetensors"

    @property
    def skip_file(self) -> Path:
        """Where the numbers of ``GaussianSkip`` are kept."""
        return self.root / "skip.safetensors"

    @property
    def moments_file(self) -> Path:
        """Where the maps of ``--match-moments`` are kept."""
        return self.root / "moments.safetensors"

    @property
    def classes_file(self) -> Path:
        """Where ``Classes`` are kept."""
        return self.root / "classes.json"

    @property
    def bad_folder(self) -> Path:
        """Where batches of bad steps are kept."""
        return self.root / "bad"

    def checkpoints(self) -> list[Path]:
        """Newest first."""
        return sorted((self.root / "checkpoints").glob("step_*.safetensors"), reverse=True)

    def save_checkpoint(self, step: int, tensors: dict[str, Tensor], keep: int) -> None:
        """Write the checkpoint behind ``step`` steps, then drop all but the newest ``keep``.

        Raises:
            UserError: it cannot be written, or the folder is no longer that of a run.
        """
        if not (self.root / "config.json").exists():  # a new folder in its place would lack the autoencoder, too
            raise UserError(f"{self.root} has vanished, and with it the run: bring it back, then give the same command")
        save_tensors(self.root / "checkpoints" / f"step_{step:08d}.safetensors", tensors, {"step": step})
        for old in self.checkpoints()[keep:]:
            old.unlink()

    def snapshots(self) -> dict[int, Path]:
        """Files by step, oldest first; what has another name is passed over."""
        files = sorted((self.root / "snapshots").glob("step_*.safetensors"))
        return {int(step): file for file in files if (step := file.stem.removeprefix("step_")).isdecimal()}

    def save_snapshot(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Write averages as they are behind ``step`` steps."""
        save_tensors(self.root / "snapshots" / f"step_{step:08d}.safetensors", tensors, {"step": step})

    def keep_snapshots_until(self, step: int) -> None:
        """Drop those behind ``step``: the run goes on from there and will write them again."""
        for file in (file for at, file in self.snapshots().items() if at > step):
            file.unlink()

    def latest_checkpoint(self) -> tuple[int, dict[str, Tensor]] | None:
        """Step and tensors of the newest checkpoint that can be read; damaged ones are named and passed over.

        Raises:
            UserError: there are checkpoints, but none can be read.
        """
        files = self.checkpoints()
        for file in files:
            try:
                tensors, about = load_tensors(file)
                if type(about.get("step")) is not int or about["step"] < 0:
                    raise UserError(f"{file} is no checkpoint of a run")
                return about["step"], tensors
            except UserError as error:
                tqdm.write(f"falling back to the checkpoint before: {error}")
        if files:
            raise UserError(f"no checkpoint in {files[0].parent} can be read: delete that folder to start again")
        return None

    def require_checkpoint(self) -> None:
        """See that there is one, readable or not, before images are loaded for it.

        Raises:
            UserError: there is none.
        """
        if not self.checkpoints():
            raise UserError(f"no checkpoint in {self.root}: train it first, with the same --out")

    def keep_rows_until(self, step: int, names: Sequence[str] = (METRICS, EVALUATIONS, BAD_STEPS)) -> None:
        """Drop the rows behind ``step`` of these files: the run goes on from there and will write them again."""
        for name in names:
            if (file := self.root / name).exists():
                rows = [row for row in self.rows(name) if row["step"] <= step]
                write_atomically(file, "".join(as_json(row) + "\n" for row in rows).encode())

    def append_row(self, name: str, row: dict[str, Any]) -> None:
        """One line of the file ``name``; ``row`` has a "step"."""
        try:
            with (self.root / name).open("a") as file:
                file.write(as_json(row) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.root / name}: {error.strerror}") from error

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        return self.rows(METRICS)

    def evaluations(self) -> list[dict[str, Any]]:
        """The rows of evaluations.jsonl."""
        return self.rows(EVALUATIONS)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of the file ``name``, none if there is no file; a last line cut short by a crash is left out."""
        file = self.root / name
        rows = []
        for line in file.read_text().splitlines() if file.exists() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    @staticmethod
    def _json(file: Path) -> Any:
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"cannot read {file}: {error}") from error
