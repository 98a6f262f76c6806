"""The compiled libraries, one for CPU tensors and one for CUDA tensors: loads what this installation has and can use,
and knows why not otherwise.

The libraries (csrc/, on the stable ABI of LibTorch) define their ops in `torch.ops.bigain_cpp` and
`torch.ops.bigain_cuda`, with the schemas of the ops in `torch.ops.bigain`. Those call them when `backends` chooses the
backend "cpp" or "cuda".

Environment variables for tests: BIGAIN_NATIVE_LIBRARY and BIGAIN_CUDA_LIBRARY are paths of other builds to load,
BIGAIN_CPU_ISA (baseline, avx2 or avx512) an instruction set below the best that the machine has.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FOLDER = Path(__file__).parent
_NAMESPACE = "bigain_cpp"
_CUDA_NAMESPACE = "bigain_cuda"


def _find(stem: str, variable: str) -> tuple[Path | None, str]:
    """A library of this installation, or why there is none."""
    override = os.environ.get(variable)
    library = Path(override) if override else next(iter(sorted(_FOLDER.glob(f"{stem}.*so"))), None)
    if library is not None:
        return library, ""
    reason = _FOLDER / f"{stem}_missing.txt"  # written by setup.py
    return None, reason.read_text() if reason.exists() else "this installation was made without it"


def _load(library: Path) -> str:
    """Load a library; returns why it does not load, or nothing."""
    try:
        torch.ops.load_library(library)
    except OSError as error:
        logging.getLogger(__name__).warning("%s does not load, the ops run without it: %s", library, error)
        return f"{library.name} does not load: {error}"
    return ""


def _load_cpu() -> str:
    library, reason = _find("_native", "BIGAIN_NATIVE_LIBRARY")
    return reason if library is None else _load(library)


def _load_cuda() -> str:
    library, reason = _find("_native_cuda", "BIGAIN_CUDA_LIBRARY")
    if library is None:
        return reason
    # The library calls into libtorch_cuda, which only such a torch has.
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return _load(library) or torch.ops.bigain_cuda.problem()


REASON = _load_cpu()
CUDA_REASON = _load_cuda()


def _implementation(namespace: str, op: str) -> Callable[..., Any] | None:
    packet = getattr(getattr(torch.ops, namespace), op, None)
    return None if packet is None else packet.default


def implementation(op: str) -> Callable[..., Any] | None:
    """The implementation of an op for CPU tensors, or None."""
    return None if REASON else _implementation(_NAMESPACE, op)


def cuda_implementation(op: str) -> Callable[..., Any] | None:
    """The implementation of an op for CUDA tensors, or None. What it refuses, `cuda_refusal` tells before."""
    return None if CUDA_REASON else _implementation(_CUDA_NAMESPACE, op)


@functools.cache
def _has_code_for(device: int) -> bool:
    return torch.ops.bigain_cuda.runs_on(device)


def cuda_refusal(arguments: tuple[Any, ...]) -> str:
    """Why the CUDA library cannot run an op with these arguments; empty when it can."""
    for argument in arguments:
        for tensor in argument if isinstance(argument, (list, tuple)) else (argument,):
            if not isinstance(tensor, Tensor):
                continue
            if tensor.dtype == torch.float64:
                return "does not compute in float64"
            if tensor.is_cuda and not _has_code_for(tensor.device.index):
                major, minor = torch.cuda.get_device_capability(tensor.device)
                return f"was built without sm_{major}{minor}, which {tensor.device} needs"
    return ""


def report() -> str:
    """One line: the instruction set that the CPU library uses and what it was built with, or why there is none."""
    return f"none: {REASON}" if REASON else torch.ops.bigain_cpp.build_info()


def cuda_report() -> str:
    """One line: the architectures that the CUDA library was built for, or why there is none."""
    return f"none: {CUDA_REASON}" if CUDA_REASON else torch.ops.bigain_cuda.build_info()
