"""Distances, scores and similarities against their closed forms."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch

from bigain_kernels.evaluation import fidelity


def _with_moments(n: int, mean: torch.Tensor, covariance: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """(n, d) whose sample mean and covariance are exactly these."""
    x = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed)).double()
    x = x - x.mean(dim=0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / (n - 1)), x.T, upper=False).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_two_normal_distributions() -> None:
    """With covariances that commute: |difference of means|^2 + sum (sqrt(a) - sqrt(b))^2 over their eigenvalues."""
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).double()).Q
    a, b = torch.tensor([1.0, 4.0, 9.0, 0.25]).double(), torch.tensor([4.0, 1.0, 1.0, 2.25]).double()
    mean = torch.tensor([1.0, -2.0, 0.5, 0.0]).double()
    first = _with_moments(40, mean, turn @ a.diag() @ turn.T)
    reference = _with_moments(60, torch.zeros(4).double(), turn @ b.diag() @ turn.T, seed=2)
    distance = fidelity.FrechetDistance(reference)
    expected = float(mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    assert distance.measure(first) == pytest.approx(expected)
    assert distance.measure(reference) == pytest.approx(0.0, abs=1e-6)
    assert distance.measure(first) == pytest.approx(expected)  # nothing is kept from one call to the next


def test_frechet_distance_at_infinity_has_less_bias() -> None:
    """Samples of the distribution of the reference: few are far from it, endless ones would not be."""
    random = torch.Generator().manual_seed(0)
    distance = fidelity.FrechetDistance(torch.randn(20000, 16, generator=random))
    samples = torch.randn(400, 16, generator=random)
    plain, endless = distance.measure(samples), distance.at_infinity(samples)
    assert plain > 0.1
    assert abs(endless) < 0.25 * plain
    assert distance.at_infinity(samples) == endless
    moved = samples.clone()
    moved[:, 0] += 3
    assert distance.at_infinity(moved) == pytest.approx(9.0, rel=0.1)


def test_inception_score_of_known_probabilities() -> None:
    certain = 50 * torch.eye(5).repeat(40, 1)
    assert 4 < fidelity.inception_score(certain).value < 5.0  # parts of twenty do not hold all classes alike
    assert fidelity.inception_score(certain[:50]).value == pytest.approx(5.0)  # a single part, with ten of each class
    assert math.isnan(fidelity.inception_score(certain[:50]).error)
    same = torch.tensor([[0.1, 0.2, 0.7]]).log().repeat(200, 1)
    assert fidelity.inception_score(same).value == pytest.approx(1.0)
    assert fidelity.inception_score(same).error == pytest.approx(0.0, abs=1e-9)
    # Two kinds of images, each sure of its class with 0.9: exp(log 2 - entropy of 0.9).
    pair = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log().repeat(20, 1)
    entropy = -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
    assert fidelity.inception_score(pair).value == pytest.approx(2 * math.exp(-entropy))


def test_inception_score_draws_nothing_from_the_global_state() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = fidelity.inception_score(torch.randn(200, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.rand(3), expected)
    assert fidelity.inception_score(torch.randn(200, 4, generator=torch.Generator().manual_seed(0))) == first


def test_precision_and_recall_of_sets_apart_alike_and_of_a_half() -> None:
    random = torch.Generator().manual_seed(0)
    left, right = (torch.randn(60, 3, generator=random) for _ in range(2))
    assert fidelity.precision_recall(left, right + 100) == (0.0, 0.0)
    assert fidelity.precision_recall(left, left) == (1.0, 1.0)
    # Drawings of one of two kinds alone: all of them are real, and half of what is real is missing.
    both = torch.cat([left, left + 100])
    assert fidelity.precision_recall(left, both) == (1.0, 0.5)
    assert fidelity.precision_recall(both, left) == (0.5, 1.0)


def test_precision_reaches_to_the_kth_neighbour() -> None:
    reference = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    # Balls of k = 1: radii 1, 1, 2, 4. 4.9 lies in that of 3, -1.1 in none.
    assert fidelity.precision_recall(torch.tensor([[4.9], [-1.1]]), reference, k=1)[0] == 0.5
    # Of k = 2: radii 3, 2, 3, 6.
    assert fidelity.precision_recall(torch.tensor([[-1.1], [-2.9], [13.1]]), reference, k=2)[0] == pytest.approx(2 / 3)


def test_ssim_of_flat_and_of_equal_images() -> None:
    flat = torch.full((1, 3, 16, 16), -0.5), torch.full((1, 3, 16, 16), 0.25)
    a, b, c = 0.25, 0.625, 0.01**2
    assert fidelity.ssim(*flat).tolist() == pytest.approx([(2 * a * b + c) / (a * a + b * b + c)])
    images = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert fidelity.ssim(images, images).tolist() == pytest.approx([1.0] * 3)
    shuffled = images.flatten(2)[:, :, torch.randperm(256, generator=torch.Generator().manual_seed(1))]
    assert float(fidelity.ssim(images, shuffled.view_as(images)).max()) < 0.3


def test_no_other_process_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process of a run reports, when the others may have gone."""

    def wait(*arguments: object, **options: object) -> None:
        raise AssertionError("waits for another process")

    monkeypatch.setattr(torch.distributed, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for name in ("barrier", "all_gather", "get_world_size"):
        monkeypatch.setattr(torch.distributed, name, wait)
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    assert fidelity.FrechetDistance(x).measure(x) == pytest.approx(0.0, abs=1e-6)
    assert fidelity.inception_score(x).value > 1
    assert fidelity.ssim(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16)).tolist() == [1.0]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("reference", lambda x: fidelity.FrechetDistance(x[:1])),
        ("features", lambda x: fidelity.FrechetDistance(x).measure(x[:, :2])),
        ("features", lambda x: fidelity.FrechetDistance(x).at_infinity(x[:8])),
        ("logits", lambda x: fidelity.inception_score(x[0])),
        ("features", lambda x: fidelity.precision_recall(x[:3], x)),
        ("reference", lambda x: fidelity.precision_recall(x, x[:3])),
        ("images", lambda x: fidelity.ssim(torch.zeros(1, 1, 8, 16), torch.zeros(1, 1, 8, 16))),
        ("images", lambda x: fidelity.ssim(torch.zeros(1, 1, 16, 16), torch.zeros(2, 1, 16, 16))),
    ],
)
def test_bad_arguments_are_named(name: str, call) -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(20, 3)))
    with pytest.raises(ValueError, match=f"^{name}: got shape"):
        call(x)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ImportError, match=r"^torchmetrics: .*pip install torchmetrics"):
        fidelity.FrechetDistance(torch.zeros(4, 2))
