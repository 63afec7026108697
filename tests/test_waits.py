"""Between two logs a step of training asks the device for no number. On a GPU ``test_device.py`` has CUDA say so; here
the calls that would wait for one are counted."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import PixelSpace
from reference_trainer.data.images import Digits, ImageSet
from reference_trainer.networks import DiT
from reference_trainer.presets import PRESETS, digits, flow_map
from reference_trainer.run import RunFolder
from reference_trainer.training import loop
from reference_trainer.training.logger import Silent
from robustcm.averages import PowerFunction
from robustcm.flow_targets import Derivative
from robustcm.gates import Above

ROOT = Path(__file__).parents[1]
OURS = tuple(str(ROOT / folder) for folder in ("robustcm", "reference_trainer", "tests"))
aten = torch.ops.aten

READ = {aten._local_scalar_dense, aten.equal}
"""Tensors that become numbers: ``item``, ``float``, ``int``, ``bool``, ``if``."""
SIZED_BY_VALUE = {
    *(aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.unique_consecutive),
    *(aten.repeat_interleave, aten.bincount),
}
"""The shape of what they give depends on the values."""
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
"""Need ``nonzero`` where a mask says which."""
UNSEEN = ("cpu", "tolist", "numpy", "__array__")
"""Methods that read a tensor on the CPU without an operation."""

ONLY_ON_A_CPU = {"_unique2 in _once_per_level.<locals>.OncePerLevel.forward"}
"""Its first line sends all other devices another way."""


class Waits(TorchDispatchMode):
    """Calls for which a GPU would be waited for, of the thread that enters it, with the function that makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kind = func.overloadpacket
        by_mask = kind in INDEXED and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if by_mask or kind in READ | SIZED_BY_VALUE:
            self.note(kind.__name__)
        return func(*args, **(kwargs or {}))

    def note(self, what: str) -> None:
        frame = sys._getframe(1)
        while not frame.f_code.co_filename.startswith(OURS) or frame.f_locals.get("self") is self:
            assert frame.f_back is not None
            frame = frame.f_back
        self.found.append(f"{what} in {frame.f_code.co_qualname}")

    @contextmanager
    def counting(self) -> Iterator[Waits]:
        """As entering it, and what no dispatcher sees."""
        thread, kept = threading.get_ident(), {name: getattr(Tensor, name) for name in UNSEEN}

        def noted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
            def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
                if threading.get_ident() == thread:
                    self.note(name)
                return method(tensor, *args, **kwargs)

            return call

        with pytest.MonkeyPatch.context() as patch, self:
            for name, method in kept.items():
                patch.setattr(Tensor, name, noted(name, method))
            yield self


@pytest.mark.parametrize(
    "ask",
    [
        *(lambda t: t.item(), lambda t: t.tolist(), lambda t: t.cpu(), lambda t: t.numpy(), lambda t: np.asarray(t)),
        *(
            lambda t: float(t),
            lambda t: bool(t),
            lambda t: int(t),
            lambda t: 1 if t > 0 else 0,
            lambda t: range(t.int()),
        ),
        *(lambda t: t.nonzero(), lambda t: t.unique(), lambda t: t.masked_select(t > 0), lambda t: torch.equal(t, t)),
        *(lambda t: t[t > 0], lambda t: t.index_put_((t > 0,), t)),
    ],
)
def test_a_call_that_waits_is_seen(ask):
    with Waits().counting() as waits:
        ask(torch.ones(1))
    assert waits.found


def test_what_does_not_wait_is_not():
    with Waits().counting() as waits:
        t = torch.ones(3, requires_grad=True)
        torch.where(t > 0, t, 0.0)[torch.arange(2)].sum().backward()
        torch._foreach_lerp_([t.detach()], [t.detach()], [torch.full((), 0.5)])
    assert not waits.found


class Watching(Silent):
    """In the place of the logger, whose context is the loop: what was called up to the end of each step."""

    def __init__(self) -> None:
        self.waits, self.after_step = Waits(), list[list[str]]()
        self.context = self.waits.counting()

    def __enter__(self) -> Watching:
        self.context.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.context.__exit__(kind, value, trace)

    def advance(self) -> None:
        self.after_step.append([call for call in self.waits.found if call not in ONLY_ON_A_CPU])


def in_two_parts() -> TrainConfig:
    return replace(digits(), micro_batches=2, averages=(PowerFunction(),))


def meanflow() -> TrainConfig:
    return replace(flow_map(), objective=replace(flow_map().objective, target=Derivative()))


@pytest.fixture(scope="module")
def small_digits() -> ImageSet:
    """500 of them, at a quarter of their side: what is measured on all latents takes a moment, too."""
    digits = Digits().load()
    assert digits.labels is not None
    every = slice(None, None, 10)
    pixels = digits.pixels[every, :, 2::4, 2::4].contiguous()
    return ImageSet("digits", pixels, digits.labels[every], digits.is_held_out[every])


@pytest.mark.parametrize("preset", [*PRESETS, in_two_parts, meanflow], ids=lambda preset: preset.__name__)
def test_between_two_logs_the_loop_asks_the_device_for_nothing(preset, small_digits: ImageSet, tmp_path, monkeypatch):
    """What is made in the background, batches and couplings, is on the CPU whatever the device."""
    config = preset()
    config = replace(
        config,
        autoencoder=PixelSpace(),
        clip=None,
        network=DiT(width=8, layers=1, heads=2, patch=8),
        objective=replace(config.objective, gate=Above(1.0)),
        batch_size=16,
        steps=4,
        log_every=100,
    )
    watching, run = Watching(), RunFolder(tmp_path)
    monkeypatch.setattr(loop, "logger_of", lambda *_: watching)
    run.claim(config)
    assert loop.train(config, run, small_digits, tmp_path, torch.device("cpu"))
    assert watching.after_step[:-1] == [[], [], []]
    assert watching.after_step[-1]  # the log and the checkpoint: that it sees
