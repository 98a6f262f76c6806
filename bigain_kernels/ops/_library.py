"""The torch.library namespace `bigain`, and what all its ops share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.reference import IMPLEMENTATIONS


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


def define(
    schema: str, reference: Callable[..., Any], fake: Callable[..., Any], device_of: Callable[..., str] | None = None
) -> None:
    """Define one op: its schema, its reference implementation and its fake.

    Args:
        schema: "name(Tensor x, ...) -> ..." in the language of torch.library.
        reference: implementation for any device, taking the op's arguments.
        fake: shapes and dtypes of the results, for tracing.
        device_of: device type of a call; by default that of the first argument.
    """
    name = schema.split("(", 1)[0]
    IMPLEMENTATIONS[name] = reference

    def dispatch(*args: Any) -> Any:
        device = args[0].device.type if device_of is None else device_of(*args)
        return backends.implementation(name, device, args)(*args)

    LIBRARY.define(schema)
    # One Python kernel for all devices: the backend is chosen at the call, so use_backend works in compiled code too.
    LIBRARY.impl(name, dispatch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bigain::{name}", fake, lib=LIBRARY)


class _RefuseBackward(torch.autograd.Function):
    """The identity, with a backward that says why there is none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, op: str) -> Tensor:
        ctx.op = op
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            f"bigain_kernels.{ctx.op}: has no backward, the ops are for inference; "
            "run under torch.no_grad() or detach the input"
        )


def inference_only(op: str, x: Tensor) -> Tensor:
    """`x`, made to raise instead of returning wrong gradients when something backpropagates through the op."""
    if x.requires_grad and torch.is_grad_enabled():
        return _RefuseBackward.apply(x, op)
    return x
