"""The processes of a run, as ``torchrun`` starts them: who trains on which micro-batches, and what all of them add up.

Plain ``torch.distributed``: nothing wraps the network, so what differentiates it forwards goes on working. A single
process is the case of one rank, and does nothing here.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from reference_trainer.errors import UserError

PATIENCE = timedelta(hours=12)  # the others wait while the first fits an autoencoder, evaluates, or saves
HEAD_START = 3.0
"""Seconds in which the leading process says what all of them find wrong, and torchrun ends the others."""
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among ``world`` processes."""

    rank: int = 0
    world: int = 1
    processes: tuple[tuple[str, int], ...] = field(default=(), repr=False)
    """Host and process number of each rank, to say which of them is gone."""

    @staticmethod
    def join(device: torch.device) -> Ranks:
        """Meet the others that ``torchrun`` started, if it did; ``device`` is where this process computes.

        Raises:
            UserError: they cannot be reached.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return Ranks()
        if not dist.is_initialized():
            try:
                dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
            except (RuntimeError, ValueError) as error:
                raise UserError(
                    f"cannot meet the other processes ({str(error).splitlines()[0]}): see torchrun"
                ) from error
        rank, world = dist.get_rank(), dist.get_world_size()
        processes: list[tuple[str, int]] = [("", 0)] * world
        dist.all_gather_object(processes, (socket.gethostname(), os.getpid()))
        return Ranks(rank, world, tuple(processes))

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes, draws and prints."""
        return self.rank == 0

    def parts(self, micro_batches: int) -> range:
        """The micro-batches of a step that are this rank's: as many for each as can be, in order.

        Raises:
            UserError: fewer micro-batches than processes.
        """
        if micro_batches < self.world:
            raise UserError(
                f"{self.world} processes cannot share {micro_batches} micro-batches: set micro_batches to a multiple "
                f"of {self.world}"
            )
        return range(self.rank * micro_batches // self.world, (self.rank + 1) * micro_batches // self.world)

    @torch.no_grad()
    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Put into each of ``tensors``, of one dtype, its sum over the ranks: one message for all of them.

        Every rank gets the same bits.

        Raises:
            UserError: a process is gone; says which.
        """
        if self.world == 1 or not any(tensor.numel() for tensor in tensors):
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with self._together():
            dist.all_reduce(flat)
        sums = [
            part.view_as(tensor) for part, tensor in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)
        ]
        torch._foreach_copy_(list(tensors), sums)

    def any(self, flag: bool) -> bool:
        """Whether it is so in any of the ranks; waits for all of them, not for the device."""
        if self.world == 1:
            return flag
        found = torch.tensor(int(flag))
        with self._together():
            dist.all_reduce(found)
        return bool(found)

    def require_same(self, number: int, what: str, needed: str) -> None:
        """See that ``number``, of ``what``, is the same on every rank.

        Raises:
            UserError: it is not, on all of them; says what is ``needed``.
        """
        if self.world == 1:
            return
        numbers: list[Any] = [None] * self.world
        with self._together():
            dist.all_gather_object(numbers, number)
        if len(set(numbers)) > 1:
            raise UserError(f"the {self.world} processes found different {what}, {numbers}: give {needed}")

    def wait(self) -> None:
        """Until all are here."""
        self.any(False)

    def in_turns(self, works: Sequence[Callable[[], T]], stopped: Callable[[], bool] = lambda: False) -> Iterator[T]:
        """What each of ``works`` returns, in their order, for the leading rank; nothing for the others, who help.

        The ranks take one each, then the next. All go through this to its end, with the same works.

        Args:
            stopped: asked before each round; it ends early where one of the ranks says so.
        Raises:
            UserError: a process is gone; says which.
        """
        for first in range(0, len(works), self.world):
            if self.any(stopped()):
                return
            own = works[first + self.rank]() if first + self.rank < len(works) else None
            found: list[T | None] = [own]
            if self.world > 1:
                found *= self.world
                with self._together():  # pickled, but by a process of this very command
                    dist.gather_object(own, found if self.leads else None)
            if self.leads:
                yield from found[: len(works) - first]  # type: ignore[misc]  # none of these is missing

    @contextmanager
    def first_leads(self) -> Iterator[None]:
        """The leading rank goes through what is inside before the others do, who find what it left in files.

        If it fails there, the others end, too.
        """
        if not self.leads and self.any(False):
            raise LeaderError
        failed = True
        try:
            yield
            failed = False
        finally:
            if self.leads:
                self.any(failed)

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise UserError(self._who_is_gone()) from error

    def _who_is_gone(self) -> str:
        time.sleep(0.5)  # what kills one process may be killing more
        host = socket.gethostname()
        gone = [str(rank) for rank, (where, pid) in enumerate(self.processes) if where == host and not _alive(pid)]
        named = (
            f"rank {' and '.join(gone)} of {self.world}" if gone else f"one of {self.world} processes, on another host"
        )
        return (
            f"{named} is gone, so rank {self.rank} stops; the last checkpoint is intact. The same command goes on, "
            "with as many processes or with fewer"
        )


class LeaderError(UserError):
    """The leading rank has failed and said why; nothing is left to say."""

    def __init__(self) -> None:
        super().__init__("")


def following(work: Callable[[], T]) -> T:
    """``work`` of a process that does not lead: what it finds wrong before all have met, the leading one finds, too.

    So that says it, once, and torchrun ends this process meanwhile. If it does not, this one alone was at fault.
    """
    try:
        return work()
    except Exception:
        if not dist.is_initialized():
            time.sleep(HEAD_START)
        raise


def own_device(device: torch.device) -> torch.device:
    """``device``, or of several GPUs the one that is this process's."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _alive(pid: int) -> bool:
    """Whether that process of this host runs: not dead, and not merely waiting to be buried."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return True
