"""Barron's general loss: right in float32 for every alpha, ours at its special cases; and the published weights."""

from __future__ import annotations

import math
import shutil
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from robustcm.barron import Barron, BarronOfR2, of_adaptive_weight
from robustcm.losses import (
    PerElement,
    PerToken,
    cauchy,
    cauchy_of_r2,
    fair,
    geman_mcclure_of_r2,
    pseudo_huber,
    pseudo_huber_of_r2,
    squared_l2,
    squared_l2_of_r2,
)
from robustcm.objective import Objective

ALPHAS = [2, 2 - 1e-15, 2 - 1e-6, 1.9, 1.5, 1, 0.7, 0.5, 0.1, 1e-3, 1e-9, 1e-25, 0]
ALPHAS += [-1e-30, -1e-9, -0.3, -1, -2, -7.9, -8, -20, -1e3, -1e8, -1e23, -1e25, -math.inf]
RADII = [1.234 * 10**k for k in range(-18, 18)]


def exact(alpha: float, r: float, c: float) -> tuple[float, float]:
    """Value and derivative in r in 120 digits, from the paper's formula and its limits."""
    with localcontext() as context:
        context.prec, context.Emin, context.Emax = 120, -(10**9), 10**9
        u, slope = (Decimal(r) / Decimal(c)) ** 2, Decimal(r) / Decimal(c) ** 2
        if alpha == 2:
            return float(u / 2), float(slope)
        if abs(alpha) < 1e-50:  # 120 digits would see no more of it
            return float((1 + u / 2).ln()), float(slope / (1 + u / 2))
        if alpha == -math.inf:
            return float(1 - (-u / 2).exp()), float(slope * (-u / 2).exp())
        a, b = Decimal(alpha) / 2, 2 - Decimal(alpha)
        return float(b / (2 * a) * ((u / b + 1) ** a - 1)), float(slope * (u / b + 1) ** (a - 1))


def value_and_influence(distance, r: Tensor, c: float) -> tuple[Tensor, Tensor]:
    student = r.clone()[:, None].requires_grad_()
    value = distance(student, torch.zeros_like(student), c)
    return value.detach(), torch.autograd.grad(value.sum(), student)[0][:, 0]


# --- Numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 2e-14)], ids=str)
def test_value_and_influence_are_right_for_every_alpha_over_36_orders_of_magnitude(alpha, dtype, tolerance):
    r = torch.tensor(RADII, dtype=dtype)
    found = value_and_influence(Barron(alpha), r, 1.0)
    expected = torch.tensor([exact(alpha, x, 1.0) for x in r.tolist()], dtype=torch.float64).T
    tolerances = torch.where(r > 1e9, 3 * tolerance, tolerance)
    assert ((found[0].double() / expected[0] - 1).abs() < tolerances).all()
    # The influence of large residuals falls like r^(alpha - 1): d/dr^2 leaves float32, and exponents magnify rounding.
    seen = expected[1] / r.double() > 1e-37
    magnified = 1 + (expected[1] / r.double()).log().abs() if alpha < -2 else torch.ones(len(r))
    off = (found[1].double() / expected[1] - 1).abs() / magnified
    assert (off < tolerances)[seen].all()
    assert (found[1][~seen].double() <= 1.1 * expected[1][~seen] + 1e-18).all()


@given(alpha=st.floats(-1e4, 2), r=st.floats(2**-20, 2**20, width=32), c=st.floats(2**-10, 2**10, width=32))
def test_value_is_right_for_any_alpha_residual_and_scale(alpha, r, c):
    value, _ = value_and_influence(Barron(alpha), torch.tensor([r]), c)
    assert value.item() == pytest.approx(exact(alpha, r, c)[0], rel=1e-6, abs=0)


@pytest.mark.parametrize("at", [2.0, 0.0, -8.0, 1.0])
@pytest.mark.parametrize("step", [1e-15, 1e-12, 1e-9, 1e-6])
def test_is_continuous_in_alpha(at, step):
    r = torch.logspace(-12, 12, 49, dtype=torch.float64)
    here = value_and_influence(Barron(at), r, 0.3)
    for alpha in (at - step, at + step):
        if alpha <= 2:
            near = value_and_influence(Barron(alpha), r, 0.3)
            torch.testing.assert_close(near, here, rtol=1e-13 + 100 * step, atol=0)


