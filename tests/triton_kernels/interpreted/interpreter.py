"""What Triton's interpreter does otherwise than a GPU, put right."""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

from . import shortcuts


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
    if left.ndim == 2 and np.isfinite(left).all() and np.isfinite(right).all():
        # What lies outside of a tensor is zero, adds nothing, and is most of a block in small tests.
        rows, columns = np.flatnonzero(left.any(axis=1)), np.flatnonzero(right.any(axis=0))
        channels = np.flatnonzero(left.any(axis=0) & right.any(axis=1))
        block = total[np.ix_(rows, columns)]
        left, right = left[np.ix_(rows, channels)], right[np.ix_(channels, columns)]
        for k in range(len(channels)):
            block += left[:, k, None] * right[None, k, :]
        total[np.ix_(rows, columns)] = block
        return TensorHandle(total, d.dtype.scalar)
    for k in range(left.shape[-1]):
        total += left[:, k, None] * right[None, k, :]
    return TensorHandle(total, d.dtype.scalar)


_cast = InterpreterBuilder.cast_impl


def _cast_impl(self, src, dst_type):
    """float32 to bfloat16 rounds to nearest even on a GPU; the interpreter cuts the low bits off.

    bfloat16 to float32 is what the interpreter does, in one step.
    """
    if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
        values = torch.from_numpy(np.ascontiguousarray(src.data))
        return TensorHandle(values.bfloat16().view(torch.uint16).numpy().reshape(src.data.shape), tl.bfloat16)
    if src.dtype.scalar == tl.bfloat16 and dst_type.scalar == tl.float32:
        return TensorHandle(_to_float32(src), tl.float32)
    return _cast(self, src, dst_type)


_run = InterpretedFunction.run
_ready: set[str] = set()


def _launch(self, *args, **kwargs):
    _ready.clear()
    return _run(self, *args, **kwargs)


def _call_device_function(self, *args, **kwargs):
    """Triton puts the interpreter's functions into tl at every call, which takes longer than most functions do.

    Once in a launch is enough for the functions of a module.
    """
    if self.fn.__module__ not in _ready:
        interpreter._patch_lang(self.fn)
        _ready.add(self.fn.__module__)
    function = self.rewrite()
    try:
        return function(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def as_exact_as_a_gpu(monkeypatch):
    """Patch the interpreter for one test."""
    shortcuts.take(monkeypatch)
    monkeypatch.setattr(InterpretedFunction, "run", _launch)
    monkeypatch.setattr(InterpretedFunction, "__call__", _call_device_function)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", _dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", _cast_impl)
    for name in ("create_fp_trunc", "create_fp_ext"):
        monkeypatch.setattr(InterpreterBuilder, name, lambda self, src, dst_type: self.cast_impl(src, dst_type))
