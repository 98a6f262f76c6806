"""Rows and tokens that lie more than 2^31 elements apart, in memory of which next to nothing is touched."""

from __future__ import annotations

import pytest
import torch

from bigain_kernels.triton_kernels.bipartite_match import launch_bipartite_match
from bigain_kernels.triton_kernels.kv_downsample import launch_kv_downsample
from bigain_kernels.triton_kernels.kv_downsample_attention import launch_kv_downsample_attention
from bigain_kernels.triton_kernels.laplacian_score import launch_laplacian_score, launch_score_and_select
from bigain_kernels.triton_kernels.lgtm_plan import launch_lgtm_plan
from bigain_kernels.triton_kernels.pooled_kv_projection import launch_pooled_kv_projection
from bigain_kernels.triton_kernels.row_stats import launch_row_stats
from bigain_kernels.triton_kernels.token_merge import launch_token_merge
from bigain_kernels.triton_kernels.token_unmerge import launch_token_unmerge
from tests.contract.inputs import odd_tokens

from .check_token_merge import plan_of_sizes
from .inputs import INTERPRETED, ON_GPU

pytestmark = pytest.mark.skipif(ON_GPU, reason="tests/gpu/test_large.py touches all of it on a GPU")

MATCH = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}
# (batch, N, stride of rows, stride of tokens): a stride past 2^31, or only its multiples.
LAYOUTS = [(2, 63, 2**31 + 64, 80), (4, 63, 2**30 + 16, 80), (1, 9, 64, 2**28 + 8)]


@pytest.fixture(autouse=True)
def _no_copies(monkeypatch):
    """The interpreter would copy whole storages back to where they are."""
    if INTERPRETED:
        from triton.runtime.interpreter import GridExecutor

        monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)


def far_apart(x, row, token):
    """A copy of x (B, N, C) with these strides."""
    span = (x.shape[0] - 1) * row + (x.shape[1] - 1) * token + x.shape[2]
    storage = torch.UntypedStorage(span * x.element_size())
    far = torch.tensor([], dtype=x.dtype).set_(storage, 0, x.shape, (row, token, 1))
    return far.copy_(x)


@pytest.mark.parametrize(("batch", "n", "row", "token"), LAYOUTS)
def test_every_kernel_that_reads_tokens(batch, n, row, token):
    near = odd_tokens(batch, n, 24, torch.float16)
    far = far_apart(near, row, token)
    grid = (n // 9, 9)
    plan = plan_of_sizes([3, 2, n - 5]) if n > 9 else plan_of_sizes([3, 2, 4])
    tables = (plan.slot, plan.offsets, plan.members, plan.anchor)
    destinations = torch.arange(0, n, 4, dtype=torch.int32).repeat(batch, 1)
    share = 2 if batch % 2 == 0 else 1

    def everything(x):
        return [
            launch_laplacian_score(x, grid),
            *launch_score_and_select(x, grid, (2, 2), batch).values(),
            *launch_bipartite_match(x, destinations, config={**MATCH, "SPLIT": 2}),
            *launch_lgtm_plan(x, grid, (1, 2), n // 3, share=share),
            launch_row_stats(x, "layernorm", 1e-5),
            *(launch_token_merge(x, *tables, mode) for mode in ("mean", "mlerp", "prune")),
            launch_token_unmerge(x[:, :3], *tables, x, x[:, 0]),
            *(launch_kv_downsample([x], grid, (1, 2), alpha)[0] for alpha in (0.9, 1.0)),
        ]

    for actual, expected in zip(everything(far), everything(near), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("batch", "n", "row", "token"), [(2, 63, 2**31 + 64, 160), (1, 9, 64, 2**28 + 8), (1, 18, 64, 2**28 + 8)]
)
def test_attention_and_projection(batch, n, row, token):
    near = odd_tokens(batch, n, 144, torch.float16).nan_to_num(1.0, 1.0)
    grid, weight = (n // 9, 9), odd_tokens(1, 40, 144, torch.float16)[0]
    factor = (2 if n == 18 else 1, 3)  # the rows of a window of two lie 2^31 elements apart as well

    def everything(x):
        q, k, v = (t.unflatten(2, (2, 24)).transpose(1, 2) for t in x.chunk(3, dim=2))
        return [
            launch_kv_downsample_attention(q, k, v, grid, factor, 0.9),
            *launch_pooled_kv_projection(x, grid, factor, 0.9, weight, weight[:24]),
        ]

    for actual, expected in zip(everything(far_apart(near, row, token)), everything(near), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
