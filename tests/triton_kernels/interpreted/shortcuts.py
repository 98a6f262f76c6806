"""Shortcuts through Triton's interpreter, most of whose time goes into types: the same results, sooner.

A kernel makes the same few types of blocks again and again, and of each the interpreter works out name, size and shape
anew. Here they are worked out once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_init_block_type, _init_tensor = tl.block_type.__init__, tl.tensor.__init__
_broadcast, _np_dtype = TritonSemantic.broadcast_impl_value, interpreter._get_np_dtype
# By element type and shape; the type in the value keeps the id in the key its own.
_block_types: dict[tuple[int, ...], tl.block_type] = {}
_np_dtypes: dict[str, np.dtype] = {}


def block_type_init(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
    sizes = [*shape]
    if not all(type(size) is int for size in sizes):  # constexpr
        _init_block_type(self, element_ty, shape)
        return
    key = (id(element_ty), *sizes)
    if key in _block_types:
        self.__dict__.update(_block_types[key].__dict__)
    else:
        _init_block_type(self, element_ty, shape)
        _block_types[key] = self


def tensor_init(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
    """All but the handle depends on the type alone, and is kept there."""
    known = type.__dict__.get("_of_its_tensors")
    if known is None:
        _init_tensor(self, handle, type)
        type._of_its_tensors = {name: value for name, value in vars(self).items() if name != "handle"}
    else:
        self.__dict__.update(known)
        self.handle = handle


def broadcast(self: TritonSemantic, lhs: tl.tensor, rhs: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape.values == rhs.type.shape.values:
        return lhs, rhs
    return _broadcast(self, lhs, rhs)


def np_dtype(of: tl.dtype) -> np.dtype:
    name = of.scalar.name
    if name not in _np_dtypes:
        _np_dtypes[name] = _np_dtype(of)
    return _np_dtypes[name]


def no_check_of_overflow(*_: Any) -> None:
    """Triton computes every sum of integers again in 64 bits, and without its option `debug` does not look at it."""


def take(monkeypatch: Any) -> None:
    """Take the shortcuts for one test."""
    monkeypatch.setattr(tl.block_type, "__init__", block_type_init)
    monkeypatch.setattr(tl.tensor, "__init__", tensor_init)
    monkeypatch.setattr(TritonSemantic, "broadcast_impl_value", broadcast)
    monkeypatch.setattr(TritonSemantic, "binary_op_sanitize_overflow_impl", no_check_of_overflow)
    monkeypatch.setattr(interpreter, "_get_np_dtype", np_dtype)
