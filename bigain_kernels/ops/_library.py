"""The torch.library namespace `bigain` (`declaration.NAMESPACE`), and what all its ops share."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad, profiler
from torch.nn import Parameter

from ..backends import implementation
from ..declaration import NAMESPACE, OPS, PUBLIC, Op
from ._vmap import one_by_one


def _library() -> torch.library.Library:
    """The namespace, which a process can define once.

    Raises:
        ImportError: another copy of this package has defined it.
    """
    try:
        return torch.library.Library(NAMESPACE, "DEF")
    except RuntimeError as error:
        raise ImportError(
            f"bigain_kernels: got a second copy at {Path(__file__).parents[1]}, expected one in a process: "
            f"another copy of the package has registered the ops torch.ops.{NAMESPACE}"
        ) from error


# Keeping the Library object alive keeps the registrations alive. C++ and Triton only add implementations to it.
LIBRARY = _library()
# Sets of dispatch keys as bits, which compare fast. Of a call with nothing special about it, no other key than that of
# its device is below autograd and the bookkeeping of views.
BELOW = _C._after_ADInplaceOrView_keyset.raw_repr()
DEVICES = {_C.DispatchKeySet(key).raw_repr() for key in (_C.DispatchKey.CPU, _C.DispatchKey.CUDA)}
_AUTOCAST = _C.DispatchKeySet(_C.DispatchKey.AutocastCPU) | _C.DispatchKeySet(_C.DispatchKey.AutocastCUDA)

# What is said of a thread in which nothing looks at ops on their way to the device, as bits of dispatch keys: these at
# most are included, the autocast of both devices is excluded. Modes, transforms and tracers include a key of theirs.
_INCLUDED = ~(
    _C.DispatchKeySet(_C.DispatchKey.BackendSelect) | _C.DispatchKeySet(_C.DispatchKey.ADInplaceOrView)
).raw_repr()
_EXCLUDED = _AUTOCAST.raw_repr()
# Tensors without a behaviour of their own, and what else goes by itself through a schema.
_PLAIN = frozenset({Tensor, Parameter, int, float, str, type(None)})


def no_derivative(op: str, kind: str = "") -> RuntimeError:
    """The error of whoever asks for a derivative that there is not; `kind` is which, with a space behind it."""
    return RuntimeError(f"bigain_kernels.{op}: has no {kind}derivative; run under torch.no_grad() or detach the input")


def _refuse(gradient: Tensor, shape: list[int], dtype: torch.dtype, op: str) -> Tensor:
    raise no_derivative(op)


# What stands for the gradients in the backward pass of an op that has none, and raises when it runs. It is an op so
# that compiled code, whose backward pass is traced with its forward pass, raises no sooner.
LIBRARY.define("no_derivative(Tensor gradient, SymInt[] shape, ScalarType dtype, str op) -> Tensor")
LIBRARY.impl("no_derivative", _refuse, "CompositeExplicitAutograd")
LIBRARY.impl("no_derivative", lambda gradient, shape, dtype, op: gradient.new_empty(shape, dtype=dtype), "Meta")


def _is_plain(args: tuple[Any, ...]) -> bool:
    """Whether a call means no more than running the op on a CPU or GPU: no derivative, mode, transform or profiler."""
    return (
        _C._dispatch_tls_local_include_set().raw_repr() & _INCLUDED == 0
        and _C._dispatch_tls_local_exclude_set().raw_repr() & _EXCLUDED == _EXCLUDED
        and _PLAIN.issuperset(map(type, args))
        # The imaginary part of a conjugate is negated by the dispatcher, on its way to what reads memory.
        and not any(isinstance(arg, Tensor) and arg.is_neg() for arg in args)
        and (args[0].is_cuda or args[0].is_cpu)
        and not (_C.is_grad_enabled() and _C._any_requires_grad(*args))
        and not _C._len_torch_function_stack()
        and forward_ad._current_level < 0
        and not profiler._is_profiler_enabled
    )


@cache
def _fake(op: str) -> Callable[..., Any]:
    return OPS[op].of_public(OPS[op].fake)


@cache
def _differentiated(op: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """The autograd kernel of an op for all but the usual call. Inference never imports it."""
    from ._autograd import autograd_kernel

    return autograd_kernel(OPS[op], run)


def define(op: Op) -> Callable[..., Any]:
    """Register an op: in torch.library, and in `OPS`.

    Returns what public functions call with the flat arguments: the op, past the dispatcher where that has nothing to
    add, since its way through schema and Python takes longer than the choice of a backend.
    """
    OPS[op.name] = op
    device_of = op.device_of()

    def dispatch(*args: Any) -> Any:
        return implementation(op.name, device_of(args), args)(*args)

    LIBRARY.define(op.schema)
    overload = getattr(PUBLIC, op.name).default

    def without_autocast(*args: Any) -> Any:
        # The ops say what they compute in; PyTorch's own inside them shall not go to another dtype.
        with _C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return overload(*args)

    def autograd(keyset: Any, *args: Any) -> Any:
        # The usual call goes straight to the backend: the way down to the next kernel takes longer than a dispatch.
        recorded = _C.is_grad_enabled() and _C._any_requires_grad(*args)
        if not recorded and forward_ad._current_level < 0 and keyset.raw_repr() & BELOW in DEVICES:
            return dispatch(*args)
        return _differentiated(op.name, dispatch)(keyset, *args)

    # One Python kernel for all devices: the backend is chosen at the call, so use_backend works in compiled code too.
    LIBRARY.impl(op.name, dispatch, "CompositeExplicitAutograd")
    LIBRARY.impl(op.name, autograd, "Autograd", with_keyset=True)
    # As register_fake does, which first looks for its caller in all modules of the process, a fifth of this import.
    LIBRARY.impl(op.name, lambda *args: _fake(op.name)(*args), "Meta")
    torch.library.register_vmap(f"{NAMESPACE}::{op.name}", one_by_one(op.name), lib=LIBRARY)
    for key in ("AutocastCPU", "AutocastCUDA"):
        LIBRARY.impl(op.name, without_autocast, key)

    def call(*args: Any) -> Any:
        if not torch.compiler.is_compiling() and _is_plain(args):
            return dispatch(*args)
        return overload(*args)

    return call
