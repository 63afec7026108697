"""What changes while training, and how it goes into a checkpoint and back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reference_trainer.averages import prefix
from reference_trainer.config import TrainConfig
from reference_trainer.errors import UserError
from reference_trainer.files import check_layout
from reference_trainer.model import build_network
from reference_trainer.optimizers import Adam, moments_like, step_unless
from reference_trainer.ranks import Ranks
from reference_trainer.training.meters import LevelMeter, TailMeter
from robustcm.averages import Average, PowerFunction

if TYPE_CHECKING:
    from reference_trainer.sharding import Sharding


@dataclass
class TrainState:
    """Everything a step reads and writes. Randomness is not part of it: that is a function of (seed, step)."""

    step: int
    """Steps done."""
    network: nn.Module
    weights: list[Tensor]
    """The network's, listed once: walking its modules for them at every step takes longer than averaging them. Of a
    sharded network this rank's shards of them, and so are all that follow from them."""
    ema: nn.Module
    """Same architecture, the averaged weights; for sampling."""
    further: dict[Average, list[Tensor]]
    """Of each further average its tensors, in the order of ``weights``."""
    optimizer: torch.optim.Optimizer
    c: Tensor
    """State of the objective's c schedule."""
    meter: Tensor
    """Sums since the last log, see ``LevelMeter``."""
    tails: Tensor
    """Counts since the last log, see ``TailMeter``."""
    first_bad_step: Tensor
    """int64, 0-dim: where the last step was bad, the first of the bad ones in a row that it ends; else -1."""
    num_bad_steps: Tensor
    """int64, 0-dim: in all."""
    sharding: Sharding | None = None
    """How the ranks hold network and ema between them; None: each has all of them."""

    @staticmethod
    def create(
        config: TrainConfig,
        shape: tuple[int, int, int],
        device: torch.device,
        classes: int = 0,
        sharding: Sharding | None = None,
        begin: bool = True,
    ) -> TrainState:
        """The state before the first step, for latents of ``shape`` (ch, h, w) and a network told of ``classes``.

        Args:
            begin: False where a checkpoint is put into it anyway.
        """
        network = build_network(config, shape, classes, begin)
        ema = copy.deepcopy(network).eval().requires_grad_(False)
        if sharding is None:
            network, ema = network.to(device), ema.to(device)
            weights: list[Tensor] = list(network.parameters())
        else:
            sharding.cut(network)
            sharding.cut(ema)
            weights = sharding.shards(network)
        return TrainState(
            step=0,
            network=network,
            weights=weights,
            ema=ema,
            further={average: [p.detach().clone() for p in weights] for average in config.averages},
            optimizer=config.optimizer.build(weights, network),
            c=config.objective.init(device),
            meter=LevelMeter().init(device),
            tails=TailMeter().init(device),
            first_bad_step=torch.tensor(-1, device=device),
            num_bad_steps=torch.tensor(0, device=device),
            sharding=sharding,
        )

    @cached_property
    def averages(self) -> list[Tensor]:
        """The ema's, in the order of ``weights``."""
        return list(self.ema.parameters()) if self.sharding is None else self.sharding.shards(self.ema)

    def whole_ema(self, build: Callable[[], nn.Module]) -> nn.Module:
        """``ema``; of a sharded one a copy that is whole, into a network that ``build`` makes. All ranks call it."""
        return self.ema if self.sharding is None else self.sharding.whole(self.ema, build().to(self.c.device)).eval()

    def gradients(self) -> list[Tensor]:
        """Of the step, in the order of ``weights``; a weight that takes no part has none."""
        return [p.grad for p in self.weights if p.grad is not None]

    def add_up_gradients(self, ranks: Ranks) -> None:
        """They become those of all ranks; of a sharded network backward has done that, and left each rank its own."""
        if self.sharding is None:
            ranks.add_up(self.gradients())
        else:
            self.sharding.take_gradients(self.network, self.weights)

    def add_up_sums(self, ranks: Ranks) -> None:
        """What was summed since the last log becomes the leading rank's, of all ranks; the others keep nothing."""
        ranks.add_up([self.meter, self.tails])
        if not ranks.leads:
            self.forget_sums()

    def forget_sums(self) -> None:
        """Begin them anew."""
        self.meter, self.tails = torch.zeros_like(self.meter), torch.zeros_like(self.tails)

    def optimizer_step(self, config: Adam, lr: float, bad: Tensor | None = None) -> Tensor:
        """Clip, step, clear the gradients; nothing here waits for the device.

        Args:
            bad: 0-dim bool: whether the step is bad already, whatever its gradient; see ``not_finite``.
        Returns:
            Whether it is bad: counted, and left out if ``config.skips``.
        """
        gradients = self.gradients()
        if config.on_nonfinite == "zero":
            finite = torch.stack([g.isfinite().all() for g in gradients]).all()
            if self.sharding is not None:
                finite = self.sharding.all(finite)
            for gradient in gradients:
                gradient.nan_to_num_(0.0, 0.0, 0.0)
            self._clip(config.max_norm)
        else:
            finite = self._clip(config.max_norm).isfinite()
        bad = ~finite if bad is None else bad | ~finite
        self.first_bad_step = torch.where(bad, torch.where(self.first_bad_step < 0, self.step, self.first_bad_step), -1)
        self.num_bad_steps = self.num_bad_steps + bad.long()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        step_unless(bad & config.skips, self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        return bad

    def _clip(self, max_norm: float) -> Tensor:
        """Clip the gradients; their norm before that."""
        if self.sharding is None:
            return torch.nn.utils.clip_grad_norm_(self.weights, max_norm)
        norm = self.sharding.norm(self.gradients())
        torch.nn.utils.clip_grads_with_norm_(self.weights, max_norm, norm)
        return norm

    @torch.no_grad()
    def update_ema(self, decay: float, skipped: Tensor | None = None) -> None:
        """``ema += (1 - decay') (network - ema)``, decay' ramped up over the first steps; the further ones alike.

        Not where ``skipped``.
        """
        ramped = min(decay, (self.step + 1) / (self.step + 10))
        further = [(average(self.step), tensors) for average, tensors in self.further.items()]
        for number, tensors in [(1 - ramped, self.averages), *further]:
            share = torch.full((), number, device=self.c.device)
            if skipped is not None:
                share = torch.where(skipped, 0.0, share)
            torch._foreach_lerp_(tensors, self.weights, [share] * len(self.weights))

    def snapshot(self) -> dict[str, Tensor]:
        """The power-function averages, float32, named as in ``tensors``, and for whom these are."""
        kept: dict[Average, list[Tensor]] = {
            average: found for average, found in self.further.items() if isinstance(average, PowerFunction)
        }
        return {name: tensor.float() for name, tensor in self._gathered(self._named(kept)).items()}

    def _named(self, averages: dict[Average, list[Tensor]]) -> dict[str, Tensor]:
        return {
            prefix(average) + name: self._joined(tensor, like)
            for average, tensors in averages.items()
            for (name, like), tensor in zip(self.network.named_parameters(), tensors, strict=True)
        }

    def tensors(self) -> dict[str, Tensor]:
        """All of the state under readable names: ``network/..., ema/..., averages/AVERAGE/..., optimizer/NAME/...``.

        Of a sharded network all ranks call this, and for the leading one it is whole, and on the CPU.
        """
        return self._gathered(self._tensors())

    def _gathered(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.sharding is None:
            return tensors
        return {name: self.sharding.gathered(tensor) for name, tensor in tensors.items()}

    def _joined(self, tensor: Tensor, like: Tensor) -> Tensor:
        return tensor if self.sharding is None else self.sharding.joined(tensor, like)

    def _put(self, into: Tensor, whole: Tensor) -> None:
        if self.sharding is None:
            into.copy_(whole)
        else:
            self.sharding.put(into, whole)

    def _tensors(self) -> dict[str, Tensor]:
        named = list(self.network.named_parameters())
        out = {f"network/{name}": tensor for name, tensor in self.network.state_dict().items()}
        out |= {f"ema/{name}": tensor for name, tensor in self.ema.state_dict().items()}
        out |= self._named(self.further)
        for index, moments in self.optimizer.state_dict()["state"].items():
            name, like = named[index]
            for key, value in moments.items():
                moment = torch.as_tensor(value)
                out[f"optimizer/{name}/{key}"] = moment if key == "step" else self._joined(moment, like)
        return out | {name: getattr(self, name) for name in self._LOOSE}

    def restore(self, step: int, tensors: dict[str, Tensor]) -> None:
        """The inverse of ``tensors``.

        Raises:
            UserError: the tensors belong to another network, or are those of no run.
        """
        names = dict(self.network.named_parameters())
        moments = {name: _below(f"optimizer/{name}/", tensors) for name in names}
        try:
            check_layout(_others(tensors), _others(self._tensors()))
            for found, like in zip(moments.values(), moments_like(self.optimizer, list(names.values())), strict=True):
                check_layout(found, like if found else {})  # a weight without a gradient has none
        except UserError as error:
            raise UserError(
                f"the checkpoint of step {step} does not fit this run ({error}): move it away to go on without it"
            ) from error
        for name, tensor in self._tensors().items():
            if name.startswith(("network/", "ema/", "averages/")):
                self._put(tensor, tensors[name])
        if self.sharding is not None:
            moments = {
                name: {key: t if key == "step" else self.sharding.own(t) for key, t in found.items()}
                for name, found in moments.items()
            }
        state = {index: found for index, found in enumerate(moments.values()) if found}
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        for name in self._LOOSE:
            setattr(self, name, tensors[name].to(getattr(self, name).device))
        self.step = step

    _LOOSE = ("c", "meter", "tails", "first_bad_step", "num_bad_steps")


def _others(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("optimizer/")}


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
