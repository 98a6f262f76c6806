"""Inputs of the tests of this folder: small where kernels are emulated, and the same on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.shapes import tokens

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (batch, grid, stride, channels, strided): odd grids, leftover strips, single rows and columns, one token, channels
# that are one, fewer than a 16-byte vector, no multiple of one, more than the tensor cores sum at a time.
CASES = [
    (3, (8, 8), (2, 2), 64, False),
    (3, (7, 9), (2, 2), 72, True),
    (1, (9, 5), (3, 2), 320, True),
    (2, (4, 6), (1, 1), 64, False),
    (1, (1, 9), (1, 2), 71, False),
    (2, (9, 1), (2, 1), 64, True),
    (2, (1, 1), (2, 2), 64, False),
    (1, (1, 7), (2, 2), 3, False),
    (2, (6, 5), (2, 2), 1, False),
    (1, (6, 6), (2, 2), 1152, False),
    (1, (26, 23), (3, 2), 40, False),
]
IDS = [f"{b}x{g[0]}x{g[1]}-{s[0]}x{s[1]}-C{c}{'-strided' * strided}" for b, g, s, c, strided in CASES]
# How the emulator goes through blocks and the threads of a block: ascending, descending, shuffled.
ORDERS = [0, -1, 3]


def odd_tokens(batch, n, channels, dtype, strided=False, seed=0):
    """Random tokens among which are a zero, a NaN, an infinite and two equal ones."""
    x = tokens(batch, n, channels, dtype, seed=seed, strided=strided)
    if n >= 8:
        x[0, 1], x[-1, n - 1], x[batch // 2, n // 2] = 0, torch.nan, torch.inf
        x[:, 4] = x[:, 6]
    return x


def on_device(tensor: Tensor, device: str) -> Tensor:
    """The tensor on a device, with its strides: `to` alone makes slices contiguous."""
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(device)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
