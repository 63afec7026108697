"""Consistency trajectories: none of no length, the closed form of Gaussian data, what becomes of it at sigma_min."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from robustcm.consistency import add_noise, sample
from robustcm.losses import geman_mcclure, squared_l2
from robustcm.noise import NoiseRange
from robustcm.objective import Batch, Objective, draw
from robustcm.randomness import step_generator, two_of
from robustcm.scales import MeasuredC
from robustcm.schedules import DoublingCurriculum, FixedCurriculum, LevelGrid, LevelPairs, RatioLevels
from robustcm.teacher_input import KeepCovariance
from robustcm.trajectories import PreconditionedTrajectory, TrajectoryObjective, UniformEnds, sample_trajectory

S = 0.3  # standard deviation of the data
LOW = NoiseRange().sigma_min


class Net(nn.Module):
    """A network told two times."""

    def __init__(self, d: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(d + 2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, d))

    def forward(self, x: Tensor, c_noise: Tensor, c_noise_s: Tensor) -> Tensor:
        return self.layers(torch.cat([x, c_noise[:, None] / 500, c_noise_s[:, None] / 500], 1))


def true_g(x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """x_s on the path through x_t, for x ~ N(0, S^2)."""
    return ((S**2 + s**2) / (S**2 + t**2)).sqrt()[:, None] * x_t


def data(step: int = 0, b: int = 8) -> Tensor:
    return S * torch.randn(b, 2, generator=step_generator(1, step))


def prepared(objective: TrajectoryObjective, step: int = 50, b: int = 8, **given) -> Batch:
    return objective.prepare(data(step, b), draw(0, step, (b, 2)), step, 100, **given)


def all_at(value: float, b: int = 64) -> Tensor:
    return torch.full((b,), value, dtype=torch.float64)


# --- The function ----------------------------------------------------------------------------------------------------


@given(st.floats(LOW, 80.0), st.sampled_from([torch.float32, torch.float64]))
def test_a_trajectory_of_no_length_is_its_point_to_the_bit(t: float, dtype: torch.dtype):
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    t = torch.full((3,), t, dtype=dtype).clamp(LOW)
    jump = PreconditionedTrajectory(Net().to(dtype))
    assert torch.equal(jump(x, t, t), x)


def test_the_rest_of_the_way_is_a_network_told_both_levels():
    told = []

    def network(x: Tensor, c_noise: Tensor, c_noise_s: Tensor, label: int) -> Tensor:
        told.append((c_noise, c_noise_s, label))
        return torch.zeros_like(x)

    jump = PreconditionedTrajectory(network)
    x, t, s = torch.ones(4, 2), torch.full((4,), 3.0), torch.full((4,), 1.0)
    c_skip = jump.preconditioning.c_skip(t)
    torch.testing.assert_close(jump(x, t, s, label=7), (1 / 3 + 2 / 3 * c_skip)[:, None] * x)
    assert torch.equal(told[0][0], 250 * t.log())
    assert torch.equal(told[0][1], 250 * s.log())
    assert told[0][2] == 7


# --- The closed form -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s", [LOW, 0.1, 0.9])
def test_the_exact_trajectories_are_left_in_place_by_the_loss_to_first_order_in_the_gap(s: float):
    """E[jump(x_u, u, s) | x_t] - jump(x_t, t, s) shrinks like the square of t - u.

    The mean is over two samples with their noise that lie evenly about those which lead to x_t: jumps are linear.
    """
    x_t, t = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 1.0
    mean, std = S**2 / (S**2 + t**2) * x_t, S * t / (S**2 + t**2) ** 0.5
    x = torch.cat([mean - std, mean + std])
    draws = draw(0, 50, x.shape)._replace(z=(x_t.repeat(2, 1) - x) / t)
    off = []
    for gap in (0.02, 0.01, 0.005):
        pairs = LevelPairs(all_at(t, 128), all_at(t - gap, 128), torch.zeros(128), 11)
        objective = TrajectoryObjective(levels=lambda *_, pairs=pairs: pairs, ends=lambda t, *_: torch.full_like(t, s))
        terms = objective(true_g, objective.prepare(x, draws, 50, 100), objective.init())
        off.append(float((terms.teacher - terms.student).unflatten(0, (2, 64)).mean(0).abs().max()))
    assert off[0] / off[1] == pytest.approx(4, rel=0.1)
    assert off[1] / off[2] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("reach", [0.0, 0.6])
@pytest.mark.parametrize("kept", [True, False])
def test_with_the_covariance_kept_the_exact_trajectories_are_what_a_regression_learns(kept: bool, reach: float):
    """Whatever s is; without it the regression's slope is too small, and the path ends nearer to the mean."""
    n = 20_000
    x = data(b=n)
    objective = TrajectoryObjective(levels=LevelGrid(curriculum=FixedCurriculum(num_levels=8)), reach=reach)
    if kept:
        objective = replace(objective, teacher_input=KeepCovariance().on(x))
    batch = objective.prepare(x, draw(0, 50, x.shape), 50, 100)
    (t, u), s = batch.pairs[:2], batch.conditions["s"]
    shown = add_noise(x, batch.z, u) if batch.x_lo is None else batch.x_lo
    inside = (t < 10) & (t > 0.05)  # where a step of eight levels loses much
    target, x_t = true_g(shown, u, s)[inside], add_noise(x, batch.z, t)[inside]
    exact, weight = true_g(x_t, t[inside], s[inside]), 1 / (S**2 + s[inside] ** 2)
    slope = float(((target * exact).sum(1) * weight).sum() / (exact.square().sum(1) * weight).sum())
    assert slope == pytest.approx(1, abs=0.02) if kept else slope < 0.95


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("levels", [(80.0,), (80.0, 1.0), (80.0, 5.0, 1.0, 0.3, 0.05)])
def test_the_exact_trajectories_sample_the_law_of_the_data(levels, gamma: float):
    z = torch.randn(4000, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = sample_trajectory(true_g, z, levels=levels, gamma=gamma, generator=torch.Generator().manual_seed(4))
    assert scipy.stats.kstest(x.flatten().numpy() / S, scipy.stats.norm.cdf).pvalue > 1e-3


def test_without_fresh_noise_all_ways_down_are_one():
    z = torch.randn(100, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    one, five = (sample_trajectory(true_g, z, levels=levels) for levels in ((80.0,), (80.0, 5.0, 1.0, 0.3, 0.05)))
    torch.testing.assert_close(one, five)


def test_at_gamma_one_it_is_the_sampler_of_consistency_models_to_the_bit():
    jump, z = PreconditionedTrajectory(Net()), torch.randn(50, 2, generator=torch.Generator().manual_seed(3))

    def f(x: Tensor, t: Tensor) -> Tensor:
        return jump(x, t, torch.full_like(t, LOW))

    ours = sample_trajectory(jump, z, levels=(80.0, 2.0, 0.5), gamma=1.0, generator=torch.Generator().manual_seed(4))
    theirs = sample(f, z, sigmas=(80.0, 2.0, 0.5), generator=torch.Generator().manual_seed(4))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": ()}, "must fall"),
        ({"levels": (80.0, 80.0)}, "must fall"),
        ({"levels": (81.0,)}, "at most sigma_max = 80.0"),
        ({"levels": (80.0, LOW)}, "above sigma_min"),
        ({"gamma": 1.5}, r"gamma must be in \[0, 1\]"),
        ({"levels": (80.0, 1.0), "gamma": 0.5}, "pass a torch.Generator"),
        ({"levels": (80.0,), "noise": NoiseRange(sigma_min=0.1, sigma_max=10.0)}, "sigma_max = 10.0"),
    ],
)
def test_levels_and_gamma_that_cannot_be_are_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_trajectory(true_g, torch.zeros(2, 2), **arguments)


