"""A mixture of Gaussians denoises by Bayes' rule, and each round of its fit raises the likelihood."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from robustcm.clusters import Clusters


def gaussian(n: int, d: int, seed: int = 0) -> Tensor:
    """Correlated, of falling variances."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64) / torch.arange(1, d + 1)
    return 0.5 * torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing


def two_dimensional() -> tuple[Clusters, list[tuple[float, np.ndarray, np.ndarray]]]:
    """A mixture of two, and weight, mean and covariance of each."""
    weights, means = [0.3, 0.7], [[-1.0, 0.0], [1.0, 0.5]]
    covariances = [[[0.3, 0.1], [0.1, 0.2]], [[0.1, 0.0], [0.0, 0.4]]]
    variances, turns = torch.linalg.eigh(torch.tensor(covariances, dtype=torch.float64))
    mixture = Clusters(*(torch.tensor(of, dtype=torch.float64) for of in (weights, means)), turns, variances)
    return mixture, list(zip(weights, np.array(means), np.array(covariances), strict=True))


def density(x: Tensor, parts: list[tuple[float, np.ndarray, np.ndarray]]) -> Tensor:
    """scipy's, ``[n]``."""
    return sum(
        weight * torch.from_numpy(stats.multivariate_normal(mean, covariance).pdf(x.numpy()))
        for weight, mean, covariance in parts
    )


@pytest.mark.parametrize("t", [0.3, 1.0])
def test_the_denoiser_is_bayes_rule_on_a_grid(t: float):
    (mixture, parts), noisy = two_dimensional(), torch.tensor([[0.2, -0.3], [1.5, 1.0]], dtype=torch.float64)
    axis = torch.linspace(-5, 5, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    denoised = mixture.denoised(noisy, torch.full((2,), t, dtype=torch.float64))
    for one, found in zip(noisy, denoised, strict=True):
        posterior = density(grid, parts) * (-(one - grid).square().sum(1) / (2 * t**2)).exp()
        torch.testing.assert_close(found, posterior @ grid / posterior.sum(), atol=1e-5, rtol=0)


def test_expectation_and_maximisation_do_not_lower_the_likelihood():
    """With no shrinking, which is what the theorem is about."""
    x, found = gaussian(400, 3) + torch.arange(400)[:, None] % 2 * 2.0, []
    shares = (9 * torch.rand(400, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).softmax(1)
    for rounds in (1, 3, 9):
        mixture = Clusters.from_shares(x, shares, rounds=rounds, prior=0.0)
        covariances = mixture.turns @ torch.diag_embed(mixture.variances) @ mixture.turns.mT
        parts = zip(mixture.weights.tolist(), mixture.means.numpy(), covariances.numpy(), strict=True)
        found.append(float(density(x, list(parts)).log().mean()))
    assert found == sorted(found)
    assert found[-1] > found[0]
