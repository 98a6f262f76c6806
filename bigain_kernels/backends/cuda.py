"""The backend "cuda": the CUDA C++ library."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import declaration, native
from .backend import Backend, Implementation


def _implement(op: str) -> Implementation | None:
    packet = getattr(declaration.CUDA, op, None)
    return None if packet is None else packet.default


@functools.cache
def _has_code_for(device: int) -> bool:
    return declaration.CUDA.runs_on(device)


def _refuses(op: str, arguments: tuple[Any, ...]) -> str:
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


# Below Triton's, whose matching uses the instructions of newer GPUs. Where both were measured, sizes.py decides.
CUDA = Backend("cuda", _implement, devices=("cuda",), priority=5, missing=native.CUDA_REASON, refuses=_refuses)
