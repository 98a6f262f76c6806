"""Noise that depends only on what it is for, never on batch size, order or the global random state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def seeded_noise(keys: Sequence[tuple[int, ...]], shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise, one independent draw for every key.

    Args:
        keys: one tuple of non-negative integers for each draw, such as (seed, image, sample).
        shape: shape of one draw.

    Returns:
        (len(keys), *shape) float32 on the CPU. A key always gives the same draw.
    """
    noise = torch.empty(len(keys), *shape)
    generator = torch.Generator()
    for row, key in zip(noise, keys, strict=True):
        generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))
        row.normal_(generator=generator)
    return noise
