"""Metrics against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from bigain_kernels.evaluation import metrics


def test_fraction_has_the_binomial_error() -> None:
    measured = metrics.fraction_true(torch.tensor([True, True, True, False]))
    assert measured.value == 0.75
    assert measured.error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert math.isnan(metrics.fraction_true(torch.zeros(0, dtype=torch.bool)).value)


def test_mean_has_the_standard_error_of_the_mean() -> None:
    values = torch.tensor([1.0, 2.0, 4.0])
    measured = metrics.mean(values)
    assert measured.value == pytest.approx(7 / 3)
    assert measured.error == pytest.approx(float(np.std([1, 2, 4], ddof=1)) / math.sqrt(3))


def test_pairing_removes_what_both_share() -> None:
    hard = torch.rand(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    measured = metrics.paired_difference(hard + 0.25, hard)
    assert measured.value == pytest.approx(0.25)
    assert measured.error == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match=r"^second: got"):
        metrics.paired_difference(hard, hard[:3])


def _with_moments(mean: np.ndarray, cov: np.ndarray, n: int = 50) -> torch.Tensor:
    """n samples whose sample mean and covariance are exactly these."""
    raw = np.random.default_rng(0).normal(size=(n, len(mean)))
    raw -= raw.mean(axis=0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw, rowvar=False)).T)
    return torch.from_numpy(white @ np.linalg.cholesky(cov).T + mean)


def test_frechet_distance_of_normals_with_equal_covariance_is_the_squared_shift() -> None:
    cov = np.array([[2.0, 0.5], [0.5, 1.0]])
    first, second = _with_moments(np.zeros(2), cov), _with_moments(np.array([3.0, 4.0]), cov)
    assert metrics.FrechetDistance(second)(first) == pytest.approx(25.0)
    assert metrics.FrechetDistance(first)(first) == pytest.approx(0.0, abs=1e-8)


def test_frechet_distance_of_diagonal_covariances() -> None:
    first = _with_moments(np.zeros(3), np.diag([1.0, 4.0, 9.0]))
    second = _with_moments(np.zeros(3), np.diag([4.0, 4.0, 1.0]))
    assert metrics.FrechetDistance(second)(first) == pytest.approx(1.0 + 0.0 + 4.0)


def test_frechet_distance_agrees_with_scipy() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 4, 4))
    cov1, cov2 = a @ a.T + np.eye(4), b @ b.T + np.eye(4)
    measured = metrics.FrechetDistance(_with_moments(np.zeros(4), cov2))(_with_moments(np.ones(4), cov1))
    expected = 4 + np.trace(cov1 + cov2 - 2 * scipy.linalg.sqrtm(cov1 @ cov2).real)
    assert measured == pytest.approx(expected)


def test_frechet_distance_of_fewer_samples_than_features_is_finite() -> None:
    features = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    assert metrics.FrechetDistance(features + 1)(features) == pytest.approx(64.0, rel=1e-4)


def test_frechet_distance_names_bad_arguments() -> None:
    good = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"^reference: got"):
        metrics.FrechetDistance(good[0])
    with pytest.raises(ValueError, match=r"^features: got shape"):
        metrics.FrechetDistance(good)(good[:1])
    with pytest.raises(ValueError, match=r"^features: got 2 features"):
        metrics.FrechetDistance(good)(good[:, :2])


def test_bootstrap_error_of_a_mean_is_its_standard_error() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    error = metrics.bootstrap_error(lambda chosen: values[chosen].mean().item(), 400, repeats=400)
    assert error == pytest.approx(metrics.mean(values).error, rel=0.15)


def test_paired_frechet_difference_of_equal_samples_is_zero() -> None:
    features, reference = torch.randn(2, 40, 5, generator=torch.Generator().manual_seed(0))
    distance = metrics.FrechetDistance(reference)
    assert distance.difference(features, features) == metrics.Measured(0.0, 0.0)
    measured = distance.measure(features)
    assert measured.value == distance(features)
    assert measured.error > 0
