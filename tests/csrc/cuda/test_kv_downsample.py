"""kv_downsample of the CUDA library against the float64 reference."""

from __future__ import annotations

import pytest
import torch

import bigain_kernels as bk
from bigain_kernels import reference
from bigain_kernels.testing import assert_close
from tests.csrc.cuda.conftest import layouts
from tests.shapes import DTYPES, GRIDS, tokens

pytestmark = pytest.mark.usefixtures("on_cuda")
FLOATS = [dtype for dtype in DTYPES if dtype != torch.float64]


@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.9, 1.0, "rows"])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("channels", [1, 7, 72, 320])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("grid", "stride"), GRIDS)
def test_pooling(on_cuda, grid, stride, dtype, channels, strided, alpha):
    factor = (min(stride[0], grid[0]), min(stride[1], grid[1]))
    weight = torch.tensor([0.9, -0.2, 1.0], device=on_cuda.device) if alpha == "rows" else alpha
    x = tokens(3, grid[0] * grid[1], channels, dtype, strided=strided).to(on_cuda.device)
    other = tokens(3, grid[0] * grid[1], 5, seed=3).to(on_cuda.device)
    for actual, source in zip(bk.kv_downsample((x, other), grid, factor, weight), (x, other), strict=True):
        assert_close(actual, reference.kv_downsample(source.double(), grid, factor, weight))


def test_tensors_of_a_dtype_share_a_launch(on_cuda, order):
    sizes = (64, 8, 320, 7, 64)
    halves = [tokens(2, 63, c, torch.bfloat16, seed=c).to(on_cuda.device) for c in sizes]
    floats = [tokens(2, 63, c).to(on_cuda.device) for c in (0, 33)]
    before = on_cuda.launches()
    together = bk.kv_downsample([halves[0], floats[0], *halves[1:], floats[1]], (7, 9), (2, 3), 0.3)
    # Four tensors fit in a launch: two for the five of bfloat16, one for those of float32.
    assert on_cuda.launches() - before == 3
    alone = [bk.kv_downsample(x, (7, 9), (2, 3), 0.3) for x in [halves[0], floats[0], *halves[1:], floats[1]]]
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", FLOATS)
def test_same_bits_in_any_layout_and_batch(on_cuda, dtype):
    x = tokens(3, 64, 40, dtype).to(on_cuda.device)
    for factor in (2, 3):
        expected = bk.kv_downsample(x, (8, 8), factor, 0.7)
        for view in layouts(x):
            assert torch.equal(bk.kv_downsample(view, (8, 8), factor, 0.7), expected)
        assert torch.equal(bk.kv_downsample(x[2:], (8, 8), factor, 0.7), expected[2:])


def test_alpha_one_reads_the_nearest_token_alone(on_cuda):
    x = torch.full((2, 36, 8), torch.nan, device=on_cuda.device)
    values = tokens(2, 9, 8).to(on_cuda.device)
    x.view(2, 6, 6, 8)[:, 1::2, 1::2] = values.view(2, 3, 3, 8)
    assert torch.equal(bk.kv_downsample(x, (6, 6), 2, 1.0), values)
    mixed = bk.kv_downsample(x, (6, 6), 2, torch.tensor([1.0, 0.5], device=on_cuda.device))
    assert torch.equal(mixed[0], values[0])
    assert mixed[1].isnan().all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_alpha_zero_leaves_the_nearest_token_out(on_cuda, dtype):
    """Where the factor does not divide, the nearest token may lie outside the window: here token 9, not in 6 to 8."""
    x = tokens(2, 11, 8, dtype).to(on_cuda.device)
    x[:, 9] = torch.nan
    for alpha in (0.0, torch.zeros(2, device=on_cuda.device)):
        pooled = bk.kv_downsample(x, (1, 11), (1, 3), alpha)
        assert not pooled.isnan().any()
        assert_close(pooled, reference.kv_downsample(x.double(), (1, 11), (1, 3), alpha))


def test_a_long_row_of_tokens(on_cuda):
    """Past 2^15 tokens along an axis the nearest-exact rule needs 64 bits."""
    x = torch.arange(70_001, dtype=torch.float32, device=on_cuda.device)[None, :, None]
    assert torch.equal(
        bk.kv_downsample(x, (1, 70_001), (1, 3), 1.0), reference.kv_downsample(x, (1, 70_001), (1, 3), 1.0)
    )


BAD = [
    (lambda x: ([x, x[:1]], 6, 8, 2, 2, 0.9, None), "xs: got batches 2 and 1"),
    (lambda x: ([x.double()], 6, 8, 2, 2, 0.9, None), "xs: wrong dtype"),
    (lambda x: ([x], 6, 8, 7, 2, 0.9, None), "factor"),
    (lambda x: ([x], 6, 8, 0, 2, 0.9, None), "factor"),
    (lambda x: ([x], 6, 8, 2, 2, 0.9, x[:1, 0, 0]), "row_alpha: got shape"),
    (lambda x: ([x], 6, 8, 2, 2, 0.9, x[:, 0, 0].half()), "row_alpha: wrong dtype"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments(on_cuda, arguments, message):
    x = tokens(2, 48, 10).to(on_cuda.device)
    with pytest.raises(ValueError, match=message):
        on_cuda.ops.kv_downsample(*arguments(x))
