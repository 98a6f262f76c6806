"""The pass for torch.compile: what it fuses in blocks of models, what it leaves, and that results stay the same."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import metrics
from torch._inductor.decomposition import select_decomp_table

import bigain_kernels as bk
from bigain_kernels.diffusers import LGTMConfig, apply_token_compression
from bigain_kernels.inductor import FuseAroundMerges, compile_options
from bigain_kernels.testing import TOLERANCES, assert_close

from .diffusers.models import dit_inputs, run, tiny_dit, tiny_unet, unet_inputs
from .shapes import tokens

GRID = (4, 6)


class Graphs:
    """A backend that makes the graphs which Inductor's pass is given, runs the pass, and keeps what it saw."""

    def __init__(self) -> None:
        self.before, self.after = [], []

    def backend(self):
        def compiler(module, _):
            self.before.append(self._calls(module))
            FuseAroundMerges()(module.graph)
            module.graph.lint()
            module.recompile()
            self.after.append(self._calls(module))
            return module.forward

        return aot_autograd(fw_compiler=compiler, decompositions=select_decomp_table())

    @staticmethod
    def _calls(module):
        return Counter(_name(node) for node in module.graph.nodes if node.op == "call_function")


def _name(node):
    """What a node calls, and for an unmerge, which operands it has."""
    if node.target != torch.ops.bigain.token_unmerge.default:
        return str(node.target)
    given = zip(("residual", "gate"), node.args[5:], strict=True)
    return "_".join(["bigain.token_unmerge", *(name for name, value in given if value is not None)])


def ours(calls):
    return {name.split(".")[1]: n for name, n in calls.items() if name.startswith("bigain.token")}


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, dynamic=False):
    graphs = Graphs()
    return torch.compile(function, backend=graphs.backend(), fullgraph=True, dynamic=dynamic), graphs


def block_function(x, plan, norm, modulation, gate):
    """What a block does around our ops: norm, scale and shift, merge, a layer, unmerge, gate and residual."""
    y = F.layer_norm(x, x.shape[-1:], *norm, 1e-6)
    if modulation is not None:
        y = y * (1 + modulation[0][:, None]) + modulation[1][:, None]
    y = bk.token_merge(y, plan)
    y = bk.token_unmerge(F.relu(y), plan)
    return (y if gate is None else gate[:, None] * y) + x


def block_inputs(dtype, affine, modulated, gated, grid=GRID):
    x = tokens(2, grid[0] * grid[1], 16, dtype)
    rows = [tokens(1, 2, 16, dtype, seed)[0] for seed in (3, 4, 5)]
    norm = tuple(tokens(1, 2, 16, dtype, 6)[0]) if affine else (None, None)
    return x, bk.lgtm_plan(x, grid, 0.5), norm, rows[:2] if modulated else None, rows[2] if gated else None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("affine", "modulated", "gated"), [(False, False, False), (True, False, False), (False, True, True), (True,) * 3]
)
def test_every_form_of_a_block(dtype, affine, modulated, gated):
    inputs = block_inputs(dtype, affine, modulated, gated)
    call, graphs = compiled(block_function)
    out = call(*inputs)
    assert ours(graphs.before[0]) == {"token_merge": 1, "token_unmerge": 1}
    unmerge = "token_unmerge_residual_gate" if gated else "token_unmerge_residual"
    assert ours(graphs.after[0]) == {"token_merge_norm": 1, unmerge: 1}
    left = {name.split(".")[1] for name in graphs.after[0] if name.startswith("aten")}
    assert not left & {"var_mean", "rsqrt", "sub", "add"}
    exact = block_function(*torch.utils._pytree.tree_map(_double, inputs))
    eager = block_function(*inputs)
    # One rounding where there were several: at most as far from the truth, or within its own tolerance.
    relative, absolute = TOLERANCES[dtype]
    allowed = 2 * (eager.double() - exact).abs().max() + absolute + relative
    assert (out.double() - exact).abs().max() <= allowed


def _double(x):
    return x.double() if torch.is_tensor(x) and x.is_floating_point() else x


def test_dynamic_shapes_keep_one_graph():
    call, graphs = compiled(block_function, dynamic=True)
    for grid in (GRID, (6, 10), (5, 7)):
        inputs = block_inputs(torch.float32, True, True, True, grid)
        torch.testing.assert_close(call(*inputs), block_function(*inputs), rtol=2e-5, atol=2e-5)
    assert len(graphs.after) <= 2
    assert all(ours(calls) == {"token_merge_norm": 1, "token_unmerge_residual_gate": 1} for calls in graphs.after)


def test_what_is_used_elsewhere_stays():
    x, plan, norm, _, _ = block_inputs(torch.float32, True, False, False)

    def both(x, plan):
        y = F.layer_norm(x, x.shape[-1:], *norm, 1e-6)
        z = bk.token_unmerge(bk.token_merge(y, plan), plan)
        return z + x, z, y

    call, graphs = compiled(both)
    for out, wanted in zip(call(x, plan), both(x, plan), strict=True):
        torch.testing.assert_close(out, wanted)
    assert graphs.after == graphs.before


