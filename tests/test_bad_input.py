"""Wrong calls: each raises the stated exception, and its message begins with the argument's name."""

from __future__ import annotations

import re

import pytest
import torch

import bigain_kernels as bk
from bigain_kernels.attention import proportional_attention
from bigain_kernels.compat import published
from bigain_kernels.evaluation.data import load_digits, load_photograph
from bigain_kernels.evaluation.train_tiny import TrainConfig
from tests.shapes import tokens

GRID = (4, 6)
X = tokens(2, 24, 8)
SCORE = bk.laplacian_score(X, GRID)
DST = bk.select_destinations(SCORE, GRID, (2, 2))
SIM, MATCH = bk.bipartite_match(X, DST)
PLAN = bk.lgtm_plan(X, GRID, 0.5)
Y = bk.token_merge(X, PLAN)
# A packing of two images.
FLAT, CU = X.flatten(0, 1), torch.tensor([0, 24, 48], dtype=torch.int32)
PACKED = bk.varlen_plan(FLAT, CU, [GRID, GRID], lambda x, grid: bk.lgtm_plan(x, grid, 0.5))
Q = tokens(2, 24, 8).unflatten(2, (2, 4)).transpose(1, 2)
META = torch.empty(2, 24, 8, device="meta")

# (name, call, exception, what the message must say after "argument: ")
WRONG_CALLS = [
    # laplacian_score
    ("x is a list", lambda: bk.laplacian_score([1.0], GRID), TypeError, "x: got list, expected a torch.Tensor"),
    ("x is int", lambda: bk.laplacian_score(X.int(), GRID), TypeError, "x: got dtype int32, expected one of float16"),
    ("x has rank 2", lambda: bk.laplacian_score(X[0], GRID), ValueError, "x: got shape (24, 8), expected 3 dimensions"),
    ("x has rank 4", lambda: bk.laplacian_score(Q, GRID), ValueError, "x: got shape (2, 2, 24, 4)"),
    ("grid misses", lambda: bk.laplacian_score(X, (5, 6)), ValueError, "grid: got (5, 6), that is 30 tokens"),
    ("grid is a number", lambda: bk.laplacian_score(X, 24), TypeError, "grid: got 24, expected two integers"),
    ("grid of floats", lambda: bk.laplacian_score(X, (4.0, 6.0)), TypeError, "grid: got (4.0, 6.0)"),
    ("grid of bools", lambda: bk.laplacian_score(X, (True, 24)), TypeError, "grid: got (True, 24)"),
    ("grid of zero", lambda: bk.laplacian_score(X, (0, 24)), ValueError, "grid: got (0, 24), expected both"),
    ("grid of four", lambda: bk.laplacian_score(X, (2, 2, 2, 3)), TypeError, "grid: got (2, 2, 2, 3)"),
    ("grid of three", lambda: bk.merge_plan(SIM, MATCH, DST, 4, (2, 2, 6)), TypeError, "grid: got (2, 2, 6)"),
    ("frames", lambda: bk.laplacian_score(X, (3, 2, 6)), ValueError, "grid: got (3, 2, 6), that is 36 tokens"),
    (
        "norm",
        lambda: bk.laplacian_score(X, GRID, norm="l3"),
        ValueError,
        "norm: got 'l3', expected one of ['l1', 'l2']",
    ),
    # select_destinations
    (
        "score is fp64",
        lambda: bk.select_destinations(SCORE.double(), GRID, (2, 2)),
        TypeError,
        "score: got dtype float64",
    ),
    ("score rank", lambda: bk.select_destinations(X, GRID, (2, 2)), ValueError, "score: got shape (2, 24, 8)"),
    ("stride zero", lambda: bk.select_destinations(SCORE, GRID, (0, 2)), ValueError, "stride: got (0, 2)"),
    ("stride number", lambda: bk.select_destinations(SCORE, GRID, 2), TypeError, "stride: got 2"),
    # bipartite_match
    ("int64 dst", lambda: bk.bipartite_match(X, DST.long()), TypeError, "destinations: got dtype int64, expected"),
    ("rows of dst", lambda: bk.bipartite_match(X, DST[:1]), ValueError, "destinations: got 1 rows, expected 2"),
    ("rank of dst", lambda: bk.bipartite_match(X, DST[0]), ValueError, "destinations: got shape (6,)"),
    (
        "too many dst",
        lambda: bk.bipartite_match(X, torch.zeros(2, 25, dtype=torch.int32)),
        ValueError,
        "destinations: got 25 a row, expected at most 24",
    ),
    (
        "window < 0",
        lambda: bk.bipartite_match(X, DST, -2, GRID, (2, 2)),
        ValueError,
        "window: got -2, expected at least",
    ),
    ("window float", lambda: bk.bipartite_match(X, DST, 1.5, GRID, (2, 2)), TypeError, "window: got 1.5"),
    ("window without grid", lambda: bk.bipartite_match(X, DST, window=1), TypeError, "grid: got None, expected two"),
    ("window without stride", lambda: bk.bipartite_match(X, DST, 1, GRID), TypeError, "stride: got None, expected two"),
    ("device of dst", lambda: bk.bipartite_match(META, DST), ValueError, "destinations: is on cpu, expected meta"),
    # merge_plan and block_merge_plan
    ("similarity dtype", lambda: bk.merge_plan(SIM.half(), MATCH, DST, 3, GRID), TypeError, "similarity: got dtype"),
    ("match shape", lambda: bk.merge_plan(SIM, MATCH[:, :9], DST, 3, GRID), ValueError, "match: got shape (2, 9)"),
    ("match dtype", lambda: bk.merge_plan(SIM, MATCH.long(), DST, 3, GRID), TypeError, "match: got dtype int64"),
    ("dst shape", lambda: bk.merge_plan(SIM, MATCH, DST[:1], 3, GRID), ValueError, "destinations: got shape (1, 6)"),
    ("r < 0", lambda: bk.merge_plan(SIM, MATCH, DST, -1, GRID), ValueError, "r: got -1, expected at least 0"),
    ("r float", lambda: bk.merge_plan(SIM, MATCH, DST, 2.5, GRID), TypeError, "r: got 2.5, expected an integer"),
    ("plan grid", lambda: bk.merge_plan(SIM, MATCH, DST, 3, (3, 6)), ValueError, "grid: got (3, 6)"),
    ("reduce", lambda: bk.block_merge_plan(SCORE, GRID, (2, 2), 3, "median"), ValueError, "reduce: got 'median'"),
    ("block r", lambda: bk.block_merge_plan(SCORE, GRID, (2, 2), -3), ValueError, "r: got -3"),
    # token_merge and token_unmerge
    ("no plan", lambda: bk.token_merge(X, None), TypeError, "plan: got NoneType, expected a MergePlan"),
    ("tokens of x", lambda: bk.token_merge(X[:, :20], PLAN), ValueError, "x: got 20 tokens, expected 24"),
    (
        "batch of x",
        lambda: bk.token_merge(X[:1], PLAN),
        ValueError,
        "x: got batch 1, expected a multiple of the plan's 2",
    ),
    ("device of plan", lambda: bk.token_merge(META, PLAN), ValueError, "plan: is on cpu, expected meta"),
    ("mode", lambda: bk.token_merge(X, PLAN, mode="sum"), ValueError, "mode: got 'sum', expected one of"),
    (
        "weights shape",
        lambda: bk.token_merge(X, PLAN, weights=X[..., :3].sum(-1)[:1]),
        ValueError,
        "weights: got shape",
    ),
    (
        "weights prune",
        lambda: bk.token_merge(X, PLAN, "prune", SCORE),
        ValueError,
        "weights: got a tensor, expected None",
    ),
    (
        "norm_eps with mlerp",
        lambda: bk.token_merge(X, PLAN, "mlerp", norm_eps=1e-5),
        ValueError,
        "norm_eps: got 1e-05 with mode='mlerp', expected None or mode='mean'",
    ),
    (
        "norm_eps with prune",
        lambda: bk.token_merge(X, PLAN, "prune", norm_eps=1e-5),
        ValueError,
        "norm_eps: got 1e-05 with mode='prune', expected None or mode='mean'",
    ),
    (
        "norm_eps text",
        lambda: bk.token_merge(X, PLAN, norm_eps="small"),
        TypeError,
        "norm_eps: got 'small', expected a number",
    ),
    (
        "norm_eps nan",
        lambda: bk.token_merge(X, PLAN, norm_eps=float("nan")),
        ValueError,
        "norm_eps: got nan, expected a finite number",
    ),
    (
        "norm_eps < 0",
        lambda: bk.token_merge(X, PLAN, norm_eps=-1e-5),
        ValueError,
        "norm_eps: got -1e-05, expected at least 0",
    ),
    *(
        (
            f"{name} without norm_eps",
            lambda name=name: bk.token_merge(X, PLAN, **{name: X[0, 0]}),
            ValueError,
            f"{name}: got a tensor, expected None without norm_eps",
        )
        for name in ("norm_weight", "norm_bias", "scale", "shift")
    ),
    *(
        (
            f"{given} alone",
            lambda given=given, value=value: bk.token_merge(X, PLAN, norm_eps=1e-5, **{given: value}),
            ValueError,
            f"{missing}: got None, expected a tensor, as {given} is one",
        )
        for given, missing, value in (
            ("norm_weight", "norm_bias", X[0, 0]),
            ("norm_bias", "norm_weight", X[0, 0]),
            ("scale", "shift", X[:, 0]),
            ("shift", "scale", X[:, 0]),
        )
    ),
    (
        "norm_weight shape",
        lambda: bk.token_merge(X, PLAN, norm_eps=1e-5, norm_weight=X[0, 0, :7], norm_bias=X[0, 0]),
        ValueError,
        "norm_weight: got shape (7,), expected (8,)",
    ),
    (
        "norm_bias rank",
        lambda: bk.token_merge(X, PLAN, norm_eps=1e-5, norm_weight=X[0, 0], norm_bias=X[:, 0]),
        ValueError,
        "norm_bias: got shape (2, 8), expected 1 dimensions",
    ),
    (
        "norm_bias dtype",
        lambda: bk.token_merge(X, PLAN, norm_eps=1e-5, norm_weight=X[0, 0], norm_bias=X[0, 0].int()),
        TypeError,
        "norm_bias: got dtype int32, expected one of",
    ),
    (
        "scale shape",
        lambda: bk.token_merge(X, PLAN, norm_eps=1e-5, scale=X[:1, 0], shift=X[:, 0]),
        ValueError,
        "scale: got shape (1, 8), expected (2, 8)",
    ),
    (
        "shift type",
        lambda: bk.token_merge(X, PLAN, norm_eps=1e-5, scale=X[:, 0], shift=0.0),
        TypeError,
        "shift: got float, expected a torch.Tensor",
    ),
    (
        "shift device",
        lambda: bk.token_merge(X, PLAN, norm_eps=1e-5, scale=X[:, 0], shift=META[:, 0]),
        ValueError,
        "shift: is on meta, expected cpu, where x is",
    ),
    ("slots of y", lambda: bk.token_unmerge(X, PLAN), ValueError, "y: got 24 tokens, expected 12"),
    ("residual shape", lambda: bk.token_unmerge(Y, PLAN, residual=Y), ValueError, "residual: got shape (2, 12, 8)"),
    ("residual dtype", lambda: bk.token_unmerge(Y, PLAN, residual=X.int()), TypeError, "residual: got dtype int32"),
    ("gate shape", lambda: bk.token_unmerge(Y, PLAN, gate=X[:, :2, 0]), ValueError, "gate: got shape (2, 2)"),
    # packed sequences
    ("seqlens int64", lambda: bk.varlen_plan(FLAT, CU.long(), [GRID, GRID], None), TypeError, "cu_seqlens: got dtype"),
    ("grids", lambda: bk.varlen_plan(FLAT, CU, [GRID], None), ValueError, "grids: got 1, expected 2"),
    (
        "large grid",
        lambda: bk.varlen_plan(FLAT, CU, [GRID, (5, 6)], None),
        ValueError,
        "grids: got images of 54 tokens",
    ),
    ("packed", lambda: bk.token_merge_varlen(FLAT, PLAN), TypeError, "packed: got MergePlan, expected a PackedPlan"),
    ("unpacked", lambda: bk.token_unmerge_varlen(FLAT, None), TypeError, "packed: got NoneType, expected a PackedPlan"),
    ("pool", lambda: bk.kv_downsample_varlen(FLAT, CU, [GRID], 2, 0.9), ValueError, "grids: got 1, expected 2"),
    # kv_downsample and attention
    ("a number", lambda: bk.kv_downsample(5, GRID, 2, 0.9), TypeError, "x: got int, expected a torch.Tensor or a"),
    ("no tensors", lambda: bk.kv_downsample([], GRID, 2, 0.9), ValueError, "x: got an empty sequence"),
    ("second tensor", lambda: bk.kv_downsample((X, X[:, :9]), GRID, 2, 0.9), ValueError, "x[1]: got shape (2, 9, 8)"),
    ("second type", lambda: bk.kv_downsample((X, 3), GRID, 2, 0.9), TypeError, "x[1]: got int"),
    (
        "factor big",
        lambda: bk.kv_downsample(X, GRID, 5, 0.9),
        ValueError,
        "factor: got (5, 5), expected at most the grid",
    ),
    ("factor 0", lambda: bk.kv_downsample(X, GRID, 0, 0.9), ValueError, "factor: got (0, 0), expected both"),
    ("factor float", lambda: bk.kv_downsample(X, GRID, 2.0, 0.9), TypeError, "factor: got 2.0"),
    ("alpha text", lambda: bk.kv_downsample(X, GRID, 2, "0.9"), TypeError, "alpha: got '0.9', expected a number"),
    ("alpha nan", lambda: bk.kv_downsample(X, GRID, 2, float("nan")), ValueError, "alpha: got nan, expected a finite"),
    ("alpha rows", lambda: bk.kv_downsample(X, GRID, 2, torch.ones(3)), ValueError, "alpha: got 3 values, expected 2"),
    ("alpha dtype", lambda: bk.kv_downsample(X, GRID, 2, torch.ones(2).half()), TypeError, "alpha: got dtype float16"),
    (
        "k shape",
        lambda: bk.kv_downsample_attention(Q, Q[:, :1], Q, GRID, 2, 0.9),
        ValueError,
        "k: got shape (2, 1, 24, 4)",
    ),
    # proportional_attention
    (
        "sizes of other keys",
        lambda: proportional_attention(Q, Q, Q, DST),
        ValueError,
        "sizes: got shape (2, 6), expected 24 keys",
    ),
    ("sizes rows", lambda: proportional_attention(Q, Q, Q, torch.ones(3, 24)), ValueError, "sizes: got 3 rows"),
    ("sizes dtype", lambda: proportional_attention(Q, Q, Q, torch.ones(2, 24) > 0), TypeError, "sizes: got dtype bool"),
    ("v shape", lambda: proportional_attention(Q, Q, Q[:, :, :9], MATCH), ValueError, "v: got shape (2, 2, 9, 4)"),
    ("no keys", lambda: proportional_attention(Q, Q[:, :, :0], Q[:, :, :0], MATCH[:, :0]), ValueError, "k: got shape"),
    ("k dtype", lambda: proportional_attention(Q, Q.half(), Q, MATCH), TypeError, "k: got torch.float16, expected"),
    ("scale of text", lambda: proportional_attention(Q, Q, Q, MATCH, "x"), TypeError, "scale: got 'x'"),
    ("route", lambda: proportional_attention(Q, Q, Q, MATCH, route="flash"), ValueError, "route: got 'flash'"),
    (
        "scale of channels",
        lambda: proportional_attention(Q, Q, Q, MATCH, 0.0, "channels"),
        ValueError,
        "scale: got 0.0 with route='channels'",
    ),
    # kv_downsample_attention
    ("v dtype", lambda: bk.kv_downsample_attention(Q, Q, Q.half(), GRID, 2, 0.9), TypeError, "v: got torch.float16"),
    ("q rank", lambda: bk.kv_downsample_attention(X, Q, Q, GRID, 2, 0.9), ValueError, "q: got shape (2, 24, 8)"),
    ("scale", lambda: bk.kv_downsample_attention(Q, Q, Q, GRID, 2, 0.9, scale="x"), TypeError, "scale: got 'x'"),
    (
        "key_bias",
        lambda: bk.kv_downsample_attention(Q, Q, Q, GRID, 2, 0.9, key_bias=SCORE),
        ValueError,
        "key_bias: got shape (2, 24), expected 6 keys",
    ),
    (
        "key_bias rows",
        lambda: bk.kv_downsample_attention(Q, Q, Q, GRID, 2, 0.9, key_bias=torch.ones(3, 6)),
        ValueError,
        "key_bias: got 3 rows, expected a divisor of 2, the batch of q",
    ),
    (
        "key_bias dtype",
        lambda: bk.kv_downsample_attention(Q, Q, Q, GRID, 2, 0.9, key_bias=torch.ones(1, 6, dtype=torch.int32)),
        TypeError,
        "key_bias: got dtype int32",
    ),
    (
        "image_tokens number",
        lambda: bk.kv_downsample_attention(Q, Q, Q, GRID, 2, 0.9, image_tokens=24),
        TypeError,
        "image_tokens: got 24, expected two integers, (start, stop)",
    ),
    (
        "image_tokens float",
        lambda: bk.kv_downsample_attention(Q, Q, Q, GRID, 2, 0.9, image_tokens=(0, 24.0)),
        TypeError,
        "image_tokens: got 24.0, expected an integer",
    ),
    (
        "image_tokens range",
        lambda: bk.kv_downsample_attention(Q, Q, Q, GRID, 2, 0.9, image_tokens=(4, 28)),
        ValueError,
        "image_tokens: got (4, 28), expected start < stop <= 24",
    ),
    (
        "image_tokens empty",
        lambda: bk.kv_downsample_attention(Q, Q, Q, GRID, 2, 0.9, image_tokens=(4, 4)),
        ValueError,
        "image_tokens: got (4, 4), expected start < stop",
    ),
    (
        "image_tokens negative",
        lambda: bk.kv_downsample_attention(Q, Q, Q, GRID, 2, 0.9, image_tokens=(-4, 20)),
        ValueError,
        "image_tokens: got -4, expected at least 0",
    ),
    (
        "grid of the image",
        lambda: bk.kv_downsample_attention(Q, Q, Q, GRID, 2, 0.9, image_tokens=(4, 24)),
        ValueError,
        "grid: got (4, 6), that is 24 tokens, expected 20, the number of tokens of image_tokens",
    ),
    (
        "w_k columns",
        lambda: bk.pooled_kv_projection(X, GRID, 2, 0.9, X[0, :, :7], X[0]),
        ValueError,
        "w_k: got shape (24, 7), expected 8 columns, the C of x",
    ),
    (
        "w_v dtype",
        lambda: bk.pooled_kv_projection(X, GRID, 2, 0.9, X[0], X[0].half()),
        TypeError,
        "w_v: got torch.float16, expected torch.float32, the dtype of x",
    ),
    (
        "w_v rank",
        lambda: bk.pooled_kv_projection(X, GRID, 2, 0.9, X[0], X),
        ValueError,
        "w_v: got shape (2, 24, 8), expected 2 dimensions",
    ),
    (
        "b_k shape",
        lambda: bk.pooled_kv_projection(X, GRID, 2, 0.9, X[0], X[0], X[0, 0]),
        ValueError,
        "b_k: got shape (8,), expected (24,)",
    ),
    (
        "b_v device",
        lambda: bk.pooled_kv_projection(X, GRID, 2, 0.9, X[0], X[0], None, META[0, :, 0]),
        ValueError,
        "b_v: is on meta, expected cpu, where x is",
    ),
    (
        "projection grid",
        lambda: bk.pooled_kv_projection(X, (5, 6), 2, 0.9, X[0], X[0]),
        ValueError,
        "grid: got (5, 6), that is 30 tokens",
    ),
    (
        "projection factor",
        lambda: bk.pooled_kv_projection(X, GRID, 5, 0.9, X[0], X[0]),
        ValueError,
        "factor: got (5, 5), expected at most the grid",
    ),
    # methods
    ("ratio high", lambda: bk.lgtm_plan(X, GRID, 0.8), ValueError, "ratio: got 0.8, expected 0 <= ratio <= 0.75"),
    ("ratio low", lambda: bk.tome_plan(X, GRID, -0.1), ValueError, "ratio: got -0.1, expected 0 <= ratio"),
    ("ratio text", lambda: bk.abm_plan(X, GRID, "half"), TypeError, "ratio: got 'half', expected a number"),
    ("ratio nan", lambda: bk.lgtm_plan(X, GRID, float("nan")), ValueError, "ratio: got nan, expected a finite number"),
    (
        "ratio, no tile",
        lambda: bk.lgtm_plan(X, GRID, 0.5, (5, 2)),
        ValueError,
        "ratio: got 0.5, expected 0 <= ratio <= 0,",
    ),
    (
        "share",
        lambda: bk.lgtm_plan(X, GRID, 0.5, share_plan=3),
        ValueError,
        "share_plan: got 3, expected a divisor of 2",
    ),
    ("share 0", lambda: bk.sito_plan(X, GRID, 0.5, share_plan=0), ValueError, "share_plan: got 0, expected at least 1"),
    ("dst rule", lambda: bk.tome_plan(X, GRID, 0.5, destinations="last"), ValueError, "destinations: got 'last'"),
    ("timestep", lambda: bk.tome_plan(X, GRID, 0.5, timestep=7), TypeError, "timestep: got int, expected a tensor"),
    (
        "timestep rows",
        lambda: bk.sito_plan(X, GRID, 0.5, timestep=torch.arange(3)),
        ValueError,
        "timestep: got shape (3,), expected (2,)",
    ),
    ("seed float", lambda: bk.tome_plan(X, GRID, 0.5, seed=1.5), TypeError, "seed: got 1.5, expected an integer"),
    ("seed none", lambda: bk.sito_plan(X, GRID, 0.5, seed=None), TypeError, "seed: got None, expected an integer"),
    (
        "timestep bool",
        lambda: bk.tome_plan(X, GRID, 0.5, timestep=torch.ones(2, dtype=torch.bool)),
        TypeError,
        "timestep: got dtype torch.bool",
    ),
    ("noise", lambda: bk.sito_plan(X, GRID, 0.5, noise=-1.0), ValueError, "noise: got -1.0, expected at least 0"),
    ("abm reduce", lambda: bk.abm_plan(X, GRID, 0.5, reduce="mode"), ValueError, "reduce: got 'mode'"),
    ("schedule of three", lambda: bk.alpha_schedule((1, 2, 3), torch.ones(1)), ValueError, "alpha: got (1, 2, 3)"),
    ("schedule text", lambda: bk.alpha_schedule((0.8, "x"), torch.ones(1)), TypeError, "alpha[1]: got 'x'"),
    ("schedule timestep", lambda: bk.alpha_schedule((0.8, 1.2), 10), ValueError, "timestep: got 10, expected a tensor"),
    (
        "schedule length",
        lambda: bk.alpha_schedule((0.8, 1.2), torch.ones(1), 1),
        ValueError,
        "num_train_timesteps: got 1, expected at least 2",
    ),
    ("max_ratio", lambda: bk.max_ratio((4, 0), (2, 2)), ValueError, "grid: got (4, 0)"),
    # the rest
    ("published ratio", lambda: published.published_lgtm_plan(X, GRID, 1.0), ValueError, "ratio: got 1.0"),
    ("published score", lambda: published.published_destinations(X, GRID, (2, 2)), ValueError, "score: got shape"),
    ("split", lambda: load_digits("training"), ValueError, "split: got 'training', expected one of"),
    ("photograph", lambda: load_photograph("cat.jpg"), ValueError, "name: got 'cat.jpg', expected one of"),
    ("steps", lambda: TrainConfig(steps=0), ValueError, "steps: got 0, expected 1 to 1e9"),
]


@pytest.mark.parametrize(
    ("call", "exception", "message"), [pytest.param(*case[1:], id=case[0]) for case in WRONG_CALLS]
)
def test_wrong_calls_say_what_is_wrong(call, exception, message):
    with pytest.raises(exception, match="^" + re.escape(message)) as caught:
        call()
    assert type(caught.value) is exception


def test_the_table_covers_every_public_function():
    source = " ".join(name for case in WRONG_CALLS for name in case[1].__code__.co_names)
    others = {
        "MergePlan",
        "PackedPlan",
        "WarmedUp",
        "backends",
        "use_backend",
        "warm_up",
    }  # these have tests of their own
    functions = set(bk.__all__) - others
    assert {name for name in functions if name not in source.split()} == set()
    assert len(WRONG_CALLS) >= 40
