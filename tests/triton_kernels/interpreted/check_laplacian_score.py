from __future__ import annotations

import pytest
import torch

from bigain_kernels import reference
from bigain_kernels.reference.lgtm_plan import share_mean
from bigain_kernels.testing import assert_close
from bigain_kernels.triton_kernels.laplacian_score import (
    launch_laplacian_score,
    launch_score_and_select,
)
from bigain_kernels.triton_kernels.row_stats import launch_row_stats
from bigain_kernels.triton_kernels.select_destinations import launch_select_destinations
from tests.contract.inputs import odd_tokens

from .inputs import CASES, DTYPES, IDS, candidates, on_device

launch_laplacian_score = on_device(launch_laplacian_score)
launch_row_stats = on_device(launch_row_stats)
launch_score_and_select = on_device(launch_score_and_select)
launch_select_destinations = on_device(launch_select_destinations)

CONFIGS = candidates("laplacian_score")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "grid", "stride", "channels", "strided"), CASES, ids=IDS)
def test_score_select_and_norms(batch, grid, stride, channels, strided, dtype):
    n = grid[0] * grid[1]
    x = odd_tokens(batch, n, channels, dtype, strided)
    out = launch_score_and_select(x, grid, stride)
    score, destinations, sources = launch_laplacian_score(x, grid), out["destinations"], out["sources"]
    assert_close(score, reference.laplacian_score(x.double(), grid), torch.float32)
    assert torch.equal(destinations.sort(1).values, reference.select_destinations(score, grid, stride))
    together = torch.cat([destinations, sources], 1).sort(1).values
    assert torch.equal(together, torch.arange(n, dtype=torch.int32).repeat(batch, 1))

    norm = x.double().square().sum(-1).sqrt()
    usable = (norm > 0) & norm.isfinite()
    assert torch.equal(out["inverse_norm"] > 0, usable)
    assert_close(out["inverse_norm"][usable], 1 / norm[usable])

    packed, tokens = out["packed"], torch.arange(n).repeat(batch, 1)
    is_destination = torch.zeros(batch, n, dtype=torch.bool).scatter_(1, destinations.long(), True)
    lowest_key = torch.tensor(float("-inf")).view(torch.int32).item() ^ 0x7FFFFFFF
    assert torch.equal(0x7FFFFFFF - (packed & 0x7FFFFFFF), tokens)
    assert ((packed >> 32) == torch.where(is_destination, lowest_key, -(2**31))).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [2, 3])
def test_rows_that_share_a_plan_are_averaged(dtype, share):
    grid, stride = (6, 7), (2, 2)
    x = odd_tokens(2 * share, 42, 72, dtype, strided=True)
    mean = share_mean(x, share)
    out = launch_score_and_select(x, grid, stride, share)
    torch.testing.assert_close(out["mean"], mean, rtol=1e-6 if dtype == torch.float32 else 0, atol=0, equal_nan=True)
    alone = launch_score_and_select(out["mean"], grid, stride)
    for name in ("inverse_norm", "destinations", "sources", "packed"):
        torch.testing.assert_close(out[name], alone[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_config_gives_the_same_bits(dtype):
    x = odd_tokens(1, 99, 72, dtype)
    results = [launch_score_and_select(x, (9, 11), (2, 2), config=config) for config in CONFIGS]
    for result in results[1:]:
        for name, value in result.items():
            torch.testing.assert_close(value, results[0][name], rtol=0, atol=0, equal_nan=True)
    scores = [launch_laplacian_score(x, (9, 11), config=config) for config in CONFIGS]
    for score in scores[1:]:
        torch.testing.assert_close(score, scores[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_stats(dtype):
    x = odd_tokens(2, 19, 72, dtype, strided=True)
    values = x.double()
    results = [launch_row_stats(x, "layernorm", 1e-5, config) for config in candidates("row_stats")]
    inverse = 1 / (values.var(-1, correction=0) + 1e-5).sqrt()
    # The shift in the low half of a word, the inverse in the high half.
    assert_close(results[0].view(torch.float32), torch.stack([values.mean(-1) * inverse, inverse], -1).flatten(1))
    for result in results[1:]:
        assert torch.equal(result, results[0])
    assert_close(launch_row_stats(x, "norm"), values.square().sum(-1).sqrt())
