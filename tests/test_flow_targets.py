"""Targets of flow maps against the closed form: the average velocity of Gaussian data."""

from __future__ import annotations

import pytest
import scipy.stats
import torch
from test_flow_maps import TARGETS, Net, S, point, times, true_flow, true_u, true_v

from robustcm.flow_maps import PreconditionedFlowMap, sample_flow_map
from robustcm.flow_targets import ConstantShare, Derivative, TwoPoint

# --- The closed form -------------------------------------------------------------------------------------------------


def test_the_closed_form_is_the_average_velocity_of_its_flow():
    t, r = times()
    z_t = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(z_t - (t - r)[:, None] * true_u(z_t, t, r), true_flow(z_t, t, r))
    torch.testing.assert_close(true_u(z_t, t, t), true_v(z_t, t))


def test_the_exact_u_fulfils_the_identity_of_meanflow():
    at = point(true_u)
    torch.testing.assert_close(Derivative()(true_u, at), at.student)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 1.0])
def test_the_exact_u_fulfils_that_of_two_points_with_the_mean_velocity_between_them(share: float):
    """The velocity of a straight path is its mean; on a curved one the mean down to s takes its place."""
    at = point(true_u, lambda z_t, t, r: true_u(z_t, t, t - share * (t - r)))
    torch.testing.assert_close(TwoPoint(share=ConstantShare(share=share))(true_u, at), at.student)


def test_two_points_tend_to_the_derivative():
    u = PreconditionedFlowMap(Net().double())
    at = point(u, lambda z_t, t, r: torch.ones_like(z_t))
    exact_target = Derivative()(u, at)
    errors = [
        float((TwoPoint(share=ConstantShare(share=share))(u, at) - exact_target).abs().max())
        for share in (1e-2, 1e-3, 1e-4)
    ]
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.2)
    assert errors[2] < 1e-2


def test_a_share_of_one_and_r_equal_to_t_are_flow_matching_exactly():
    u = PreconditionedFlowMap(Net().double())
    at = point(u)
    assert torch.equal(TwoPoint(share=ConstantShare(share=1.0))(u, at), at.v)
    for target in TARGETS:
        same = point(u, t=times()[0], r=times()[0], progress=0.7)._replace(student=at.student + 1)  # another teacher
        assert torch.equal(target(u, same), same.v)


def test_the_squared_error_has_the_gradient_of_the_published_loss():
    """|u - (share v + (1 - share) u(z_s, s, r))|^2 / share."""
    share, net = 0.2, Net().double()
    u = PreconditionedFlowMap(net)
    at = point(u)
    s = at.t - share * (at.t - at.r)
    with torch.no_grad():
        there = u(at.z_t - (at.t - s)[:, None] * at.v, s, at.r)
        published, ours = share * at.v + (1 - share) * there, TwoPoint(share=ConstantShare(share=share))(u, at)
    gradients = []
    for loss in (
        (u(at.z_t, at.t, at.r) - published).square().sum() / share,
        # 2 D / share, for the residual D / share without the weight
        (u(at.z_t, at.t, at.r) - ours).square().sum(),
    ):
        gradients.append(torch.autograd.grad(loss, list(net.parameters())))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_targets_have_no_gradient_and_derivatives_leave_no_graph():
    u = PreconditionedFlowMap(Net().double())
    for target in TARGETS:
        assert not target(u, point(u)).requires_grad


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_exact_u_samples_the_law_of_the_data_and_its_steps_are_one(steps: int):
    z = torch.randn(4000, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = sample_flow_map(true_u, z, steps=steps)
    assert scipy.stats.kstest(x.flatten().numpy() / S, scipy.stats.norm.cdf).pvalue > 1e-3
    torch.testing.assert_close(x, S * z)  # the flow of Gaussian data only scales
    torch.testing.assert_close(x, sample_flow_map(true_u, z, times=(1.0, 0.9, 0.1, 0.0)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "at least 1"),
        ({"times": (1.0,)}, "from 1 to 0"),
        ({"times": (0.9, 0.0)}, "from 1 to 0"),
        ({"times": (1.0, 0.5, 0.5, 0.0)}, "from 1 to 0"),
        ({"times": (1.0, 0.1)}, "from 1 to 0"),
    ],
)
def test_times_that_do_not_lead_from_noise_to_data_are_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_flow_map(true_u, torch.zeros(2, 2), **arguments)
