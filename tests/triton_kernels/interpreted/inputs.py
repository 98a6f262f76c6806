"""Inputs of the interpreted checks: small, since every program runs in Python."""

from __future__ import annotations

import torch

from tests.shapes import tokens

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (batch, grid, stride, channels, strided): odd grids, leftover strips, single rows and columns, one token, channels
# below, above and no multiple of a block of 64.
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
]
IDS = [f"{b}x{g[0]}x{g[1]}-{s[0]}x{s[1]}-C{c}{'-strided' * strided}" for b, g, s, c, strided in CASES]


def odd_tokens(batch, n, channels, dtype, strided=False, seed=0):
    """Random tokens among which are a zero, a NaN, an infinite and two equal ones."""
    x = tokens(batch, n, channels, dtype, seed=seed, strided=strided)
    if n >= 8:
        x[0, 1], x[-1, n - 1], x[batch // 2, n // 2] = 0, torch.nan, torch.inf
        x[:, 4] = x[:, 6]
    return x
