"""Data of any floating dtype, under a caller's autocast, and moved by ``to``: levels and counts stay what they were."""

from __future__ import annotations

import copy
from types import MappingProxyType

import pytest
import torch
from torch import Tensor, nn

from robustcm.consistency import Preconditioned, sample, temporal_difference
from robustcm.couplers import Entropic
from robustcm.flow_maps import FlowMapObjective, sample_flow_map
from robustcm.flow_targets import FlowPoint, TwoPoint
from robustcm.losses import LikeSquares, cauchy_of_r2, geman_mcclure_of_r2, sample_r2
from robustcm.objective import Batch, Objective, draw
from robustcm.preconditioning import Preconditioning, ScalarSkip
from robustcm.robust import RobustLoss
from robustcm.schedules import LevelPairs
from robustcm.semidiscrete import Semidiscrete
from robustcm.tails.advice import advise
from robustcm.trajectories import TrajectoryObjective, sample_trajectory

HALVES = [torch.bfloat16, torch.float16]


class Seen:
    """A network of no weights that keeps the times it was told."""

    def __init__(self) -> None:
        self.times: list[Tensor] = []

    def __call__(self, x: Tensor, *times: Tensor) -> Tensor:
        self.times += times
        return 0.5 * x


def drawn(kind: str, network: Seen, z: Tensor) -> Tensor:
    """Two evaluations of a sampler."""
    if kind == "consistency":
        return sample(Preconditioned(network), z, sigmas=(80.0, 0.821), generator=torch.Generator().manual_seed(0))
    if kind == "trajectory":
        return sample_trajectory(TrajectoryObjective().function_of(network), z, levels=(80.0, 0.821))
    return sample_flow_map(FlowMapObjective().function_of(network), z, times=(1.0, 0.3, 0.0))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64])
@pytest.mark.parametrize("kind", ["consistency", "trajectory", "flow map"])
def test_a_sampler_tells_the_network_the_levels_it_was_trained_at_whatever_the_noise_is(kind, dtype, rng):
    z, usual, other = torch.randn(4, 6, generator=rng), Seen(), Seen()
    assert drawn(kind, usual, z).dtype == torch.float32
    assert drawn(kind, other, z.to(dtype)).dtype == dtype
    for one, two in zip(usual.times, other.times, strict=True):
        torch.testing.assert_close(two.float(), one, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64])
@pytest.mark.parametrize("kind", ["consistency", "trajectory", "flow map"])
def test_a_network_of_any_floating_dtype_is_sampled(kind, dtype, rng):
    linear, z = nn.Linear(6, 6).to(dtype), torch.randn(4, 6, generator=rng).to(dtype)

    class Weighted(Seen):
        def __call__(self, x: Tensor, *times: Tensor) -> Tensor:
            return linear(super().__call__(x, *times))

    found = drawn(kind, Weighted(), z)
    assert found.dtype == dtype
    assert found.isfinite().all()


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64])
@pytest.mark.parametrize("objective", [Objective(), TrajectoryObjective(), FlowMapObjective()], ids=type)
def test_an_objective_takes_data_of_any_floating_dtype(objective, dtype, rng):
    x = torch.randn(8, 6, generator=rng).to(dtype)
    batch = objective.prepare(x, draw(0, 0, x.shape), 0, 10)
    terms = objective(objective.function_of(lambda x, *_: (0.5 * x.double()).to(x.dtype)), batch, objective.init())
    assert terms.loss.isfinite()


def test_student_gets_its_gradient_under_the_callers_autocast(rng):
    linear = nn.Linear(6, 6)
    x, z = torch.randn(2, 4, 6, generator=rng)
    levels = torch.full((4,), 1.0), torch.full((4,), 0.5)

    def gradient(enabled: bool) -> Tensor:
        linear.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            student, teacher = temporal_difference(Preconditioned(lambda x, _: linear(x)), x, z, *levels)
            sample_r2(student, teacher).sum().backward()
        return linear.weight.grad.clone()

    torch.testing.assert_close(gradient(True), gradient(False), rtol=0.1, atol=0.5)


# --- The distance with its measured scale -----------------------------------------------------------------------------


@pytest.mark.parametrize("move", [nn.Module.half, nn.Module.bfloat16, nn.Module.float, lambda m: m.to(torch.bfloat16)])
def test_the_counts_stay_float64_to_the_bit_wherever_the_module_goes(move, rng):
    robust = RobustLoss()
    for _ in range(3):
        robust(torch.randn(100_000, 2, generator=rng).requires_grad_(), torch.zeros(100_000, 2))
    before = copy.deepcopy(robust.state_dict())
    moved = move(nn.Sequential(robust, nn.Linear(2, 2)))[0].state_dict()
    for name, value in before.items():
        assert moved[name].dtype == value.dtype
        assert torch.equal(moved[name], value)


