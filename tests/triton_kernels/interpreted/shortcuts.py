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

from bigain_kernels.triton_kernels import configs

_pick = configs._pick
_init_block_type, _init_tensor = tl.block_type.__init__, tl.tensor.__init__
_with_element_ty, _unwrap = tl.block_type.with_element_ty, tl.core._unwrap_if_constexpr
_broadcast, _np_dtype = TritonSemantic.broadcast_impl_value, interpreter._get_np_dtype
_computation_type = TritonSemantic.computation_type_impl
# By element type and shape; the type in the value keeps the id in the key its own.
_block_types: dict[tuple[int, ...], tl.block_type] = {}
_np_dtypes: dict[str, np.dtype] = {}
_computation_types: dict[tuple[str, bool, str, bool, bool], tl.dtype] = {}
_PLAIN = frozenset({int, float, bool, str, type(None), tl.tensor, tl.dtype, tl.block_type, tl.pointer_type})


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


def with_element_ty(self: tl.block_type, scalar_ty: tl.dtype) -> tl.block_type:
    return self if scalar_ty is self.element_ty else _with_element_ty(self, scalar_ty)


def block_type_to_ir(self: tl.block_type, builder: Any) -> tl.block_type:
    """The interpreter's types are those of the language."""
    return self


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


def computation_type(
    self: TritonSemantic, a_ty: tl.dtype, a_is_scalar: bool, b_ty: tl.dtype, b_is_scalar: bool, div_or_mod: bool
) -> tl.dtype:
    key = (a_ty.name, a_is_scalar, b_ty.name, b_is_scalar, div_or_mod)
    if key not in _computation_types:
        _computation_types[key] = _computation_type(self, a_ty, a_is_scalar, b_ty, b_is_scalar, div_or_mod)
    return _computation_types[key]


def unwrap(x: Any) -> Any:
    """What a constexpr holds is never one itself."""
    kind = type(x)
    if kind is tl.constexpr:
        return x.value
    return x if kind in _PLAIN else _unwrap(x)


def np_dtype(of: tl.dtype) -> np.dtype:
    name = of.scalar.name
    if name not in _np_dtypes:
        _np_dtypes[name] = _np_dtype(of)
    return _np_dtypes[name]


def no_check_of_overflow(*_: Any) -> None:
    """Triton computes every sum of integers again in 64 bits, and without its option `debug` does not look at it."""


def coarse(op: str, architecture_name: str, size: str) -> configs.Config:
    """All configs give the same bits; matching within a window takes hundreds of operations a program, of any size."""
    config = _pick(op, architecture_name, size)
    return {**config, "VECTORS": 2048} if op == "match_near" else config


def take(monkeypatch: Any) -> None:
    """Take the shortcuts for one test."""
    monkeypatch.setattr(configs, "_pick", coarse)
    monkeypatch.setattr(tl.block_type, "__init__", block_type_init)
    monkeypatch.setattr(tl.block_type, "with_element_ty", with_element_ty)
    monkeypatch.setattr(tl.block_type, "to_ir", block_type_to_ir)
    monkeypatch.setattr(tl.tensor, "__init__", tensor_init)
    monkeypatch.setattr(tl.core, "_unwrap_if_constexpr", unwrap)
    monkeypatch.setattr(TritonSemantic, "computation_type_impl", computation_type)
    monkeypatch.setattr(TritonSemantic, "broadcast_impl_value", broadcast)
    monkeypatch.setattr(TritonSemantic, "binary_op_sanitize_overflow_impl", no_check_of_overflow)
    monkeypatch.setattr(interpreter, "_get_np_dtype", np_dtype)
