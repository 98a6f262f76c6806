"""How drawings compare with the images of a data set, by features of both, and with each other, pixel by pixel."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .metrics import Measured

# Sizes at which `FrechetDistance.at_infinity` looks, the smallest part of the samples, and how many samples it takes.
_SIZES, _SMALLEST = 8, 0.5
FEWEST_FOR_INFINITY = 2 * _SIZES
# Parts of the inception score, as it is always given, and the least that one of them may hold.
_PARTS, _LEAST = 10, 10
# One process computes, whoever else is at work: torchmetrics would wait for all of them.
_ALONE = {"sync_on_compute": False}
# Rows whose distances to all others are held at a time.
_ROWS = 1024


def _torchmetrics(module: str) -> Any:
    """A module of torchmetrics.

    Raises:
        ImportError: it is not there, or loads something that does not load.
    """
    from importlib import import_module

    try:
        return import_module(f"torchmetrics.{module}")
    except (ImportError, RuntimeError) as error:
        # A torchvision that was built for another torch fails with a RuntimeError.
        reason = str(error).splitlines()[0]
        raise ImportError(f"torchmetrics: needs pip install torchmetrics that can be imported ({reason})") from error


def what_is_missing() -> str | None:
    """Why FID, inception score and SSIM cannot be computed here, in a line; None where they can."""
    try:
        _torchmetrics("image.fid")
    except ImportError as error:
        return str(error)
    return None


def _check_features(name: str, features: torch.Tensor, least: int, width: int | None = None) -> torch.Tensor:
    """`features` as float64 on the CPU."""
    if features.ndim != 2 or len(features) < least or width not in (None, features.shape[1]):
        expected = f"(n, {width or 'features'}) with n at least {least}"
        raise ValueError(f"{name}: got shape {tuple(features.shape)}, expected {expected}")
    return features.detach().double().cpu()


class FrechetDistance:
    """Frechet distance of sets of features from one reference: that of two normal distributions with their moments.

    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", 2017; computed by torchmetrics in float64. It is
    biased: it falls as samples get more, by about c / n, so that numbers of different n are not comparable.

    Args:
        reference: (m, features), m at least 2.

    Raises:
        ImportError: torchmetrics is not there.
        ValueError: wrong shapes, here and in the calls.
    """

    def __init__(self, reference: torch.Tensor) -> None:
        reference = _check_features("reference", reference, 2)
        self._width = reference.shape[1]
        features = torch.nn.Identity()
        features.num_features = self._width  # type: ignore[assignment]
        self._distance = _torchmetrics("image.fid").FrechetInceptionDistance(
            features, reset_real_features=False, **_ALONE
        )
        self._distance.set_dtype(torch.float64)
        self._distance.update(reference, real=True)

    def measure(self, features: torch.Tensor) -> float:
        """The distance of `features` (n, features), n at least 2."""
        features = _check_features("features", features, 2, self._width)
        self._distance.reset()
        self._distance.update(features, real=False)
        return float(self._distance.compute())

    def at_infinity(self, features: torch.Tensor, seed: int = 0) -> float:
        """The distance that endless samples would have, from those of parts of `features` (n, features), n at least 16.

        A line through the distances of random parts against 1 / size, at 0 (Chong and Forsyth, "Effectively Unbiased
        FID and Inception Score and Where to Find Them", 2020).
        """
        features = _check_features("features", features, FEWEST_FOR_INFINITY, self._width)
        random = np.random.default_rng(seed)
        sizes = np.linspace(_SMALLEST * len(features), len(features), _SIZES).astype(int)
        distances = [self.measure(features[random.permutation(len(features))[:size]]) for size in sizes]
        return float(np.polyfit(1.0 / sizes, distances, 1)[1])


def inception_score(logits: torch.Tensor, seed: int = 0) -> Measured:
    """exp of the mean divergence of the classes of an image from those of all, by `logits` (n, classes), n at least 2.

    Salimans et al., "Improved Techniques for Training GANs", 2016; by torchmetrics. The mean over ten parts of the
    samples in random order, of one with fewer than a hundred, and their standard deviation (not the error of the mean),
    which is how it is always given.

    Raises:
        ImportError: torchmetrics is not there.
        ValueError: wrong shape.
    """
    import warnings

    logits = _check_features("logits", logits, 2)
    parts = _PARTS if len(logits) >= _PARTS * _LEAST else 1
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # It warns of the memory that all features take, and of the deviation of a single part.
        warnings.simplefilter("ignore", UserWarning)
        torch.manual_seed(seed)
        score = _torchmetrics("image.inception").InceptionScore(torch.nn.Identity(), splits=parts, **_ALONE)
        score.update(logits)
        value, deviation = score.compute()
    return Measured(float(value), float(deviation) if parts > 1 else math.nan)


def _nearest(x: torch.Tensor, y: torch.Tensor, reduce: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`reduce` of the distances of each row of x to all of y, a part of the rows at a time."""
    return torch.cat([reduce(torch.cdist(part, y)) for part in x.split(_ROWS)])


def precision_recall(features: torch.Tensor, reference: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """How many of the samples lie where the reference does, and how much of the reference lies where the samples do.

    A set lies where a ball around one of its members reaches that ends at its k-th neighbour (Kynkaanniemi et al.,
    "Improved Precision and Recall Metric for Assessing Generative Models", 2019). torch-fidelity has the same, but
    cannot be imported without torchvision.

    Args:
        features: (n, features) of the samples, n more than k.
        reference: (m, features), m more than k.
        k: neighbours.

    Raises:
        ValueError: wrong shapes.
    """
    reference = _check_features("reference", reference, k + 1)
    features = _check_features("features", features, k + 1, reference.shape[1])

    def covered(of: torch.Tensor, by: torch.Tensor) -> float:
        # Each is its own nearest neighbour.
        reach = _nearest(by, by, lambda distances: distances.kthvalue(k + 1, dim=1).values)
        return float(_nearest(of, by, lambda distances: (distances <= reach).any(dim=1)).double().mean())

    return covered(features, reference), covered(reference, features)


def ssim(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """(n,) structural similarities of `images` to `reference`, (n, C, H, W) in [-1, 1] both, at least 11 x 11 pixels.

    Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004, with its Gaussian
    window of 11 x 11 pixels; by torchmetrics. 1 is equality.

    Raises:
        ImportError: torchmetrics is not there.
        ValueError: the two are of different shapes, or too small.
    """
    if images.shape != reference.shape or images.ndim != 4 or min(images.shape[2:]) < 11:
        raise ValueError(
            f"images: got shape {tuple(images.shape)}, expected that of reference, {tuple(reference.shape)}, (n, C, H, "
            "W) with H and W at least 11"
        )
    similarity = _torchmetrics("functional.image").structural_similarity_index_measure
    pairs = [((part.double().cpu() + 1) / 2).clamp(0, 1) for part in (images, reference)]
    found = [similarity(a[None], b[None], data_range=1.0).reshape(1) for a, b in zip(*pairs, strict=True)]
    return torch.cat(found)
