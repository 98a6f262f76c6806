"""The functions of tomesd and of the published code: results of the originals, and what is refused."""

from __future__ import annotations

import functools
import json
import re

import numpy as np
import pytest
import tomesd as original
import torch

import bigain_kernels as bk
from bigain_kernels.compat import bigain, tomesd
from tests.golden_files import golden_path, golden_root

CASES = json.loads((golden_root() / "index.json").read_text())["cases"]
VALUES = {"rtol": 0, "atol": 2e-5}


def of(operator, variant=None):
    chosen = [c for c in CASES if c["operator"] == operator and c.get("variant") == variant]
    return pytest.mark.parametrize("case", [pytest.param(c, id=str(c["file"])) for c in chosen[:12]])


@functools.cache
def load(name):
    with np.load(golden_path(name)) as file:
        return {k: torch.from_numpy(v) for k, v in file.items()}


def sizes(args):
    return args["W"], args["H"], args["sx"], args["sy"], args["r"]


def check(functions, golden, x, y, mlerp="mlerp"):
    merge, unmerge = functions
    compared = 0
    for name, tensor in (("xm", x), ("ym", y)):
        for mode, key in (("mean", "mean"), ("prune", "prune"), ("mlerp", mlerp)):
            if f"{name}_{key}" in golden:
                merged = merge(tensor, mode=mode)
                torch.testing.assert_close(unmerge(merged), golden[f"{name}_{key}"], **VALUES)
                compared += 1
    assert compared


@of("tome")
def test_tome(case):
    golden, args = load(case["file"]), case["args"]
    seed = args["generator_seed"]
    for module in (tomesd.merge, bigain):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        functions = module.bipartite_soft_matching_random2d(golden["x"], *sizes(args), args["no_rand"], generator)
        kept = {k: v for k, v in golden.items() if module is bigain or "mlerp" not in k}
        check(functions, kept, golden["x"], golden["y"])


@of("lgtm", "official")
def test_lgtm(case):
    """With the flag that the published scripts leave out, and with scores."""
    golden, inputs, args = load(case["file"]), load(case["inputs"]), case["args"]
    x, y, scorer = inputs["x"], inputs["y"], bigain.SpatialFilterScorer()
    scored = bigain.bipartite_soft_matching_with_scoring(
        x, scorer, *sizes(args), preserve_ratio=0.0, if_low_frequency_dst_tokens=True
    )
    check(scored, golden, x, y, "mlerp_published")
    scores = scorer.score_tokens(x, H=args["H"], W=args["W"])
    functions = bigain.bipartite_soft_matching_random2d(x, *sizes(args), token_scores=scores)
    check(functions, golden, x, y, "mlerp_published")


@of("abm")
def test_abm(case):
    golden, inputs, args = load(case["file"]), load(case["inputs"]), case["args"]
    x, y = inputs["x"], inputs["y"]
    check(bigain.adaptive_block_pooling_random2d(x, *sizes(args), tile_aggregation=args["agg"]), golden, x, y)
    by_name = {"preserve_ratio": 0, "merge_method": "abp", "abp_tile_aggregation": args["agg"]}
    check(bigain.bipartite_soft_matching_with_scoring(x, None, *sizes(args), **by_name), golden, x, y)


