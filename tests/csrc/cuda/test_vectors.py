"""Channel counts that fill whole vectors are read in vectors, those of every model among them."""

from __future__ import annotations

import pytest
import torch

import bigain_kernels as bk
from tests.shapes import tokens

from .conftest import loads

pytestmark = pytest.mark.usefixtures("on_cuda")
GRID = (4, 6)


def calls(channels: int, dtype: torch.dtype, device: str):
    x = tokens(2, 24, channels, dtype).to(device)
    plan = bk.lgtm_plan(x, GRID, 0.5)
    destinations = bk.select_destinations(bk.laplacian_score(x, GRID), GRID, (2, 2))
    y = bk.token_merge(x, plan)
    yield "laplacian_score", lambda: bk.laplacian_score(x, GRID)
    yield "bipartite_match", lambda: bk.bipartite_match(x, destinations)
    yield "token_merge", lambda: bk.token_merge(x, plan)
    yield "token_unmerge", lambda: bk.token_unmerge(y, plan, residual=x)
    yield "kv_downsample", lambda: bk.kv_downsample(x, GRID, 2, 0.9)


@pytest.mark.parametrize(("channels", "in_vectors"), [(72, True), (40, True), (71, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_72_channels_are_read_in_vectors(on_cuda, channels, in_vectors, dtype):
    for name, call in calls(channels, dtype, on_cuda.device):
        before = loads(on_cuda)[0]
        call()
        assert (loads(on_cuda)[0] > before) == in_vectors, name
