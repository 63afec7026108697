"""Flow maps: the closed form of Gaussian data fulfils both targets, samples its law, and is what training finds."""

from __future__ import annotations

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from robustcm.consistency import Preconditioned
from robustcm.couplers import exact
from robustcm.flow_maps import FlowMapObjective, LogitNormalTimes, PreconditionedFlowMap, sample_flow_map
from robustcm.flow_targets import ConstantShare, Derivative, FlowPoint, SigmoidShare, TwoPoint
from robustcm.gates import Above, of_flow_time
from robustcm.losses import cauchy, squared_l2
from robustcm.objective import Batch, draw
from robustcm.randomness import step_generator, two_of
from robustcm.scales import ConstantC, MeasuredC
from robustcm.schedules import BoundedInverseGap, LevelPairs, inverse_gap

S = 0.3  # standard deviation of the data


class Net(nn.Module):
    """A network told two times."""

    def __init__(self, d: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(d + 2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, d))

    def forward(self, x: Tensor, c_noise: Tensor, c_span: Tensor) -> Tensor:
        return self.layers(torch.cat([x, c_noise[:, None] / 250, c_span[:, None] / 250], 1))


def variance(t: Tensor) -> Tensor:
    return (1 - t) ** 2 * S**2 + t**2


def true_flow(z_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """z_r on the path through z_t, for x ~ N(0, S^2)."""
    return (variance(r) / variance(t)).sqrt()[:, None] * z_t


def true_v(z_t: Tensor, t: Tensor) -> Tensor:
    """E[z - x | z_t]"""
    return ((t - (1 - t) * S**2) / variance(t))[:, None] * z_t


def true_u(z_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
    slope = ((1 + S**2) * (t + r) - 2 * S**2) / (variance(t) + (variance(t) * variance(r)).sqrt())
    return slope[:, None] * z_t


def times(b: int = 64) -> tuple[Tensor, Tensor]:
    t, r = torch.rand(2, b, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.maximum(t, r), torch.minimum(t, r)


def point(u, v=None, *, t=None, r=None, progress=0.0) -> FlowPoint:
    t, r = times() if t is None else (t, r)
    z_t = torch.randn(len(t), 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    v = true_v(z_t, t) if v is None else v(z_t, t, r)
    return FlowPoint(z_t, v, t, r, u(z_t, t, r), progress, {})


def data(step: int = 0, b: int = 8) -> Tensor:
    return S * torch.randn(b, 2, generator=step_generator(1, step))


def prepared(objective: FlowMapObjective, step: int = 50, b: int = 8, **given) -> Batch:
    return objective.prepare(data(step, b), draw(0, step, (b, 2)), step, 100, **given)


TARGETS = [Derivative(), TwoPoint(), TwoPoint(share=ConstantShare(share=0.3))]


# --- The function around the network ---------------------------------------------------------------------------------


def test_a_network_that_gives_nothing_leaves_the_exact_u_of_white_data_of_that_std():
    t, r = times()
    z_t = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u = PreconditionedFlowMap(lambda x, c_noise, c_span: torch.zeros_like(x), sigma_data=S)
    torch.testing.assert_close(u(z_t, t, r), true_u(z_t, t, r))


def test_the_network_sees_input_and_target_of_std_one():
    seen = []

    def network(x: Tensor, c_noise: Tensor, c_span: Tensor) -> Tensor:
        seen.append(x)
        return torch.ones_like(x)

    u, g = PreconditionedFlowMap(network, sigma_data=S), torch.Generator().manual_seed(0)
    for t in (0.0, 0.3, 0.9, 1.0):
        x, z = S * torch.randn(20000, 1, generator=g), torch.randn(20000, 1, generator=g)
        z_t, t = (1 - t) * x + t * z, torch.full((20000,), t)
        scale = u(z_t, t, t) - true_v(z_t, t)  # c_out, the output being 1
        assert float(seen[-1].std()) == pytest.approx(1, abs=0.02)
        assert float(((z - x - true_v(z_t, t)) / scale).std()) == pytest.approx(1, abs=0.02)


# --- Times -----------------------------------------------------------------------------------------------------------


def test_times_are_logit_normal_and_the_share_is_kept():
    uniform = draw(0, 0, (40000, 1)).uniform
    t, r, depth, n = LogitNormalTimes(mean=-0.4, std=1.0, share_equal=0.75)(0, 1, uniform)
    assert n == 2
    assert torch.equal(depth, (1 - t.double()).float()) or torch.allclose(depth, 1 - t)
    assert ((r <= t) & (r > 0) & (t < 1)).all()
    equal = t == r
    assert float(equal.float().mean()) == pytest.approx(0.75, abs=0.01)
    assert scipy.stats.kstest(torch.logit(t[equal].double()).numpy() + 0.4, scipy.stats.norm.cdf).pvalue > 1e-3
    both = torch.cat([t[~equal], r[~equal]]).double()
    assert scipy.stats.kstest(torch.logit(both).numpy() + 0.4, scipy.stats.norm.cdf).pvalue > 1e-3
    # Of two independent numbers the larger and the smaller: P(larger < median) = 1/4.
    median = torch.sigmoid(torch.tensor(-0.4))
    assert float((t[~equal] < median).float().mean()) == pytest.approx(0.25, abs=0.02)


@given(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 0.25, 0.75, 1.0]))
def test_any_uniform_number_gives_times_inside(uniform: float, share: float):
    t, r, _, _ = LogitNormalTimes(share_equal=share)(0, 1, torch.tensor([uniform], dtype=torch.float64))
    assert 0 < r <= t < 1


def test_two_numbers_of_one_are_uniform_and_independent():
    one, two = two_of(draw(0, 0, (20000, 1)).uniform)
    for v in (one, two):
        assert scipy.stats.kstest(v.numpy(), scipy.stats.uniform.cdf).pvalue > 1e-3
    assert abs(float(torch.corrcoef(torch.stack([one, two]))[0, 1])) < 5 / 20000**0.5
    torch.testing.assert_close(two_of(torch.tensor([0.0]))[1], torch.tensor([2.0**-27], dtype=torch.float64))


def test_the_share_falls_from_flow_matching_to_its_smallest():
    share = SigmoidShare()(torch.linspace(0, 1, 101))
    assert share[0] == 1
    assert share[50] == 0.5
    assert float(share[-1]) == pytest.approx(0.005)
    assert (share.diff() <= 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogitNormalTimes(std=0.0), "std must be a finite number > 0"),
        (lambda: LogitNormalTimes(share_equal=1.5), "share_equal"),
        (lambda: LogitNormalTimes(mean=float("nan")), "mean must be a finite number"),
        (lambda: ConstantShare(share=0.0), "share must be a finite number >= 1e-06 and <= 1"),
        (lambda: SigmoidShare(smallest=1e-9), "smallest must be a finite number >= 1e-06"),
        (lambda: PreconditionedFlowMap(Net(), sigma_data=0.0), "sigma_data"),
        (lambda: FlowMapObjective(gate=of_flow_time(Above(1.0))), "in sigma"),
    ],
)
def test_a_part_out_of_range_is_said(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- The objective ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS, ids=["derivative", "annealed", "constant"])
def test_the_loss_is_the_distance_of_u_from_its_target(target):
    objective = FlowMapObjective(target=target, distance=cauchy, c=ConstantC(per_sqrt_d=0.1))
    u, batch = objective.function_of(Net()), prepared(objective)
    x, z, (t, r, _, _), _, progress = batch[:5]
    terms = objective(u, batch, objective.init())
    z_t = (1 - t)[:, None] * x + t[:, None] * z
    student = u(z_t, t, r)
    expected = target(u, FlowPoint(z_t, z - x, t, r, student.detach(), progress, {}))
    torch.testing.assert_close(terms.student, student)
    torch.testing.assert_close(terms.teacher, expected)
    torch.testing.assert_close(terms.consistency, cauchy(student, expected, 0.1 * 2**0.5))
    torch.testing.assert_close(terms.loss, terms.consistency.mean())
    assert terms.loss.requires_grad
    assert not any(v.requires_grad for v in (terms.r, terms.teacher, terms.state, terms.extra))