def test_a_validation_waits_for_no_other_rank_and_counts_nothing(monkeypatch, rng):
    calls: list[Tensor] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda counts, group: calls.append(counts))
    robust, (s, t) = RobustLoss(group=object()), torch.randn(2, 8, 3, generator=rng)
    robust(s.requires_grad_(), t)
    assert len(calls) == 1
    state = robust.state.clone()
    with torch.no_grad():
        robust(s.detach(), t)  # in training mode, to look at a loss
        robust.eval()(s, t)
    robust.eval()(s, t)
    assert len(calls) == 1
    assert torch.equal(robust.state, state)
    robust.look(s, t)
    assert len(calls) == 2


@pytest.mark.parametrize("call", [lambda r, s: r(s, s, num_levels=1), lambda r, s: r.look(s, s, num_levels=1)])
def test_one_level_has_no_temporal_difference(call):
    with pytest.raises(ValueError, match="num_levels must be at least 2"):
        call(RobustLoss(), torch.zeros(2, 3))


@pytest.mark.parametrize("rho", [cauchy_of_r2, geman_mcclure_of_r2])
def test_like_squares_takes_every_form_of_c(rho, rng):
    student, teacher = torch.randn(2, 4, 3, generator=rng)
    like, c = LikeSquares(rho), torch.tensor([0.5, 1.0, 2.0, 4.0])
    expected = torch.stack([like(s[None], t[None], float(k))[0] for s, t, k in zip(student, teacher, c, strict=True)])
    for form in (c, c.reshape(4, 1), c.reshape(4, 1, 1, 1)):
        assert torch.equal(like(student, teacher, form), expected)
    assert like(student, teacher, torch.tensor(0.0)).isfinite().all()
    assert like(student, teacher, 1e-30).isfinite().all()


def test_a_number_and_a_tensor_of_progress_are_the_same(rng):
    z_t, v, student = torch.randn(3, 4, 6, generator=rng)
    t, r = torch.full((4,), 0.8), torch.full((4,), 0.2)

    def u(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return 0.3 * z

    found = [TwoPoint()(u, FlowPoint(z_t, v, t, r, student, p, {})) for p in (0.7, torch.tensor(0.7))]
    assert torch.equal(*found)


# --- What else takes tensors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64])
def test_noise_is_paired_with_data_of_any_floating_dtype(dtype, rng):
    x = torch.randn(20, 3, generator=rng)
    fitted = Semidiscrete(steps=4).fit(x.to(dtype), torch.Generator().manual_seed(0))
    assert fitted(torch.randn(5, 3, generator=rng).to(dtype)).shape == (5,)


def test_advice_takes_differences_in_bfloat16(rng):
    td = torch.randn(400, 8, generator=rng)
    r = td.norm(dim=1)
    coarse, fine = (advise(r, torch.zeros(400), 2, 8, td=td.to(dtype)) for dtype in (torch.bfloat16, torch.float32))
    assert coarse.element_gain == pytest.approx(fine.element_gain, rel=0.05)


def test_a_batch_that_goes_to_the_cpu_is_waited_for(monkeypatch):
    asked: list[bool] = []
    original = Tensor.to

    def to(self: Tensor, *args: object, **named: object) -> Tensor:
        asked.append(bool(named.get("non_blocking")))
        return original(self, *args)

    monkeypatch.setattr(Tensor, "to", to)
    ones = torch.ones(2)
    batch = Batch(torch.ones(2, 3), torch.ones(2, 3), LevelPairs(ones, ones, ones, 2))
    batch.to("cpu")
    assert asked
    assert not any(asked)
    asked.clear()
    batch.to("meta")
    assert all(asked)


def test_the_second_noise_can_be_paired_by_a_coupler_that_draws(rng):
    z = torch.randn(6, 4, generator=rng)
    found = [
        sample(
            Preconditioned(Seen()),
            z,
            sigmas=(80.0, 1.0),
            generator=torch.Generator().manual_seed(1),
            coupler=Entropic(),
        )
        for _ in range(2)
    ]
    assert torch.equal(*found)


def test_the_usual_skip_by_name_is_the_usual_skip(rng):
    x_t, t = torch.randn(4, 3, generator=rng), torch.tensor([0.002, 0.5, 1.0, 80.0])
    for sigma_data in (0.5, 1.0):
        usual = Preconditioned(Seen(), Preconditioning(sigma_data=sigma_data))
        named = Preconditioned(Seen(), Preconditioning(sigma_data=sigma_data), ScalarSkip(sigma_data=sigma_data))
        assert torch.equal(named(x_t, t), usual(x_t, t))
    with pytest.raises(ValueError, match="sigma_data"):
        Preconditioning(sigma_data=0.0)


def test_a_batch_moves_with_all_that_f_is_told_however_deep():
    ones = torch.ones(2)
    told = {
        "text": MappingProxyType({"embeds": torch.ones(2, 3), "ids": [ones, (ones, "a")]}),
        "labels": ones,
        "scale": 2.0,
    }
    moved = Batch(torch.ones(2, 3), torch.ones(2, 3), LevelPairs(ones, ones, ones, 2), told).to("meta").conditions
    text = moved["text"]
    assert {text["embeds"].device.type, text["ids"][0].device.type, text["ids"][1][0].device.type} == {"meta"}
    assert (moved["labels"].device.type, moved["scale"], text["ids"][1][1]) == ("meta", 2.0, "a")
    assert told["text"]["embeds"].device.type == "cpu"
