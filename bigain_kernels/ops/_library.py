"""The torch.library namespace `bigain`, and what all its ops share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import backends
from ..backends.reference import IMPLEMENTATIONS
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
    LIBRARY.impl(name, refuse_derivatives(name, dispatch), "Autograd", with_keyset=True)
    torch.library.register_vmap(f"bigain::{name}", one_by_one(name), lib=LIBRARY)