@of("iekvd")
def test_iekvd(case):
    golden, a, compared = load(case["file"]), case["args"], 0
    for part in case["cases"]:
        if part["matches_intended"] and part["key"] in golden:
            factor = part["factor"]
            where = (a["W"], a["H"], a["W"] // factor, a["H"] // factor)
            if (a["H"] // where[3], a["W"] // where[2]) != (factor, factor):
                continue  # the sizes do not tell this factor
            pooled = bigain.up_or_downsample(golden["x"], *where, "linear_blend", blend_factor=part["alpha"])
            torch.testing.assert_close(pooled, golden[part["key"]], rtol=1e-5, atol=2e-6)
            nearest = bigain.up_or_downsample(golden["x"], *where, "nearest-exact")
            assert torch.equal(nearest, golden[f"near_f{factor}"])
            average = bigain.up_or_downsample(golden["x"], *where, "avg_pool")
            assert torch.equal(average, bk.kv_downsample(golden["x"], (a["H"], a["W"]), factor, 0.0))
            compared += 1
    assert compared


def test_the_schedule():
    for row in next(c for c in CASES if c["operator"] == "iekvd_alpha_schedule")["table"]:
        alpha = bigain.compute_dynamic_blend_factor(row["t"], True, row["start"], row["end"])
        assert alpha == pytest.approx(row["alpha"], abs=1e-6)
    assert bigain.compute_dynamic_blend_factor(5, False, 0.8, 1.2, 0.9) == 0.9


@pytest.mark.parametrize("r", [0, 5, 40, 1000])
@pytest.mark.parametrize(("w", "h", "sx", "sy"), [(8, 6, 2, 2), (7, 9, 3, 2), (5, 5, 1, 4)])
def test_of_one_generator_tomesd_and_this_draw_alike(w, h, sx, sy, r):
    """Batches of one and more, all sources merged, strips that no tile covers."""
    x = torch.randn(3, h * w, 8, generator=torch.Generator().manual_seed(1))
    mine, theirs = (torch.Generator().manual_seed(5) for _ in range(2))
    merge, unmerge = tomesd.merge.bipartite_soft_matching_random2d(x, w, h, sx, sy, r, generator=mine)
    their_merge, their_unmerge = original.merge.bipartite_soft_matching_random2d(x, w, h, sx, sy, r, generator=theirs)
    assert merge(x).shape == their_merge(x).shape
    torch.testing.assert_close(unmerge(merge(x)), their_unmerge(their_merge(x)), **VALUES)
    assert torch.equal(mine.get_state(), theirs.get_state())


X = torch.zeros(1, 16, 4)
REFUSED = [
    (lambda: tomesd.merge.bipartite_soft_matching_random2d(X, 4, 4, 2, 2, 4), TypeError, "generator: got None"),
    (lambda: tomesd.merge.bipartite_soft_matching_random2d(X, 4, 3, 2, 2, 4, True), ValueError, "grid: got"),
    (
        lambda: tomesd.merge.bipartite_soft_matching_random2d(X, 4, 4, 2, 2, 4, True)[0](X, mode="sum"),
        ValueError,
        "mode: got 'sum'",
    ),
    (lambda: bigain.bipartite_soft_matching_random2d(X, 4, 4, 2, 2, 4), TypeError, "generator: got None"),
    (
        lambda: bigain.bipartite_soft_matching_random2d(X, 4, 4, 2, 2, 4, True, locality_block_factor_h=2),
        ValueError,
        "locality_block_factor_h: got 2",
    ),
    (
        lambda: bigain.bipartite_soft_matching_with_scoring(X, bigain.SpatialFilterScorer(), 4, 4, 2, 2, 4),
        ValueError,
        "preserve_ratio: got 0.3",
    ),
    (
        lambda: bigain.adaptive_block_pooling_random2d(X, 4, 4, 2, 2, 4, tile_aggregation="median"),
        ValueError,
        "tile_aggregation: got 'median'",
    ),
    (lambda: bigain.up_or_downsample(X, 4, 4, 2, 2, "bicubic"), ValueError, "method: got 'bicubic'"),
    (lambda: bigain.up_or_downsample(X, 4, 4, 3, 0, "avg_pool"), ValueError, "new_h, new_w: got (0, 3)"),
    (lambda: bigain.up_or_downsample(X, 8, 2, 2, 1, "avg_pool"), ValueError, "new_h, new_w: got (1, 2)"),
    (
        lambda: bigain.up_or_downsample(X, 4, 4, 2, 2, "linear_blend", blend_method_1="area"),
        ValueError,
        "blend_method_1: got 'area'",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[row[2] for row in REFUSED])
def test_what_is_not_offered_is_refused(call, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        call()
