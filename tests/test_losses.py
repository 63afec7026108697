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
from robustcm.shapes import aligned

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


# --- Shapes of the scale ---------------------------------------------------------------------------------------------

GRANULARITIES = [pseudo_huber, fair, squared_l2, PerToken(cauchy_of_r2), PerElement(geman_mcclure_of_r2)]
C_B = torch.tensor([0.03, 1.0, 30.0])


@pytest.mark.parametrize("distance", GRANULARITIES, ids=name)
@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 1, 1, 1)], ids=str)
def test_a_scale_for_each_sample_may_keep_the_axes_it_was_broadcast_with(distance, shape, rng):
    student, teacher = torch.randn(2, 3, 3, 3, 3, generator=rng)
    assert torch.equal(distance(student, teacher, C_B.reshape(shape)), distance(student, teacher, C_B))


@pytest.mark.parametrize("distance", GRANULARITIES, ids=name)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1, 1)], ids=str)
def test_a_scale_with_one_entry_is_one_for_all(distance, shape, rng, assert_close):
    student, teacher = torch.randn(2, 3, 3, 3, 3, generator=rng)
    value = distance(student, teacher, torch.full(shape, 0.3))
    assert value.shape == (3,)
    assert_close(value, distance(student, teacher, 0.3))


@pytest.mark.parametrize("distance", GRANULARITIES, ids=name)
@pytest.mark.parametrize("shape", [(2,), (4,), (4, 1), (1, 3), (3, 3), (3, 3, 1)], ids=str)
def test_a_scale_that_would_broadcast_is_refused(distance, shape, rng):
    student, teacher = torch.randn(2, 3, 3, 5, 5, generator=rng)
    with pytest.raises(
        ValueError, match=r"the scale c has shape .* where there are 3 samples: give a number"
    ) as caught:
        distance(student, teacher, torch.ones(shape))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rho", RHOS)
def test_a_scale_for_each_sample_meets_tokens_on_the_first_axis(rho, rng, assert_close):
    r2 = torch.rand(3, 3, 3, generator=rng)  # on the last it would fit as well, and be wrong
    assert_close(rho(r2, C_B), torch.stack([rho(r2[i], float(C_B[i])) for i in range(3)]))


@pytest.mark.parametrize("kind", [PerToken, PerElement])
def test_a_rho_of_ones_own_gets_the_scale_in_the_shape_it_needs(kind, rng, assert_close):
    student, teacher = torch.randn(2, 3, 3, 3, 3, generator=rng)
    own = kind(lambda r2, c: r2 / c**2)(student, teacher, C_B[:, None])
    assert_close(own, squared_l2(student, teacher) / C_B**2)


def test_a_scale_may_have_the_shape_of_the_residuals(rng, assert_close):
    student, teacher = torch.randn(2, 2, 3, 4, 5, generator=rng)
    c = torch.rand(2, 4, 5, generator=rng) + 0.1
    expected = torch.log1p(token_r2(student, teacher) / (2 * c**2)).sum((1, 2))
    assert_close(PerToken(cauchy_of_r2)(student, teacher, c), expected)
    row = PerToken(cauchy_of_r2)(student, teacher, c[:1])  # one a place, for all samples
    assert_close(row, PerToken(cauchy_of_r2)(student, teacher, c[:1].expand(2, 4, 5)))


@pytest.mark.parametrize(
    ("value", "shape", "becomes"),
    [
        ((), (3, 4, 4), ()),
        ((1, 1), (3, 4, 4), ()),
        ((3,), (3,), (3,)),
        ((3, 1, 1, 1), (3,), (3,)),
        ((3,), (3, 4, 4), (3, 1, 1)),
        ((3, 1), (3, 4, 4), (3, 1, 1)),
        ((3, 4, 4), (3, 4, 4), (3, 4, 4)),
        ((3, 1, 4), (3, 4, 4), (3, 1, 4)),
        ((7,), (), (7,)),
        ((0,), (0,), (0,)),
    ],
    ids=str,
)
def test_aligned_broadcasts_on_the_axis_of_the_samples(value, shape, becomes):
    found = aligned("weight", torch.ones(value), shape)
    assert found.shape == becomes
    assert not shape or torch.broadcast_shapes(found.shape, shape) == shape


