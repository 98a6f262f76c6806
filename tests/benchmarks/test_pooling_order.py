"""The two orders of pooling in a layer with norm and rotation."""

from __future__ import annotations

import pytest

from benchmarks.pooling_order import PoolingOrderConfig, compare_pooling_orders

QUICK = PoolingOrderConfig(alphas=(0.5, 1.0), sharpness=(3.0,), seeds=(0, 1), grid=(6, 10))


def test_orders_agree_at_alpha_one_alone() -> None:
    half, one = compare_pooling_orders(QUICK)
    assert (half.alpha, one.alpha, half.sharpness) == (0.5, 1.0, 3.0)
    assert one.apart.value < 1e-5 < 1e-3 < half.apart.value
    assert abs(one.difference.value) < 1e-5
    assert half.difference.value == pytest.approx(half.hidden.value - half.keys.value, rel=1e-6)
    assert min(half.keys.value, half.hidden.value, one.keys.value) > 1e-3
    again = compare_pooling_orders(QUICK)
    assert again[0].keys.value == pytest.approx(half.keys.value, rel=1e-4)
