"""What the robust distances take: scales and samples of any shape, values that are not finite; and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from test_losses import DISTANCES, RADII, RHOS, name
from torch import Tensor

from robustcm.losses import (
    PerElement,
    PerToken,
    cauchy,
    cauchy_of_r2,
    fair,
    fair_of_r2,
    geman_mcclure,
    geman_mcclure_of_r2,
    pseudo_huber,
    pseudo_huber_of_r2,
    squared_l2,
    token_r2,
)
from robustcm.shapes import aligned

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
