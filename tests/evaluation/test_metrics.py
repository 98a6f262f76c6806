"""Metrics against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from bigain_kernels.evaluation import metrics


def test_fraction_has_its_wilson_interval() -> None:
    """Against the formula of Wilson, 1927, and at the ends, where the error sqrt(p (1 - p) / n) would be zero."""
    z = scipy.stats.norm.ppf(0.975)
    measured = metrics.fraction_true(torch.arange(40) < 30)
    middle, half = 0.75 + z * z / 80, z * math.sqrt(0.75 * 0.25 / 40 + z * z / 6400)
    assert measured.value == 0.75
    assert measured.low == pytest.approx((middle - half) / (1 + z * z / 40))
    assert measured.high == pytest.approx((middle + half) / (1 + z * z / 40))
    whole = metrics.fraction_true(torch.ones(200, dtype=torch.bool))
    assert (whole.value, whole.high) == (1.0, 1.0)
    assert whole.low == pytest.approx(0.981, abs=5e-4)
    assert math.isnan(metrics.fraction_true(torch.zeros(0, dtype=torch.bool)).low)


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


def test_mcnemar_is_exact() -> None:
    first, second = torch.ones(20, dtype=torch.bool), torch.ones(20, dtype=torch.bool)
    assert metrics.mcnemar(first, second) == 1.0
    second[:5] = False
    assert metrics.mcnemar(first, second) == pytest.approx(2 / 2**5)
    assert metrics.mcnemar(second, first) == pytest.approx(2 / 2**5)
    first[5] = False
    assert metrics.mcnemar(first, second) == pytest.approx(2 * (1 + 6) / 2**6)
    with pytest.raises(ValueError, match=r"^second: got"):
        metrics.mcnemar(first, second[:3])


def test_normal_p() -> None:
    assert metrics.normal_p(metrics.Measured(-1.959964, 1.0)) == pytest.approx(0.05, rel=1e-5)
    assert metrics.normal_p(metrics.Measured(0.0, 0.0)) == 1.0
    assert metrics.normal_p(metrics.Measured(0.1, 0.0)) == 0.0
    assert math.isnan(metrics.normal_p(metrics.Measured(0.1, math.nan)))


def test_holm_corrects_step_by_step() -> None:
    assert metrics.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert metrics.holm([0.9, 0.8]) == [1.0, 1.0]
    corrected = metrics.holm([0.01, math.nan, 0.02])
    assert math.isnan(corrected[1])
    assert corrected[::2] == pytest.approx([0.02, 0.02])
    assert metrics.holm([]) == []


def _kernel_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """The definition as loops."""

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    def among(z: torch.Tensor) -> float:
        pairs = [kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j]
        return sum(pairs) / len(pairs)

    return among(x) + among(y) - 2 * sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))


def _without(x: torch.Tensor, i: int) -> torch.Tensor:
    return torch.cat([x[:i], x[i + 1 :]])


def _jackknife(values: list[float]) -> float:
    return (len(values) - 1) / len(values) * sum((v - np.mean(values)) ** 2 for v in values)


def test_kernel_distance_and_its_error_are_their_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    x, other, y = (torch.randn(n, 3, generator=generator).double() + s for n, s in ((6, 0.5), (6, 0.2), (8, 0)))
    distance = metrics.KernelDistance(y)
    measured = distance.measure(x)
    assert measured.value == pytest.approx(_kernel_distance(x, y))
    of_x = _jackknife([_kernel_distance(_without(x, i), y) for i in range(6)])
    of_y = _jackknife([_kernel_distance(x, _without(y, i)) for i in range(8)])
    assert measured.error == pytest.approx(math.sqrt(of_x + of_y))
    difference = distance.difference(x, other)
    assert difference.value == pytest.approx(_kernel_distance(x, y) - _kernel_distance(other, y))
    pairs = [(_without(x, i), _without(other, i), y) for i in range(6)] + [(x, other, _without(y, i)) for i in range(8)]
    apart = [_kernel_distance(a, c) - _kernel_distance(b, c) for a, b, c in pairs]
    assert difference.error == pytest.approx(math.sqrt(_jackknife(apart[:6]) + _jackknife(apart[6:])))
    assert distance.difference(x, x) == metrics.Measured(0.0, 0.0)


def test_kernel_distance_of_few_samples_is_not_biased() -> None:
    """Sets of ten from one distribution: nothing apart in the mean, and single ones as far as the error says."""
    rng = torch.Generator().manual_seed(1)
    distance = metrics.KernelDistance(torch.randn(2000, 4, generator=rng))
    measured = [distance.measure(torch.randn(10, 4, generator=rng)) for _ in range(200)]
    values = np.array([m.value for m in measured])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(200)
    assert np.mean([m.error for m in measured]) == pytest.approx(values.std(), rel=0.5)
    assert distance.measure(torch.randn(10, 4, generator=rng) + 2).value > 10 * values.std()


def test_kernel_distance_names_bad_arguments() -> None:
    good = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"^reference: got"):
        metrics.KernelDistance(good[0])
    with pytest.raises(ValueError, match=r"^features: got shape"):
        metrics.KernelDistance(good).measure(good[:2])
    with pytest.raises(ValueError, match=r"^features: got 2 features"):
        metrics.KernelDistance(good).measure(good[:, :2])
