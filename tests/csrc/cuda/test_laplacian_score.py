"""laplacian_score and select_destinations of the CUDA library against the float64 reference."""

from __future__ import annotations

import pytest
import torch

import bigain_kernels as bk
from tests.shapes import tokens

pytestmark = pytest.mark.usefixtures("on_cuda")


def test_one_launch_each(on_cuda):
    x = tokens(2, 64, 320).to(on_cuda.device)
    before = on_cuda.launches()
    score = bk.laplacian_score(x, (8, 8))
    bk.select_destinations(score, (8, 8), (2, 2))
    assert on_cuda.launches() - before == 2


BAD = [
    (lambda x: (x.double(), 6, 8, "l1"), "x: got float64, expected float16, bfloat16 or float32"),
    (lambda x: (x.int(), 6, 8, "l1"), "x: got int32"),
    (lambda x: (x[0], 6, 8, "l1"), r"x: got shape \(48, 10\), expected 3 dimensions"),
    (lambda x: (x, 6, 9, "l1"), r"grid: got \(6, 9\), expected H \* W = 48"),
    (lambda x: (x, 2**62, 4, "l1"), "grid"),
    (lambda x: (x, 6, 8, "l3"), "norm: got 'l3'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments(on_cuda, arguments, message):
    x = tokens(2, 48, 10).to(on_cuda.device)
    with pytest.raises(ValueError, match=message):
        on_cuda.ops.laplacian_score(*arguments(x))


@pytest.mark.parametrize("stride", [(0, 2), (2, -1)])
def test_bad_stride(on_cuda, stride):
    with pytest.raises(ValueError, match="stride"):
        on_cuda.ops.select_destinations(torch.zeros(2, 48, device=on_cuda.device), 6, 8, *stride)
    with pytest.raises(ValueError, match="score: got float64"):
        on_cuda.ops.select_destinations(torch.zeros(2, 48, device=on_cuda.device).double(), 6, 8, 2, 2)


def test_tiles_beyond_the_grid_are_none(on_cuda):
    score = torch.zeros(2, 48, device=on_cuda.device)
    for stride in ((2**62, 2**62), (7, 2), (2, 9)):
        assert on_cuda.ops.select_destinations(score, 6, 8, *stride).shape == (2, 0)
