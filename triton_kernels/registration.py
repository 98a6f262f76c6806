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

from bigain_kernels.declaration import OPS, Op

from ._common import FLOAT_DTYPES, MAX_TOKENS
from .launching import cdiv
from .lgtm_plan import LARGEST_TILE
from .repeated import repeated
from .select_destinations import MOST_SCORES, scores_of_a_program

_PLANS = ("merge_plan", "block_merge_plan", "lgtm_plan")

# A grid of programs has at most 65,535 of them along its second and third axis: blocks of 16 tokens (and, in merging, a
# program per 1,024 tokens), and rows of up to four tensors.
MOST_TOKENS = 1_000_000
MOST_ROWS = 16_383
_MOST_PROGRAMS = 65_535
_INT_MAX = 2**31 - 1
# The smallest tile of similarities in a config: sources, destinations.
TILE = (64, 32)


# Floating-point numbers that no kernel computes in: float64, and all below 16 bits.
_REFUSED = {each for each in vars(torch).values() if isinstance(each, torch.dtype) and each.is_floating_point} - set(
    FLOAT_DTYPES
)


def _score_refusal(x: Tensor, height: int, width: int, norm: str, frames: int) -> str:
    # A program for each frame, and for at least two rows of the grid.
    if x.shape[0] * frames > _MOST_PROGRAMS:
        return f"launches at most {_MOST_PROGRAMS} frames, got {x.shape[0]} rows of {frames}"
    if height > 2 * _MOST_PROGRAMS:
        return f"launches grids of at most {2 * _MOST_PROGRAMS} rows, got {height}"
    return ""


def _select_refusal(score: Tensor, height: int, width: int, sy: int, sx: int) -> str:
    scores = scores_of_a_program((height, width), (sy, sx))
    if scores > MOST_SCORES:
        return f"selects from rows of tiles with at most {MOST_SCORES} scores, got {scores}"
    return ""


def _similarity_refusal(rows: int, sources: int, destinations: int) -> str:
    # A program counts the tiles of the whole launch in 32 bits.
    if rows * cdiv(sources, TILE[0]) * cdiv(destinations, TILE[1]) > _INT_MAX:
        lists = f"{rows} rows of {sources} by {destinations}"
        return f"matches at most {_INT_MAX} tiles of {TILE[0]} by {TILE[1]} tokens, got {lists}"
    return ""


def _match_refusal(x: Tensor, destinations: Tensor, *_: int) -> str:
    rows, tokens, count = x.shape[0], x.shape[1], destinations.shape[1]
    if rows * tokens > _INT_MAX:
        return f"matches at most {_INT_MAX} tokens, got {rows} rows of {tokens}"
    return _similarity_refusal(rows, tokens - count, count)


def _lgtm_refusal(x: Tensor, height: int, width: int, sy: int, sx: int, r: int, window: int, share: int) -> str:
    if sy * sx > LARGEST_TILE:
        refused = _select_refusal(x, height, width, sy, sx)
    elif cdiv(height, sy) > _MOST_PROGRAMS:
        refused = f"launches at most {_MOST_PROGRAMS} rows of tiles, got {cdiv(height, sy)}"
    else:
        refused = ""
    count = (height // sy) * (width // sx)
    return refused or _similarity_refusal(x.shape[0] // share, x.shape[1] - count, count)


# What single ops refuse beside what all do, by their flat arguments.
_OWN: dict[str, Callable[..., str]] = {
    "laplacian_score": _score_refusal,
    "select_destinations": _select_refusal,
    "bipartite_match": _match_refusal,
    "lgtm_plan": _lgtm_refusal,
}


def refusal(op: str, args: tuple[Any, ...]) -> str:
    """Why the kernels cannot run a call; empty when they can."""
    # Looked at in every call, so written to take few steps.
    tensors = args[0] if args[0].__class__ is not Tensor and isinstance(args[0], (list, tuple)) else ()
    tokens, device = 0, None
    for tensor in (*tensors, *args):
        if not isinstance(tensor, Tensor):
            continue
        if tensor.dtype in _REFUSED:
            return f"does not compute in {str(tensor.dtype).removeprefix('torch.')}"
        if device is None:
            device, rows = tensor.get_device(), tensor.shape[0]
        elif tensor.get_device() != device:
            return f"takes tensors of one device, got one on {tensor.device}"
        shape = tensor.shape
        if len(shape) > 1 and shape[1] > tokens:
            tokens = shape[1]
    if rows > MOST_ROWS or tokens > MOST_TOKENS:
        return f"launches at most {MOST_ROWS} rows of {MOST_TOKENS} tokens, got {rows} of {tokens}"
    if op in _PLANS and args[0].shape[1] > MAX_TOKENS:
        return f"plans rows of at most {MAX_TOKENS} tokens, got {args[0].shape[1]}"
    own = _OWN.get(op)
    return own(*args) if own is not None else ""


def _launcher(op: str) -> Callable[..., Any]:
    module = import_module(f".{op}", __package__)
    return getattr(module, f"run_{op}", None) or getattr(module, f"launch_{op}")


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device: `launch` with that of its tensors for the current one."""

    def run(*args: Any) -> Any:
        index = (args[0][0] if isinstance(args[0], (list, tuple)) else args[0]).get_device()
        if index < 0 or index == torch.cuda.current_device():
            return launch(*args)
        with torch.cuda.device(index):
            return launch(*args)

    return run


def _implementation(declared: Op) -> Callable[..., Any]:
    launch = declared.of_launcher(_launcher(declared.name))
    # An alpha may be another at each step: calls with numbers that are no integers are seldom of one kind.
    kinds = [parameter.split(" ")[0] for each in declared.arguments for parameter in each.parameters]
    seldom = {"float", "float?", "Tensor[]"} & set(kinds)
    return _on_its_device(launch if seldom else repeated(launch))


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {op: _implementation(declared) for op, declared in OPS.items()}
