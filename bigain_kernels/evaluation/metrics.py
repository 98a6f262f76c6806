"""What is measured, each number with its standard error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Measured:
    """A number and its standard error."""

    value: float
    error: float


def binomial_error(fraction: float, n: int) -> float:
    """Standard error of a fraction of `n` independent trials, sqrt(p (1 - p) / n); NaN for n = 0."""
    return math.sqrt(max(0.0, fraction * (1 - fraction)) / n) if n else math.nan


def fraction_true(outcomes: torch.Tensor) -> Measured:
    """The fraction of true values in `outcomes` (n,) bool, with its binomial standard error."""
    n = outcomes.numel()
    fraction = outcomes.double().mean().item() if n else math.nan
    return Measured(fraction, binomial_error(fraction, n))


def mean(values: torch.Tensor) -> Measured:
    """The mean of `values` (n,) with its standard error, the sample standard deviation over sqrt(n)."""
    n = values.numel()
    if n == 0:
        return Measured(math.nan, math.nan)
    return Measured(values.double().mean().item(), values.double().std().item() / math.sqrt(n) if n > 1 else math.nan)


def paired_difference(first: torch.Tensor, second: torch.Tensor) -> Measured:
    """Mean of first - second over the same items, with the standard error of the paired difference.

    Pairing removes what both share, such as images that are hard for every method, so this error is smaller than that
    of the difference of two independent means.

    Raises:
        ValueError: the two are not of the same shape.
    """
    if first.shape != second.shape:
        raise ValueError(f"second: got shape {tuple(second.shape)}, expected that of first, {tuple(first.shape)}")
    return mean(first.double() - second.double())


def _root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T


class FrechetDistance:
    """Frechet distance of sets of features from one reference, by the normal distributions fitted to both, in float64.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2) (Dowson and Landau, 1982; Heusel et al., 2017, use it as FID).
    The symmetric form needs eigenvalues of symmetric matrices only, so it is real even when a covariance is singular.
    The estimate from n samples is biased upwards by about 1/n: compare only distances from equal numbers of samples.

    Args:
        reference: (m, features), m at least 2.

    Raises:
        ValueError: wrong shapes, here and in the call.
    """

    def __init__(self, reference: torch.Tensor) -> None:
        self.mean, self.cov = self._moments("reference", reference)
        self.root = _root(self.cov)

    def _moments(self, name: str, features: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        if features.ndim != 2 or features.shape[0] < 2:
            raise ValueError(f"{name}: got shape {tuple(features.shape)}, expected (n, features) with n at least 2")
        values = features.double().cpu().numpy()
        return values.mean(axis=0), np.cov(values, rowvar=False).reshape(values.shape[1], -1)

    def __call__(self, features: torch.Tensor) -> float:
        """The distance of `features` (n, features), n at least 2, from the reference."""
        mean, cov = self._moments("features", features)
        if mean.shape != self.mean.shape:
            raise ValueError(f"features: got {mean.size} features, expected {self.mean.size} as in the reference")
        cross = np.sqrt(np.linalg.eigvalsh(self.root @ cov @ self.root).clip(min=0.0)).sum()
        return float(((mean - self.mean) ** 2).sum() + np.trace(cov) + np.trace(self.cov) - 2 * cross)

    def measure(self, features: torch.Tensor) -> Measured:
        """The distance with its bootstrap error over `features`."""
        error = bootstrap_error(lambda chosen: self(features[chosen]), features.shape[0])
        return Measured(self(features), error)

    def difference(self, first: torch.Tensor, second: torch.Tensor) -> Measured:
        """Distance of `first` minus distance of `second`, (n, features) both, resampled in pairs.

        Sample i of both is made from the same noise and label.
        """
        error = bootstrap_error(lambda chosen: self(first[chosen]) - self(second[chosen]), first.shape[0])
        return Measured(self(first) - self(second), error)


def bootstrap_error(statistic: Callable[[torch.Tensor], float], n: int, repeats: int = 50, seed: int = 0) -> float:
    """Standard error of a statistic of n samples by the bootstrap (Efron, 1979).

    Args:
        statistic: takes the indices (n,) int64 of resampled samples.
        n: number of samples.
        repeats, seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    values = [statistic(torch.from_numpy(rng.integers(0, n, n))) for _ in range(repeats)]
    return float(np.std(values, ddof=1))
