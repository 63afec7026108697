"""How the passes through the network are computed while training: precision, layout, memory; by device, and why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from reference_trainer.errors import UserError
from reference_trainer.machine import describe_machine
from robustcm.consistency import Network

Precision = Literal["float32", "tf32", "bfloat16"]

ON_A_GPU = "6.01 steps/s against 4.29 in TF32 and 1.73 in float32, on an NVIDIA H200 with the U-Net of CelebA-HQ"
"""Measured by ``benchmarks/gpu_step.py``, see docs/log.md."""
WITH_BFLOAT16 = (8, 0)
"""The first compute capability whose matrix units take bfloat16 and TF32."""


@dataclass(frozen=True, kw_only=True)
class Computing:
    """Of the network while training. All else is float32 throughout: weights, averages, optimizer, c, distances.

    So is sampling, and with it every evaluation. What is off here is off because it was not faster where measured
    (docs/log.md); ``benchmarks/computing.py`` measures it on your machine.
    """

    precision: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"
    """Of products of matrices and convolutions, forwards and backwards. ``auto``: bfloat16 on a GPU of compute
    capability 8 or more, else float32; a run says which at its start, and why. bfloat16 is torch's autocast; TF32 is
    float32 with 10 bits for the fraction, on such a GPU alone, elsewhere float32. A derivative taken forwards
    (``Derivative``) is computed in TF32 where bfloat16 is asked for: convolutions have none under autocast."""
    compile: bool = False
    """Compile the network with torch.compile, at each start anew; on an H200 the U-Net of CelebA-HQ had not finished
    after 200 s. Needs a C++ compiler or Triton."""
    channels_last: bool = False
    """Lay what goes into the convolutions of a U-Net out with the channels last. On an H200, where weights lay so as
    well, slower: 5.22 steps/s against 6.01."""
    checkpointing: bool = False
    """Keep what goes into each block alone, and compute its inside again on the way back: less memory, for one more
    pass forwards. Changes no number beyond rounding; dropout draws the same masks again."""

    def __post_init__(self) -> None:
        if self.precision not in ("auto", "float32", "tf32", "bfloat16"):
            raise ValueError(f"precision is 'auto', 'float32', 'tf32' or 'bfloat16', got {self.precision!r}")

    def on(self, device: torch.device, network: nn.Module | None = None) -> Passes:
        """What that means on ``device``, for ``network``.

        One with ``rounding_grows`` set multiplies what it computes by the noise level: bfloat16 would begin as noise.
        """
        grows = getattr(network, "rounding_grows", False)
        if device.type != "cuda":
            name = str(describe_machine()["cpu"]) if device.type == "cpu" else device.type
            return self.decided(device.type, name, None, grows)
        capability = torch.cuda.get_device_capability(device)
        return self.decided("cuda", torch.cuda.get_device_name(device), capability, grows)

    def decided(self, kind: str, name: str, capability: tuple[int, int] | None, grows: bool = False) -> Passes:
        """What that means on a device of ``kind`` (cpu, cuda, ...) called ``name``; ``capability`` of a GPU; ``grows``:
        the network's rounding does, with the noise level."""
        able = capability is not None and capability >= WITH_BFLOAT16
        if self.precision == "auto":
            if able and grows:
                return Passes(self, "float32", kind, name, "a diffusion model's rounding grows with the noise level")
            if able:
                return Passes(self, "bfloat16", kind, name, f"the fastest where measured, {ON_A_GPU}")
            why = "bfloat16 and TF32 are of GPUs of compute capability 8 or more"
            return Passes(self, "float32", kind, name, why)
        if self.precision == "tf32" and not able:
            return Passes(self, "float32", kind, name, "it has no TF32")
        return Passes(self, self.precision, kind, name, "as asked")


@dataclass(frozen=True)
class Passes:
    """``Computing``, decided for a device::

    passes = config.computing.on(device)
    f = config.preconditioned(passes.of(network))        # once
    passes.backward(objective(f, batch, state).loss)     # every step
    """

    computing: Computing
    precision: Precision
    kind: str
    """Of the device: cpu, cuda."""
    device: str
    """Its name."""
    why: str
    """The reason for ``precision``, in words."""

    def __str__(self) -> str:
        """As a run says it at its start."""
        asked = [name for name in ("compile", "channels_last", "checkpointing") if getattr(self.computing, name)]
        beside = f", with {', '.join(asked)}" if asked else ""
        return (
            f"the network is computed in {self.precision}{beside} on {self.device}: {self.why} "
            "(computing.precision=... changes it)"
        )

    def as_row(self) -> dict[str, Any]:
        """What the last bits of a run depend on."""
        return {
            "device": self.device,
            "precision": self.precision,
            "compile": self.computing.compile,
            "torch": torch.__version__,
        }

    def of(self, network: nn.Module) -> Network:
        """``network`` as it is called in training; its weights and their names stay what they are. Ask once.

        Raises:
            UserError: it has no blocks to be checkpointed; or, at its first call, it cannot be compiled here.
        """
        if self.computing.checkpointing:
            _checkpoint(network)
        if self.computing.channels_last:
            for module in network.modules():
                if isinstance(module, nn.Conv2d):  # not the weights: the optimizer's state would have to follow them
                    module.register_forward_pre_hook(_with_channels_last)
        call = _compiled(network) if self.computing.compile else network
        if self.precision == "float32" and self.kind != "cuda":
            return call

        def computed(x: Tensor, *c_noise: Tensor, **conditions: Any) -> Tensor:
            forwards = unpack_dual(x).tangent is not None
            half = self.precision == "bfloat16" and not forwards
            with self._tf32(), torch.autocast(x.device.type, torch.bfloat16, enabled=half):
                output: Tensor = call(x, *c_noise, **conditions)
            return output

        return computed

    def backward(self, loss: Tensor) -> None:
        """``loss.backward()`` as the pass forwards was computed."""
        with self._tf32():
            loss.backward()

    @contextmanager
    def _tf32(self) -> Iterator[None]:
        """torch's switches for what is computed inside, then back to what they were: only the network shall see it."""
        if self.kind != "cuda":  # there are none, and on a CPU the first one has another meaning
            yield
            return
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        before = matmul.allow_tf32, cudnn.allow_tf32
        try:
            matmul.allow_tf32 = cudnn.allow_tf32 = self.precision != "float32"
            yield
        finally:
            matmul.allow_tf32, cudnn.allow_tf32 = before


def _compiled(network: nn.Module) -> Network:
    """``network`` compiled in place, so that no name in its state changes; draws dropout's masks as without."""
    from torch._dynamo.exc import TorchDynamoException  # slow to import

    network.compile(dynamic=False, options={"fallback_random": True})

    def call(x: Tensor, *c_noise: Tensor, **conditions: Any) -> Tensor:
        try:
            output: Tensor = network(x, *c_noise, **conditions)
        except TorchDynamoException as error:
            why = " ".join(str(error).split())[:200]
            raise UserError(
                f"computing.compile=True: this network cannot be compiled here ({why}): leave it out"
            ) from error
        return output

    return call


def _checkpoint(network: nn.Module) -> None:
    """See diffusers' ModelMixin."""
    for module in network.modules():
        enable: Any = getattr(module, "enable_gradient_checkpointing", None)
        if enable is not None:
            enable()
            return
    raise UserError("computing.checkpointing is of diffusers' networks: this one has no blocks that it knows")


def _with_channels_last(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:])