# --- The levels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [LevelGrid(), RatioLevels()])
@pytest.mark.parametrize("reach", [0.0, 0.5, 1.0])
def test_the_teacher_lies_between_the_student_and_the_end(levels, reach: float):
    objective = TrajectoryObjective(levels=levels, reach=reach, ends=UniformEnds(share_to_data=0.3))
    batch = prepared(objective, b=4000)
    s, u, t = batch.conditions["s"], batch.pairs.t_lo, batch.pairs.t_hi
    assert ((s >= LOW) & (s <= u) & (u < t)).all()
    below, _ = two_of(draw(0, 50, (4000, 2)).uniform)
    next_to_t = levels(50, 100, below).t_lo
    if reach == 0:
        assert torch.equal(u, next_to_t)
    else:
        assert (u <= next_to_t).all()
        assert (u < next_to_t).float().mean() > 0.5
    if reach == 1:
        torch.testing.assert_close(u, s)


def test_a_share_of_trajectories_ends_at_the_data_and_the_others_evenly_in_depth():
    noise, u = NoiseRange(), torch.full((20000,), 5.0)
    s = UniformEnds(share_to_data=0.25)(u, noise, torch.linspace(0, 1, 20001, dtype=torch.float64)[:-1])
    assert float((s == torch.tensor(LOW)).float().mean()) == pytest.approx(0.25, abs=0.001)
    depth = noise.depth(s.double())
    way = ((depth - noise.depth(u.double())) / (1 - noise.depth(u.double())))[:15000]
    assert scipy.stats.kstest(way.numpy(), scipy.stats.uniform.cdf).pvalue > 1e-3
    assert (UniformEnds(share_to_data=1.0)(u, noise, torch.rand(20000)) == torch.tensor(LOW)).all()
    assert (UniformEnds(share_to_data=0.0)(u, noise, torch.rand(20000)) > LOW).float().mean() > 0.99


