"""The Triton backend as `backends` and `torch.ops.bigain` see it, on a machine without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bigain_kernels import backends, methods, reference, use_backend

pytest.importorskip("triton")

from bigain_kernels.ops._triton import OPS
from bigain_kernels.triton_kernels.registration import IMPLEMENTATIONS
from tests.shapes import tokens


def test_every_op_is_registered_for_cuda():
    assert set(OPS) == set(IMPLEMENTATIONS)
    for op in OPS:
        with use_backend("triton"):
            assert backends.choose(op, "cuda").backend == "triton"
            with pytest.raises(backends.BackendUnavailable, match=f"no implementation of {op} for cpu"):
                backends.choose(op, "cpu")


def test_float64_goes_to_the_next_backend():
    x = tokens(1, 12, 8, torch.float64)
    score = IMPLEMENTATIONS["laplacian_score"](x, 3, 4, "l1")
    assert torch.equal(score, reference.laplacian_score(x, (3, 4)))
    with use_backend("triton"), pytest.raises(backends.BackendUnavailable, match="does not compute in float64"):
        IMPLEMENTATIONS["laplacian_score"](x, 3, 4, "l1")


def test_long_rows_go_to_the_next_backend():
    packed = torch.zeros(1, 65_537), torch.zeros(1, 65_537, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    expected = reference.merge_plan(*packed, 5, (1, 65_537))
    assert torch.equal(IMPLEMENTATIONS["merge_plan"](*packed, 5)[0], expected.slot)
    with use_backend("triton"), pytest.raises(backends.BackendUnavailable, match="at most 65536 tokens, got 65537"):
        IMPLEMENTATIONS["merge_plan"](*packed, 5)


@pytest.mark.parametrize("share", [1, 2])
def test_lgtm_plan_op_is_the_method(share):
    x = tokens(4, 63, 16)
    args = (x, 7, 9, 2, 2, 30, -1, share)
    tables = torch.ops.bigain.lgtm_plan(*args)
    with use_backend("reference"):
        plan = methods.lgtm_plan(x, (7, 9), 30.5 / 63, share_plan=share)
    for table, name in zip(tables, ("slot", "offsets", "members", "anchor"), strict=True):
        assert torch.equal(table, getattr(plan, name))
    torch.library.opcheck(torch.ops.bigain.lgtm_plan.default, args)


def test_fake_cuda_tensors_are_traced():
    with FakeTensorMode():
        x = torch.empty(2, 64, 32, dtype=torch.bfloat16, device="cuda")
        slot, offsets, members, anchor = torch.ops.bigain.lgtm_plan(x, 8, 8, 2, 2, 40, -1, 1)
        y = torch.ops.bigain.token_merge(x, slot, offsets, members, anchor, "mean", None)
        out = torch.ops.bigain.token_unmerge(y, slot, offsets, members, anchor, x, None)
    assert y.shape == (2, 24, 32)
    assert out.shape == x.shape
    assert out.device.type == "cuda"
