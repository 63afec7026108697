"""The first components of a large covariance are those of all of them; a small one's are the same to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reference_trainer.training import batches
from reference_trainer.training.batches import with_measured_teacher
from robustcm import principal as module
from robustcm.gaussian import Gaussian
from robustcm.objective import Objective
from robustcm.principal import SMALL, principal
from robustcm.teacher_input import KeepCovariance

LARGE = SMALL + 40


def samples(n: int, d: int) -> Tensor:
    """Correlated, of variances that fall as those of images do."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64) / torch.arange(1, d + 1)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing


@pytest.fixture(scope="module")
def large() -> Tensor:
    return samples(LARGE + 5, LARGE).T.cov()


def test_some_of_many_are_the_first_of_all(large: Tensor):
    axes, variances, others = principal(large, 30)
    values, vectors = torch.linalg.eigh(large)
    torch.testing.assert_close(variances, values.flip(0)[:30], rtol=1e-10, atol=0)
    first = vectors.flip(1)[:, :30]
    torch.testing.assert_close(axes @ axes.T, first @ first.T, rtol=0, atol=1e-6)  # whatever the signs
    torch.testing.assert_close((axes.T @ first).abs(), torch.eye(30, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(others, values[:-30].mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("k", [3, SMALL // 2, SMALL])
def test_a_small_covariance_is_taken_apart_as_a_whole(k: int):
    covariance = samples(600, SMALL).T.cov()
    values, vectors = torch.linalg.eigh(covariance)
    axes, variances, others = principal(covariance, k)
    assert torch.equal(axes, vectors.flip(1)[:, :k])
    assert torch.equal(variances, values.flip(0)[:k])
    assert torch.equal(others, values.flip(0)[k:].mean() if k < SMALL else values.flip(0).mean())


@pytest.mark.parametrize("n", [LARGE + 5, LARGE - 5])
def test_what_is_made_of_some_components_is_what_is_made_of_all(n: int, monkeypatch: pytest.MonkeyPatch):
    """The teacher's input of as many samples as elements, or fewer; and the skip of low rank."""
    x = samples(n, LARGE).float()

    def made() -> tuple[Tensor, ...]:
        kept, skip = KeepCovariance(components=16).on(x), Gaussian.of(x.mean(0), x.T.cov(), rank=16)
        return (kept.axes @ kept.axes.T, kept.variances, skip.axes @ skip.axes.T, skip.variances)

    some = made()
    monkeypatch.setattr(module, "SMALL", LARGE)
    for one, other in zip(some, made(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_what_takes_seconds_is_said_and_what_does_not_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    objective = Objective(teacher_input=KeepCovariance())
    for most, said in ((10, ""), (9, "measuring principal components of 40 elements\n")):
        monkeypatch.setattr(batches, "SLOW", most)
        with_measured_teacher(objective, samples(10, 40).float(), None)
        assert capsys.readouterr().out == said
