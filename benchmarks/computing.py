"""What do precision, compilation, memory layout and checkpointing make of a training step on this machine?

    python benchmarks/computing.py [--network digits|unet|celebahq] [--batch 128] [--seconds 60] [--compile]

A step is forward, backward, optimizer, average and meters, as the trainer has them, on random latents and on the GPU if
there is one. The ways are timed in turns, so that a busy machine is busy for all of them; printed are the steps/s of
each over those in float32, with quartiles, the ratio of processor seconds where there is no GPU, and on a GPU what one
step needs beside weights and optimizer. The defaults of ``reference_trainer/computing.py`` are chosen by it.
"""

from __future__ import annotations

import argparse
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before what a Python may lack is imported
    runpy.run_path(str(Path(__file__).parents[1] / "analysis" / "needed.py"))

import torch
from _timing import measure_in_turns, write_json

from reference_trainer.computing import Computing
from reference_trainer.config import TrainConfig
from reference_trainer.machine import describe_machine, device_of
from reference_trainer.networks import DiT, UNet
from reference_trainer.presets import digits
from reference_trainer.training.meters import LevelMeter, TailMeter
from reference_trainer.training.state import TrainState
from robustcm.gates import Above
from robustcm.objective import draw

NETWORKS: dict[str, tuple[DiT | UNet, tuple[int, int, int]]] = {
    "digits": (DiT(), (2, 4, 4)),
    "unet": (UNet(), (4, 32, 32)),
    "celebahq": (
        UNet(
            block_out_channels=(128, 256, 384, 512),
            layers_per_block=4,
            attention=(False, True, True, False),
            norm_num_groups=32,
        ),
        (4, 32, 32),
    ),
}
WAYS = {
    "float32": Computing(precision="float32"),
    "tf32": Computing(precision="tf32"),
    "bfloat16": Computing(precision="bfloat16"),
    "bfloat16, channels_last": Computing(precision="bfloat16", channels_last=True),
    "float32, channels_last": Computing(precision="float32", channels_last=True),
    "float32, checkpointing": Computing(precision="float32", checkpointing=True),
    "bfloat16, checkpointing": Computing(precision="bfloat16", checkpointing=True),
    "float32, compile": Computing(precision="float32", compile=True),
    "bfloat16, compile": Computing(precision="bfloat16", compile=True),
}


def fits(way: Computing, network: DiT | UNet, device: torch.device, compiled: bool) -> bool:
    """Whether it can be had here, and was asked for."""
    return (
        (isinstance(network, UNet) or not way.channels_last)
        and (device.type == "cuda" or way.precision != "tf32")
        and (compiled or not way.compile)
    )


def stepper(config: TrainConfig, shape: tuple[int, int, int], device: torch.device) -> Callable[[], None]:
    """One step of training, again and again on the same batch."""
    state = TrainState.create(config, shape, device)
    passes = config.computing.on(device)
    f = config.preconditioned(passes.of(state.network.train()))
    x = 0.5 * torch.randn(config.batch_size, *shape, generator=torch.Generator().manual_seed(0))
    batch = config.objective.prepare(x, draw(0, 0, x.shape), config.steps // 2, config.steps).to(device)
    meter, tails = LevelMeter(), TailMeter()

    def step() -> None:
        terms = config.objective(f, batch, state.c)
        passes.backward(terms.loss)
        state.optimizer_step(config.optimizer, 1e-4)
        state.update_ema(config.ema_decay)
        state.c = terms.state
        state.meter = meter.add(state.meter, terms, batch.pairs)
        state.tails = tails.add(state.tails, terms, batch.pairs)

    step()  # compiles; the optimizer's state is made
    return step


def megabytes(step: Callable[[], None], device: torch.device) -> float | None:
    """What ``step`` needs beyond what is there before it; None on a CPU, where memory let go stays the process's."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def in_words(row: dict[str, Any]) -> str:
    """A line of what is printed; on a GPU without the processor's seconds, on a CPU without memory."""
    q1, median, q3 = row["speed_over_float32"]
    processor, memory = row["processor_over_float32"], row["megabytes"]
    return (
        f"{row['way']:25} {1 / row['step'].median:8.2f} steps/s, {median:.2f} of float32's ({q1:.2f} .. {q3:.2f}"
        + ("" if processor is None else f"; by processor seconds {processor:.2f}")
        + (")" if memory is None else f"), {memory:.0f} MB a step")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="digits")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing, all ways together (default 60)")
    parser.add_argument("--rounds", type=int, default=5, help="at least (default 5)")
    parser.add_argument("--compile", action="store_true", help="torch.compile too (takes minutes)")
    parser.add_argument("--device", default=None, help="default: cuda if there is one, else cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device, about = device_of(options.device), describe_machine()
    network, shape = NETWORKS[options.network]
    config = digits()
    objective = replace(config.objective, gate=Above(1.0), teacher_input=None)
    config = replace(config, network=network, objective=objective, batch_size=options.batch)
    ways = {name: way for name, way in WAYS.items() if fits(way, network, device, options.compile)}
    steps = {name: stepper(replace(config, computing=way), shape, device) for name, way in ways.items()}
    memory = {name: megabytes(step, device) for name, step in steps.items()}
    timings, ratios = measure_in_turns(steps, "float32", min_seconds=options.seconds, min_rounds=options.rounds)
    rows: list[dict[str, Any]] = []
    for name in ways:
        processor = timings["float32"].cpu / timings[name].cpu
        rows.append(
            {
                "way": name,
                "network": options.network,
                "batch": options.batch,
                "step": timings[name],
                "speed_over_float32": list(ratios[name]),
                "processor_over_float32": None if device.type == "cuda" else processor,
                "megabytes": memory[name],
            }
        )
        print(in_words(rows[-1]))
    file = write_json(f"computing_{options.network}", rows, about)
    print(f"{about['gpu'] if device.type == 'cuda' else about['cpu']}, batch {options.batch}; wrote {file.name}")


if __name__ == "__main__":
    main()
