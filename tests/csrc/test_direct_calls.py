"""torch.ops.bigain.* called directly: what the public functions would have refused must raise in C++, never crash."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

import bigain_kernels as bk
from bigain_kernels import native
from tests.shapes import tokens

pytestmark = pytest.mark.usefixtures("cpp")

X = tokens(4, 48, 10)
SCORE = bk.laplacian_score(X, (6, 8))
DESTINATIONS = bk.select_destinations(SCORE, (6, 8), (2, 2))
SIMILARITY, MATCH = bk.bipartite_match(X, DESTINATIONS)
PLAN = bk.merge_plan(SIMILARITY, MATCH, DESTINATIONS, 20, (6, 8))
SLOT, OFFSETS, MEMBERS, ANCHOR = PLAN.slot, PLAN.offsets, PLAN.members, PLAN.anchor
Y = tokens(4, 28, 10)
ROW = X[0, 0]
PLAN_TABLES = (SLOT, OFFSETS, MEMBERS, ANCHOR)
NORM_ARGUMENTS = (SCORE + 1, 1e-5, ROW, ROW, X[:, 0], X[:, 1])
TOKENS = torch.arange(48, dtype=torch.int32).repeat(4, 1)


def changed(table, value):
    """The table with one value replaced."""
    table = table.clone()
    table[-1, -2] = value
    return table


BAD = [
    ("laplacian_score", (X.int(), 6, 8, "l1"), "x: got int32"),
    ("laplacian_score", (X[0], 6, 8, "l1"), r"x: got shape \(48, 10\), expected 3 dimensions"),
    ("laplacian_score", (X, 6, 9, "l1"), r"grid: got \(6, 9\), expected H \* W = 48"),
    ("laplacian_score", (X, 2**62, 4, "l1"), "grid"),
    ("laplacian_score", (X, -6, -8, "l1"), "grid"),
    ("laplacian_score", (X, 6, 8, "l3"), "norm: got 'l3'"),
    ("select_destinations", (SCORE.double(), 6, 8, 2, 2), "score: got float64, expected float32"),
    ("select_destinations", (SCORE, 6, 8, 0, 2), "stride"),
    ("bipartite_match", (X, DESTINATIONS.long(), -1, 1, 1, 1, 1), "destinations: got int64"),
    ("bipartite_match", (X, DESTINATIONS[:3], -1, 1, 1, 1, 1), r"destinations: got shape \(3, 12\)"),
    ("bipartite_match", (X, changed(DESTINATIONS, 48), -1, 1, 1, 1, 1), "destinations: got values from .* to 48"),
    ("bipartite_match", (X, changed(DESTINATIONS, -1), -1, 1, 1, 1, 1), "destinations: got values from -1"),
    ("bipartite_match", (X, DESTINATIONS, 1, 6, 9, 2, 2), "grid"),
    ("bipartite_match", (X, DESTINATIONS, 1, 6, 8, 0, 2), "stride"),
    ("bipartite_match", (X, DESTINATIONS, -2, 6, 8, 2, 2), "window: got -2"),
    ("merge_plan", (SIMILARITY, MATCH, DESTINATIONS, 37), "r: got 37, expected 0 <= r <= 36"),
    ("merge_plan", (SIMILARITY, MATCH, DESTINATIONS, -1), "r: got -1"),
    ("merge_plan", (SIMILARITY, MATCH[:, :-1], DESTINATIONS, 3), "match: got shape"),
    ("merge_plan", (SIMILARITY, MATCH + 100, DESTINATIONS, 3), "match: got values"),
    ("merge_plan", (SIMILARITY, (MATCH + 1) % 48, DESTINATIONS, 36), "match: row . matches a merging token to no"),
    ("merge_plan", (SIMILARITY, TOKENS, DESTINATIONS, 36), "match: row . matches a merging token to no destination"),
    ("block_merge_plan", (SCORE, 6, 8, 2, 2, -1, "max"), "r: got -1"),
    ("block_merge_plan", (SCORE, 6, 8, 2, 2, 3, "median"), "reduce: got 'median'"),
    ("token_merge", (X, SLOT, changed(OFFSETS, 49), MEMBERS, ANCHOR, "mean", None), "offsets: got values"),
    ("token_merge", (X, SLOT, changed(OFFSETS, 0), MEMBERS, ANCHOR, "mean", None), "offsets: got .* ascending"),
    ("token_merge", (X, SLOT, OFFSETS, changed(MEMBERS, 48), ANCHOR, "mean", None), "members: got values"),
    ("token_merge", (X, SLOT, OFFSETS, MEMBERS, changed(ANCHOR, -7), "prune", None), "anchor: got values"),
    ("token_merge", (X, SLOT, OFFSETS, MEMBERS, ANCHOR, "mode", None), "mode: got 'mode'"),
    ("token_merge", (X[:3], SLOT[:2], OFFSETS, MEMBERS, ANCHOR, "mean", None), "x: got batch 3"),
    ("token_merge", (X, SLOT, OFFSETS, MEMBERS, ANCHOR, "mean", SCORE[:, 1:]), "weights: got shape"),
    ("token_merge_norm", (X.int(), *PLAN_TABLES, *NORM_ARGUMENTS), "x: got int32"),
    ("token_merge_norm", (X[:3], *PLAN_TABLES, *NORM_ARGUMENTS), "x: got batch 3"),
    ("token_merge_norm", (X, SLOT, OFFSETS, changed(MEMBERS, 48), ANCHOR, *NORM_ARGUMENTS), "members: got values"),
    ("token_merge_norm", (X, *PLAN_TABLES, SCORE[:, 1:], *NORM_ARGUMENTS[1:]), "weights: got shape"),
    ("token_merge_norm", (X, *PLAN_TABLES, None, 1e-5, ROW[1:], ROW, X[:, 0], X[:, 1]), r"norm_weight: got shape \(9"),
    ("token_merge_norm", (X, *PLAN_TABLES, None, 1e-5, ROW, X[0], X[:, 0], X[:, 1]), r"norm_bias: got shape \(48, 10"),
    ("token_merge_norm", (X, *PLAN_TABLES, None, 1e-5, ROW, ROW, X[:3, 0], X[:, 1]), r"scale: got shape \(3, 10"),
    ("token_merge_norm", (X, *PLAN_TABLES, None, 1e-5, ROW, ROW, X[:, 0], X[:, 1].int()), "shift: got int32"),
    ("token_merge_norm", (X, *PLAN_TABLES, None, 1e-5, None, ROW, None, None), "norm_weight: got None"),
    ("token_merge_norm", (X, *PLAN_TABLES, None, 1e-5, None, None, X[:, 0], None), "shift: got None"),
    ("token_unmerge", (Y, changed(SLOT, 28), OFFSETS, MEMBERS, ANCHOR, None, None), "slot: got values"),
    ("token_unmerge", (Y, SLOT, OFFSETS, MEMBERS, ANCHOR, X[:, 1:], None), "residual: got shape"),
    ("token_unmerge", (Y, SLOT, OFFSETS, MEMBERS, ANCHOR, None, X[0]), "gate: got shape"),
    ("token_unmerge", (X, SLOT, OFFSETS, MEMBERS, ANCHOR, None, None), "offsets: got shape"),
    ("bipartite_match", (X[:, :5], TOKENS[:, :6], -1, 1, 1, 1, 1), "destinations: got 6 for 5 tokens"),
    ("merge_plan", (SIMILARITY, MATCH, DESTINATIONS[:, :0], 1), "r: got 1, expected 0 <= r <= 0"),
    ("token_merge", (X[:, :9], SLOT[:, :9], OFFSETS, MEMBERS[:, :9], ANCHOR, "mean", None), "anchor: got 28 slots"),
    ("token_unmerge", (Y[:, :0], SLOT, OFFSETS[:, :1], MEMBERS, ANCHOR[:, :0], None, None), "y: got no slots"),
    ("kv_downsample", ([X, X[:2]], 6, 8, 2, 2, 0.9, None), "xs: got batches 4 and 2"),
    ("kv_downsample", ([X], 6, 8, 7, 2, 0.9, None), "factor"),
    ("kv_downsample", ([X], 6, 8, 0, 2, 0.9, None), "factor"),
    ("kv_downsample", ([X], 6, 8, 2, 2, 0.9, SCORE[:3, 0]), "row_alpha: got shape"),
]


@pytest.mark.parametrize(("op", "arguments", "message"), BAD, ids=[f"{b[0]}-{i}" for i, b in enumerate(BAD)])
def test_bad_arguments_raise_value_error(op, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(torch.ops.bigain, op)(*arguments)


@pytest.mark.parametrize(
    "wrong", [X.to("meta"), X.to_sparse(), X.to(torch.complex64)], ids=["meta", "sparse", "complex"]
)
def test_other_kinds_of_tensors_raise(wrong):
    with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
        torch.ops.bigain_cpp.laplacian_score(wrong, 6, 8, "l1")
    with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
        torch.ops.bigain_cpp.token_unmerge(Y, SLOT, OFFSETS, MEMBERS, ANCHOR, wrong, None)


def test_views_that_overlap_or_have_no_unit_stride_are_read_right():
    expanded, transposed = X[:1].expand(4, -1, -1), X.transpose(1, 2).contiguous().transpose(1, 2)
    broadcast = X[:, :, :1].expand(-1, -1, 10)
    for view in (expanded, transposed, broadcast):
        for op, arguments in (("laplacian_score", (6, 8, "l1")), ("bipartite_match", (DESTINATIONS, -1, 1, 1, 1, 1))):
            actual = getattr(torch.ops.bigain, op)(view, *arguments)
            expected = getattr(torch.ops.bigain, op)(view.contiguous(), *arguments)
            for a, b in zip(*((v,) if isinstance(v, torch.Tensor) else v for v in (actual, expected)), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 48, 10), (4, 48, 0), (0, 48, 0)])
@pytest.mark.parametrize("window", [-1, 1])
def test_empty_batches_and_no_channels_work(shape, window):
    x, rows = torch.zeros(shape), shape[0]
    score = torch.ops.bigain.laplacian_score(x, 6, 8, "l2")
    assert torch.equal(score, torch.zeros(shape[:2]))
    destinations = torch.ops.bigain.select_destinations(score, 6, 8, 2, 2)
    similarity, match = torch.ops.bigain.bipartite_match(x, destinations, window, 6, 8, 2, 2)
    assert (similarity == -torch.inf).all()
    tables = torch.ops.bigain.merge_plan(similarity, match, destinations, 20)
    for mode in ("mean", "mlerp", "prune"):
        merged = torch.ops.bigain.token_merge(x, *tables, mode, None)
        assert merged.shape == (rows, 28, shape[2])
    norm = (score + 1, 1e-5, x.new_ones(shape[2]), x.new_ones(shape[2]), x[:, 0], x[:, 1])
    assert torch.ops.bigain.token_merge_norm(x, *tables, *norm).shape == merged.shape
    assert torch.ops.bigain.token_unmerge(merged, *tables, x, x[:, 0]).shape == shape
    assert torch.ops.bigain.kv_downsample([x], 6, 8, 2, 2, 0.9, None)[0].shape == (rows, 12, shape[2])


def test_schemas_are_those_of_the_public_ops():
    for op in {call[0] for call in BAD}:
        ours = str(getattr(torch.ops.bigain_cpp, op).default._schema).replace("bigain_cpp::", "bigain::")
        assert ours == str(getattr(torch.ops.bigain, op).default._schema).replace("SymInt", "int")
    implemented = {choice.op for choice in bk.backends.report(("cpu",)) if choice.backend == "cpp"}
    assert implemented == {choice.op for choice in bk.backends.report(("cpu",))}
    assert native.report()


def test_two_thousand_random_calls_do_not_crash(request):
    run = subprocess.run(
        [sys.executable, "-m", "tests.csrc.fuzz", "--count", "2000"],
        cwd=request.config.rootpath,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = re.search(r"returned (\d+) raised (\d+)", run.stdout)
    assert found, run.stdout
    # Both happen often: the calls reach the kernels, and what is wrong is noticed.
    assert int(found[1]) > 200
    assert int(found[2]) > 800
