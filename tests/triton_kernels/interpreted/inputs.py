"""Inputs of the checks, small, since the interpreter runs every program in Python; and the device they run on."""

from __future__ import annotations

import functools
import os

import torch
from torch.utils._pytree import tree_map_only

from bigain_kernels.triton_kernels import configs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = not INTERPRETED and torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if ON_GPU else "cpu")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (batch, grid, stride, channels, strided): odd grids, leftover strips, single rows and columns, one token, channels
# below, above and no multiple of a block of 64, and those of DiT-XL/2 and SDXL.
CASES = [
    (3, (8, 8), (2, 2), 64, False),
    (3, (7, 9), (2, 2), 72, True),
    (1, (9, 5), (3, 2), 320, True),
    (2, (4, 6), (1, 1), 64, False),
    (1, (1, 9), (1, 2), 72, False),
    (2, (9, 1), (2, 1), 64, True),
    (2, (1, 1), (2, 2), 64, False),
    (1, (1, 7), (2, 2), 1, False),
    (1, (6, 6), (2, 2), 1152, False),
    (1, (3, 4), (2, 2), 1280, True),
]
IDS = [f"{b}x{g[0]}x{g[1]}-{s[0]}x{s[1]}-C{c}{'-strided' * strided}" for b, g, s, c, strided in CASES]


def to_device(x):
    """`x` on DEVICE with the strides and the offset that it has."""
    whole = torch.tensor([], dtype=x.dtype).set_(x.untyped_storage()).to(DEVICE)
    return whole.as_strided(x.shape, x.stride(), x.storage_offset())


def on_device(launch):
    """A launcher that takes and returns CPU tensors and runs on DEVICE, so that references are computed on the CPU."""

    @functools.wraps(launch)
    def run(*args, **kwargs):
        args, kwargs = tree_map_only(torch.Tensor, to_device, (args, kwargs))
        return tree_map_only(torch.Tensor, torch.Tensor.cpu, launch(*args, **kwargs))

    return run


def candidates(op):
    """The configs shipped for an op and the GPU at hand."""
    return configs.candidates(op, configs.architecture(DEVICE))
