"""The diffusion term at small noise: where it is on, its size, and its share of the gradient."""

from __future__ import annotations

import pytest
import torch

from robustcm.early import EarlyDiffusion, gradient_share
from robustcm.schedules import FixedCurriculum, LevelGrid, LevelPairs, UniformLaw


def pairs_at(depth: list[float]) -> LevelPairs:
    return LevelPairs(torch.ones(len(depth)), torch.full((len(depth),), 0.5), torch.tensor(depth), 11)


def test_term_is_zero_above_its_start_and_the_error_from_there_on(rng):
    student, x = torch.randn(2, 4, 3, 2, generator=rng)
    term = EarlyDiffusion(weight=5, start=0.75)(student, x, pairs_at([0.0, 0.74, 0.75, 0.99]))
    error = 5 * (student - x).square().mean((1, 2))
    torch.testing.assert_close(term, torch.where(torch.tensor([False, False, True, True]), error, 0.0))


def test_default_is_on_for_the_last_quarter_of_the_grid():
    grid = LevelGrid(curriculum=FixedCurriculum(num_levels=40), law=UniformLaw())
    pairs = grid(0, 1, (torch.arange(39) + 0.5) / 39)
    term = EarlyDiffusion()(torch.ones(39, 1), torch.zeros(39, 1), pairs)
    assert term.tolist() == [0] * 30 + [5] * 9  # i >= 0.75 N, as the authors' code has it


@pytest.mark.parametrize("shape", [(3, 4, 4), (7,)])
def test_reductions_differ_by_the_number_of_elements_of_a_sample(shape, rng):
    student, x = torch.randn(2, 5, *shape, generator=rng)
    mean, total = (EarlyDiffusion(start=0, reduction=r)(student, x, pairs_at([0.5] * 5)) for r in ("mean", "sum"))
    torch.testing.assert_close(total, mean * torch.Size(shape).numel())


def test_gradient_of_the_sum_is_twice_the_error_where_the_term_is_on_and_zero_elsewhere(rng):
    student, x = torch.randn(2, 2, 3, generator=rng)
    student.requires_grad_()
    EarlyDiffusion(weight=2, reduction="sum")(student, x, pairs_at([0.1, 0.9])).sum().backward()
    assert torch.equal(student.grad[0], torch.zeros(3))
    torch.testing.assert_close(student.grad[1], 4 * (student.detach() - x)[1])


def test_low_precision_output_is_compared_in_float32(rng):
    student, x = torch.randn(2, 2, 300, generator=rng)
    term = EarlyDiffusion(start=0)
    low = term(student.bfloat16(), x, pairs_at([0.5, 0.5]))
    assert torch.equal(low, term(student.bfloat16().float(), x, pairs_at([0.5, 0.5])))


@pytest.mark.parametrize("k", [0.0, 0.5, 3.0])
def test_share_of_a_term_k_times_as_steep_is_k_over_one_plus_k(k, rng):
    student = torch.randn(4, 5, generator=rng, requires_grad=True)
    direction = torch.randn(4, 5, generator=rng)
    share = gradient_share(k * (student * direction).sum(1), (student * direction).sum(1), student)
    torch.testing.assert_close(share, torch.tensor(k / (1 + k)))


def test_share_measures_norms_at_the_output_and_keeps_the_graph():
    student = torch.zeros(2, 2, requires_grad=True)
    weight = torch.ones(1, requires_grad=True)
    output = student + weight
    term, rest = (output * torch.tensor([3.0, 4.0])).sum(), (output * torch.tensor([0.0, 15.0])).sum()
    assert gradient_share(term, rest, output).item() == pytest.approx(5 / (5 + 15))
    (term + rest).backward()
    assert weight.grad.item() == pytest.approx(2 * 22)


def test_share_of_a_constant_term_is_zero_and_of_nothing_is_zero():
    student = torch.ones(2, requires_grad=True)
    assert gradient_share(torch.zeros(()), student.sum(), student) == 0
    assert gradient_share(torch.zeros(()), torch.zeros(()), student) == 0
    other = torch.ones(2, requires_grad=True)
    assert gradient_share(other.sum(), student.sum(), student) == 0


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"weight": -1}, "weight must be a finite number >= 0 .*, got -1"),
        ({"start": 1.5}, r"start must be a finite number >= 0 and <= 1, got 1\.5"),
        ({"reduction": "max"}, "reduction must be 'mean' or 'sum' over the elements of a sample, got 'max'"),
    ],
    ids=str,
)
def test_parameters_that_cannot_be_are_refused(parameters, message):
    with pytest.raises(ValueError, match=message):
        EarlyDiffusion(**parameters)
