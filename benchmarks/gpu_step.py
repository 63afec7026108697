"""What does a step of the paper's network cost on this GPU, how far is it from its floor, and what do precisions save?

    python benchmarks/gpu_step.py [--batch 128] [--seconds 8] [--compile]

The network is the U-Net of Dao et al. for CelebA-HQ at 256 x 256 (128 channels, multipliers 1, 2, 3, 4, four residual
blocks a resolution, attention at 16 and 8), as a diffusers UNet2DModel; the latents are random numbers of its shape,
4 x 32 x 32. The floor is what no recipe can leave out: teacher forward, student forward and backward, a fused AdamW
step. The whole step adds the robust distance with its measured scale, clipping, the average of the weights and the
meters, as the trainer has them. Variants are timed in turns.
"""

from __future__ import annotations

import argparse
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # before what a Python may lack is imported
    runpy.run_path(str(Path(__file__).parents[1] / "analysis" / "needed.py"))

import torch
from _timing import measure_in_turns, write_json
from torch import Tensor, nn

from reference_trainer.config import TrainConfig
from reference_trainer.errors import UserError
from reference_trainer.machine import describe_machine
from reference_trainer.networks import UNet
from reference_trainer.presets import digits
from reference_trainer.training.meters import LevelMeter, TailMeter
from reference_trainer.training.state import TrainState
from robustcm.consistency import add_noise
from robustcm.gates import Above
from robustcm.objective import draw

SHAPE = (4, 32, 32)
CELEBAHQ = UNet(
    block_out_channels=(128, 256, 384, 512),
    layers_per_block=4,
    attention=(False, True, True, False),
    norm_num_groups=32,
)


class Cast(nn.Module):
    """A network under autocast, whose weights stay float32."""

    def __init__(self, network: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        with torch.autocast(x.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            output: Tensor = self.network(x, c_noise)
        return output


class Steps:
    """The whole step and its floor, on one batch that lies on the device."""

    def __init__(self, config: TrainConfig, device: torch.device, batch_size: int, variant: str) -> None:
        self.config, self.variant = config, variant
        self.state = TrainState.create(config, SHAPE, device)
        dtype = torch.bfloat16 if "bf16" in variant else None
        network = self.state.network.train()
        if "channels_last" in variant:
            network.to(memory_format=torch.channels_last)
        run = Cast(torch.compile(network) if "compile" in variant else network, dtype)
        self.f = config.preconditioned(run)
        x = 0.5 * torch.randn(batch_size, *SHAPE, generator=torch.Generator().manual_seed(0))
        self.batch = config.objective.prepare(x, draw(0, 0, x.shape), config.steps // 2, config.steps).to(device)
        self.meter, self.tails = LevelMeter(), TailMeter()

    def _precision(self) -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.variant != "float32"

    def whole(self) -> None:
        self._precision()
        terms = self.config.objective(self.f, self.batch, self.state.c)
        terms.loss.backward()
        self.state.optimizer_step(self.config.optimizer, 1e-4)
        self.state.update_ema(0.9999)
        self.state.c = terms.state
        self.state.meter = self.meter.add(self.state.meter, terms, self.batch.pairs)
        self.state.tails = self.tails.add(self.state.tails, terms, self.batch.pairs)

    def floor(self) -> None:
        self._precision()
        x, z, pairs = self.batch[:3]
        with torch.no_grad():
            teacher = self.f(add_noise(x, z, pairs.t_lo), pairs.t_lo)
        (self.f(add_noise(x, z, pairs.t_hi), pairs.t_hi) - teacher).square().sum().backward()
        self.state.optimizer.step()
        self.state.optimizer.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=8.0, help="of timing, for each variant (default 8)")
    parser.add_argument("--compile", action="store_true", help="torch.compile too (takes minutes)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("benchmarks/gpu_step.py needs a GPU")
    device, about = torch.device("cuda"), describe_machine()
    config = digits()
    config = replace(config, network=CELEBAHQ, objective=replace(config.objective, gate=Above(1.0), teacher_input=None))
    variants = ["float32", "tf32", "bf16", "bf16 channels_last"] + (["bf16 compile"] if options.compile else [])
    rows, parameters = [], 0
    for variant in variants:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        steps = Steps(config, device, options.batch, variant)
        parameters = sum(p.numel() for p in steps.state.network.parameters())
        calls: dict[str, Callable[[], object]] = {"floor": steps.floor, "whole": steps.whole}
        timings, ratios = measure_in_turns(calls, "floor", min_seconds=options.seconds)
        q1, median, q3 = (1 / ratio for ratio in reversed(ratios["whole"]))
        memory = torch.cuda.max_memory_allocated() / 2**30
        rows.append(
            {
                "variant": variant,
                "batch": options.batch,
                "parameters": parameters,
                "floor": timings["floor"],
                "whole": timings["whole"],
                "whole_over_floor": [q1, median, q3],
                "peak_gib": memory,
            }
        )
        print(
            f"{variant:20} floor {1e3 * timings['floor'].median:.1f} ms, whole {1e3 * timings['whole'].median:.1f} ms "
            f"({median:.3f} x, quartiles {q1:.3f} .. {q3:.3f}), {1 / timings['whole'].median:.2f} steps/s, "
            f"peak {memory:.1f} GiB",
            flush=True,
        )
        del steps, calls
    print(
        f"{about['gpu']}: {parameters / 1e6:.1f} M parameters, batch {options.batch}; wrote "
        f"{write_json('gpu_step', rows, about).name}"
    )


if __name__ == "__main__":
    main()