def test_ends_in_welsch(assert_close):
    r2 = torch.logspace(-12, 12, 49, dtype=torch.float64)
    far, limit = BarronOfR2(-1e20)(r2, 0.3), BarronOfR2(-math.inf)(r2, 0.3)
    assert_close(far, limit)
    assert_close(limit, -torch.expm1(-r2 / (2 * 0.3**2)))


@pytest.mark.parametrize("c", [1e-3, 0.3, 40.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("alpha", "rho", "factor"),
    [
        (2, squared_l2_of_r2, lambda c: 1 / (2 * c**2)),
        (1, pseudo_huber_of_r2, lambda c: 1 / c),
        (0, cauchy_of_r2, lambda c: 1),
        (-2, geman_mcclure_of_r2, lambda c: 2),
    ],
)
def test_special_cases_are_ours_times_the_factor_of_the_docstring(alpha, rho, factor, dtype, c, assert_close):
    r2 = (c**2 * torch.logspace(-18, 18, 73, dtype=dtype)).requires_grad_()
    ours, barrons = factor(c) * rho(r2, c), BarronOfR2(alpha)(r2, c)
    assert_close(barrons.detach(), ours.detach())
    gradients = (torch.autograd.grad(value.sum(), r2)[0] for value in (barrons, ours))
    assert_close(*gradients)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_curvature_at_zero_is_that_of_every_other_alpha(alpha, assert_close):
    zero, expected = torch.zeros((), dtype=torch.float64), torch.tensor(1 / 0.3**2, dtype=torch.float64)
    assert_close(torch.func.hessian(lambda r: BarronOfR2(alpha)(r * r, 0.3))(zero), expected)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_never_falls_with_the_residual_nor_rises_with_alpha(alpha):
    value = BarronOfR2(alpha)(torch.logspace(-12, 12, 500, dtype=torch.float64), 0.3)
    assert (value.diff() >= -1e-15 * value[1:]).all()
    below = BarronOfR2(alpha - 0.5)(torch.logspace(-12, 12, 500, dtype=torch.float64), 0.3)
    assert (below <= value * (1 + 1e-13)).all()


@pytest.mark.parametrize("alpha", [1.5, 0.5, 0, -0.5, -3, -12, -math.inf])
def test_first_and_second_derivatives_are_exact(alpha, rng):
    student, teacher = torch.randn(2, 3, 2, 2, generator=rng, dtype=torch.float64)
    c = torch.tensor([0.5, 1.0, 5.0], dtype=torch.float64, requires_grad=True)
    inputs = (student.requires_grad_(), teacher.requires_grad_(), c)
    assert torch.autograd.gradcheck(Barron(alpha), inputs)
    assert torch.autograd.gradgradcheck(Barron(alpha), inputs)


# --- A distance like the others --------------------------------------------------------------------------------------

DISTANCES = [Barron(1.5), Barron(0), Barron(-12), PerToken(BarronOfR2(0.5)), PerElement(BarronOfR2(-math.inf))]


@pytest.mark.parametrize("distance", DISTANCES, ids=str)
def test_compiles_into_one_graph_with_the_same_value_and_gradient(distance, rng, assert_close):
    student, teacher = torch.randn(2, 3, 4, 2, 2, generator=rng)
    c = torch.tensor([0.03, 1.0, 30.0])
    (eager_student, compiled_student) = (student.clone().requires_grad_() for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(distance, fullgraph=True, backend="aot_eager")(compiled_student, teacher, c)
    eager = distance(eager_student, teacher, c)
    compiled.sum().backward()
    eager.sum().backward()
    assert_close(compiled.detach(), eager.detach())
    assert_close(compiled_student.grad, eager_student.grad)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_compiled_code_is_as_right_as_eager(assert_close):
    r2 = torch.logspace(-30, 12, 100)

    def both(r2: Tensor) -> Tensor:
        return torch.stack([BarronOfR2(0.5)(r2, 1.0), BarronOfR2(-20)(r2, 1.0)])

    # For AVX2 where the processor says it has it: asking the compiler about each set of instructions takes seconds.
    options = {"cpp.vec_isa_ok": True, "cpp.simdlen": 256}
    torch._dynamo.reset()
    assert_close(torch.compile(both, fullgraph=True, options=options)(r2), both(r2))


@pytest.mark.parametrize("distance", DISTANCES, ids=str)
def test_functional_transforms_agree_with_autograd(distance, rng, assert_close):
    student, teacher, tangent = torch.randn(3, 3, 4, 2, 2, generator=rng, dtype=torch.float64)
    c = torch.tensor([0.5, 1.0, 10.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(distance(student.requires_grad_(), teacher, c).sum(), student)
    student = student.detach()

    def of_one(x, y, scale):
        return distance(x[None], y[None], scale)[0]

    assert_close(torch.func.vmap(torch.func.grad(of_one))(student, teacher, c), gradient)
    _, forward = torch.func.jvp(lambda x: distance(x, teacher, c), (student,), (tangent,))
    assert_close(forward, (gradient * tangent).flatten(1).sum(1))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("c", [1.0, torch.tensor(0.0), torch.tensor(math.inf), torch.tensor([1.0, 0.0, 1.0, 1e-42])])
def test_infinite_residuals_and_scales_at_the_ends_have_finite_gradients(alpha, c):
    student = torch.tensor([[math.inf, 1.0], [0, 0], [math.nan, 1.0], [1e-3, 1.0]], requires_grad=True)
    value = Barron(alpha)(student, torch.zeros_like(student), c)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert gradient[[0, 1, 3]].isfinite().all()
    assert value.isnan().tolist() == [False, False, True, False]
    assert value[0].item() == pytest.approx(math.inf if alpha > -1e-20 else 1 - 2 / alpha)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("alpha", ALPHAS)
def test_no_nan_arises_on_the_way_to_a_finite_gradient(alpha):
    student = torch.tensor(RADII)[:, None].requires_grad_()
    with torch.autograd.detect_anomaly():
        Barron(alpha)(student, torch.zeros_like(student), 1.0).sum().backward()


def test_objective_takes_it():
    assert Objective(distance=Barron(alpha=0.5)) == Objective(distance=Barron(alpha=0.5))


@pytest.mark.parametrize("kind", [Barron, BarronOfR2])
@pytest.mark.parametrize("alpha", [2 + 1e-9, 3, math.inf, math.nan])
def test_alpha_above_two_is_refused(kind, alpha):
    with pytest.raises(ValueError, match=r"alpha must be at most 2, which is squared L2, got"):
        kind(alpha)


def test_its_scale_is_checked_like_any_other():
    with pytest.raises(ValueError, match=r"the scale c must be positive"):
        Barron(0.5)(torch.ones(2, 3), torch.zeros(2, 3), 0.0)
    with pytest.raises(ValueError, match=r"where there are 2 samples"):
        Barron(0.5)(torch.ones(2, 3), torch.zeros(2, 3), torch.ones(3))


# --- The published weights -------------------------------------------------------------------------------------------


def residuals(rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Samples whose residuals span twelve orders of magnitude."""
    student, teacher = torch.randn(2, 25, 4, 3, 3, generator=rng, dtype=torch.float64)
    size = torch.logspace(-6, 6, 25, dtype=torch.float64)[:, None, None, None]
    return teacher + size * (student - teacher), teacher


def gradient(loss, student: Tensor, teacher: Tensor) -> Tensor:
    student = student.clone().requires_grad_()
    return torch.autograd.grad(loss(student, teacher).sum(), student)[0]


def weighted_sum(student: Tensor, teacher: Tensor, p: float, eps: float) -> Tensor:
    """MeanFlow, iMF, py-meanflow: squares summed over the elements, over their own detached power."""
    square = (student - teacher).pow(2).flatten(1).sum(1)
    return square / (square + eps).pow(p).detach()


def weighted_mean(student: Tensor, teacher: Tensor, p: float, eps: float) -> Tensor:
    """FACM, alpha-Flow, TiM: the same with their mean."""
    square = (student - teacher).pow(2).flatten(1).mean(1)
    return square / (square + eps).pow(p).detach()


@pytest.mark.parametrize(
    ("weighted", "p", "eps"),
    [
        pytest.param(weighted_sum, 1, 0.01, id="MeanFlow"),
        pytest.param(weighted_sum, 0.75, 1e-3, id="py-meanflow"),
        pytest.param(weighted_mean, 0.5, 1e-3, id="FACM"),
        pytest.param(weighted_mean, 1, 1e-3, id="alpha-Flow"),
        pytest.param(weighted_mean, 1, 1e-5, id="TiM"),
        pytest.param(weighted_sum, 2, 0.3, id="Geman-McClure"),
        pytest.param(weighted_mean, 1.7, 4.0, id="another"),
    ],
)
def test_the_gradient_of_a_published_weight_is_the_distances_times_one_factor(weighted, p, eps, rng, assert_close):
    student, teacher = residuals(rng)
    distance, c = of_adaptive_weight(p, eps if weighted is weighted_sum else eps * student[0].numel())
    theirs = gradient(lambda x, y: weighted(x, y, p, eps), student, teacher)
    ours = gradient(lambda x, y: distance(x, y, c), student, teacher)
    assert_close(theirs, eps ** (1 - p) / p * ours)


def test_the_weights_in_units_of_the_sample_norm():
    assert of_adaptive_weight(1, 0.01) == (Barron(0), pytest.approx(0.0707, rel=1e-3))
    assert of_adaptive_weight(0.75, 1e-3) == (Barron(0.5), pytest.approx(0.0258, rel=1e-3))
    assert of_adaptive_weight(0.5, 1e-3 * 4096) == (Barron(1), pytest.approx(math.sqrt(1e-3 * 4096)))
    assert of_adaptive_weight(2, 0.04) == (Barron(-2), pytest.approx(0.1))


@pytest.mark.parametrize("weighted", [weighted_sum, weighted_mean])
def test_no_weight_is_squared_l2(weighted, rng, assert_close):
    student, teacher = residuals(rng)
    distance, c = of_adaptive_weight(0, 0.01)
    assert distance is squared_l2
    factor = 1 if weighted is weighted_sum else 1 / student[0].numel()
    theirs = gradient(lambda x, y: weighted(x, y, 0, 0.01), student, teacher)
    assert_close(theirs, factor * gradient(lambda x, y: distance(x, y, c), student, teacher))


def test_weights_of_one_and_one_half_are_cauchy_and_pseudo_huber(rng, assert_close):
    student, teacher = residuals(rng)
    for p, ours, factor in ((1, cauchy, 1), (0.5, pseudo_huber, 2)):
        _, c = of_adaptive_weight(p, 0.01)
        theirs = gradient(lambda x, y, p=p: weighted_sum(x, y, p, 0.01), student, teacher)
        assert_close(theirs, factor * gradient(lambda x, y, ours=ours, c=c: ours(x, y, c), student, teacher))


@pytest.mark.parametrize("per_root_d", [False, True], ids=["sCM and rCM", "FACM's sCM"])
def test_the_gradient_of_a_normalised_tangent_is_fairs_times_one_factor(per_root_d, rng, assert_close):
    student, teacher = residuals(rng)
    root_d = student[0].numel() ** 0.5 if per_root_d else 1.0

    def towards_normalised(x: Tensor, y: Tensor) -> Tensor:
        g = (y - x).detach()
        norm = g.flatten(1).norm(dim=1)[:, None, None, None] / root_d  # the root mean square, or the norm
        return (x - x.detach() - g / (norm + 0.1)).pow(2).flatten(1).sum(1)

    theirs = gradient(towards_normalised, student, teacher)
    assert_close(theirs, 2 * root_d * gradient(lambda x, y: fair(x, y, 0.1 * root_d), student, teacher))


def test_the_value_of_the_weighted_loss_stays_and_ours_falls(rng):
    student, teacher = torch.randn(2, 8, 64, generator=rng, dtype=torch.float64)
    nearer = teacher + 0.5 * (student - teacher)
    distance, c = of_adaptive_weight(1, 0.01)
    theirs = [float(weighted_sum(x, teacher, 1, 0.01).mean()) for x in (student, nearer)]
    ours = [float(distance(x, teacher, c).mean()) for x in (student, nearer)]
    assert theirs == pytest.approx([1, 1], abs=1e-3)
    assert ours[0] - ours[1] == pytest.approx(2 * math.log(2), rel=1e-3)


@pytest.mark.parametrize(
    ("p", "eps", "message"),
    [
        (-0.5, 0.01, "p must be 0 or more"),
        (math.inf, 0.01, "p must be 0 or more"),
        (math.nan, 0.01, "p must be 0 or more"),
        (1, 0.0, "eps must be positive"),
        (0, -1.0, "eps must be positive"),
        (1, math.nan, "eps must be positive"),
        (1, math.inf, "eps must be positive"),
    ],
)
def test_a_weight_without_a_scale_is_refused(p, eps, message):
    with pytest.raises(ValueError, match=message):
        of_adaptive_weight(p, eps)