@pytest.mark.parametrize(
    ("part", "field", "value"), [(UniformEnds, "share_to_data", 1.1), (TrajectoryObjective, "reach", -0.1)]
)
def test_a_part_out_of_range_is_said(part, field, value):
    with pytest.raises(ValueError, match=f"{field} must be a finite number >= 0 and <= 1, got {value}"):
        part(**{field: value})


# --- The objective ---------------------------------------------------------------------------------------------------


def test_ending_at_sigma_min_it_is_consistency_training_to_the_bit():
    parts = {"distance": geman_mcclure, "c": MeasuredC(bins=4)}
    ours, theirs = TrajectoryObjective(ends=UniformEnds(share_to_data=1.0), **parts), Objective(**parts)
    jump = ours.function_of(Net())
    f = partial(jump, s=torch.full((8,), LOW))
    batch = prepared(ours)
    same = theirs.prepare(data(50), draw(0, 50, (8, 2)), 50, 100)
    assert torch.equal(batch.pairs.t_hi, same.pairs.t_hi)
    one, other = ours(jump, batch, ours.init()), theirs(f, same, theirs.init())
    for name in ("loss", "consistency", "r", "c", "student", "teacher", "seen", "state"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    gradients = [torch.autograd.grad(terms.loss, list(jump.network.parameters())) for terms in (one, other)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_student_and_teacher_start_from_the_same_noise_and_end_at_the_same_level():
    objective = TrajectoryObjective()
    jump, batch = objective.function_of(Net()), prepared(objective)
    x, z, pairs, conditions = batch[:4]
    terms = objective(jump, batch, objective.init())
    s = conditions["s"]
    torch.testing.assert_close(terms.student, jump(add_noise(x, z, pairs.t_hi), pairs.t_hi, s))
    torch.testing.assert_close(terms.teacher, jump(add_noise(x, z, pairs.t_lo), pairs.t_lo, s))
    assert not terms.teacher.requires_grad


def test_with_full_reach_the_teacher_is_the_point_itself():
    objective = TrajectoryObjective(reach=1.0)
    batch = prepared(objective)
    terms = objective(objective.function_of(Net()), batch, objective.init())
    torch.testing.assert_close(terms.teacher, add_noise(batch.x, batch.z, batch.conditions["s"]))


def test_the_gradient_of_the_squared_error_is_the_weighted_residual():
    objective = TrajectoryObjective(distance=squared_l2)
    batch = prepared(objective)
    terms = objective(objective.function_of(Net()), batch, objective.init())
    (gradient,) = torch.autograd.grad(terms.consistency.sum(), terms.student)
    gap = (batch.pairs.t_hi - batch.pairs.t_lo)[:, None]
    torch.testing.assert_close(gradient, 2 * (terms.student - terms.teacher) / gap)


def test_conditions_of_the_caller_go_along_with_s():
    told = []

    def jump(x_t: Tensor, t: Tensor, s: Tensor, labels: Tensor) -> Tensor:
        told.append(labels.tolist())
        return x_t

    objective = TrajectoryObjective()
    objective(jump, prepared(objective, conditions={"labels": torch.arange(8)}).to("cpu"), objective.init())
    assert told == [list(range(8))] * 2


def test_the_loss_never_waits_for_a_value_on_the_device():
    objective = TrajectoryObjective(c=MeasuredC(bins=4))
    x, z, pairs, conditions = prepared(objective)[:4]
    with FakeTensorMode() as fake:
        x, z, s, state, *levels = (fake.from_tensor(v) for v in (x, z, conditions["s"], objective.init(), *pairs[:3]))
        batch = Batch(x, z, LevelPairs(*levels, pairs.num_levels), {"s": s})
        terms = objective(lambda x_t, t, s: x_t * (s / t)[:, None], batch, state)
        with pytest.raises(DataDependentOutputException):
            terms.loss.item()


def test_the_whole_objective_compiles_as_one_graph():
    objective = TrajectoryObjective(c=MeasuredC(bins=4))
    jump, batch = objective.function_of(Net()), prepared(objective)

    def loss(x: Tensor, z: Tensor, s: Tensor, t: Tensor, u: Tensor, depth: Tensor, state: Tensor):
        pairs = LevelPairs(t, u, depth, batch.pairs.num_levels)
        terms = objective(jump, Batch(x, z, pairs, {"s": s}), state)
        return terms.loss, terms.state

    arguments = (batch.x, batch.z, batch.conditions["s"], *batch.pairs[:3], objective.init())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*arguments)
    for a, b in zip(compiled, loss(*arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_shapes_and_ranges_that_do_not_fit_get_one_line():
    objective = TrajectoryObjective()
    jump, batch = objective.function_of(Net()), prepared(objective)
    with pytest.raises(ValueError, match=r"s must be one value a sample, \[8\], got \[8, 2\]"):
        jump(batch.x, batch.pairs.t_hi, batch.x)
    with pytest.raises(ValueError, match=r"t must be one value a sample, \[8\], got \[3\]"):
        jump(batch.x, torch.ones(3), torch.ones(8))
    other = TrajectoryObjective(levels=LevelGrid(noise=NoiseRange(sigma_max=10.0)))
    with pytest.raises(ValueError, match=r"f is made for .*80.0.*the levels are drawn from .*10.0"):
        other(jump, batch, objective.init())


def test_sampling_levels_are_those_of_training_and_too_many_are_said():
    objective = TrajectoryObjective(levels=LevelGrid(curriculum=FixedCurriculum(num_levels=5)))
    trained = NoiseRange().levels(5).tolist()
    assert objective.sampling_levels(4, 0.2, 0, 1) == pytest.approx(trained[:4])
    assert objective.sampling_levels(1, 0.2, 0, 1) == (80.0,)
    with pytest.raises(ValueError, match="9 evaluations are more"):
        objective.sampling_levels(9, 0.2, 0, 1)


# --- Training --------------------------------------------------------------------------------------------------------


def error(jump, t: float, s: float) -> float:
    """Of the point at s, in units of its spread."""
    t, s = torch.full((2000,), t), torch.full((2000,), s)
    x_t = (S**2 + t**2).sqrt()[:, None] * draw(2, 0, (2000, 2)).z
    with torch.no_grad():
        return float((jump(x_t, t, s) - true_g(x_t, t, s)).norm() / true_g(x_t, t, s).norm())


def test_a_bare_loop_learns_the_known_trajectories():
    objective = TrajectoryObjective(levels=LevelGrid(curriculum=DoublingCurriculum(s0=10, s1=40)))
    jump, total = objective.function_of(Net()), 400
    spans = ((80.0, LOW), (10.0, 1.0), (2.0, LOW), (1.0, 0.3))
    before = {span: error(jump, *span) for span in spans}
    optimizer = torch.optim.Adam(jump.network.parameters(), 3e-3)
    state = objective.init()
    for step in range(total):
        x = data(step, b=128)
        terms = objective(jump, objective.prepare(x, draw(0, step, x.shape), step, total), state)
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        state = terms.state
    after = {span: error(jump, *span) for span in spans}
    assert all(after[span] < 0.3 for span in spans), (before, after)
    assert sum(after.values()) < sum(before.values()) / 2, (before, after)
