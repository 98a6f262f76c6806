"""The kernels as implementations of the ops in `torch.ops.bigain`, and what they refuse.

The file that is called like an op has its launcher, `launch_<op>`, and where there are several ways to run the op, the
choice among them, `run_<op>`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from bigain_kernels.declaration import OPS

from ._common import FLOAT_DTYPES, MAX_TOKENS

_PLANS = ("merge_plan", "block_merge_plan", "lgtm_plan")

# A grid of programs has at most 65,535 of them along its second and third axis: blocks of 16 tokens (and, in merging, a
# program per 1,024 tokens), and rows of up to four tensors.
MOST_TOKENS = 1_000_000
MOST_ROWS = 16_383


def refusal(op: str, args: tuple[Any, ...]) -> str:
    """Why the kernels cannot run a call; empty when they can."""
    first, tokens = None, 0
    for arg in args:
        for tensor in arg if isinstance(arg, (list, tuple)) else (arg,):
            if isinstance(tensor, Tensor):
                first = tensor if first is None else first
                if tensor.dtype not in FLOAT_DTYPES and tensor.is_floating_point():
                    return f"does not compute in {str(tensor.dtype).removeprefix('torch.')}"
                if tensor.dim() > 1 and tensor.shape[1] > tokens:
                    tokens = tensor.shape[1]
    assert first is not None
    rows = first.shape[0]
    if rows > MOST_ROWS or tokens > MOST_TOKENS:
        return f"launches at most {MOST_ROWS} rows of {MOST_TOKENS} tokens, got {rows} of {tokens}"
    if op in _PLANS and first.shape[1] > MAX_TOKENS:
        return f"plans rows of at most {MAX_TOKENS} tokens, got {first.shape[1]}"
    return ""


def _launcher(op: str) -> Callable[..., Any]:
    module = import_module(f".{op}", __package__)
    return getattr(module, f"run_{op}", None) or getattr(module, f"launch_{op}")


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device: `launch` with that of its tensors for the current one."""

    def run(*args: Any) -> Any:
        device = (args[0][0] if isinstance(args[0], (list, tuple)) else args[0]).device
        if device.index is None or device.index == torch.cuda.current_device():
            return launch(*args)
        with torch.cuda.device(device):
            return launch(*args)

    return run


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    op: _on_its_device(declared.of_launcher(_launcher(op))) for op, declared in OPS.items()
}
