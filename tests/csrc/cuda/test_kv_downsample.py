"""kv_downsample of the CUDA library against the float64 reference."""

from __future__ import annotations

import pytest
import torch

import bigain_kernels as bk
from tests.shapes import tokens

pytestmark = pytest.mark.usefixtures("on_cuda")


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


BAD = [
    (lambda x: ([x, x[:1]], 6, 8, 2, 2, 0.9, None), "xs: got batches 2 and 1"),
    (lambda x: ([x.double()], 6, 8, 2, 2, 0.9, None), "xs: got float64"),
    (lambda x: ([x], 6, 8, 7, 2, 0.9, None), "factor"),
    (lambda x: ([x], 6, 8, 0, 2, 0.9, None), "factor"),
    (lambda x: ([x], 6, 8, 2, 2, 0.9, x[:1, 0, 0]), "row_alpha: got shape"),
    (lambda x: ([x], 6, 8, 2, 2, 0.9, x[:, 0, 0].half()), "row_alpha: got float16"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments(on_cuda, arguments, message):
    x = tokens(2, 48, 10).to(on_cuda.device)
    with pytest.raises(ValueError, match=message):
        on_cuda.ops.kv_downsample(*arguments(x))
