"""The denoising errors of one image: what was asked of the model about it, and scores of its classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# What is kept of prediction - target, each the mean over channels and pixels. Huber's is that of torch with delta 1.
METRICS = ("l2", "l1", "huber")
SCORES = ("mean", "standardised")


@dataclass(frozen=True)
class ImageErrors:
    """Errors of one image by noise sample and class. NaN where a class was not asked about a sample.

    Attributes:
        classes: (K,) int64, the classes that may be asked about.
        timesteps: (S,) int64, of each sample.
        values: (3, S, K) float32, by `METRICS`.
    """

    classes: np.ndarray
    timesteps: np.ndarray
    values: np.ndarray

    @staticmethod
    def empty(classes: np.ndarray) -> ImageErrors:
        return ImageErrors(
            classes, np.zeros(0, dtype=np.int64), np.zeros((len(METRICS), 0, len(classes)), dtype=np.float32)
        )

    @property
    def samples(self) -> int:
        """S, noise samples so far."""
        return len(self.timesteps)

    @property
    def asked(self) -> np.ndarray:
        """(S, K) bool."""
        return ~np.isnan(self.values[0])

    def head(self, samples: int) -> ImageErrors:
        """The first `samples` samples alone."""
        return ImageErrors(self.classes, self.timesteps[:samples], self.values[:, :samples])

    def common(self) -> ImageErrors:
        """The samples alone that every class was asked about: what may be compared over all classes."""
        full = self.asked.all(axis=1)
        return ImageErrors(self.classes, self.timesteps[full], self.values[:, full])

    def with_samples(self, first: int, timesteps: np.ndarray, places: np.ndarray, values: np.ndarray) -> ImageErrors:
        """These errors and those of the classes at `places` (k,) for the samples from `first` on, (3, s, k)."""
        last = max(self.samples, first + len(timesteps))
        grown = np.full((len(METRICS), last, len(self.classes)), np.nan, dtype=np.float32)
        grown[:, : self.samples] = self.values
        grown[:, first : first + len(timesteps), places] = values
        times = np.zeros(last, dtype=np.int64)
        times[: self.samples] = self.timesteps
        times[first : first + len(timesteps)] = timesteps
        return ImageErrors(self.classes, times, grown)


def _scales(errors: np.ndarray, timesteps: np.ndarray) -> dict[int, float]:
    """The spread over classes of each timestep, by which its errors (S, K) are divided.

    It is the standard deviation over all classes at the first sample of the timestep that asked most of them. A
    timestep that only survivors were asked about has no such spread: of theirs alone, two would always stand one
    deviation apart, however little they differ. It takes the relative spread, deviation over mean error, that the
    timesteps have which all classes were asked about.
    """
    asked = ~np.isnan(errors)
    count, most = asked.sum(axis=1), int(asked.sum(axis=1).max(initial=0))
    scales: dict[int, float] = {}
    relative, pending = [], {}
    for t in dict.fromkeys(timesteps.tolist()):
        rows = np.flatnonzero(timesteps == t)
        row = errors[rows[np.argmax(count[rows])]]
        here = row[~np.isnan(row)].astype(np.float64)
        if len(here) == most and most > 1:
            scales[t] = float(here.std(ddof=1))
            relative.append(scales[t] / max(float(here.mean()), 1e-30))
        else:
            pending[t] = float(here.mean())
    for t, mean in pending.items():
        scales[t] = float(np.mean(relative)) * mean if relative else 1.0
    return {t: max(scale, 1e-30) for t, scale in scales.items()}


def scores(errors: ImageErrors, kind: str = "mean", metric: str = "l2") -> np.ndarray:
    """One number for each class, the less the likelier; NaN for one that was never asked about.

    Classes are comparable that were asked about the same samples; see `ImageErrors.common`.

    Args:
        errors: of an image.
        kind: "mean" of the errors of a class; or "standardised": the mean over timesteps of what is left of them when
            the mean over the classes asked is taken off each sample and the spread of its timestep divided out, so
            that every timestep has the same say.
        metric: one of `METRICS`.

    Returns:
        (K,) float64.

    Raises:
        ValueError: there is no such kind or metric.
    """
    if kind not in SCORES:
        raise ValueError(f"score: got {kind!r}, expected one of {list(SCORES)}")
    if metric not in METRICS:
        raise ValueError(f"metric: got {metric!r}, expected one of {list(METRICS)}")
    values = errors.values[METRICS.index(metric)].astype(np.float64)
    if kind == "mean":
        return _mean(values)
    scales = _scales(values, errors.timesteps)
    levelled = np.stack([row - _mean(row[:, None]) for row in values]) if len(values) else values
    by_timestep = [_mean(levelled[errors.timesteps == t] / scale) for t, scale in sorted(scales.items())]
    return _mean(np.stack(by_timestep)) if by_timestep else np.full(len(errors.classes), np.nan)


def _mean(values: np.ndarray) -> np.ndarray:
    """The mean over the first axis of what is not NaN; NaN where nothing is."""
    there = ~np.isnan(values)
    count = there.sum(axis=0)
    total = np.where(there, values, 0.0).sum(axis=0)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
