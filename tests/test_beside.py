"""What is done beside a step: in order, in time, and to the same bits as in its own place."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch

from reference_trainer.training.beside import Beside
from reference_trainer.training.meters import Sums
from reference_trainer.training.state import TrainState
from robustcm.noise import NoiseRange
from robustcm.objective import Objective, draw

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_works_wait_for_meanwhile_and_are_done_in_order_on_another_thread():
    beside, done = Beside(CPU), list[tuple[int, int]]()
    for number in range(20):
        beside.later(lambda number=number: done.append((number, threading.get_ident())))
    assert not done
    with beside.meanwhile():
        pass
    assert [number for number, _ in done] == list(range(20))
    assert threading.get_ident() not in {thread for _, thread in done}


def test_finish_does_here_and_now_what_waits():
    beside, done = Beside(CPU), list[int]()
    beside.later(lambda: done.append(threading.get_ident()))
    beside.finish()
    with beside.meanwhile():
        pass
    assert done == [threading.get_ident()]


def test_a_gpu_has_its_own_queue():
    beside, done = Beside(GPU), list[int]()
    beside.later(lambda: done.append(threading.get_ident()))
    assert done == [threading.get_ident()]


def test_what_a_work_raises_is_raised_by_the_step():
    beside = Beside(CPU)
    beside.later(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError), beside.meanwhile():
        pass


def test_of_a_skipped_step_no_part_stays_in_the_sums():
    objective = Objective()
    x = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    batches = [objective.prepare(x, draw(0, step, x.shape), step, 3) for step in range(3)]
    terms = [objective(lambda x_t, t: 0.5 * x_t, batch, objective.init()) for batch in batches]

    def after(steps: list[tuple[int, ...]], skipped: list[bool]) -> TrainState:
        state = TrainState.__new__(TrainState)
        sums = Sums(state, NoiseRange())
        state.meter, state.tails = sums.meter.init(CPU), sums.tail_meter.init(CPU)
        for parts, skip in zip(steps, skipped, strict=True):
            for part in parts:
                sums.add(terms[part], batches[part].pairs)
            sums.close(torch.tensor(skip))
        return state

    skipping, without = after([(0,), (1, 2), (2,)], [False, True, False]), after([(0,), (2,)], [False, False])
    assert torch.equal(skipping.meter, without.meter)
    assert torch.equal(skipping.tails, without.tails)
    assert int(skipping.meter[:, 0].sum()) == 16


def test_an_average_taken_later_is_of_the_step_it_belongs_to():
    states = [TrainState.__new__(TrainState) for _ in range(2)]
    for state in states:
        state.step, state.weights, state.further, state.c = 3, [torch.ones(4)], {}, torch.zeros(1)
        state.__dict__["averages"] = [torch.zeros(4)]
    at_once, later = states
    at_once.update_ema(0.9)
    beside = Beside(CPU)
    beside.later(partial(later.update_ema, 0.9, None, later.step))
    later.step += 1
    beside.finish()
    assert torch.equal(at_once.averages[0], later.averages[0])