def test_the_gradient_of_the_squared_error_is_the_residual():
    objective = FlowMapObjective(distance=squared_l2)
    terms = objective(objective.function_of(Net()), prepared(objective), objective.init())
    (gradient,) = torch.autograd.grad(terms.consistency.sum(), terms.student)
    torch.testing.assert_close(gradient, 2 * (terms.student - terms.teacher))


def test_the_gate_knows_sigma_and_is_asked_at_that_of_the_flow_time():
    objective = FlowMapObjective(coupler=exact, gate=Above(1.0))
    batch, draws = prepared(objective, b=256), draw(0, 50, (256, 2))
    coupled, above = draws.z[exact(batch.x, draws.z)], batch.pairs.t_hi > 0.5  # t / (1 - t) = 1
    assert 20 < above.sum() < 236
    assert torch.equal(batch.z[above], coupled[above])
    assert torch.equal(batch.z[~above], draws.z[~above])


def test_preparing_twice_gives_the_same_and_a_rank_its_slice():
    objective, draws = FlowMapObjective(), draw(0, 50, (8, 2))
    whole, again = (objective.prepare(data(), draws, 50, 100) for _ in range(2))
    mine = objective.prepare(data()[2:4], draws._replace(z=draws.z[2:4], uniform=draws.uniform[2:4]), 50, 100)
    for a, b, c in zip(whole.pairs[:3], again.pairs[:3], mine.pairs[:3], strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[2:4], c)


