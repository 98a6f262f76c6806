"""Runs the kernels on CPU tensors in Triton's interpreter; `test_interpreted.py` starts a process for each file here.

TRITON_INTERPRET must be set before Triton is imported, and a process that has it set can compile nothing. So these
files are named check_*.py, which an ordinary run does not collect.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from bigain_kernels.testing import poisoned

assert os.environ.get("TRITON_INTERPRET") == "1", "run these files through tests/triton_kernels/test_interpreted.py"


def _to_float32(handle):
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """tl.dot in an order of its own: channel by channel into the accumulator, whatever the shape of the block.

    The interpreter leaves the order to a BLAS, which chooses it by shape, and multiplies the bits of bfloat16 numbers
    as integers.
    """
    total, left, right = d.data.copy(), _to_float32(a).astype(np.float32), _to_float32(b).astype(np.float32)
    for k in range(left.shape[1]):
        total += left[:, k, None] * right[None, k, :]
    return TensorHandle(total, d.dtype.scalar)


_cast = InterpreterBuilder.cast_impl


def _cast_impl(self, src, dst_type):
    """float32 to bfloat16 rounds to nearest even on a GPU; the interpreter cuts the low bits off."""
    if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
        values = torch.from_numpy(np.ascontiguousarray(src.data))
        return TensorHandle(values.bfloat16().view(torch.uint16).numpy().reshape(src.data.shape), tl.bfloat16)
    return _cast(self, src, dst_type)


@pytest.fixture(autouse=True)
def _interpreter_as_exact_as_a_gpu(monkeypatch):
    monkeypatch.setattr(InterpreterBuilder, "create_dot", _dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", _cast_impl)
    for name in ("create_fp_trunc", "create_fp_ext"):
        monkeypatch.setattr(InterpreterBuilder, name, lambda self, src, dst_type: self.cast_impl(src, dst_type))


@pytest.fixture(autouse=True)
def _poisoned_buffers(monkeypatch):
    """What launchers allocate is full of NaN, so that an element that no program writes is seen."""

    def empty(shape, *, dtype, device):
        return poisoned(*shape, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", lambda x: poisoned(*x.shape, dtype=x.dtype, device=x.device))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield
