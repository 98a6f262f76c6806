"""The ops in torch.library: opcheck, full-graph compilation, dynamic batches, fake CUDA tensors, export."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import bigain_kernels as bk
from bigain_kernels.testing import samples
from tests.shapes import tokens

pytestmark = pytest.mark.usefixtures("backend")

GRID, STRIDE = (6, 8), (2, 2)
X = tokens(4, 48, 10)
PLAN = bk.lgtm_plan(X, GRID, 0.5)
Q = tokens(4, 48, 20).unflatten(2, (2, 10)).transpose(1, 2)
W = X[0, :6]

OP_CALLS = samples()


@pytest.mark.parametrize("call", sorted(OP_CALLS))
def test_opcheck(call):
    op, arguments = OP_CALLS[call]
    torch.library.opcheck(getattr(torch.ops.bigain, op).default, arguments)


PUBLIC_CALLS = {
    "laplacian_score": lambda x: bk.laplacian_score(x, GRID),
    "select_destinations": lambda x: bk.select_destinations(bk.laplacian_score(x, GRID), GRID, STRIDE),
    "lgtm": lambda x: bk.lgtm_plan(x, GRID, 0.5),
    "lgtm window": lambda x: bk.lgtm_plan(x, GRID, 0.5, window=1),
    "lgtm share": lambda x: bk.lgtm_plan(x, GRID, 0.5, share_plan=2),
    "abm": lambda x: bk.abm_plan(x, GRID, 0.5),
    "tome": lambda x: bk.tome_plan(x, GRID, 0.5, timestep=torch.arange(x.shape[0])),
    "sito": lambda x: bk.sito_plan(x, GRID, 0.5),
    "merge and unmerge": lambda x: merge_and_unmerge(x, bk.lgtm_plan(x, GRID, 0.5)),
    "merge of a norm": lambda x: merge_norm(x, bk.lgtm_plan(x, GRID, 0.5)),
    "kv_downsample": lambda x: bk.kv_downsample((x, x), GRID, 2, 0.9),
    "kv_downsample schedule": lambda x: bk.kv_downsample(
        x, GRID, 2, bk.alpha_schedule((0.8, 1.2), torch.arange(x.shape[0]))
    ),
    "attention": lambda x: bk.kv_downsample_attention(*[x.unsqueeze(1)] * 3, GRID, 2, 0.9),
    "attention text": lambda x: bk.kv_downsample_attention(
        *[x.unsqueeze(1)] * 3,
        (5, 8),
        2,
        0.9,
        key_bias=x.select(2, 0).narrow(0, 0, 2).narrow(1, 0, 16),
        image_tokens=(3, 43),
    ),
    "attention proportional": lambda x: bk.kv_downsample_attention(
        *[x.unsqueeze(1)] * 3, (1, x.shape[1]), 1, 1.0, key_bias=x.select(2, 0)
    ),
    "projection": lambda x: bk.pooled_kv_projection(
        x, GRID, 2, 0.9, x.select(0, 0), x.select(0, 1), None, x.select(0, 0).select(1, 0)
    ),
}


def merge_and_unmerge(x, plan):
    return bk.token_unmerge(bk.token_merge(x, plan), plan, residual=x, gate=x.select(1, 0))


def merge_norm(x, plan):
    vector, rows = x.select(0, 0).select(0, 0), x.select(1, 0)
    operands = {"norm_weight": vector, "norm_bias": vector, "scale": rows, "shift": rows}
    return bk.token_merge(x, plan, norm_eps=1e-6), bk.token_merge(x, plan, norm_eps=1e-5, **operands)


def leaves(value):
    return torch.utils._pytree.tree_leaves(value)


@pytest.mark.parametrize("call", sorted(PUBLIC_CALLS))
def test_compiles_to_one_graph_and_does_not_recompile_for_new_batches(call):
    torch._dynamo.reset()
    function, graphs = PUBLIC_CALLS[call], []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for batch in (2, 4, 6, 8, 10):
        x = tokens(batch, 48, 10, seed=batch)
        for actual, expected in zip(leaves(compiled(x)), leaves(function(x)), strict=True):
            assert torch.equal(actual, expected)
    assert len(graphs) <= 2  # one for the first batch size, one for all others


def test_compiles_with_inductor():
    torch._dynamo.reset()
    compiled = torch.compile(PUBLIC_CALLS["merge and unmerge"], fullgraph=True)
    torch.testing.assert_close(compiled(X), PUBLIC_CALLS["merge and unmerge"](X))


def test_a_plan_passes_through_compiled_code():
    torch._dynamo.reset()
    compiled = torch.compile(merge_and_unmerge, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X, PLAN), merge_and_unmerge(X, PLAN))


@pytest.mark.parametrize("call", sorted(PUBLIC_CALLS))
def test_traces_with_fake_cuda_tensors_on_any_machine(call):
    with FakeTensorMode():
        x = torch.empty(4, 48, 10, device="cuda")
        if call in ("tome", "kv_downsample schedule"):
            steps = torch.empty(4, dtype=torch.int64, device="cuda")
            result = (
                bk.tome_plan(x, GRID, 0.5, timestep=steps)
                if call == "tome"
                else bk.kv_downsample(x, GRID, 2, bk.alpha_schedule((0.8, 1.2), steps))
            )
        else:
            result = PUBLIC_CALLS[call](x)
    expected = PUBLIC_CALLS[call](tokens(4, 48, 10))
    for fake, real in zip(leaves(result), leaves(expected), strict=True):
        assert fake.device.type == "cuda"
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


def test_export_round_trip(tmp_path):
    class Layer(torch.nn.Module):
        def forward(self, x):
            pooled = PUBLIC_CALLS["attention text"](x), *PUBLIC_CALLS["projection"](x)
            others = *pooled, *PUBLIC_CALLS["merge of a norm"](x)
            return bk.lgtm_plan(x, GRID, 0.5), PUBLIC_CALLS["merge and unmerge"](x), others

    batch = 2 * torch.export.Dim("pairs", min=1, max=32)  # a key bias of two rows divides the batch
    program = torch.export.export(Layer(), (X,), dynamic_shapes={"x": {0: batch}})
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    x = tokens(6, 48, 10, seed=9)
    plan, out, others = loaded(x)
    assert isinstance(plan, bk.MergePlan)
    assert plan.grid == GRID
    torch.testing.assert_close(out, Layer()(x)[1])
    torch.testing.assert_close(others, Layer()(x)[2])


def test_plans_do_not_carry_gradients():
    with torch.enable_grad():
        plan = bk.lgtm_plan(X.clone().requires_grad_(), GRID, 0.5)
    assert not any(t.requires_grad for t in leaves(plan))