def test_conditions_and_another_teacher_reach_their_function():
    told = []

    def u(z_t: Tensor, t: Tensor, r: Tensor, labels: Tensor) -> Tensor:
        told.append(("u", labels.tolist()))
        return z_t

    def slow(z_t: Tensor, t: Tensor, r: Tensor, labels: Tensor) -> Tensor:
        told.append(("slow", labels.tolist()))
        return z_t

    for target in TARGETS:
        objective = FlowMapObjective(target=target)
        told.clear()
        batch = prepared(objective, conditions={"labels": torch.arange(8)}).to("cpu")
        objective(u, batch, objective.init(), teacher=slow)
        assert told == [("u", list(range(8))), ("slow", list(range(8)))]


@pytest.mark.parametrize("target", [TwoPoint(), Derivative()], ids=["two-point", "derivative"])
def test_student_and_teacher_share_their_dropout_mask(target):
    class Dropping(Net):
        def forward(self, *given: Tensor) -> Tensor:
            masks.append(nn.functional.dropout(torch.ones(100), 0.5))
            return super().forward(*given)

    masks: list[Tensor] = []
    objective = FlowMapObjective(target=target)
    objective(objective.function_of(Dropping()), prepared(objective), objective.init())
    assert torch.equal(masks[0], masks[1])


@pytest.mark.parametrize("target", [TwoPoint(), Derivative(), lambda u, at: at.v], ids=["two-point", "derivative", "v"])
@pytest.mark.parametrize("slow", [False, True], ids=["own", "averaged"])
def test_the_next_step_draws_another_mask_whatever_the_target_draws(target, slow):
    """The random state behind a step is that behind one pass of the student."""
    objective = FlowMapObjective(target=target)
    u = objective.function_of(lambda x, *levels: nn.functional.dropout(x, 0.5))
    batch, teacher = prepared(objective), (lambda x, t, r: x) if slow else None
    torch.manual_seed(0)
    first = objective(u, batch, objective.init(), teacher=teacher)
    behind = torch.get_rng_state()
    assert not torch.equal(objective(u, batch, objective.init(), teacher=teacher).student, first.student)
    torch.manual_seed(0)
    nn.functional.dropout(batch.x, 0.5)
    assert torch.equal(torch.get_rng_state(), behind)


@pytest.mark.parametrize("weight", [inverse_gap, BoundedInverseGap(floor=0)])
def test_a_weight_that_is_infinite_where_both_times_are_one_is_refused(weight):
    with pytest.raises(ValueError, match="is not finite at r = t, where 75% of the samples are"):
        FlowMapObjective(weight=weight)
    apart = FlowMapObjective(weight=weight, levels=LogitNormalTimes(share_equal=0))
    assert apart(apart.function_of(Net()), prepared(apart), apart.init()).loss.isfinite()


@pytest.mark.parametrize("target", [TwoPoint(), Derivative()], ids=["two-point", "derivative"])
def test_the_loss_never_waits_for_a_value_on_the_device(target):
    objective = FlowMapObjective(target=target, c=MeasuredC(bins=4))
    x, z, pairs, _, progress = prepared(objective)[:5]
    with FakeTensorMode() as fake:
        x, z, state, progress, *levels = (fake.from_tensor(v) for v in (x, z, objective.init(), progress, *pairs[:3]))
        batch = Batch(x, z, LevelPairs(*levels, 2), {}, progress)
        terms = objective(lambda z_t, t, r: z_t * (t + r)[:, None], batch, state)
        with pytest.raises(DataDependentOutputException):
            terms.loss.item()


