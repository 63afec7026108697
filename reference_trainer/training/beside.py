"""What a step's result does not depend on, done on a second core while the first one goes backwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


class Beside:
    """Works wait here, in order, until the main thread is in C++ for long, then are done on a thread beside it::

        beside.later(partial(sums.add, terms, pairs))     # any number of these
        with beside.meanwhile():
            loss.backward()
        beside.finish()                                   # before their results are read

    Not as soon as they come: both threads would ask for Python's lock at every operation. A GPU has a queue of its own,
    so there all is done at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._waiting: list[Callable[[], object]] = []
        self._thread = ThreadPoolExecutor(1) if device.type == "cpu" else None

    def later(self, work: Callable[[], object]) -> None:
        """Have ``work`` done, behind those before it."""
        self._waiting.append(work)
        if self._thread is None:
            self.finish()

    @contextmanager
    def meanwhile(self) -> Iterator[None]:
        """All that waits is done while inside, and is done on leaving; what a work raises is raised there."""
        if self._thread is None or not self._waiting:
            yield
            return
        done = self._thread.submit(self.finish)
        try:
            yield
        finally:
            done.result()

    def finish(self) -> None:
        """Do what still waits, here and now."""
        works, self._waiting = self._waiting, []
        for work in works:
            work()
