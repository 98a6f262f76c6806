"""The backend "triton": Triton's kernels on CUDA tensors, and in Triton's interpreter on CPU tensors as well.

Neither Triton nor the kernels are imported before the first call that they run.
"""

from __future__ import annotations

import functools
import os
from importlib.util import find_spec
from typing import Any

from .backend import Backend, Implementation

# Triton reads it at import; the kernels then run in Python, which is for looking at them, not for speed.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_KERNELS = f"{__name__.split('.')[0]}.triton_kernels"


def _missing() -> str:
    if find_spec("triton") is None:
        return "Triton is not installed"
    # The kernels lie in a folder of their own, which an uninstalled copy of the sources does not map to this name.
    if find_spec(_KERNELS) is None:
        return "this installation was made without the Triton kernels"
    return ""


@functools.cache
def _registration() -> Any:
    from ..triton_kernels import registration

    return registration


def _implement(op: str) -> Implementation | None:
    if find_spec(f"{_KERNELS}.{op}") is None:
        return None

    def run(*arguments: Any) -> Any:
        return _registration().IMPLEMENTATIONS[op](*arguments)

    return run


def _refuses(op: str, arguments: tuple[Any, ...]) -> str:
    return _registration().refusal(op, arguments)


TRITON = Backend(
    "triton",
    _implement,
    devices=("cuda", "cpu") if _INTERPRETED else ("cuda",),
    priority=-1 if _INTERPRETED else 10,
    missing=_missing(),
    refuses=_refuses,
)