def test_the_whole_objective_of_two_points_compiles_as_one_graph():
    objective = FlowMapObjective(c=MeasuredC(bins=4))
    u, batch = objective.function_of(Net()), prepared(objective)

    def loss(x: Tensor, z: Tensor, t: Tensor, r: Tensor, depth: Tensor, progress: Tensor, state: Tensor):
        terms = objective(u, Batch(x, z, LevelPairs(t, r, depth, 2), {}, progress), state)
        return terms.loss, terms.state

    arguments = (batch.x, batch.z, *batch.pairs[:3], batch.progress, objective.init())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*arguments)
    for a, b in zip(compiled, loss(*arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parts", [2, 4])
def test_the_same_step_in_any_number_of_micro_batches(parts: int):
    objective = FlowMapObjective(c=MeasuredC(bins=4))
    u, batch = objective.function_of(Net()), prepared(objective)
    whole = objective(u, batch, objective.init())
    pieces = [
        Batch(batch.x[i], batch.z[i], LevelPairs(*(v[i] for v in batch.pairs[:3]), 2), {}, batch.progress)
        for i in torch.arange(8).chunk(parts)
    ]
    ahead = sum(objective.look(u, piece) for piece in pieces)
    found = [objective(u, piece, objective.init(), seen=ahead) for piece in pieces]
    assert torch.equal(sum(f.seen for f in found), whole.seen)
    torch.testing.assert_close(torch.cat([f.consistency for f in found]), whole.consistency, rtol=1e-5, atol=1e-6)


def test_shapes_and_functions_that_do_not_fit_get_one_line():
    objective = FlowMapObjective()
    u, batch = objective.function_of(Net()), prepared(objective)
    state = objective.init()
    with pytest.raises(ValueError, match=r"x and z must have one shape \[b, \.\.\.\], got \(8, 2\) and \(8, 1\)"):
        objective(u, batch._replace(z=batch.z[:, :1]), state)
    with pytest.raises(ValueError, match=r"t must be one value a sample, \[8\], got \[4\]"):
        objective(u, batch._replace(pairs=batch.pairs._replace(t_hi=batch.pairs.t_hi[:4])), state)
    with pytest.raises(ValueError, match=r"r must be one value a sample, \[8\], got \[8, 2\]"):
        u(batch.x, batch.pairs.t_hi, batch.x)
    with pytest.raises(ValueError, match=r"f is made for NoiseRange.*objective\.function_of\(network\)"):
        objective(Preconditioned(Net()), batch, state)
    spread = torch.ones(8, 1, 1, 1)  # one value a sample, however it comes
    torch.testing.assert_close(u(batch.x, spread, spread / 2), u(batch.x, torch.ones(8), torch.full((8,), 0.5)))


def test_the_derivative_goes_through_attention():
    class Tokens(nn.Module):
        def forward(self, x: Tensor, c_noise: Tensor, c_span: Tensor) -> Tensor:
            x = x * (1 + c_noise[:, None, None] / 250)
            heads = x.unflatten(2, (2, 4)).transpose(1, 2)
            return nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)

    objective = FlowMapObjective(target=Derivative())
    x = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
    terms = objective(
        objective.function_of(Tokens()), objective.prepare(x, draw(0, 0, x.shape), 0, 1), objective.init()
    )
    assert terms.teacher.isfinite().all()


# --- Training --------------------------------------------------------------------------------------------------------


def error(u, t: float, r: float) -> float:
    """Relative error of the jump from t to r."""
    z = draw(2, 0, (2000, 2)).z
    t, r = torch.full((2000,), t), torch.full((2000,), r)
    z_t = variance(t).sqrt()[:, None] * z
    with torch.no_grad():
        jump, true = u(z_t, t, r), true_u(z_t, t, r)
    return float((jump - true).norm() / true.norm())


@pytest.mark.parametrize("target", [Derivative(), TwoPoint()], ids=["derivative", "two-point"])
def test_a_bare_loop_learns_the_known_flow_map(target):
    objective = FlowMapObjective(target=target, levels=LogitNormalTimes(share_equal=0.5))
    u, total = objective.function_of(Net()), 300
    before = {span: error(u, *span) for span in ((1.0, 0.0), (1.0, 0.5), (0.5, 0.0))}
    optimizer = torch.optim.Adam(u.network.parameters(), 3e-3)
    state = objective.init()
    for step in range(total):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / total)
        x = data(step, b=128)
        terms = objective(u, objective.prepare(x, draw(0, step, x.shape), step, total), state)
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        state = terms.state
    after = {span: error(u, *span) for span in before}
    assert all(after[span] < 0.25 and after[span] < before[span] for span in after), (before, after)
    assert sum(after.values()) < sum(before.values()) / 2, (before, after)
    z = draw(3, 0, (4000, 2)).z
    assert float(sample_flow_map(u, z, steps=1).std()) == pytest.approx(S, rel=0.35)
    assert float(sample_flow_map(u, z, steps=2).std()) == pytest.approx(S, rel=0.15)
