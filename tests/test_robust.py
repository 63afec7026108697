"""A robust distance with its measured scale: the same step in any number of micro-batches and ranks."""

from __future__ import annotations

import copy
import math
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import robustcm
from robustcm import losses
from robustcm.losses import LikeSquares, PerElement, PerToken, cauchy, cauchy_of_r2, geman_mcclure, sample_r2
from robustcm.noise import NoiseRange, TimestepIndex, flow_time
from robustcm.robust import RobustLoss, robust_distance
from robustcm.scales import ConstantC, MeasuredC

B, D = 16, 12


def batch(step: int = 0, size: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher, sigma."""
    generator = torch.Generator().manual_seed(step)
    student, teacher = size * torch.randn(2, B, D, generator=generator)
    return student.requires_grad_(), teacher, torch.rand(B, generator=generator) * 79 + 0.5


# --- What it computes ------------------------------------------------------------------------------------------------


def test_the_first_step_measures_its_own_residuals_and_later_ones_those_before():
    robust, (s, t, _), (s2, t2, _) = RobustLoss(cauchy), batch(0), batch(1, size=100.0)
    median = sample_r2(s, t).detach().sqrt().quantile(0.5, interpolation="higher")
    torch.testing.assert_close(robust(s, t), cauchy(s, t, float(median)), rtol=0.05, atol=0)
    torch.testing.assert_close(robust(s2, t2), cauchy(s2, t2, float(median)), rtol=0.05, atol=0)


def test_it_is_the_function_underneath_with_its_state_kept():
    robust, scale = RobustLoss(geman_mcclure, MeasuredC()), MeasuredC()
    state, depth = scale.init(), torch.zeros(B)
    for step in range(4):
        s, t, _ = batch(step)
        found = robust_distance(s, t, state, depth=depth, distance=geman_mcclure, c=scale)
        assert torch.equal(robust(s, t), found.distance)
        state = scale.observe(state, found.seen)
        assert torch.equal(robust.state, state)


def test_residuals_are_scaled_by_the_number_of_levels():
    robust, (s, t, _) = RobustLoss(cauchy), batch()
    robust(s, t, num_levels=11)
    torch.testing.assert_close(robust(s / 10, t / 10, num_levels=101), robust(s, t, num_levels=11), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("axis", "t"),
    [
        (NoiseRange().depth, torch.tensor([79.0, 0.01])),
        (flow_time, torch.tensor([0.99, 0.01])),
        (TimestepIndex(1000), torch.tensor([990, 10])),
    ],
    ids=["sigma", "flow-time", "index"],
)
def test_each_range_of_noise_levels_has_its_own_c_on_every_axis(axis, t):
    robust = RobustLoss(cauchy, MeasuredC(bins=4), axis=axis)
    residual = torch.tensor([100.0, 1.0]).repeat_interleave(8)[:, None].expand(16, D)
    levels = t.repeat_interleave(8)
    robust(residual, torch.zeros_like(residual), levels)
    # Each sample's residual is its range's median, so its distance is log(1 + 1/2) whatever its size.
    found = robust(residual, torch.zeros_like(residual), levels)
    torch.testing.assert_close(found, torch.full((16,), math.log(1.5)), rtol=0.04, atol=0)


def test_nothing_is_learnt_in_eval_mode():
    robust, (s, t, _) = RobustLoss().eval(), batch()
    before = copy.deepcopy(robust.state_dict())
    first, again = robust(s, t), robust(10 * s, 10 * t)
    assert all(torch.equal(before[k], v) for k, v in robust.state_dict().items())
    torch.testing.assert_close(first, again, rtol=0.05, atol=0)  # no state: each call measures itself


def test_nothing_is_learnt_from_a_student_without_gradient():
    robust, (s, t, _) = RobustLoss(), batch()
    with torch.no_grad():
        robust(1 * s, t)
    robust(s.detach(), t)
    assert robust.state[:, :-1].sum() == 0
    robust(s, t)
    assert robust.state[:, :-1].sum() == B


def test_scales_are_the_c_of_the_next_step_for_each_range():
    robust, (s, t, sigma) = RobustLoss(cauchy, MeasuredC(bins=4), axis=NoiseRange().depth), batch()
    assert robust.scales(D).isnan().all()
    robust(s, t, sigma)
    depth = (torch.arange(4) + 0.5) / 4
    assert torch.equal(robust.scales(D), robust.c(robust.state, robust.pending, depth, 2, D))
    assert RobustLoss(c=ConstantC()).scales(4096).tolist() == [pytest.approx(0.00054 * 64)]


def test_a_call_may_say_that_it_closes_the_step():
    counted, told = RobustLoss(accumulation=2), RobustLoss()
    for step in range(6):
        s, t, _ = batch(step)
        assert torch.equal(counted(s, t), told(s, t, closes=step % 2 == 1))
        assert torch.equal(counted.state, told.state)


def test_at_the_height_of_squares_small_residuals_have_their_squared_error():
    s, t, _ = batch()
    like = LikeSquares(cauchy_of_r2)
    torch.testing.assert_close(like(s, t, 1e4), sample_r2(s, t), rtol=1e-5, atol=0)
    for c in (0.01, torch.full((B,), 3.0)):
        torch.testing.assert_close(like(s, t, c), 2 * c**2 * cauchy(s, t, c), rtol=1e-4, atol=0)


def test_weight_is_multiplied_sample_by_sample():
    robust, (s, t, sigma) = RobustLoss(c=ConstantC()), batch()
    assert torch.equal(robust(s, t, weight=sigma), sigma * robust(s, t))


@pytest.mark.parametrize("distance", [PerToken(cauchy_of_r2), PerElement(cauchy_of_r2)], ids=["token", "element"])
def test_a_finer_distance_gets_its_share_of_the_scale(distance):
    generator = torch.Generator().manual_seed(0)
    s, t = torch.ones(4, 2, 3, 3), torch.zeros(4, 2, 3, 3)
    norms = distance.norms_per_sample(s.shape[1:])
    scaled = 1 + torch.rand(4, generator=generator).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(
        RobustLoss(distance)(scaled * s, t), norms * RobustLoss(cauchy)(scaled * s, t), rtol=1e-5, atol=0
    )


# --- Micro-batches and ranks -----------------------------------------------------------------------------------------


def trained(parts: int, steps: int = 3) -> tuple[RobustLoss, list[Tensor], list[Tensor]]:
    """The module, the gradients and the scales of a few steps, each in ``parts`` micro-batches."""
    robust = RobustLoss(cauchy, MeasuredC(bins=4), axis=NoiseRange().depth, accumulation=parts)
    weight, gradients, distances = nn.Parameter(torch.eye(D)), [], []
    for step in range(steps):
        pieces = list(zip(*(v.chunk(parts) for v in batch(step)), strict=True))
        if step == 0:
            for s, t, sigma in pieces:
                robust.look(s @ weight, t, sigma)
        weight.grad = None
        found = []
        for s, t, sigma in pieces:
            distance = robust(s @ weight, t, sigma)
            (distance.sum() / B).backward()
            found.append(distance.detach())
        gradients.append(weight.grad.clone())
        distances.append(torch.cat(found))
    return robust, gradients, distances


@pytest.mark.parametrize("parts", [4, 16])
def test_the_same_step_in_any_number_of_micro_batches(parts):
    (whole, gradients, distances), (pieces, theirs, found) = trained(1), trained(parts)
    assert torch.equal(whole.state, pieces.state)
    for a, b in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    for a, b in zip(distances, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def on_rank(rank: int, folder: Path) -> None:
    """One of two ranks, each with half of every batch."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    robust = RobustLoss(cauchy, MeasuredC(bins=4), axis=NoiseRange().depth, group=dist.group.WORLD)
    weight, gradients = nn.Parameter(torch.eye(D)), []
    for step in range(3):
        s, t, sigma = (v.chunk(2)[rank] for v in batch(step))
        weight.grad = None
        (robust(s @ weight, t, sigma).sum() / B).backward()
        dist.all_reduce(weight.grad)
        gradients.append(weight.grad.clone())
    torch.save({"state": robust.state, "gradients": gradients}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_the_same_step_on_two_ranks(tmp_path):
    mp.spawn(on_rank, (tmp_path,), nprocs=2)
    whole, gradients, _ = trained(1)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(found["state"], whole.state)
        for a, b in zip(gradients, found["gradients"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# --- A module like any other -----------------------------------------------------------------------------------------


def test_state_goes_through_a_checkpoint_and_along_with_the_module(device):
    robust = RobustLoss(cauchy, accumulation=2).to(device)
    for step in range(3):
        s, t, _ = batch(step)
        robust(s.to(device), t.to(device))
    other = RobustLoss(cauchy, accumulation=2).to(device)
    other.load_state_dict(robust.state_dict())
    s, t, _ = batch(9)
    assert torch.equal(robust(s.to(device), t.to(device)), other(s.to(device), t.to(device)))
    assert all(torch.equal(a, b) for a, b in zip(robust.buffers(), other.buffers(), strict=True))


@pytest.mark.parametrize("shape", [(B,), (B, D), (B, 5, D), (B, 2, 20), (B, 3, 4, 4), (B, 3, 2, 4, 4)])
def test_vectors_tokens_audio_images_and_video(shape):
    s = torch.randn(*shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    if len(shape) == 1:
        with pytest.raises(ValueError, match=r"must have one shape \[b, \.\.\.\]"):
            RobustLoss()(s, torch.zeros(shape))
        return
    distance = RobustLoss()(s, torch.zeros(shape))
    assert distance.shape == (B,)
    distance.mean().backward()
    assert s.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_precision(dtype):
    s, t, _ = batch()
    s, t = s.to(dtype), t.to(dtype)
    found, expected = RobustLoss()(s, t), RobustLoss()(s.float(), t.float())
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=0)


def test_autocast_leaves_it_in_float32():
    s, t, _ = batch()
    with torch.autocast("cpu", torch.bfloat16):
        found = RobustLoss()(s, t)
    assert torch.equal(found, RobustLoss()(s, t))


def test_it_compiles_as_one_graph():
    robust, eager = (RobustLoss(cauchy, MeasuredC(bins=4), axis=NoiseRange().depth) for _ in range(2))
    compiled = torch.compile(robust, fullgraph=True, backend="aot_eager")
    for step in range(3):
        s, t, sigma = batch(step)
        torch.testing.assert_close(compiled(s, t, sigma), eager(s, t, sigma), rtol=1e-6, atol=0)
    assert torch.equal(robust.state, eager.state)


# --- Said, not guessed -----------------------------------------------------------------------------------------------


def test_weights_and_levels_with_axes_to_spare_mean_what_they_say():
    robust, (s, t, sigma) = RobustLoss(c=MeasuredC(bins=2), axis=NoiseRange().depth).eval(), batch()
    spread = sigma.reshape(-1, 1, 1, 1)
    assert torch.equal(robust(s, t, spread, weight=spread), robust(s, t, sigma, weight=sigma))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RobustLoss(c=MeasuredC(bins=8)), "8 ranges of noise levels need an axis"),
        (lambda: RobustLoss(accumulation=0), "accumulation must be at least 1"),
        (lambda: RobustLoss()(*batch()), r"t needs an axis .*axis=flow_time.*NoiseRange\(\).depth"),
        (lambda: RobustLoss(axis=flow_time)(*batch()[:2]), "has an axis: pass the noise levels as t"),
        (lambda: RobustLoss()(*batch()[:2], weight=torch.ones(3)), r"weight must be one value a sample, \[16\], got"),
        (lambda: RobustLoss()(*batch()[:2], weight=torch.ones(1, B)), r"weight must be one value a sample, \[16\]"),
        (lambda: RobustLoss(axis=flow_time)(*batch()[:2], torch.ones(4)), r"t must be one value a sample, \[16\], got"),
        (lambda: RobustLoss()(batch()[0], batch()[0][:1]), "student and teacher must have one shape"),
        (lambda: robust_distance(*batch()[:2], MeasuredC().init(), depth=torch.ones(3)), r"depth must be one value a"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(call, message):
    with pytest.raises(ValueError, match=message) as found:
        call()
    assert "\n" not in str(found.value)


# --- The names of the top --------------------------------------------------------------------------------------------


def test_the_top_has_every_name_it_promises_and_they_are_the_modules_own():
    for name in robustcm.__all__:
        assert getattr(robustcm, name).__module__.startswith("robustcm.")
    assert robustcm.cauchy is losses.cauchy
    assert set(robustcm.__all__) <= set(dir(robustcm))
    with pytest.raises(AttributeError, match="no attribute 'cauchi'"):
        robustcm.cauchi  # noqa: B018
