"""Metrics against closed forms, scipy and brute force."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.kid import KernelInceptionDistance

from reference_trainer.evaluation.metrics import frechet_distance, kernel_distance, precision_recall, psnr


def gaussian(n: int, k: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    return shift + scale * torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def test_frechet_distance_is_that_of_the_fitted_gaussians():
    real, fake = gaussian(200, 5, 0).double(), (gaussian(300, 5, 1) @ gaussian(5, 5, 2) + 1).double()
    a, b = np.cov(real.numpy().T), np.cov(fake.numpy().T)
    root = scipy.linalg.sqrtm(a @ b).real
    expected = float((real.mean(0) - fake.mean(0)).square().sum()) + np.trace(a + b - 2 * root)
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_of_a_shift_is_its_square():
    x = gaussian(500, 4, 0)
    assert frechet_distance(x, x + torch.tensor([3.0, 0, 4, 0])) == pytest.approx(25, rel=1e-4)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-4)


def test_kernel_distance_is_around_zero_for_one_distribution_and_grows_with_the_shift():
    real = gaussian(1000, 4, 0)
    same, near, far = (kernel_distance(real, gaussian(1000, 4, 1, shift)) for shift in (0.0, 0.3, 1.0))
    assert abs(same) < 0.1 * near < 0.1 * far


def test_kernel_distance_does_not_depend_on_the_ambient_generator():
    real, fake = gaussian(1500, 4, 0), gaussian(1500, 4, 1)
    torch.manual_seed(1)
    first, after = kernel_distance(real, fake), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    assert kernel_distance(real, fake) == first


@pytest.mark.parametrize(("n", "m"), [(1100, 1300), (40, 40), (30, 1001), (2, 3)])
def test_kernel_distance_is_that_of_torchmetrics_to_the_last_digit(n: int, m: int):
    real, fake = gaussian(n, 4, 0), gaussian(m, 4, 1, shift=0.5)
    scale = real.double().square().mean().sqrt()
    with warnings.catch_warnings(action="ignore"), torch.random.fork_rng([]):
        metric = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=20, subset_size=min(1000, n, m))
        metric.real_features, metric.fake_features = [real.double() / scale], [fake.double() / scale]
        torch.manual_seed(3)
        assert kernel_distance(real, fake, seed=3) == 1000 * float(metric.compute()[0])


def test_precision_and_recall_agree_with_brute_force():
    real, fake = gaussian(60, 3, 0), gaussian(50, 3, 1, shift=0.8)

    def inside(points: torch.Tensor, cloud: torch.Tensor) -> float:
        hits = 0
        for point in points:
            hits += any(
                (point - centre).norm() <= (cloud - centre).norm(dim=1).sort().values[3] for centre in cloud
            )  # index 0 is the centre itself
        return hits / len(points)

    assert precision_recall(real, fake) == pytest.approx((inside(fake, real), inside(real, fake)))


def test_a_collapsed_model_has_precision_but_no_recall():
    real = gaussian(200, 2, 0)
    collapsed = 1e-3 * gaussian(200, 2, 1)
    precision, recall = precision_recall(real, collapsed)
    assert precision > 0.95
    assert recall < 0.05


def test_identical_sets_are_perfect_and_distant_ones_worthless():
    real = gaussian(100, 3, 0)
    assert precision_recall(real, real.clone()) == (1.0, 1.0)
    assert precision_recall(real, real + 100) == (0.0, 0.0)


def test_precision_and_recall_are_of_the_first_two_thousand_vectors_of_each_set():
    """They depend on the size."""
    real, fake = gaussian(2100, 2, 0), gaussian(2100, 2, 1, shift=1.0)
    first = precision_recall(real[:2000], fake[:2000])
    real[2000:] += 1000
    fake[2000:] -= 1000
    assert precision_recall(real, fake) == first
    assert precision_recall(real, fake, limit=2100) != pytest.approx(first, abs=0.02)


@pytest.mark.parametrize("unit", [1e-30, 1e-12, 1e15, 1e30])
def test_precision_and_recall_do_not_depend_on_the_unit_of_the_features(unit: float):
    real, fake = gaussian(60, 3, 0), gaussian(50, 3, 1, shift=0.8)
    assert precision_recall(unit * real, unit * fake) == pytest.approx(precision_recall(real, fake), abs=0.05)


def test_precision_and_recall_of_fakes_beyond_all_distance_are_not_a_number():
    real = gaussian(20, 3, 0)
    assert all(math.isnan(share) for share in precision_recall(real, 1e25 * real))


@pytest.mark.parametrize(("off", "db"), [(1, 48.13), (16, 24.05), (255, 0.0)])
def test_psnr_of_a_constant_error_is_that_of_its_square(off, db):
    dark = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    assert psnr(dark, dark + off) == psnr(dark + off, dark) == pytest.approx(db, abs=0.01)  # uint8 must not wrap round


def test_psnr_is_a_mean_of_decibels_over_images_in_pairs_and_finite_for_equal_ones():
    images = torch.randint(0, 240, (300, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    near, far = images + 1, images + 8
    half = torch.cat([near[:150], far[150:]])
    assert psnr(images, half) == pytest.approx((psnr(images, near) + psnr(images, far)) / 2, rel=1e-9)
    assert psnr(images, images) == pytest.approx(58.9, abs=0.05)
    assert psnr(images, half.flip(0)) < 20  # another order, other pairs
