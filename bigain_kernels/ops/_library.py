"""The torch.library namespace `bigain`, and what all its ops share."""

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
from ..declaration import OPS, Op
from ._autograd import autograd_kernel, define_refusal
from ._vmap import one_by_one


def _library() -> torch.library.Library:
    """The namespace, which a process can define once.

    Raises:
        ImportError: another copy of this package has defined it.
    """
    try:
        return torch.library.Library("bigain", "DEF")
    except RuntimeError as error:
        raise ImportError(
            f"bigain_kernels: got a second copy at {Path(__file__).parents[1]}, expected one in a process: "
            "another copy of the package has registered the ops torch.ops.bigain"
        ) from error


# Keeping the Library object alive keeps the registrations alive. C++ and Triton only add implementations to it.
LIBRARY = _library()
define_refusal(LIBRARY)
_AUTOCAST = _C.DispatchKeySet(_C.DispatchKey.AutocastCPU) | _C.DispatchKeySet(_C.DispatchKey.AutocastCUDA)

# What is said of a thread in which nothing looks at ops on their way to the device, as bits of dispatch keys: these at
# most are included, the autocast of both devices is excluded. Modes, transforms and tracers include a key of theirs.
_INCLUDED = ~(
    _C.DispatchKeySet(_C.DispatchKey.BackendSelect) | _C.DispatchKeySet(_C.DispatchKey.ADInplaceOrView)
).raw_repr()
_EXCLUDED = _AUTOCAST.raw_repr()
# Tensors without a behaviour of their own, and what else goes by itself through a schema.
_PLAIN = frozenset({Tensor, Parameter, int, float, str, type(None)})


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


def define(op: Op) -> Callable[..., Any]:
    """Register an op: in torch.library, and in `OPS`.

    Returns what public functions call with the flat arguments: the op, past the dispatcher where that has nothing to
    add, since its way through schema and Python takes longer than the choice of a backend.
    """
    OPS[op.name] = op
    device_of = op.device_of()

    def dispatch(*args: Any) -> Any:
        return implementation(op.name, device_of(args), args)(*args)

    @cache
    def fake() -> Callable[..., Any]:
        return op.of_public(op.fake)

    LIBRARY.define(op.schema)
    overload = getattr(torch.ops.bigain, op.name).default

    def without_autocast(*args: Any) -> Any:
        # The ops say what they compute in; PyTorch's own inside them shall not go to another dtype.
        with _C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return overload(*args)

    # One Python kernel for all devices: the backend is chosen at the call, so use_backend works in compiled code too.
    LIBRARY.impl(op.name, dispatch, "CompositeExplicitAutograd")
    LIBRARY.impl(op.name, autograd_kernel(op, dispatch), "Autograd", with_keyset=True)
    torch.library.register_fake(f"bigain::{op.name}", lambda *args: fake()(*args), lib=LIBRARY)
    torch.library.register_vmap(f"bigain::{op.name}", one_by_one(op.name), lib=LIBRARY)
    for key in ("AutocastCPU", "AutocastCUDA"):
        LIBRARY.impl(op.name, without_autocast, key)

    def call(*args: Any) -> Any:
        if not torch.compiler.is_compiling() and _is_plain(args):
            return dispatch(*args)
        return overload(*args)

    return call
