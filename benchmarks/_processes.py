"""Work in several processes that meet as those of torchrun do, and images for them to work on."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from PIL import Image

from reference_trainer.ranks import Ranks

CPU = torch.device("cpu")


def in_processes(number: int, work: Callable[..., None], *arguments: Any) -> None:
    """``work(ranks, *arguments)`` in each of ``number`` processes, one thread each; ``work`` is a module's function."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(_joined, (number, port, work, arguments), nprocs=number)


def _joined(rank: int, number: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(number), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"TQDM_DISABLE": "1"}
    work(Ranks.join(CPU), *arguments)


def make_images(folder: Path, n: int, side: int) -> None:
    """n PNGs of blurred noise, in colour."""
    folder.mkdir(parents=True)
    noise = torch.rand(n, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    for i, small in enumerate(noise.split(1)):
        picture = torch.nn.functional.interpolate(small, (side, side), mode="bicubic").clamp(0, 1)[0]
        Image.fromarray((255 * picture).byte().permute(1, 2, 0).numpy()).save(folder / f"{i:05}.png")