@pytest.mark.parametrize(
    ("value", "shape"), [((4,), (3, 4)), ((3, 3), (3,)), ((2, 1), (3, 4)), ((4, 3), (3, 4))], ids=str
)
def test_aligned_names_what_does_not_fit(value, shape):
    with pytest.raises(ValueError, match=rf"weight has shape \({value[0]}, ?{'' if len(value) == 1 else value[1]}\)"):
        aligned("weight", torch.ones(value), shape)


@pytest.mark.parametrize("shape", [(3, 16), (3, 2, 400), (3, 2, 5, 6, 7), (0, 2, 4, 4)], ids=str)
@pytest.mark.parametrize("distance", GRANULARITIES, ids=name)
def test_vectors_audio_video_and_an_empty_batch(distance, shape, rng):
    student, teacher = torch.randn(2, *shape, generator=rng)
    value = distance(student, teacher, torch.ones(shape[0]))
    assert value.shape == shape[:1]
    assert (value > 0).all()


# --- What is not finite ----------------------------------------------------------------------------------------------

EVERYWHERE = [*DISTANCES, PerToken(fair_of_r2), PerElement(pseudo_huber_of_r2), PerElement(geman_mcclure_of_r2)]


def value_and_gradient(distance, student: Tensor, c) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    value = distance(student, torch.zeros_like(student), c)
    return value.detach(), torch.autograd.grad(value.sum(), student)[0]


@pytest.mark.parametrize("c", [1e-3, 1e3, torch.tensor([1.0, 1e-3, 1e3])], ids=["small", "large", "each"])
@pytest.mark.parametrize("distance", EVERYWHERE, ids=name)
def test_an_infinite_residual_shows_in_the_value_and_not_in_the_gradient(distance, c):
    infinite = torch.tensor([[math.inf, 1.0], [-math.inf, math.inf], [1.0, 1.0]])
    value, gradient = value_and_gradient(distance, infinite, c)
    assert (gradient[infinite.isinf()] == 0).all()
    assert gradient.isfinite().all()
    if distance in (geman_mcclure, PerElement(geman_mcclure_of_r2)):
        assert value.isfinite().all()
    else:
        assert value.tolist()[:2] == [math.inf, math.inf]
    assert value[2].isfinite()
    assert (gradient[2] > 0).all()


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_residual_whose_square_overflows_counts_as_infinite(distance):
    value, gradient = value_and_gradient(distance, torch.full((1, 2), 1e25), 1.0)
    assert value.item() == (1 if distance is geman_mcclure else math.inf)
    assert gradient.tolist() == [[2 * torch.tensor(1e25).item()] * 2 if distance is squared_l2 else [0, 0]]


@pytest.mark.parametrize("distance", EVERYWHERE, ids=name)
@pytest.mark.parametrize("c", [1.0, C_B[:2]], ids=["number", "tensor"])
def test_nan_stays_nan_and_in_its_sample(distance, c):
    value, gradient = value_and_gradient(distance, torch.tensor([[math.nan, 1.0], [2.0, 1.0]]), c)
    assert value.isnan().tolist() == [True, False]
    assert gradient[0, 0].isnan()
    assert gradient[1].isfinite().all()


@pytest.mark.parametrize("distance", [d for d in EVERYWHERE if d is not squared_l2], ids=name)
def test_a_negative_or_missing_scale_in_a_tensor_gives_nan_for_its_sample(distance):
    value, _ = value_and_gradient(distance, torch.ones(3, 2), torch.tensor([-1.0, math.nan, 1.0]))
    assert value.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("distance", EVERYWHERE, ids=name)
