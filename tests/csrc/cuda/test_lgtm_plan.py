"""lgtm_plan of the CUDA library: the chain in one call against the reference and against its own single ops."""

from __future__ import annotations

import pytest
import torch

import bigain_kernels as bk
from tests.shapes import tokens

pytestmark = pytest.mark.usefixtures("on_cuda")


@pytest.mark.parametrize("share", [1, 2])
def test_the_whole_of_lgtm_is_five_launches(on_cuda, share):
    x = tokens(2, 256, 64, torch.bfloat16).to(on_cuda.device)
    before = on_cuda.launches()
    plan = bk.lgtm_plan(x, (16, 16), 0.7, share_plan=share)
    assert on_cuda.launches() - before == 3
    y = bk.token_merge(x, plan)
    bk.token_unmerge(y, plan, residual=x, gate=x[:, 0])
    assert on_cuda.launches() - before == 5


BAD = [
    ((6, 9, 2, 2, 20, -1, 1), "grid"),
    ((6, 8, 0, 2, 20, -1, 1), "stride"),
    ((6, 8, 2, 2, 37, -1, 1), "r: got 37, expected 0 <= r <= 36"),
    ((6, 8, 2, 2, -1, -1, 1), "r: got -1"),
    ((6, 8, 7, 2, 1, -1, 1), "r: got 1, expected 0 <= r <= 0"),
    ((6, 8, 2, 2, 20, -2, 1), "window: got -2"),
    ((6, 8, 2, 2, 20, -1, 3), "share: got 3, expected a divisor of the batch, 4"),
    ((6, 8, 2, 2, 20, -1, 0), "share: got 0"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments(on_cuda, arguments, message):
    x = tokens(4, 48, 10).to(on_cuda.device)
    with pytest.raises(ValueError, match=message):
        on_cuda.ops.lgtm_plan(x, *arguments)
    with pytest.raises(ValueError, match="x: got float64"):
        on_cuda.ops.lgtm_plan(x.double(), 6, 8, 2, 2, 20, -1, 1)
