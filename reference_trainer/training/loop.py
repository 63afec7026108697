"""The training loop, to be read in one sitting."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from reference_trainer.averages import check_snapshots
from reference_trainer.config import TrainConfig
from reference_trainer.data.images import ImageSet
from reference_trainer.errors import Stop, Terminated, UserError
from reference_trainer.model import TrainedModel, build_network, number_of
from reference_trainer.optimizers import Muon, said_of_muon
from reference_trainer.ranks import Ranks
from reference_trainer.run import RunFolder
from reference_trainer.training.bad_steps import BadSteps, not_finite
from reference_trainer.training.batches import Batches, check_batch_size, check_labels
from reference_trainer.training.logger import logger_of
from reference_trainer.training.meters import LevelMeter, TailMeter
from reference_trainer.training.start import classes_of_run, latents_of_run, say_how_it_computes, skip_of_run
from reference_trainer.training.state import TrainState
from robustcm.losses import Scale


class Judge(Protocol):
    """Says what the averaged weights are worth while training."""

    def prepare(self, model: TrainedModel) -> None:
        """Before the first step, and of weights that are worth nothing yet: try all that will be needed later."""
        ...

    def share(self, model: TrainedModel, ranks: Ranks, stopped: Callable[[], bool]) -> bool:
        """All ranks do what they can between them, before the leading one calls this; False: they were ``stopped``."""
        ...

    def __call__(self, model: TrainedModel) -> None: ...


def train(
    config: TrainConfig,
    run: RunFolder,
    images: ImageSet,
    cache: Path,
    device: torch.device,
    judge: Judge | None = None,
    new_data: bool = False,
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
    sharded: bool = False,
) -> bool:
    """Train to ``config.steps``; call it again with the same arguments to continue, bit-exactly.

    Args:
        judge: is shown the averaged weights every ``config.evaluate_every`` steps, but not those of the last.
        new_data: go on although the images or the user's autoencoder are not what the run was made from.
        ranks: the processes that share each step's micro-batches; all call this, the leading one writes.
        sharded: each of them holds its share of weights, averages and moments, see ``Sharding``.
    Returns:
        Whether the run is complete and nobody asked for a stop (False: stopped by Ctrl-C, after saving).
    Raises:
        Terminated: stopped by SIGTERM, after saving.
        UserError: see its message; checkpoints written before stay good.
    """
    if sharded:
        from reference_trainer.sharding import Sharding, require_shardable  # slow to import, and seldom needed
    with ranks.first_leads():
        check_labels(config, images.train_labels)
        check_snapshots(config)
        check_batch_size(config, images.num_train)  # all before the autoencoder is fitted
        parts = ranks.parts(config.micro_batches)
        if sharded:
            require_shardable(config.objective, config.optimizer, config.micro_batches, ranks)
        classes = classes_of_run(config, run, images, new_data)
        latents, space = latents_of_run(config, run, images, cache, device, new_data)
        if classes is not None and ranks.leads:
            classes.save(run.classes_file)
        skip = skip_of_run(config, run, latents, space, device)
    batches = Batches(config, latents, images.train_labels, number_of(classes), parts)
    ch, h, w = latents.shape
    sharding = Sharding.over(ranks, device) if sharded else None
    begin = not run.checkpoints()
    state = TrainState.create(config, (ch, h, w), device, number_of(classes), sharding, begin)
    passes = config.computing.on(device, state.network)
    if found := run.latest_checkpoint():
        state.restore(*found)
        if state.step > config.steps:
            raise UserError(f"{run.root} has a checkpoint of step {state.step} of {config.steps}: it is of another run")
    ranks.require_same(state.step, f"checkpoints in {run.root}, of steps", "one folder that all of them see")
    averaged = TrainedModel(config, state.ema, space, (ch, h, w), state.step, device, classes=classes, skip=skip)
    build = partial(build_network, config, (ch, h, w), number_of(classes))
    with ranks.first_leads():
        if ranks.leads:
            if judge:
                judge.prepare(averaged)
            run.keep_rows_until(state.step)
            run.keep_snapshots_until(state.step)
            say_how_it_computes(passes, run, state.step, config.steps)
            if begin and isinstance(config.optimizer, Muon):
                tqdm.write(said_of_muon(state.network))
        else:
            state.forget_sums()
    objective = config.objective
    meter, tail_meter = LevelMeter(noise=objective.noise), TailMeter(noise=objective.noise)
    bad_steps = BadSteps(config, run, batches, images, device, ranks)
    f = config.preconditioned(passes.of(state.network.train()), skip)

    def show(judge: Judge) -> None:
        model = replace(averaged, network=state.whole_ema(build), step=state.step)
        shared = ranks.world == 1 or judge.share(model, ranks, partial(bool, stop_requested))
        if shared and ranks.leads:
            stop_requested.may_break(partial(judge, model))

    with (
        closing(batches),
        logger_of(run, state.step, config.steps, ranks) as logger,
        stop_requests() as stop_requested,
    ):
        stopped = False
        if judge and found and config.evaluates_at(state.step) and ranks.any(state.step not in evaluated(run)):
            show(judge)  # a stop came first
            stopped = ranks.any(bool(stop_requested))  # and again: one step more, and this evaluation would be lost
        while state.step < config.steps and not stopped:
            first = residuals_ahead(config, f, batches, state, ranks)
            before, seen, scales = (state.meter, state.tails), list[Tensor](), list[Scale]()
            wrong = torch.zeros(config.micro_batches, batches.rows, dtype=torch.float64, device=device)
            for part in parts:
                batch = batches(state.step, part).to(device)
                seed_dropout(batches.dropout_seed(state.step, part), device)
                terms = objective(f, batch, state.c, seen=first)
                passes.backward(terms.loss / config.micro_batches)
                seen.append(terms.seen)
                scales.append(terms.c)
                wrong[part] = not_finite(terms)
                state.meter = meter.add(state.meter, terms, batch.pairs)
                state.tails = tail_meter.add(state.tails, terms, batch.pairs)

            counts = torch.stack(seen).sum(0)
            state.add_up_gradients(ranks)
            ranks.add_up([counts, wrong])
            lr = config.learning_rate(state.step, config.steps)
            bad = state.optimizer_step(config.optimizer, lr, wrong.any())
            bad_steps.add(bad, state, wrong.flatten())
            skipped = bad & config.optimizer.skips
            state.update_ema(config.ema_decay, skipped)
            state.c = torch.where(skipped, state.c, objective.c.observe(state.c, counts))
            state.meter, state.tails = (
                torch.where(skipped, old, new) for old, new in zip(before, (state.meter, state.tails), strict=True)
            )
            state.step += 1

            last = state.step == config.steps
            if state.step % config.log_every == 0 or last:  # the only synchronisation with the device
                bad_steps.look(state)
                state.add_up_sums(ranks)
                row = {"num_levels": batch.pairs.num_levels, "c": mean_of(scales, config, ranks), "lr": lr}
                row |= meter.read(state.meter) | {"td": tail_meter.read(state.tails)}
                logger.log(state.step, row | {"bad_steps": int(state.num_bad_steps)})
                state.forget_sums()
            if config.keeps_snapshot_at(state.step):  # before saving, too
                bad_steps.look(state)
                snapshot = state.snapshot()
                if ranks.leads:
                    run.save_snapshot(state.step, snapshot)
            stopped = ranks.any(bool(stop_requested))
            last |= stopped
            judged = judge is not None and config.evaluates_at(state.step) and not last
            if state.step % config.save_every == 0 or judged or last:
                bad_steps.look(state)
                state.add_up_sums(ranks)
                tensors = state.tensors()
                if ranks.leads:
                    run.save_checkpoint(state.step, tensors, config.keep_checkpoints)
            if judge and judged:  # behind saving: a stop leaves it, and a resumed run has it first
                show(judge)
                stopped = last = ranks.any(bool(stop_requested))
            logger.advance()
            if last:
                break
    if stop_requested.terminated:
        raise Terminated(f"stopped after step {state.step} and saved in {run.root}")
    return state.step == config.steps and not stopped


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed torch's own generators, of the CPU and of ``device``."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)  # torch.manual_seed writes down a stack trace for GPUs to come
    else:
        torch.manual_seed(seed)


def evaluated(run: RunFolder) -> list[int]:
    """The steps that have a row."""
    return [row["step"] for row in run.evaluations()]


def residuals_ahead(
    config: TrainConfig, f: Callable[..., Tensor], batches: Batches, state: TrainState, ranks: Ranks
) -> Tensor | None:
    """What the residuals of a first step in several parts add to c's state: every part shall have the same c.

    None where c comes from the step before, or the step has one part; and behind a first step that was bad, whose c was
    not observed: then each part of the next measures its own.
    """
    if state.step > 0 or config.micro_batches == 1:
        return None
    looks = []
    for part in batches.parts:
        batch = batches(0, part).to(state.first_bad_step.device)
        seed_dropout(batches.dropout_seed(0, part), state.first_bad_step.device)
        looks.append(config.objective.look(f, batch))
    seen = torch.stack(looks).sum(0)
    ranks.add_up([seen])
    return seen


def mean_of(scales: Sequence[Scale], config: TrainConfig, ranks: Ranks) -> float:
    """The scale of a step's parts as one number for the log."""
    total = torch.stack([torch.as_tensor(c, dtype=torch.float64).cpu().mean() for c in scales]).sum()
    ranks.add_up([total])
    return float(total) / config.micro_batches


