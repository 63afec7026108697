"""Which of several processes writes which file: a claim is a lock of the system's, and gone when its holder is."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from reference_trainer.errors import UserError

PAUSE = 0.2
"""Seconds between two looks whether others have finished, or have gone."""


@dataclass(frozen=True)
class Claims:
    """Lock files in the folder ``root``; whoever is killed holds nothing."""

    root: Path

    @contextmanager
    def held(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Inside, whether ``name`` is ours: of all processes that ask, one has it.

        Args:
            wait: until it is; else ask once.
        Raises:
            UserError: the folder cannot be written.
        """
        file = self.root / f"{name}.lock"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = file.open("w")
        except OSError as error:
            raise UserError(f"cannot write {file}: {error.strerror}; make room or make it writable") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                ours = True
            except BlockingIOError:
                ours = False
            except OSError as error:  # some network file systems
                tqdm.write(f"{self.root} cannot be locked ({error.strerror}): start no second process in it")
                ours = True
            yield ours

    def shared(self, files: Sequence[Path]) -> Iterator[tuple[Path, bool]]:
        """Every one of ``files``, and whether it is ours to write before the next is asked for; else it is there.

        Ends when all are there. A file whose writer is killed comes back to those that are left, or to a later start.
        """
        missing = list(files)
        while missing:
            left = list[Path]()
            for file in missing:
                with self.held(file.name, wait=False) as ours:
                    if file.exists():
                        yield file, False
                    elif ours:
                        yield file, True
                    else:
                        left.append(file)
            if len(left) == len(missing):
                time.sleep(PAUSE)
            missing = left

    def clear(self) -> None:
        """Take the lock files away, and the folder above them if nothing else is in it.

        Only where a second holder does no harm: behind a lock that is taken whoever has waited looks at what is there.
        """
        with suppress(OSError):
            for file in self.root.glob("*.lock"):
                file.unlink(missing_ok=True)
            self.root.rmdir()
            self.root.parent.rmdir()
