"""How sure a difference is: over images and over seeds."""

from __future__ import annotations

import numpy as np

# Draws of a bootstrap. The ends of a 95 % interval move by a hundredth of its length or so from one set to another.
_DRAWS = 2000


def bootstrap(first: np.ndarray, second: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """The mean of first - second with its 95 % interval over images and seeds.

    Both are drawn again with replacement, images and seeds apart: another set of images would differ, and so would
    another noise. With one seed there is nothing to say about the latter, and the interval covers images alone.

    Args:
        first, second: (seeds, images), of the same seeds and images.
        seed: of the draws.

    Raises:
        ValueError: the two do not belong together.
    """
    if first.shape != second.shape or first.ndim != 2 or not first.size:
        raise ValueError(f"second: got shape {second.shape}, expected (seeds, images) as of first, {first.shape}")
    difference = first.astype(np.float64) - second.astype(np.float64)
    seeds, images = difference.shape
    random = np.random.default_rng(seed)
    means = np.empty(_DRAWS)
    for i in range(_DRAWS):
        rows = random.integers(seeds, size=seeds)
        counts = np.bincount(random.integers(images, size=images), minlength=images)
        means[i] = difference[rows].mean(axis=0) @ counts / images
    low, high = np.quantile(means, [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)
