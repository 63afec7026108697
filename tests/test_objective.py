"""The whole objective: pure randomness, parts that do not know of each other, and a loop that learns a known f."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from robustcm.consistency import Preconditioned, add_noise, temporal_difference
from robustcm.couplers import WithinClasses, exact
from robustcm.early import EarlyDiffusion
from robustcm.gates import Above
from robustcm.losses import PerElement, PerToken, cauchy, cauchy_of_r2, pseudo_huber, sample_r2, squared_l2
from robustcm.objective import Batch, Objective, draw
from robustcm.randomness import step_generator
from robustcm.scales import ConstantC, MeasuredC
from robustcm.schedules import (
    DoublingCurriculum,
    FixedCurriculum,
    LevelGrid,
    LevelPairs,
    RatioLevels,
    equal_weight,
    inverse_gap,
)

S = 0.3  # standard deviation of the data
SHAPE = (8, 2)


class Net(nn.Module):
    def __init__(self, d: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(d + 1, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, d))

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return self.layers(torch.cat([x, c_noise[:, None] / 500], 1))


def data(step: int = 0, b: int = 8) -> Tensor:
    return S * torch.randn(b, 2, generator=step_generator(1, step))


def terms_of(objective: Objective, f=None, step: int = 50, **labels):
    batch = objective.prepare(data(), draw(0, step, SHAPE), step, 100, **labels)
    return objective(f or Preconditioned(Net()), batch, objective.init()), batch


# --- Randomness ------------------------------------------------------------------------------------------------------


def test_draws_are_a_function_of_seed_and_step_alone():
    first = draw(3, 14, (4, 5))
    torch.rand(7)  # the ambient generator must not matter
    again = draw(3, 14, (4, 5))
    assert torch.equal(first.z, again.z)
    assert torch.equal(first.uniform, again.uniform)
    assert torch.equal(torch.rand(3, generator=first.generator), torch.rand(3, generator=again.generator))


def test_draws_of_different_seeds_steps_and_streams_are_all_different():
    triples = itertools.product(range(20), range(50), range(3))
    first = [float(torch.rand((), generator=step_generator(*t), dtype=torch.float64)) for t in triples]
    assert len(set(first)) == 20 * 50 * 3
    assert scipy.stats.kstest(first, scipy.stats.uniform.cdf).pvalue > 1e-3  # across generators, too


def test_draws_of_neighbouring_seeds_and_steps_are_uncorrelated():
    z = torch.stack([draw(seed, step, (5000,)).z for seed in range(4) for step in range(4)])
    correlation = torch.corrcoef(z) - torch.eye(16)
    assert correlation.abs().max() < 5 / 5000**0.5


def test_draws_have_the_laws_they_claim():
    z, uniform, gate, _ = draw(0, 0, (5000, 2))
    assert scipy.stats.kstest(z.flatten().numpy(), scipy.stats.norm.cdf).pvalue > 1e-3
    assert scipy.stats.kstest(uniform.numpy(), scipy.stats.uniform.cdf).pvalue > 1e-3
    assert scipy.stats.kstest(gate.numpy(), scipy.stats.uniform.cdf).pvalue > 1e-3
    assert abs(float(torch.corrcoef(torch.stack([uniform, gate]))[0, 1])) < 5 / 5000**0.5
    assert (z.dtype, uniform.dtype, uniform.shape) == (torch.float32, torch.float64, (5000,))


# --- Preparing a batch -----------------------------------------------------------------------------------------------


def test_preparing_couples_only_above_the_gate():
    x, draws = data(b=256), draw(0, 0, (256, 2))
    batch = Objective(coupler=exact, gate=Above(1.0)).prepare(x, draws, 0, 100)
    coupled = draws.z[exact(x, draws.z)]
    above = batch.pairs.t_hi > 1.0
    assert 20 < above.sum() < 236
    assert torch.equal(batch.z[above], coupled[above])
    assert torch.equal(batch.z[~above], draws.z[~above])


def test_coupling_changes_neither_the_data_nor_the_levels():
    plain, coupled = (o.prepare(data(), draw(0, 5, SHAPE), 5, 100) for o in (Objective(), Objective(coupler=exact)))
    assert torch.equal(plain.x, coupled.x)
    assert torch.equal(plain.pairs.t_hi, coupled.pairs.t_hi)
    assert torch.equal(plain.z, draw(0, 5, SHAPE).z)
    assert not torch.equal(plain.z, coupled.z)


def test_labels_reach_the_coupler():
    labels = torch.arange(8) % 2
    batch = Objective(coupler=WithinClasses()).prepare(data(), draw(0, 5, SHAPE), 5, 100, labels=labels)
    assert torch.equal(batch.z, draw(0, 5, SHAPE).z[WithinClasses()(data(), draw(0, 5, SHAPE).z, labels=labels)])


# --- The loss --------------------------------------------------------------------------------------------------------


def test_loss_is_the_mean_of_weight_times_distance_plus_extra():
    objective = Objective(distance=pseudo_huber, c=ConstantC(per_sqrt_d=0.1), extra=EarlyDiffusion(weight=3, start=0.5))
    f = Preconditioned(Net())
    terms, (x, z, pairs, *_) = terms_of(objective, f)
    student = f(add_noise(x, z, pairs.t_hi), pairs.t_hi)
    teacher = f(add_noise(x, z, pairs.t_lo), pairs.t_lo)
    torch.testing.assert_close(terms.student, student)
    torch.testing.assert_close(terms.teacher, teacher)
    torch.testing.assert_close(terms.r, (student - teacher).norm(dim=1))
    assert terms.c == pytest.approx(0.1 * 2**0.5)
    distance = pseudo_huber(student, teacher, 0.1 * 2**0.5)
    torch.testing.assert_close(terms.consistency, distance / (pairs.t_hi - pairs.t_lo))
    torch.testing.assert_close(terms.extra, torch.where(pairs.depth >= 0.5, 3 * (student - x).square().mean(1), 0.0))
    torch.testing.assert_close(terms.loss, (terms.consistency + terms.extra).mean())


def test_gradient_goes_to_the_student_through_loss_and_not_through_the_diagnostics():
    terms, _ = terms_of(Objective())
    assert terms.loss.requires_grad
    assert terms.consistency.requires_grad
    assert not any(v.requires_grad for v in (terms.r, terms.c, terms.teacher, terms.state))


def test_state_of_the_scale_is_handed_on_and_the_old_one_left_alone():
    objective = Objective(c=MeasuredC())
    state = objective.init()
    batch = objective.prepare(data(), draw(0, 0, SHAPE), 0, 100)
    terms = objective(Preconditioned(Net()), batch, state)
    assert torch.equal(state, objective.init())
    depth, n = batch.pairs.depth, batch.pairs.num_levels
    assert torch.equal(terms.seen, objective.c.count(terms.r, depth, n))
    assert torch.equal(terms.state, objective.c.observe(state, terms.seen))
    assert torch.equal(terms.c, objective.c(state, terms.seen, depth, n, 2))


@pytest.mark.parametrize("c", [MeasuredC(), MeasuredC(bins=4), ConstantC()], ids=["measured", "per-level", "constant"])
def test_loss_never_waits_for_a_value_on_the_device(c):
    """Fake tensors have shapes and no values: whatever asks for one, as ``item`` and boolean masks do, raises."""
    objective = Objective(c=c, extra=EarlyDiffusion())
    x, z, pairs, *_ = objective.prepare(data(), draw(0, 5, SHAPE), 5, 100)
    with FakeTensorMode() as fake:
        x, z, state, *levels = (fake.from_tensor(v) for v in (x, z, objective.init(), *pairs[:3]))
        terms = objective(lambda x_t, t: x_t * t[:, None], Batch(x, z, LevelPairs(*levels, pairs.num_levels)), state)
        with pytest.raises(DataDependentOutputException):
            terms.loss.item()


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_slices_of_the_global_batch_give_each_sample_the_same_loss(ranks):
    objective = Objective(c=ConstantC(), coupler=exact, extra=EarlyDiffusion())
    f = Preconditioned(Net())
    whole, (x, z, pairs, *_) = terms_of(objective, f)
    parts = []
    for rank in range(ranks):
        mine = slice(8 // ranks * rank, 8 // ranks * (rank + 1))
        batch = Batch(x[mine], z[mine], LevelPairs(*(v[mine] for v in pairs[:3]), pairs.num_levels))
        parts.append(objective(f, batch, objective.init()))
    torch.testing.assert_close(torch.cat([p.consistency for p in parts]), whole.consistency, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([p.extra for p in parts]), whole.extra, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.stack([p.loss for p in parts]).mean(), whole.loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parts", [4, 8])
def test_the_same_step_in_any_number_of_micro_batches(parts):
    """c, loss and gradient of the first steps, with ``look`` ahead of the very first."""
    objective = Objective(c=MeasuredC(bins=4), coupler=exact, gate=Above(1.0))
    whole, pieces = Preconditioned(Net()), Preconditioned(Net())
    state = other = objective.init()
    for step in range(3):
        batch = objective.prepare(data(step), draw(0, step, SHAPE), step, 100)
        terms = objective(whole, batch, state)
        terms.loss.backward()
        parted = [
            Batch(batch.x[i], batch.z[i], LevelPairs(*(v[i] for v in batch.pairs[:3]), batch.pairs.num_levels))
            for i in torch.arange(8).chunk(parts)
        ]
        ahead = sum(objective.look(pieces, part) for part in parted)
        found = [objective(pieces, part, other, seen=ahead) for part in parted]
        (sum(f.loss for f in found) / parts).backward()
        assert torch.equal(torch.cat([f.c for f in found]), terms.c)
        state, other = terms.state, objective.c.observe(other, sum(f.seen for f in found))
        assert torch.equal(state, other)
    for a, b in zip(whole.network.parameters(), pieces.network.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


def test_conditions_reach_student_and_teacher():
    told = []

    def f(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        told.append(labels.tolist())
        return x_t

    batch = Objective().prepare(data(), draw(0, 5, SHAPE), 5, 100, conditions={"labels": torch.arange(8)})
    Objective()(f, batch.to("cpu"), Objective().init())
    assert told == [list(range(8))] * 2


def test_the_teacher_may_be_another_function_and_gets_no_gradient():
    f, slow = Preconditioned(Net()), Net()
    terms, batch = terms_of(Objective(), f)
    found = Objective()(f, batch, Objective().init(), teacher=Preconditioned(slow))
    x_lo = add_noise(batch.x, batch.z, batch.pairs.t_lo)
    assert torch.equal(found.teacher, Preconditioned(slow)(x_lo, batch.pairs.t_lo))
    assert torch.equal(found.student, terms.student)
    found.loss.backward()
    assert all(p.grad is None for p in slow.parameters())


def test_the_whole_objective_compiles_as_one_graph():
    objective = Objective(c=MeasuredC(bins=4), extra=EarlyDiffusion())
    f = Preconditioned(Net())
    batch = objective.prepare(data(), draw(0, 5, SHAPE), 5, 100)

    def loss(x: Tensor, z: Tensor, t_hi: Tensor, t_lo: Tensor, depth: Tensor, state: Tensor):
        pairs = LevelPairs(t_hi, t_lo, depth, batch.pairs.num_levels)
        terms = objective(f, Batch(x, z, pairs), state)
        return terms.loss, terms.state

    arguments = (batch.x, batch.z, *batch.pairs[:3], objective.init())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*arguments)
    for a, b in zip(compiled, loss(*arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_dropout_inside_a_compiled_objective_is_refused_and_a_compiled_network_shares_its_mask():
    objective, net = Objective(), nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    batch = objective.prepare(data(), draw(0, 5, SHAPE), 5, 100)
    f = Preconditioned(lambda x, c_noise: compiled(x))
    compiled = torch.compile(net, backend="aot_eager")
    same = torch.full((8,), 3.0)
    student, teacher = temporal_difference(f, batch.x, batch.z, same, same)
    assert torch.equal(student, teacher)
    whole = torch.compile(objective, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="compile the network alone"):
        whole(Preconditioned(net), batch, objective.init())


def test_a_batch_moves_whole(device):
    batch = Objective().prepare(data(), draw(0, 5, SHAPE), 5, 100)
    moved = batch.to(device)
    assert {v.device.type for v in (moved.x, moved.z, *moved.pairs[:3])} == {device.type}
    assert torch.equal(moved.pairs.depth.cpu(), batch.pairs.depth)
    assert moved.pairs.num_levels == batch.pairs.num_levels


# --- Every part is any callable --------------------------------------------------------------------------------------


class TwoC:
    """A scale from outside the library."""

    def init(self, device=None) -> Tensor:
        return torch.zeros(1)

    def count(self, r: Tensor, depth: Tensor, num_levels: int) -> Tensor:
        return torch.ones(1)

    def observe(self, state: Tensor, seen: Tensor) -> Tensor:
        return state + seen

    def __call__(self, state: Tensor, seen: Tensor, depth: Tensor, num_levels: int, d: int) -> float:
        return float(d + state)


def two_levels(step: int, total_steps: int, uniform: Tensor) -> LevelPairs:
    return LevelPairs(torch.full((8,), 3.0), torch.full((8,), 2.0), torch.zeros(8), 2)


def backwards(x: Tensor, z: Tensor, *, labels=None, generator=None) -> Tensor:
    return torch.arange(len(x)).flip(0)


def test_any_distance_will_do():
    terms, _ = terms_of(Objective(distance=lambda s, t, c: torch.full((len(s),), 4.0), weight=equal_weight))
    assert terms.loss == 4


def test_any_scale_will_do():
    terms, _ = terms_of(Objective(c=TwoC()))
    assert (terms.c, terms.state) == (2, 1)


def test_any_law_of_levels_will_do():
    terms, batch = terms_of(Objective(levels=two_levels))
    assert batch.pairs.t_hi.tolist() == [3] * 8
    assert terms.loss.isfinite()


def test_any_weight_will_do():
    (one, _), (two, _) = (terms_of(Objective(weight=lambda hi, lo, k=k: k * torch.ones_like(hi))) for k in (1, 2))
    torch.testing.assert_close(two.loss, 2 * one.loss)


def test_any_coupler_will_do():
    _, batch = terms_of(Objective(coupler=backwards))
    assert torch.equal(batch.z, draw(0, 50, SHAPE).z.flip(0))


def test_any_extra_term_will_do():
    terms, _ = terms_of(Objective(extra=lambda student, x, pairs: pairs.t_hi))
    _, batch = terms_of(Objective())
    assert torch.equal(terms.extra, batch.pairs.t_hi)


def test_any_f_will_do():
    terms, _ = terms_of(Objective(distance=squared_l2), f=lambda x_t, t: torch.zeros_like(x_t))
    assert terms.loss == 0


# --- Training --------------------------------------------------------------------------------------------------------


def true_f(x_t: Tensor, t: Tensor) -> Tensor:
    return x_t * ((S**2 + 0.002**2) / (S**2 + t**2)).sqrt()[:, None]


def error(f, t: float) -> float:
    """Relative error of f at level ``t``."""
    t = torch.full((2000,), t)
    x_t = (S**2 + t**2).sqrt()[:, None] * draw(2, 0, (2000, 2)).z
    with torch.no_grad():
        return float((f(x_t, t) - true_f(x_t, t)).norm() / true_f(x_t, t).norm())


GRID = LevelGrid(curriculum=DoublingCurriculum(s0=10, s1=40))


@pytest.mark.parametrize(
    "objective",
    [
        Objective(distance=pseudo_huber, levels=GRID),
        Objective(distance=cauchy, levels=GRID, coupler=exact, gate=Above(3.0), extra=EarlyDiffusion()),
        Objective(distance=cauchy, levels=RatioLevels(stages=6), weight=inverse_gap),
    ],
    ids=["ict", "all-techniques", "ect-levels"],
)
def test_a_bare_loop_learns_the_known_consistency_function(objective):
    f, total = Preconditioned(Net()), 600
    before = {t: error(f, t) for t in (0.1, 0.5, 2.0, 80.0)}
    optimizer = torch.optim.Adam(f.network.parameters(), 3e-3)
    state = objective.init()
    for step in range(total):
        x = data(step, b=128)
        terms = objective(f, objective.prepare(x, draw(0, step, x.shape), step, total), state)
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        state = terms.state
    after = {t: error(f, t) for t in before}
    assert all(after[t] < 0.35 for t in after), (before, after)
    assert after[2.0] < before[2.0] / 2
    assert after[80.0] < before[80.0] / 2


def test_a_step_against_the_gradient_lowers_the_loss_of_its_batch():
    objective, f = Objective(c=ConstantC(per_sqrt_d=0.1)), Preconditioned(Net())
    before, batch = terms_of(objective, f)
    before.loss.backward()
    with torch.no_grad():
        for p in f.network.parameters():
            p -= 1e-4 * p.grad
    student = f(add_noise(batch.x, batch.z, batch.pairs.t_hi), batch.pairs.t_hi)
    after = inverse_gap(*batch.pairs[:2]) * cauchy(student, before.teacher, before.c)
    assert after.mean() < before.loss
    assert sample_r2(student, before.teacher).mean() < before.r.square().mean()


@pytest.mark.parametrize(("distance", "norms"), [(PerToken(cauchy_of_r2), 9), (PerElement(cauchy_of_r2), 18)])
def test_a_finer_distance_gets_its_share_of_the_scale(distance, norms: int):
    x = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    evenly = Objective(distance=distance, c=ConstantC(per_sqrt_d=1.0), levels=LevelGrid(curriculum=FixedCurriculum()))
    batch = evenly.prepare(x, draw(0, 0, x.shape), 0, 1)

    def f(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:  # the same residual everywhere in a sample
        return torch.ones_like(x_t) * t[:, None, None, None]

    whole = replace(evenly, distance=cauchy)
    terms, expected = (objective(f, batch, objective.init()) for objective in (evenly, whole))
    torch.testing.assert_close(terms.consistency, norms * expected.consistency)