@pytest.mark.parametrize("c", [0.0, 1e-42, 1e-30, 1e30, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_tensor_scale_at_the_ends_of_the_range_gives_finite_gradients(distance, c, dtype):
    student = torch.tensor([[0, 0], [1e-30, 0], [1e-3, 1e-3], [1, 2], [1e12, 1], [math.inf, 1]], dtype=dtype)
    value, gradient = value_and_gradient(distance, student, torch.tensor(c, dtype=dtype))
    assert not value.isnan().any()
    assert gradient.isfinite().all()
    assert value[0] == 0
    assert (gradient[0] == 0).all()
    if 0 < c < math.inf:  # a number is cut in the same way
        by_number = value_and_gradient(distance, student, c)
        torch.testing.assert_close((value, gradient), by_number, rtol=1e-6, atol=0)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(
    ("dtype", "c"),
    [
        (torch.float64, torch.zeros(2)),
        (torch.float32, torch.zeros(2).double()),
        (torch.float32, torch.zeros(()).double()),
    ],
    ids=["float32", "float64", "one float64"],
)
def test_a_scale_of_zero_in_another_precision_gives_finite_gradients(distance, dtype, c):
    value, gradient = value_and_gradient(distance, torch.tensor([[0.0, 0], [1, 2]], dtype=dtype), c)
    assert not value.isnan().any()
    assert gradient.isfinite().all()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("distance", EVERYWHERE, ids=name)
def test_no_nan_arises_on_the_way_to_a_finite_gradient(distance):
    student = torch.tensor([[0.0], *([r] for r in RADII)], requires_grad=True)
    with torch.autograd.detect_anomaly():
        distance(student, torch.zeros_like(student), 1.0).sum().backward()


@pytest.mark.parametrize("rho", [pseudo_huber_of_r2, fair_of_r2])
def test_a_scale_of_zero_is_the_limit_where_there_is_one(rho, assert_close):
    r = torch.logspace(-6, 6, 13, requires_grad=True)
    value = rho(r**2, torch.zeros(()))
    assert_close(value.detach(), r.detach())
    assert_close(torch.autograd.grad(value.sum(), r)[0], torch.ones(13))


@pytest.mark.parametrize("distance", DISTANCES)
def test_residuals_too_small_to_square_count_as_zero(distance):
    value, gradient = value_and_gradient(distance, torch.full((1, 2), 1e-30), 1.0)
    assert value.item() == 0
    assert gradient.abs().max() <= 2.1e-30


# --- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [*DISTANCES, PerToken(cauchy_of_r2), PerElement(cauchy_of_r2)], ids=name)
@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (2, 3, 1, 1), (2, 3, 4)], ids=str)
def test_shapes_that_would_broadcast_are_refused(distance, shape):
    with pytest.raises(ValueError, match=r"student and teacher must have one shape \[b, \.\.\.\], got \(2, 3, 4, 4\)"):
        distance(torch.zeros(2, 3, 4, 4), torch.zeros(shape), 0.3)


def test_a_sample_needs_a_batch_axis_and_another():
    with pytest.raises(ValueError, match=r"got \(4,\) and \(4,\)"):
        cauchy(torch.zeros(4), torch.zeros(4), 0.3)


@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("c", [0.0, -1.0, math.nan])
def test_a_scale_that_is_not_positive_is_refused(rho, c):
    with pytest.raises(ValueError, match=r"the scale c must be positive, got .*units of the residual norm r"):
        rho(torch.ones(3), c)


def test_student_and_teacher_live_on_one_device():
    with pytest.raises(ValueError, match=r"the student is on cpu and the teacher on meta"):
        cauchy(torch.zeros(2, 3), torch.zeros(2, 3, device="meta"), 0.3)


def test_a_scale_for_each_sample_lives_with_them():
    student = torch.zeros(2, 3, device="meta")
    with pytest.raises(ValueError, match=r"the scale c is on cpu and the residuals on meta"):
        cauchy(student, student, torch.ones(2))
    assert cauchy(student, student, torch.tensor(0.3)).shape == (2,)  # one for all may stay where it is


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64], ids=str)
def test_residuals_of_anything_but_floating_point_are_refused(dtype):
    with pytest.raises(ValueError, match=rf"floating point, got {dtype} and torch.float32"):
        cauchy(torch.ones(2, 3, dtype=dtype), torch.ones(2, 3), 0.3)


def test_a_scale_of_whole_numbers_is_one_of_floats():
    student, teacher = torch.ones(2, 3), torch.zeros(2, 3)
    whole, floats = (cauchy(student, teacher, c) for c in (torch.tensor([1, 2]), torch.tensor([1.0, 2.0])))
    assert torch.equal(whole, floats)
    nought = fair(student.double(), teacher.double(), torch.tensor([0, 1]))
    assert nought[0].item() == pytest.approx(3**0.5, rel=1e-15)
