"""The ops in torch.compile, opcheck and torch.export, on tensors of the device."""

from __future__ import annotations

import pytest
import torch

import bigain_kernels as bk

from .device import BACKENDS, DEVICE, random_tokens

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
GRID = (16, 16)


def block(x, gate):
    """What a transformer block does with the ops, some work of its own around them."""
    plan = bk.lgtm_plan(x, GRID, 0.6)
    y = torch.nn.functional.gelu(bk.token_merge(x, plan))
    k, v = bk.kv_downsample((x, x + 1), GRID, 2, 0.9)
    return bk.token_unmerge(y, plan, residual=x, gate=gate), k, v


def inputs(batch, seed=0):
    x = random_tokens(batch, 256, 64, torch.bfloat16, seed)
    return x, x[:, 3].contiguous()


def test_one_graph_without_recompilation_for_new_batches(backend):
    torch._dynamo.reset()
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(block, fullgraph=True, backend=count)
    with torch.no_grad(), bk.use_backend(backend):
        for batch in (2, 3, 4, 6, 8):
            for a, b in zip(compiled(*inputs(batch, batch)), block(*inputs(batch, batch)), strict=True):
                assert torch.equal(a, b)
    assert len(graphs) <= 2


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor(backend, mode):
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, mode=mode)
    with torch.no_grad(), bk.use_backend(backend):
        for seed in range(3):
            expected = block(*inputs(2, seed))
            for a, b in zip(compiled(*inputs(2, seed)), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-2)


def test_export_round_trip(backend, tmp_path):
    class Layer(torch.nn.Module):
        def forward(self, x, gate):
            return block(x, gate)

    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad(), bk.use_backend(backend):
        shapes = {"x": {0: batch}, "gate": {0: batch}}
        program = torch.export.export(Layer(), inputs(4), dynamic_shapes=shapes)
        torch.export.save(program, tmp_path / "layer.pt2")
        loaded = torch.export.load(tmp_path / "layer.pt2").module()
        for a, b in zip(loaded(*inputs(6, 1)), block(*inputs(6, 1)), strict=True):
            assert torch.equal(a, b)


def calls():
    x, gate = inputs(4)
    x = x.float()
    score = bk.laplacian_score(x, GRID)
    destinations = bk.select_destinations(score, GRID, (2, 2))
    similarity, match = bk.bipartite_match(x, destinations)
    plan = bk.lgtm_plan(x, GRID, 0.6)
    tables = (plan.slot, plan.offsets, plan.members, plan.anchor)
    y = bk.token_merge(x, plan)
    alpha = torch.rand(4, device=DEVICE)
    return {
        "laplacian_score": (x, *GRID, "l2"),
        "select_destinations": (score, *GRID, 2, 2),
        "bipartite_match": (x, destinations, 1, *GRID, 2, 2),
        "merge_plan": (similarity, match, destinations, 100),
        "block_merge_plan": (score, *GRID, 2, 2, 90, "std"),
        "lgtm_plan": (x, *GRID, 2, 2, 100, -1, 2),
        "token_merge": (x, *tables, "mlerp", score + 1),
        "token_merge_norm": (x, *tables, score + 1, 1e-5, x[0, 0], x[0, 1], x[:, 0], x[:, 1]),
        "token_unmerge": (y, *tables, x, gate.float()),
        "kv_downsample": ([x, x], *GRID, 2, 2, 0.0, alpha),
    }


OPS = ("laplacian_score", "select_destinations", "bipartite_match", "merge_plan", "block_merge_plan", "lgtm_plan",
       "token_merge", "token_merge_norm", "token_unmerge", "kv_downsample")  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_opcheck(backend, op):
    with torch.no_grad(), bk.use_backend(backend):
        torch.library.opcheck(getattr(torch.ops.bigain, op).default, calls()[op])
