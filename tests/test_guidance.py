"""Labels are hidden at their share, the same ones each time; guidance is a line through two outputs of f."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom
from torch import Tensor

from robustcm.consistency import Preconditioned
from robustcm.flow_maps import FlowMapObjective
from robustcm.guidance import Guided, hidden
from robustcm.noise import NoiseRange
from robustcm.objective import FewStepObjective, Objective
from robustcm.trajectories import TrajectoryObjective

NO_CLASS = 3
X, T = torch.randn(5, 2, 2, 2, generator=torch.Generator().manual_seed(0)), torch.full((5,), 2.0)
LABELS = torch.tensor([0, 2, 1, 0, NO_CLASS])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class ByLabel:
    """f that shifts by its label, and notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def __call__(self, x: Tensor, *levels: Tensor, labels: Tensor, **conditions: Any) -> Tensor:
        self.asked.append({"labels": labels, **conditions})
        return torch.tanh(x + 0.3 * labels.reshape(-1, 1, 1, 1) + torch.sin(sum(levels)).reshape(-1, 1, 1, 1))


@given(share=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_the_share_of_hidden_labels_is_that_asked_for(share: float, seed: int):
    """As many as the binomial law gives: too few or too many by chance in one of 10^9 runs of 50 examples."""
    labels = torch.arange(40_000) % NO_CLASS
    found = hidden(labels, share, NO_CLASS, generator(seed))
    gone = found == NO_CLASS
    assert torch.equal(found[~gone], labels[~gone])
    many = int(gone.sum())
    assert min(binom.cdf(many, len(labels), share), binom.sf(many - 1, len(labels), share)) > 1e-11
    assert torch.equal(found, hidden(labels, share, NO_CLASS, generator(seed)))


def test_a_larger_share_hides_more_and_never_others():
    labels = torch.zeros(500, dtype=torch.long)
    gone = [hidden(labels, share, 1, generator(0)) == 1 for share in (0.0, 0.1, 0.5, 1.0)]
    assert [int(those.sum()) for those in gone][::3] == [0, 500]
    for some, more in pairwise(gone):
        assert (more | ~some).all()
        assert not torch.equal(some, more)


@pytest.mark.parametrize("levels", [(T,), (T, T / 2)])
def test_weight_1_is_f_and_0_is_f_without_a_class_to_the_last_bit_in_one_evaluation(levels: tuple[Tensor, ...]):
    for weight, labels in ((1.0, LABELS), (0.0, torch.full((5,), NO_CLASS))):
        f = ByLabel()
        found = Guided(f, weight, NO_CLASS)(X, *levels, labels=LABELS, text="kept")
        assert torch.equal(found, ByLabel()(X, *levels, labels=labels))
        assert len(f.asked) == 1
        assert f.asked[0]["text"] == "kept"


@given(weight=st.floats(0, 20))
def test_guidance_is_the_line_through_both_outputs(weight: float):
    f = ByLabel()
    nothing, told = f(X, T, labels=torch.full((5,), NO_CLASS)), f(X, T, labels=LABELS)
    found = Guided(f, weight, NO_CLASS)(X, T, labels=LABELS)
    torch.testing.assert_close(found, (1 - weight) * nothing + weight * told, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[4], nothing[4])  # asked for no class


def test_a_weight_below_0_is_refused_and_the_range_of_f_is_kept():
    with pytest.raises(ValueError, match="weight must be"):
        Guided(ByLabel(), -0.5, NO_CLASS)
    f = Preconditioned(ByLabel())
    assert Guided(f, 2.0, NO_CLASS).noise == NoiseRange()
    assert Guided(ByLabel(), 2.0, NO_CLASS).noise is None


@pytest.mark.parametrize("part", [Objective, FlowMapObjective, TrajectoryObjective])
def test_every_method_draws_what_is_asked_for(part: type[FewStepObjective]):
    objective, network = part(), ByLabel()
    f = Guided(objective.function_of(network), 1.5, NO_CLASS)
    levels = objective.sampling_levels(2, 0.8, 10, 20)
    samples = [
        objective.sample(f, X, levels, generator(0), {"labels": labels}) for labels in (LABELS, LABELS, LABELS.flip(0))
    ]
    assert torch.equal(samples[0], samples[1])
    assert not torch.allclose(samples[0], samples[2])
    assert {tuple(asked["labels"].tolist()) for asked in network.asked} == {
        tuple(labels.tolist()) for labels in (LABELS, LABELS.flip(0), torch.full((5,), NO_CLASS))
    }


@pytest.mark.parametrize("shape", [(4, 1), (4, 4), ()])
def test_labels_that_would_broadcast_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"labels must be \[b\], got"):
        hidden(torch.zeros(shape, dtype=torch.long), 0.5, NO_CLASS, generator(0))
