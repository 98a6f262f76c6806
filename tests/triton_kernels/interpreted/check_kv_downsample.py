from __future__ import annotations

import pytest
import torch

from bigain_kernels import reference
from bigain_kernels.testing import assert_close
from bigain_kernels.triton_kernels.kv_downsample import launch_kv_downsample

from .inputs import DTYPES, candidates, odd_tokens, on_device

launch_kv_downsample = on_device(launch_kv_downsample)

CASES = [
    (3, (8, 8), (2, 2), 64, False),
    (2, (7, 9), (2, 2), 72, True),
    (1, (9, 10), (4, 3), 320, True),
    (1, (10, 10), (5, 5), 64, False),
    (1, (11, 11), (5, 5), 64, True),
    (1, (1, 9), (1, 2), 1152, False),
    (1, (1, 1), (1, 1), 64, False),
]


@pytest.mark.parametrize("alpha", [0.9, 0.0, 1.0, 1.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "grid", "factor", "channels", "strided"), CASES)
def test_pooling(batch, grid, factor, channels, strided, dtype, alpha):
    x = odd_tokens(batch, grid[0] * grid[1], channels, dtype, strided)
    (y,) = launch_kv_downsample([x], grid, factor, alpha)
    assert_close(y, reference.kv_downsample(x.double(), grid, factor, alpha))


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("grid", "factor"), [((4, 6), (2, 2)), ((7, 9), (2, 2)), ((11, 11), (5, 5))])
def test_what_has_weight_zero_does_not_show(grid, factor, dtype, rows):
    x = odd_tokens(2, grid[0] * grid[1], 72, dtype, strided=True)
    for number in (0.0, 1.0):
        alpha = torch.tensor([number, 0.3]) if rows else number
        (y,) = launch_kv_downsample([x], grid, factor, alpha)
        expected = reference.kv_downsample(x, grid, factor, number)
        if number == 1.0:
            torch.testing.assert_close(
                y[: 1 if rows else 2], expected[: 1 if rows else 2], rtol=0, atol=0, equal_nan=True
            )
        assert_close(y[0], expected[0])


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_several_tensors_of_different_kinds(count):
    grid, factor = (7, 9), (2, 2)
    xs = [
        odd_tokens(2, 63, channels, dtype, strided, seed=channels)
        for channels, dtype, strided in [
            (64, torch.float32, False),
            (72, torch.bfloat16, True),
            (320, torch.float16, False),
            (8, torch.float32, True),
            (72, torch.float32, False),
        ][:count]
    ]
    alpha = torch.tensor([0.8, 1.2])
    ys = launch_kv_downsample(xs, grid, factor, alpha)
    for x, y in zip(xs, ys, strict=True):
        assert_close(y, reference.kv_downsample(x.double(), grid, factor, alpha.double()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_config_gives_the_same_bits(dtype):
    x = odd_tokens(2, 63, 72, dtype)
    for alpha in (0.9, 1.0):
        results = [launch_kv_downsample([x], (7, 9), (2, 2), alpha, c)[0] for c in candidates("kv_downsample")]
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=0, atol=0, equal_nan=True)
