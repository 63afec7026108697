"""One Gaussian is the linear denoiser, a mixture's is Bayes' rule, and data that are not Gaussian are told from it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor

from analysis import non_gaussian
from analysis.non_gaussian import FEWEST, LEVELS, denoising
from reference_trainer.errors import UserError
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


def test_a_single_gaussian_is_the_linear_denoiser():
    """To the last digits, but for what the mixture counts by n and the covariance by n - 1."""
    for one in denoising(gaussian(2000, 8), gaussians=1):
        assert one.ratio == pytest.approx(1, abs=1e-3)


def test_gaussian_data_gain_nothing_and_lose_little():
    for one in denoising(gaussian(3000, 40), gaussians=8):
        assert 0.99 < one.ratio < 1.1


def test_clusters_are_denoised_far_better_than_linearly_and_close_to_the_best():
    """Two points, so that the best denoiser is known: its error is that of the mixture that has no width."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (4000, 1), generator=generator).double() * 2 - 1
    x = 0.5 * signs + 0.01 * torch.randn(4000, 4, generator=generator, dtype=torch.float64)
    found = denoising(x, [0.5], gaussians=2)[0]
    z = torch.randn(200_000, generator=generator, dtype=torch.float64)
    # Along the diagonal the two points are 1 from 0, noise of level 0.5: the posterior mean is tanh(y / t^2).
    best = float((torch.tanh((1 + 0.5 * z) / 0.25) - 1).square().mean())
    assert found.mixture == pytest.approx(best + 4 * 1e-4, rel=0.2)
    assert found.ratio < 0.6


def test_scales_that_differ_are_seen_where_no_cluster_is():
    """Most latents are small, some large, all around one mean: only covariances differ."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.where(torch.rand(3000, 1, generator=generator) < 0.2, 1.0, 0.1)
    x = scale * torch.randn(3000, 6, generator=generator)
    assert denoising(x, [0.3], gaussians=8)[0].ratio < 0.9


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


def test_nothing_is_fitted_to_what_it_is_measured_on():
    """A mixture with a Gaussian for nearly every sample remembers its half; the other half is then denoised worse."""
    assert denoising(gaussian(FEWEST, 32), [0.2], gaussians=64)[0].ratio > 1.02


def test_too_few_and_broken_latents_are_one_line():
    with pytest.raises(UserError, match="a mixture wants"):
        denoising(gaussian(FEWEST - 1, 4))
    broken = gaussian(FEWEST, 4)
    broken[3, 2] = torch.nan
    with pytest.raises(UserError, match="NaN or infinite"):
        denoising(broken)


def test_the_script_prints_the_gate_among_its_levels(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, rng = tmp_path / "noise", np.random.default_rng(0)
    folder.mkdir()
    for i in range(FEWEST * 10 // 9 + 1):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i:04}.png", compress_level=0)
    words = ["--data", folder, "--resolution", 8, "--autoencoder", "PixelSpace", "--out", tmp_path, "--device", "cpu"]
    assert non_gaussian.main([str(word) for word in words]) == 0
    said = capsys.readouterr().out
    assert "== pixels: d = 192" in said
    assert "the gate" in said
    report = json.loads((tmp_path / "non_gaussian.json").read_text())["pixels"]
    assert [one["t"] for one in report["levels"]] == sorted({*LEVELS, report["gate"]})
    assert all(one["ratio"] == pytest.approx(one["mixture"] / one["linear"]) for one in report["levels"])
