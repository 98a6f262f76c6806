"""The torch.library namespace `bigain`, and what all its ops share."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import _C

from ..backends import implementation
from ..declaration import OPS, Op
from ._autograd import define_refusal, refuse_derivatives
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


def define(op: Op) -> Callable[..., Any]:
    """Register an op: in torch.library, and in `OPS`. Returns the op, which takes the flat arguments."""
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
    LIBRARY.impl(op.name, refuse_derivatives(op, dispatch), "Autograd", with_keyset=True)
    torch.library.register_fake(f"bigain::{op.name}", lambda *args: fake()(*args), lib=LIBRARY)
    torch.library.register_vmap(f"bigain::{op.name}", one_by_one(op.name), lib=LIBRARY)
    for key in ("AutocastCPU", "AutocastCUDA"):
        LIBRARY.impl(op.name, without_autocast, key)
    return overload