@pytest.mark.parametrize("case", ["mode", "axis", "channels apart", "row", "wide residual", "broadcast", "alpha"])
def test_what_only_looks_alike_stays(case):
    x, plan, _, _, _ = block_inputs(torch.float32, False, False, False)
    wide = tokens(2, 24, 16, torch.float64, 9)

    def function(x, plan):
        y = x.transpose(1, 2).contiguous().transpose(1, 2) if case == "channels apart" else x
        n = F.layer_norm(y, y.shape[-1:], eps=1e-5)
        if case == "axis":
            n = (x - x.mean(1, True)) * (x.var(1, correction=0, keepdim=True) + 1e-5).rsqrt()
        if case == "row":
            n = n * (2 + x[:, :1]) + x[:, 1:2]
        m = bk.token_merge(n, plan, "mlerp" if case == "mode" else "mean")
        u = bk.token_unmerge(m, plan)
        if case == "wide residual":
            return u + wide
        if case == "broadcast":
            return u + x[:1, :1]
        return torch.add(u, x, alpha=2) if case == "alpha" else u.relu()

    call, graphs = compiled(function)
    torch.testing.assert_close(call(x, plan), function(x, plan), rtol=2e-5, atol=2e-5)
    if case in ("wide residual", "broadcast", "alpha"):
        assert ours(graphs.after[0]) == {"token_merge_norm": 1, "token_unmerge": 1}
        assert any("add" in name for name in graphs.after[0])
    else:
        assert graphs.after == graphs.before


def test_graphs_without_our_ops_are_left_as_they_are():
    model = tiny_dit(num_layers=2)
    plain = run(model, dit_inputs())
    graphs = Graphs()
    for block in model.transformer_blocks:
        block.compile(backend=graphs.backend(), fullgraph=True)
    torch.testing.assert_close(run(model, dit_inputs()), plain, rtol=1e-5, atol=1e-5)
    assert graphs.after
    assert graphs.after == graphs.before


@pytest.mark.parametrize(
    ("build", "inputs", "config", "fused"),
    [
        # A U-Net plans on the residual stream, so nothing but the merge wants the norm.
        (tiny_unet, unet_inputs, LGTMConfig(), {"token_merge_norm", "token_unmerge_residual"}),
        (tiny_unet, unet_inputs, LGTMConfig(proportional=True), {"token_merge_norm", "token_unmerge_residual"}),
        # A DiT plans on the modulated tokens: they are in memory for that. The first block's residual has its channels
        # apart, and the op would copy it.
        (tiny_dit, dit_inputs, LGTMConfig(), {"token_merge", "token_unmerge", "token_unmerge_residual_gate"}),
        # Blocks that use the plan of another want them for the merge alone.
        (
            tiny_dit,
            dit_inputs,
            LGTMConfig(cached_assignment=True),
            {"token_merge", "token_unmerge", "token_merge_norm", "token_unmerge_residual_gate"},
        ),
    ],
)
def test_blocks_of_models(build, inputs, config, fused):
    changes = {"num_layers": 2} if build is tiny_dit else {}
    model, graphs = build(**changes).double(), Graphs()
    inputs = {name: _double(value) for name, value in inputs().items()}
    apply_token_compression(model, config)
    eager = run(model, inputs)
    if build is tiny_dit:
        for block in model.transformer_blocks:
            block.compile(backend=graphs.backend(), fullgraph=True)
    else:
        model.compile_repeated_blocks(backend=graphs.backend(), fullgraph=True)
    assert_close(run(model, inputs), eager, torch.float64)
    assert {name for calls in graphs.after for name in ours(calls)} == fused
    for before, after in zip(graphs.before, graphs.after, strict=True):
        residuals = sum(n for name, n in after.items() if "residual" in name)
        norms = after["bigain.token_merge_norm.default"]
        gone = before - after
        # Sums of a norm: eps, bias or shift, and one plus scale.
        assert gone["aten.add.Tensor"] == residuals + norms * (3 if build is tiny_dit else 2)
        assert gone["aten.var_mean.correction"] == norms


def test_inductor_makes_fewer_kernels_and_nothing_is_on_by_import():
    """The whole of Inductor: kernels that it generates for a block, through the options of torch.compile."""
    inputs = block_inputs(torch.float32, True, True, True)
    counts = []
    for options in (None, compile_options(epilogue_fusion=True)):
        torch._dynamo.reset()
        metrics.reset()
        # Three plain kernels: to try vectors and to precompile headers takes far longer than they do.
        with torch._inductor.config.patch({"cpp.vec_isa_ok": False, "cpp_cache_precompile_headers": False}):
            out = torch.compile(block_function, fullgraph=True, dynamic=False, options=options)(*inputs)
        torch.testing.assert_close(out, block_function(*inputs), rtol=2e-5, atol=2e-5)
        counts.append(metrics.generated_kernel_count)
    # relu is left.
    assert counts[1] == 1 < counts[0]
    with pytest.raises(ValueError, match="post_grad_custom_pre_pass: got a pass"):
        compile_options(post_grad_custom_pre_pass=FuseAroundMerges())
    assert FuseAroundMerges().uuid() == FuseAroundMerges().uuid()