class StopRequest:
    """True once Ctrl-C was pressed or SIGTERM came; a second Ctrl-C interrupts at once, a second SIGTERM does not: a
    scheduler may send several, and kills soon enough itself.
    """

    def __init__(self) -> None:
        self.requested, self.terminated, self._waited_for = False, False, False

    def __bool__(self) -> bool:
        return self.requested

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested, self.terminated = True, self.terminated or number == signal.SIGTERM
        tqdm.write("stopping after this step; the run is saved (Ctrl-C again stops at once)")
        if self._waited_for:
            self._waited_for = False
            raise _Stopped

    def may_break(self, work: Callable[[], None]) -> None:
        """Do ``work``, which changes no state and takes long, until a request comes."""
        try:
            self._waited_for = True
            if not self.requested:  # before; from now on a request raises
                work()
        except _Stopped:
            pass
        finally:
            self._waited_for = False


class _Stopped(Stop):
    """Leaves the work that ``may_break``."""


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """While inside, the first Ctrl-C (or SIGTERM) asks for a clean stop."""
    request, previous = StopRequest(), {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, request)
    except ValueError:  # not the main thread: the caller keeps its own handling
        pass
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def elapsed(since: float) -> str:
    """Wall time since ``time.monotonic() == since``, for a person."""
    seconds = round(time.monotonic() - since)
    return f"{seconds // 60} min {seconds % 60} s" if seconds >= 60 else f"{seconds} s"
