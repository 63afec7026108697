"""The robust distances: right over 24 orders of magnitude, and every statement of their docstrings a theorem."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import kornia
import pytest
import torch
from torch import Tensor

from robustcm.losses import (
    PerElement,
    PerToken,
    cauchy,
    cauchy_of_r2,
    element_r2,
    fair,
    fair_of_r2,
    geman_mcclure,
    geman_mcclure_of_r2,
    pseudo_huber,
    pseudo_huber_of_r2,
    sample_r2,
    squared_l2,
    squared_l2_of_r2,
    token_r2,
)

RHOS = [pseudo_huber_of_r2, cauchy_of_r2, geman_mcclure_of_r2, fair_of_r2, squared_l2_of_r2]


ROBUST_RHOS = RHOS[:4]


DISTANCES = [pseudo_huber, cauchy, geman_mcclure, fair, squared_l2]


ROBUST_DISTANCES = DISTANCES[:4]


RADII = [10.0**k for k in range(-12, 13)]


# Value and derivative in r, as the papers print them.
PAPER = {
    pseudo_huber: (lambda r, c: (r**2 + c**2).sqrt() - c, lambda r, c: r / (r**2 + c**2).sqrt()),
    cauchy: (lambda r, c: (1 + r**2 / (2 * c**2)).ln(), lambda r, c: 2 * r / (r**2 + 2 * c**2)),
    geman_mcclure: (lambda r, c: r**2 / (r**2 + 4 * c**2), lambda r, c: 8 * c**2 * r / (r**2 + 4 * c**2) ** 2),
    fair: (lambda r, c: r - c * (1 + r / c).ln(), lambda r, c: r / (r + c)),
    squared_l2: (lambda r, c: r**2, lambda r, c: 2 * r),
}


def name(distance) -> str:
    inside = getattr(distance, "rho", None)
    return distance.__name__ if inside is None else f"{type(distance).__name__}({inside.__name__})"


def in_100_digits(formula, radii: Tensor, c: float) -> Tensor:
    with localcontext() as context:
        context.prec = 100
        return torch.tensor([float(formula(Decimal(r), Decimal(c))) for r in radii.tolist()], dtype=torch.float64)


def barron(r: Tensor, alpha: float) -> Tensor:
    """Barron 2019, arXiv 1701.03077, Eq. (8) at c = 1."""
    k = abs(alpha - 2)
    return k / alpha * ((r**2 / k + 1) ** (alpha / 2) - 1)


# --- Numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [1e-3, 0.0345, 1.0, 25.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
def test_value_and_influence_equal_the_papers_over_24_orders_of_magnitude(distance, dtype, c, device, assert_close):
    student = torch.tensor(RADII, dtype=dtype, device=device)[:, None].requires_grad_()
    value = distance(student, torch.zeros_like(student), c)
    value.sum().backward()
    formula, derivative = PAPER[distance]
    radii = student.detach().double().cpu()[:, 0]
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(value.detach().cpu(), in_100_digits(formula, radii, c))
    # 1e-25: where d/dr^2 leaves float32's range, Geman-McClure's influence may be cut to 0.
    assert_close(student.grad.cpu()[:, 0], in_100_digits(derivative, radii, c), atol=1e-25)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=str)
def test_fair_has_no_seam_where_its_series_ends(dtype, tolerance):
    r = torch.linspace(0.01, 2, 1000, dtype=dtype, requires_grad=True)
    value = fair_of_r2(r**2, 1.0)
    (influence,) = torch.autograd.grad(value.sum(), r)
    for found, formula in zip((value, influence), PAPER[fair], strict=True):
        expected = in_100_digits(formula, r.detach(), 1.0)
        torch.testing.assert_close(found.detach().double(), expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("distance", DISTANCES)
def test_residual_is_the_norm_over_everything_that_makes_one_sample(distance, rng, assert_close):
    student, teacher = torch.randn(2, 5, 4, 8, 8, generator=rng)
    r = (student.double() - teacher.double()).flatten(1).norm(dim=1)
    assert_close(distance(student, teacher, 0.3), in_100_digits(PAPER[distance][0], r, 0.3), torch.float32)


@pytest.mark.parametrize(
    "distance", [*DISTANCES, *(kind(rho) for rho in RHOS for kind in (PerToken, PerElement))], ids=name
)
def test_equal_outputs_have_distance_zero_and_gradient_zero(distance, device):
    student = torch.ones(3, 4, 2, 2, device=device, requires_grad=True)
    value = distance(student, student.detach().clone(), 0.03)
    value.sum().backward()
    assert value.tolist() == [0, 0, 0]
    assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("distance", [*DISTANCES, PerToken(cauchy_of_r2), PerElement(geman_mcclure_of_r2)], ids=name)
def test_first_and_second_derivatives_are_exact(distance, rng):
    student, teacher = torch.randn(2, 3, 2, 2, 2, generator=rng, dtype=torch.float64)
    # Residuals on both sides of the switches, Geman-McClure's at r = 2 c and Fair's at c / 2.
    c = torch.tensor([0.05, 0.6, 5.0], dtype=torch.float64, requires_grad=distance is not squared_l2)
    inputs = (student.requires_grad_(), teacher.requires_grad_(), c)
    assert torch.autograd.gradcheck(distance, inputs)
    assert torch.autograd.gradgradcheck(distance, inputs)


@pytest.mark.parametrize("distance", [*DISTANCES, PerToken(cauchy_of_r2), PerElement(pseudo_huber_of_r2)], ids=name)
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_inputs_lose_nothing_beyond_their_own_rounding(dtype, rng):
    student, teacher = torch.randn(2, 3, 4, 8, 8, generator=rng).to(dtype)
    in_float32 = cauchy(student.float(), teacher.float(), 0.1)
    assert torch.equal(cauchy(student, teacher, 0.1), in_float32)
    assert torch.equal(cauchy(student, teacher.float(), 0.1), in_float32)  # a student under autocast, an EMA teacher


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_scale_in_half_precision_is_squared_in_float32(distance, rng):
    student, teacher = torch.randn(2, 3, 4, generator=rng)
    c = torch.tensor([1e-4, 1.0, 1e3], dtype=torch.float16)  # 1e-4 and 1e3 squared leave float16
    assert torch.equal(distance(student, teacher, c), distance(student, teacher, c.float()))


@pytest.mark.parametrize("distance", [*DISTANCES, PerToken(fair_of_r2), PerElement(pseudo_huber_of_r2)], ids=name)
def test_autocast_changes_nothing(distance, rng, device):
    student, teacher = torch.randn(2, 3, 4, 8, 8, generator=rng).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        inside = distance(student, teacher, 0.1)
    assert torch.equal(inside, distance(student, teacher, 0.1))


@pytest.mark.parametrize("distance", [*DISTANCES, PerToken(fair_of_r2), PerElement(geman_mcclure_of_r2)], ids=name)
def test_functional_transforms_agree_with_autograd(distance, rng, assert_close):
    student, teacher, tangent = torch.randn(3, 3, 4, 2, 2, generator=rng, dtype=torch.float64)
    c = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(distance(student.requires_grad_(), teacher, c).sum(), student)
    student = student.detach()

    def of_one(x, y, scale):
        return distance(x[None], y[None], scale)[0]

    assert_close(torch.func.vmap(of_one)(student, teacher, c), distance(student, teacher, c))
    assert_close(torch.func.vmap(torch.func.grad(of_one))(student, teacher, c), gradient)
    _, forward = torch.func.jvp(lambda x: distance(x, teacher, c), (student,), (tangent,))
    assert_close(forward, (gradient * tangent).flatten(1).sum(1))


# --- Shapes of the curves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1e-3, 7.0, 1e4])
@pytest.mark.parametrize(
    ("rho", "degree"),
    [(pseudo_huber_of_r2, 1), (cauchy_of_r2, 0), (geman_mcclure_of_r2, 0), (fair_of_r2, 1), (squared_l2_of_r2, 2)],
)
def test_is_homogeneous_in_residual_and_scale(rho, degree, k, assert_close):
    r2 = torch.logspace(-8, 8, 33, dtype=torch.float64)
    assert_close(rho(k**2 * r2, k * 0.3), k**degree * rho(r2, 0.3))


@pytest.mark.parametrize("rho", RHOS)
def test_grows_with_the_residual(rho):
    value = rho(torch.logspace(-12, 6, 1000, dtype=torch.float64), 0.3)
    assert (value.diff() > 0).all()


@pytest.mark.parametrize("rho", RHOS)
def test_never_falls_with_the_residual_in_float32(rho):
    value = rho(torch.logspace(-24, 24, 1000), 0.3)
    assert (value.diff() >= 0).all()


@pytest.mark.parametrize("rho", ROBUST_RHOS)
def test_falls_with_the_scale(rho):
    c = torch.logspace(-3, 3, 100, dtype=torch.float64)
    assert (rho(torch.tensor(2.0, dtype=torch.float64), c).diff() < 0).all()


C = 0.3


@pytest.mark.parametrize(
    ("rho", "curvature"),
    [
        (pseudo_huber_of_r2, 1 / C),
        (cauchy_of_r2, 1 / C**2),
        (geman_mcclure_of_r2, 1 / (2 * C**2)),
        (fair_of_r2, 1 / C),
        (squared_l2_of_r2, 2),
    ],
)
def test_curvature_at_zero(rho, curvature, assert_close):
    zero, expected = torch.zeros((), dtype=torch.float64), torch.tensor(curvature, dtype=torch.float64)
    assert_close(torch.func.hessian(lambda r: rho(r * r, C))(zero), expected)
    assert_close(torch.func.jacrev(torch.func.jacrev(lambda r: rho(r * r, C)))(zero), expected)


@pytest.mark.parametrize(
    ("rho", "near_zero"),
    [
        (pseudo_huber_of_r2, lambda r: r**2 / (2 * C)),
        (cauchy_of_r2, lambda r: r**2 / (2 * C**2)),
        (geman_mcclure_of_r2, lambda r: r**2 / (4 * C**2)),
        (fair_of_r2, lambda r: r**2 / (2 * C) - r**3 / (3 * C**2)),  # the only one with a cubic term
    ],
)
def test_is_quadratic_for_residuals_far_below_the_scale(rho, near_zero, assert_close):
    r = torch.logspace(-12, -7, 11, dtype=torch.float64)
    assert_close(rho(r**2, C), near_zero(r))


@pytest.mark.parametrize(
    ("rho", "far"),
    [
        (pseudo_huber_of_r2, lambda r: r - C),
        (cauchy_of_r2, lambda r: 2 * torch.log(r / C) - math.log(2)),
        (geman_mcclure_of_r2, torch.ones_like),
        (fair_of_r2, lambda r: r - C * torch.log(r / C)),
    ],
)
def test_limit_for_residuals_far_above_the_scale(rho, far, assert_close):
    r = torch.logspace(7, 12, 11, dtype=torch.float64)
    assert_close(rho(r**2, C), far(r))


@pytest.mark.parametrize(
    ("rho", "location", "height"),
    [
        (cauchy_of_r2, math.sqrt(2) * C, 1 / (math.sqrt(2) * C)),
        (geman_mcclure_of_r2, 2 * C / math.sqrt(3), 9 / (16 * math.sqrt(3) * C)),
    ],
)
def test_influence_peaks_where_the_docstring_says(rho, location, height):
    r = torch.linspace(0.01 * C, 10 * C, 100_000, dtype=torch.float64, requires_grad=True)
    (influence,) = torch.autograd.grad(rho(r**2, C).sum(), r)
    peak = influence.argmax()
    assert r[peak].item() == pytest.approx(location, rel=1e-3)
    assert influence[peak].item() == pytest.approx(height, rel=1e-6)


@pytest.mark.parametrize(
    ("rho", "half_way", "shortfall"), [(pseudo_huber_of_r2, C / math.sqrt(3), 1e-9), (fair_of_r2, C, C / 1e5)]
)
def test_influence_rises_to_one_and_stays_there(rho, half_way, shortfall):
    r = torch.cat([torch.logspace(-3, 5, 1000, dtype=torch.float64), torch.tensor([half_way])]).requires_grad_()
    (influence,) = torch.autograd.grad(rho(r**2, C).sum(), r)
    *rising, half = influence
    assert (torch.stack(rising).diff() >= -1e-12).all()
    assert 1 - rising[-1].item() == pytest.approx(shortfall, abs=1e-9)
    assert half.item() == pytest.approx(0.5)


# --- Agreement with others -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rho", "theirs", "factor"),
    [
        (pseudo_huber_of_r2, kornia.losses.charbonnier_loss, 1),
        (cauchy_of_r2, kornia.losses.cauchy_loss, 1),
        (geman_mcclure_of_r2, kornia.losses.geman_mcclure_loss, 2),
    ],
)
def test_kornia_is_the_elementwise_case_at_scale_one(rho, theirs, factor, rng, assert_close):
    student, teacher = 3 * torch.randn(2, 2, 3, 4, 4, generator=rng, dtype=torch.float64)
    assert_close(factor * rho(element_r2(student, teacher), 1.0), theirs(student, teacher))


@pytest.mark.parametrize(
    ("rho", "alpha", "factor"), [(pseudo_huber_of_r2, 1, 1), (cauchy_of_r2, 1e-9, 1), (geman_mcclure_of_r2, -2, 2)]
)
def test_barrons_general_loss_at_its_alpha(rho, alpha, factor):
    r = torch.linspace(0, 20, 201, dtype=torch.float64)
    torch.testing.assert_close(factor * rho(r**2, 1.0), barron(r, alpha), rtol=1e-6, atol=1e-6)


# --- Granularity and scale -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", RHOS)
def test_per_token_sums_over_tokens_the_distance_of_each(rho, rng, assert_close):
    student, teacher = torch.randn(2, 2, 3, 2, 2, generator=rng)
    tokens = [
        sum(
            float(rho((student[b, :, i, j] - teacher[b, :, i, j]).square().sum(), 0.3))
            for i in range(2)
            for j in range(2)
        )
        for b in range(2)
    ]
    assert_close(PerToken(rho)(student, teacher, 0.3), torch.tensor(tokens))


@pytest.mark.parametrize("rho", RHOS)
def test_per_element_sums_over_elements_the_distance_of_each(rho, rng, assert_close):
    student, teacher = torch.randn(2, 2, 3, 2, 2, generator=rng)
    expected = rho((student - teacher) ** 2, 0.3).sum((1, 2, 3))
    assert_close(PerElement(rho)(student, teacher, 0.3), expected)


def test_squared_l2_does_not_care_about_granularity(rng, assert_close):
    student, teacher = torch.randn(2, 4, 3, 5, 5, generator=rng)
    for distance in (PerToken(squared_l2_of_r2), PerElement(squared_l2_of_r2)):
        assert_close(distance(student, teacher, 0.3), squared_l2(student, teacher))


def test_squared_l2_does_not_care_about_the_scale(rng):
    student, teacher = torch.randn(2, 4, 3, generator=rng)
    assert torch.equal(squared_l2(student, teacher, 1e-3), squared_l2(student, teacher, 1e3))


def test_token_and_element_residuals_sum_to_that_of_the_sample(rng, assert_close):
    student, teacher = torch.randn(2, 2, 3, 4, 5, generator=rng)
    assert token_r2(student, teacher).shape == (2, 4, 5)
    assert element_r2(student, teacher).shape == (2, 3, 4, 5)
    assert_close(token_r2(student, teacher).sum((1, 2)), sample_r2(student, teacher))
    assert_close(element_r2(student, teacher).sum((1, 2, 3)), sample_r2(student, teacher))


@pytest.mark.parametrize(
    "distance", [*ROBUST_DISTANCES, *(kind(rho) for rho in ROBUST_RHOS for kind in (PerToken, PerElement))], ids=name
)
def test_a_scale_for_each_sample_equals_one_call_for_each_sample(distance, rng, assert_close):
    student, teacher = torch.randn(2, 3, 3, 3, 3, generator=rng)  # b = ch = h = w: wrong broadcasting would not raise
    c = torch.tensor([0.03, 1.0, 30.0])
    one_by_one = [distance(student[i : i + 1], teacher[i : i + 1], float(c[i])) for i in range(3)]
    assert_close(distance(student, teacher, c), torch.cat(one_by_one))
