"""Inputs of the tests of this folder: small where kernels are emulated, and the same on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# How the emulator goes through blocks and the threads of a block: ascending, descending, shuffled.
ORDERS = [0, -1, 3]


def on_device(tensor: Tensor, device: str) -> Tensor:
    """The tensor on a device, with its strides: `to` alone makes slices contiguous."""
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(device)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
