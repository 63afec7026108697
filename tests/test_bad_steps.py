"""A bad step costs one step: it changes nothing, is named, its batch is kept, and too many in a row end the run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import PixelSpace
from reference_trainer.data.images import ImageFolder
from reference_trainer.errors import UserError
from reference_trainer.evaluation.pictures import draw_losses
from reference_trainer.files import load_tensors
from reference_trainer.networks import DiT
from reference_trainer.optimizers import Adam, Muon, RAdam
from reference_trainer.ranks import Ranks
from reference_trainer.run import RunFolder
from reference_trainer.training import bad_steps, loop
from reference_trainer.training.bad_steps import KEPT, BadSteps, not_finite
from reference_trainer.training.batches import Batches
from reference_trainer.training.loop import train
from reference_trainer.training.state import TrainState
from robustcm.couplers import exact
from robustcm.gates import Above
from robustcm.objective import Batch, Objective, draw
from robustcm.robust import RobustLoss
from robustcm.scales import MeasuredC

CPU = torch.device("cpu")
ROW = 3


@pytest.fixture
def config(image_folder: Path) -> TrainConfig:
    return TrainConfig(
        data=ImageFolder(path=str(image_folder), resolution=16),
        autoencoder=PixelSpace(),
        clip=None,
        network=DiT(width=8, layers=1, heads=2, patch=8),
        objective=Objective(c=MeasuredC(bins=2), coupler=exact, gate=Above(0.5)),
        batch_size=8,
        steps=12,
        log_every=4,
        save_every=3,
        most_bad_steps=3,
    )


def poison(
    steps: Iterable[int], monkeypatch: pytest.MonkeyPatch, value: float = torch.nan, parts: Sequence[int] = (0,)
) -> None:
    """One sample of these parts of each of ``steps`` (as the log counts them) has one such element."""

    class Poisoned(Batches):
        def _made(self, step: int, part: int) -> Batch:
            batch = super()._made(step, part)
            if step + 1 in steps and part in parts:
                batch.x[ROW, 0, 0, 0] = value
            return batch

    monkeypatch.setattr(loop, "Batches", Poisoned)


def run(config: TrainConfig, root: Path) -> RunFolder:
    folder = RunFolder(root)
    with folder.locked():
        folder.claim(config)
        train(config, folder, config.data.load(), root.parent / "cache", CPU)
    return folder


def final(folder: RunFolder) -> dict[str, Tensor]:
    found = folder.latest_checkpoint()
    assert found is not None
    return found[1]


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert not [name for name in one if not torch.equal(one[name], two[name])]


# --- One step --------------------------------------------------------------------------------------------------------


def gradients(state: TrainState, seed: int, bad: bool = False) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in state.weights:
        weight.grad = torch.randn(weight.shape, generator=generator)
    if bad:
        state.weights[-1].grad.view(-1)[0] = torch.inf


def no_gradient_is_finite(state: TrainState) -> None:
    gradients(state, 9, bad=True)


def only_the_loss_is_bad(state: TrainState) -> None:
    gradients(state, 9)


@pytest.mark.parametrize("make", [no_gradient_is_finite, only_the_loss_is_bad], ids=lambda make: make.__name__)
@pytest.mark.parametrize("before", [0, 1, 7])
@pytest.mark.parametrize("optimizer", [Adam(weight_decay=0.1), RAdam(weight_decay=0.1), Muon(weight_decay=0.1)])
def test_a_skipped_step_is_as_if_it_had_not_been(
    optimizer: Adam, before: int, make: Callable[[TrainState], None], config: TrainConfig
):
    config = replace(config, optimizer=optimizer)
    torch.manual_seed(0)
    without = TrainState.create(config, (3, 16, 16), CPU)
    with_it = copy.deepcopy(without)
    for state in (without, with_it):
        for step in range(before + 2):
            if step == before and state is with_it:
                make(state)
                bad = state.optimizer_step(optimizer, 0.1, torch.tensor(make is only_the_loss_is_bad))
                assert bad
                state.update_ema(0.9, bad)
            gradients(state, step)
            bad = state.optimizer_step(optimizer, 0.1, torch.tensor(False))
            assert not bad
            state.update_ema(0.9, bad)
    assert int(with_it.num_bad_steps) == 1
    assert_same(without.tensors(), with_it.tensors() | {"num_bad_steps": without.num_bad_steps})


@pytest.mark.parametrize("optimizer", [Adam(), Muon()])
def test_nothing_waits_for_the_device_between_two_looks(
    optimizer: Adam, config: TrainConfig, tmp_path: Path, monkeypatch
):
    config = replace(config, optimizer=optimizer)
    state = TrainState.create(config, (3, 16, 16), CPU)
    x = torch.randn(8, 3, 16, 16)
    batch = config.objective.prepare(x, draw(0, 0, x.shape), 0, 12)
    terms = config.objective(config.preconditioned(state.network), batch, state.c)
    terms.loss.backward()
    remembered = BadSteps(config, RunFolder(tmp_path), Batches(config, x), config.data.load(), CPU)
    for name in ("item", "tolist", "cpu", "nonzero", "numpy", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(Tensor, name, lambda *_, name=name: pytest.fail(f"{name} waits for the device"))
    wrong = not_finite(terms)
    bad = state.optimizer_step(config.optimizer, 0.1, wrong.any())
    remembered.add(bad, state, wrong)
    state.update_ema(0.9, bad & config.optimizer.skips)


# --- In a run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_step_is_named_and_counted_and_its_batch_kept(
    value: float, config: TrainConfig, tmp_path: Path, monkeypatch, capsys
):
    poison([6], monkeypatch, value)
    folder = run(config, tmp_path / "run")
    images = config.data.load()
    batches = Batches(config, torch.zeros(images.num_train, 3, 16, 16))
    indices, batch = batches.again(5, 0)
    sample, sigma = int(indices[ROW]), float(batch.pairs.t_hi[ROW])
    (row,) = folder.rows("bad_steps.jsonl")
    assert row == {"step": 6, "samples": 1, "sample": sample, "sigma": pytest.approx(sigma, rel=1e-4)}
    said = capsys.readouterr().out
    assert f"skipped: step 6: 1 of 8 latents are NaN or infinite ({images.train_name(sample)} at sigma" in said
    (file,) = folder.bad_folder.iterdir()
    kept, about = load_tensors(file)
    assert (about["step"], kept["x"].shape, kept["z"].shape) == (6, (8, 3, 16, 16), (8, 3, 16, 16))
    assert kept["x"][ROW, 0, 0, 0].isfinite().logical_not()
    assert torch.equal(kept["indices"], indices)
    assert [row["bad_steps"] for row in folder.metrics()] == [0, 1, 1]
    assert all(row["consistency"] > 0 for row in folder.metrics())
    assert all(tensor.isfinite().all() for tensor in final(folder).values())


@pytest.mark.parametrize(("parts", "samples"), [([0], 1), ([1], 1), ([0, 1], 2)])
def test_of_a_step_in_parts_the_first_bad_sample_is_named_and_its_part_kept(
    parts: list[int], samples: int, config: TrainConfig, tmp_path: Path, monkeypatch, capsys
):
    config = replace(config, micro_batches=2)
    poison([6], monkeypatch, parts=parts)
    folder = run(config, tmp_path / "run")
    images, first = config.data.load(), parts[0]
    indices, batch = Batches(config, torch.zeros(images.num_train, 3, 16, 16)).again(5, first)
    sample, sigma = int(indices[ROW]), float(batch.pairs.t_hi[ROW])
    (row,) = folder.rows("bad_steps.jsonl")
    assert row == {"step": 6, "samples": samples, "sample": sample, "sigma": pytest.approx(sigma, rel=1e-4)}
    said = capsys.readouterr().out
    assert f"skipped: step 6: 1 of 4 latents of part {first + 1} of 2 are NaN or infinite" in said
    assert images.train_name(sample) in said
    (file,) = folder.bad_folder.iterdir()
    kept, about = load_tensors(file)
    assert about == {"step": 6, "part": first}
    assert torch.equal(kept["indices"], indices)


@pytest.mark.parametrize("step", [1, 6])  # the first step has its c from a look at all parts
def test_whichever_part_was_bad_the_run_ends_the_same(step: int, config: TrainConfig, tmp_path: Path, monkeypatch):
    config, ends = replace(config, micro_batches=2), []
    for parts in ([0], [1], [0, 1]):
        poison([step], monkeypatch, parts=parts)
        ends.append(final(run(config, tmp_path / f"{parts}")))
    assert_same(ends[0], ends[1])
    assert_same(ends[0], ends[2])
    assert int(ends[0]["num_bad_steps"]) == 1
    assert all(tensor.isfinite().all() for tensor in ends[0].values())


def test_a_run_with_bad_steps_that_crashed_continues_bit_exactly(config: TrainConfig, tmp_path: Path, monkeypatch):
    poison([3, 6, 7], monkeypatch)
    whole, crashed = run(config, tmp_path / "whole"), RunFolder(tmp_path / "crashed")
    with monkeypatch.context() as patch:
        patch.setattr(TrainState, "update_ema", crashing(TrainState.update_ema, 7))
        with pytest.raises(ZeroDivisionError):
            run(config, crashed.root)
    run(config, crashed.root)
    assert_same(final(whole), final(crashed))
    assert [row["step"] for row in crashed.rows("bad_steps.jsonl")] == [3, 6, 7]


def crashing(function: Callable[..., None], step: int) -> Callable[..., None]:
    def wrapped(state: TrainState, *arguments: object) -> None:
        if state.step == step:
            raise ZeroDivisionError
        function(state, *arguments)

    return wrapped


def test_a_latent_that_is_not_finite_costs_no_more_than_its_step(config: TrainConfig):
    x = torch.randn(36, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    x[5, 1, 2, 3] = torch.nan
    config = replace(config, batch_size=36)
    batch, clean = Batches(config, x)(0), Batches(config, x.nan_to_num())(0)
    assert torch.equal(batch.z, clean.z)  # all others are paired
    assert int(batch.x.isnan().sum()) == 1


def with_element(number: float, at: int) -> Callable[[TrainState, Ranks], None]:
    """``add_up_gradients``, but in one step one element of the last gradient is ``number``."""
    as_it_is = TrainState.add_up_gradients

    def wrapped(state: TrainState, ranks: Ranks) -> None:
        as_it_is(state, ranks)
        if state.step == at:
            state.gradients()[-1].view(-1)[0] = number

    return wrapped


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_step_with_zeros_in_the_place_of_what_is_not_finite_is_taken(
    value: float, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ends = []
    for policy, number in (("zero", value), ("zero", 0.0), ("skip", value)):
        asked = replace(config, optimizer=Adam(on_nonfinite=policy), steps=3)
        with monkeypatch.context() as patch:
            patch.setattr(TrainState, "add_up_gradients", with_element(number, at=1))
            ends.append(final(run(asked, tmp_path / f"{policy} {number}")))
    zeroed, by_hand, skipped = ends
    assert [int(end["num_bad_steps"]) for end in ends] == [1, 0, 1]
    assert_same(by_hand, zeroed | {"num_bad_steps": by_hand["num_bad_steps"]})
    assert [name for name in zeroed if name.startswith(("network/", "ema/")) and not zeroed[name].equal(skipped[name])]


def test_zeroing_bad_gradients_counts_them_and_no_number_of_them_ends_the_run(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    poison(range(1, 13), monkeypatch)
    folder = run(replace(config, optimizer=RAdam(on_nonfinite="zero")), tmp_path / "run")
    assert folder.metrics()[-1]["bad_steps"] == 12
    assert all(tensor.isfinite().all() for tensor in final(folder).values())


@pytest.mark.parametrize("steps", [[1, 2, 4, 5, 7, 8, 10, 11], [4, 5, 11, 12], []])
def test_fewer_than_most_bad_steps_in_a_row_end_no_run(steps: list[int], config: TrainConfig, tmp_path, monkeypatch):
    poison(steps, monkeypatch)
    folder = run(config, tmp_path / "run")
    assert folder.latest_checkpoint()[0] == 12
    assert folder.metrics()[-1]["bad_steps"] == len(steps)


@pytest.mark.parametrize("first", [1, 2, 3, 4, 6])
def test_most_bad_steps_in_a_row_end_the_run_wherever_logs_and_saves_fall(
    first: int, config: TrainConfig, tmp_path: Path, monkeypatch
):
    poison(range(first, first + 3), monkeypatch)
    with pytest.raises(UserError, match=r"3 bad steps in a row, at step .* mend them; else lower") as caught:
        run(config, tmp_path / "run")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="3 bad steps in a row"):  # the same command again
        run(config, tmp_path / "run")


def test_a_run_can_stop_at_its_first_bad_step_and_saves_nothing_after(config, tmp_path: Path, monkeypatch):
    poison([5], monkeypatch)
    with pytest.raises(UserError, match="a bad step, at step 5"):
        run(replace(config, optimizer=Adam(on_nonfinite="stop"), save_every=1), tmp_path / "run")
    assert RunFolder(tmp_path / "run").latest_checkpoint()[0] == 4


def test_a_log_of_bad_steps_alone_has_no_loss_and_is_still_drawn(config: TrainConfig, tmp_path: Path, monkeypatch):
    poison(range(5, 9), monkeypatch)
    folder = run(replace(config, most_bad_steps=5), tmp_path / "run")
    assert [row["consistency"] is None for row in folder.metrics()] == [False, True, False]
    draw_losses(folder.metrics())


def test_few_of_many_bad_steps_are_named_and_fewer_kept(config: TrainConfig, tmp_path: Path, monkeypatch, capsys):
    poison(range(1, 13), monkeypatch)
    folder = run(replace(config, most_bad_steps=100, save_every=100, log_every=6), tmp_path / "run")
    assert [row["step"] for row in folder.rows("bad_steps.jsonl")] == [1, 2, 3, 4, 7, 8, 9, 10]
    assert capsys.readouterr().out.count("and 2 more bad steps") == 2
    assert len(list(folder.bad_folder.iterdir())) == KEPT


def test_a_batch_that_cannot_be_kept_ends_no_run(config: TrainConfig, tmp_path: Path, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise UserError("cannot write: No space left on device")

    poison([2], monkeypatch)
    monkeypatch.setattr(bad_steps, "save_tensors", full)
    assert run(config, tmp_path / "run").latest_checkpoint()[0] == 12
    assert "its batch is not kept (cannot write: No space left" in capsys.readouterr().out


# --- The measured scale ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_a_residual_that_is_not_finite_leaves_no_trace_in_a_measured_scale(value: float):
    student, teacher = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0))
    student[ROW, 2] = value
    fine = torch.arange(8) != ROW
    robust, without = RobustLoss(), RobustLoss()
    for _ in range(3):
        found = robust(student.clone().requires_grad_(), teacher)
        alone = without(student[fine].clone().requires_grad_(), teacher[fine])
        assert torch.equal(found[fine], alone)
        assert torch.equal(robust.state, without.state)
