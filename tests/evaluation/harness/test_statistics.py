"""The bootstrap over images and seeds."""

from __future__ import annotations

import numpy as np
import pytest

from bigain_kernels.evaluation.harness.statistics import bootstrap


def test_one_seed_gives_the_interval_of_a_mean() -> None:
    difference = np.random.default_rng(0).normal(0.3, 1.0, size=(1, 400))
    mean, low, high = bootstrap(difference, np.zeros_like(difference))
    error = difference.std() / 20
    assert mean == pytest.approx(difference.mean())
    assert (mean - low) / error == pytest.approx(1.96, rel=0.1)
    assert (high - mean) / error == pytest.approx(1.96, rel=0.1)
    assert bootstrap(difference, np.zeros_like(difference)) == (mean, low, high)


def test_seeds_that_disagree_widen_it_and_pairs_narrow_it() -> None:
    random = np.random.default_rng(1)
    shared = random.normal(size=(4, 300))
    alike = bootstrap(shared + 0.1, shared)
    assert alike == pytest.approx((0.1, 0.1, 0.1))
    moved = bootstrap(shared + np.array([[0.0], [0.0], [1.0], [1.0]]), shared)
    assert moved[0] == pytest.approx(0.5)
    assert moved[1] < 0.1 < 0.9 < moved[2]


def test_what_does_not_belong_together_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^second: got shape \(1, 3\)"):
        bootstrap(np.zeros((1, 2)), np.zeros((1, 3)))
