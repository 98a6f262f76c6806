"""What is measured, each number with how sure it is, and whether two of them differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

# The square of the range of values of an image in [-1, 1].
_PEAK = 4.0
# Rows of a kernel matrix that are held at a time.
_ROWS = 1024


@dataclass(frozen=True)
class Measured:
    """A number and its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class Fraction:
    """A fraction of independent trials with its 95 % interval (Wilson, 1927), which is one at 0 and 1 too."""

    value: float
    low: float
    high: float


def fraction_true(outcomes: torch.Tensor) -> Fraction:
    """The fraction of true values in `outcomes` (n,) bool; NaN for n = 0."""
    from scipy.stats import binomtest

    n = outcomes.numel()
    if n == 0:
        return Fraction(math.nan, math.nan, math.nan)
    count = int(outcomes.sum())
    interval = binomtest(count, n).proportion_ci(0.95, method="wilson")
    return Fraction(count / n, float(interval.low), float(interval.high))


def mean(values: torch.Tensor) -> Measured:
    """The mean of `values` (n,) with its standard error, the sample standard deviation over sqrt(n)."""
    n = values.numel()
    if n == 0:
        return Measured(math.nan, math.nan)
    return Measured(values.double().mean().item(), values.double().std().item() / math.sqrt(n) if n > 1 else math.nan)


def psnr(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """(n,) peak signal-to-noise ratios in decibels of `images` to `reference`, (n, C, H, W) both.

    What is outside of [-1, 1] counts as its end, as it does in a picture. Of equal images it is 126.
    """
    _check_pairs(images, reference)
    error = (images.clamp(-1, 1) - reference.clamp(-1, 1)).double().square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(_PEAK / error.clamp_min(1e-12))


def _check_pairs(first: torch.Tensor, second: torch.Tensor) -> None:
    if first.shape != second.shape:
        raise ValueError(f"second: got shape {tuple(second.shape)}, expected that of first, {tuple(first.shape)}")


def paired_difference(first: torch.Tensor, second: torch.Tensor) -> Measured:
    """Mean of first - second over the same items, with the standard error of the paired difference.

    Pairing removes what both share, such as images that are hard for every method, so this error is smaller than that
    of the difference of two independent means.

    Raises:
        ValueError: the two are not of the same shape.
    """
    _check_pairs(first, second)
    return mean(first.double() - second.double())


def mcnemar(first: torch.Tensor, second: torch.Tensor) -> float:
    """How likely outcomes (n,) bool of the same items would differ so much or more if both were equally good.

    McNemar's test in its exact form, over the items of which only one outcome is true; two-sided.

    Raises:
        ValueError: the two are not of the same shape.
    """
    from scipy.stats import binomtest

    _check_pairs(first, second)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    discordant = only_first + only_second
    return float(binomtest(only_first, discordant).pvalue) if discordant else 1.0


def normal_p(difference: Measured) -> float:
    """How likely a difference so far from zero or farther is if there is none and its estimate is normal; two-sided."""
    if difference.value == 0:
        return 1.0
    if math.isnan(difference.error):
        return math.nan
    return math.erfc(abs(difference.value) / difference.error / math.sqrt(2)) if difference.error else 0.0


def holm(p: Sequence[float]) -> list[float]:
    """p-values of several tests, corrected so that all that are below a level are so by chance that often (Holm, 1979).

    NaN, of a test that could not be made, stays and does not count.
    """
    order = sorted((value, i) for i, value in enumerate(p) if not math.isnan(value))
    corrected, least = [math.nan] * len(p), 0.0
    for rank, (value, i) in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * value))
        corrected[i] = least
    return corrected


class KernelDistance:
    """Kernel inception distance of sets of features from one reference, in float64.

    The unbiased estimate of the squared maximum mean discrepancy under the kernel (x . y / features + 1)^3 (Binkowski
    et al., "Demystifying MMD GANs", 2018). Unlike the Frechet distance it has no bias that grows as samples get fewer,
    and may be below zero where the sets are alike. Errors are of the jackknife over samples and reference.

    Args:
        reference: (m, features), m at least 3.

    Raises:
        ValueError: wrong shapes, here and in the calls.
    """

    def __init__(self, reference: torch.Tensor) -> None:
        self.reference = self._checked("reference", reference)
        self._own, self._own_rows = self._among(self.reference)

    @staticmethod
    def _checked(name: str, features: torch.Tensor) -> np.ndarray:
        if features.ndim != 2 or features.shape[0] < 3:
            raise ValueError(f"{name}: got shape {tuple(features.shape)}, expected (n, features) with n at least 3")
        return features.double().cpu().numpy()

    @staticmethod
    def _sums(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sums of the kernel of x and y over y and over x; the matrix of them all may be of gigabytes."""
        over_y, over_x = np.empty(len(x)), np.zeros(len(y))
        for first in range(0, len(x), _ROWS):
            kernel = (x[first : first + _ROWS] @ y.T / x.shape[1] + 1.0) ** 3
            over_y[first : first + _ROWS] = kernel.sum(axis=1)
            over_x += kernel.sum(axis=0)
        return over_y, over_x

    def _among(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """The sum of the kernel over all pairs of different rows, and of the pairs of each row."""
        rows = self._sums(x, x)[0] - ((x * x).sum(axis=1) / x.shape[1] + 1.0) ** 3
        return float(rows.sum()), rows

    def _estimates(self, features: torch.Tensor) -> tuple[float, np.ndarray, np.ndarray]:
        """The distance, and those without each of the samples and without each of the reference."""
        x = self._checked("features", features)
        if x.shape[1] != self.reference.shape[1]:
            raise ValueError(
                f"features: got {x.shape[1]} features, expected {self.reference.shape[1]} as in the reference"
            )
        n, m = len(x), len(self.reference)
        among, rows = self._among(x)
        of_x, of_reference = self._sums(x, self.reference)
        total = of_x.sum()

        def distance(xx: np.ndarray, n: int, yy: np.ndarray, m: int, xy: np.ndarray) -> np.ndarray:
            return xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m)

        whole = distance(np.asarray(among), n, np.asarray(self._own), m, total)
        without_x = distance(among - 2 * rows, n - 1, np.asarray(self._own), m, total - of_x)
        without_y = distance(np.asarray(among), n, self._own - 2 * self._own_rows, m - 1, total - of_reference)
        return float(whole), without_x, without_y

    @staticmethod
    def _error(*leave_one_out: np.ndarray) -> float:
        variances = [(len(e) - 1) * e.var() for e in leave_one_out]
        return math.sqrt(sum(variances))

    def measure(self, features: torch.Tensor) -> Measured:
        """The distance of `features` (n, features), n at least 3, from the reference."""
        value, *rest = self._estimates(features)
        return Measured(value, self._error(*rest))

    def difference(self, first: torch.Tensor, second: torch.Tensor) -> Measured:
        """Distance of `first` minus distance of `second`, (n, features) both; sample i of both belongs together."""
        _check_pairs(first, second)
        (a, *without_a), (b, *without_b) = self._estimates(first), self._estimates(second)
        return Measured(a - b, self._error(*(x - y for x, y in zip(without_a, without_b, strict=True))))
