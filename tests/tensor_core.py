"""How the tensor cores of Hopper add, as far as it is known, in NumPy: the worst that a kernel has to live with.

Sixteen products at a time are aligned to the largest of them and of the sum so far, cut off two bits below the float32
of that size, added exactly, and rounded towards zero (Fasi et al., "Numerical behavior of NVIDIA tensor cores", 2021,
for the scheme; the block of 16 is the instruction's). Every step loses, so that long sums of one sign come out low.
"""

from __future__ import annotations

import numpy as np

BLOCK = 16
BITS = 24 + 2


def _towards_zero(exact: np.ndarray) -> np.ndarray:
    """float64 to float32, never away from zero."""
    rounded = exact.astype(np.float32)
    return np.where(np.abs(rounded) > np.abs(exact), np.nextafter(rounded, np.float32(0)), rounded)


def dot(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    """total + a @ b for 16-bit values a (M, K) and b (K, N), as float32 (M, N)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    for k in range(0, a.shape[1], BLOCK):
        products = a[:, k : k + BLOCK, None] * b[None, k : k + BLOCK]
        terms = np.concatenate([total[:, None].astype(np.float64), products], axis=1)
        exponent = np.frexp(np.abs(terms).max(axis=1, keepdims=True))[1]
        unit = np.ldexp(1.0, exponent - BITS)
        total = _towards_zero((np.trunc(terms / unit) * unit).sum(axis=1))
    return total
