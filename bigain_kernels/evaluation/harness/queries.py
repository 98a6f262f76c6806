"""What a table of rows says: accuracy, ranking, calibration; each a question to the rows, none of them stored."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from ..metrics import Fraction, fraction_true
from .errors import ImageErrors, scores
from .rules import Rule


@dataclass(frozen=True)
class Outcomes:
    """What a rule decided about n images.

    Attributes:
        paths: of the images, sorted.
        labels: true classes of each; several where an image shows several things.
        ranking: (n, K) int32 labels, likeliest first; what was dropped later stands before what was dropped earlier.
        scores: (n, K) by place, the less the likelier, of the samples that every class was asked about, standardised:
            comparable over classes and over images. Where groups of classes were dropped unasked there are no such
            samples: then of those that each class was asked about, and NaN for none.
        classes: (K,) label of each place.
        evaluations: (n,) rows of the model.
        seconds: (n,).
    """

    paths: tuple[str, ...]
    labels: tuple[tuple[int, ...], ...]
    ranking: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    evaluations: np.ndarray
    seconds: np.ndarray

    @property
    def correct(self) -> torch.Tensor:
        """(n,) bool: the likeliest class is among the labels."""
        return self.within(1)

    def within(self, k: int) -> torch.Tensor:
        """(n,) bool: a label is among the k likeliest classes."""
        hits = [
            bool(set(row[:k].tolist()) & set(labels)) for row, labels in zip(self.ranking, self.labels, strict=True)
        ]
        return torch.tensor(hits, dtype=torch.bool)

    def top(self, k: int) -> Fraction:
        """Accuracy among the k likeliest, with its Wilson interval."""
        return fraction_true(self.within(k))

    def per_class(self) -> dict[int, Fraction]:
        """Accuracy over the images that have a label, by label."""
        correct = self.correct
        return {
            int(c): fraction_true(correct[torch.tensor(rows)])
            for c in self.classes
            if (rows := [i for i, labels in enumerate(self.labels) if int(c) in labels])
        }

    @property
    def truth(self) -> np.ndarray:
        """(n, K) bool: which classes an image has."""
        return np.asarray([[int(c) in labels for c in self.classes] for labels in self.labels])

    def mean_average_precision(self) -> float:
        """The mean over classes of the average precision with which `scores` find their images among all.

        Ranked by samples that every class of every image was asked about. Means over whatever samples a class has, the
        rank of the published code, put classes that were dropped in front of those that went on to harder timesteps.
        """
        truth, found = self.truth, []
        for place in range(len(self.classes)):
            if truth[:, place].any():
                hit = truth[np.argsort(self.scores[:, place], kind="stable"), place]
                precision = np.cumsum(hit) / np.arange(1, len(hit) + 1)
                found.append(float(precision[hit].mean()))
        return float(np.mean(found)) if found else float("nan")

    def probabilities(self, temperature: float) -> np.ndarray:
        """(n, K): softmax of -scores / temperature; 0 for a class that was never asked about."""
        # In float32 the least probability that `calibration` lets be would be zero.
        z = self.scores.astype(np.float64) / -temperature
        z = np.where(np.isnan(z), -np.inf, z)
        z = np.exp(z - z.max(axis=1, keepdims=True))
        return z / z.sum(axis=1, keepdims=True)

    def calibration(self, bins: int = 15) -> tuple[float, float]:
        """Expected calibration error of the likeliest class by `scores`, and the temperature at which it is taken.

        The temperature is the one of the largest likelihood on the even images for the odd ones, and the other way
        round; that of all is given back. Bins have as many images each.
        """
        from scipy.optimize import minimize_scalar

        truth = self.truth

        def fitted(rows: np.ndarray) -> float:
            def loss(log_temperature: float) -> float:
                p = self.probabilities(float(np.exp(log_temperature)))[rows]
                return -float(np.log(np.maximum((p * truth[rows]).max(axis=1), 1e-300)).mean())

            return float(np.exp(minimize_scalar(loss, bounds=(-5, 5), method="bounded").x))

        n = len(self.paths)
        even = np.arange(n) % 2 == 0
        if n < 2:
            return float("nan"), float("nan")
        p = np.empty_like(self.scores)
        for rows in (even, ~even):
            p[rows] = self.probabilities(fitted(~rows))[rows]
        best = p.argmax(axis=1)
        sure, right = p[np.arange(n), best], truth[np.arange(n), best]
        parts = [part for part in np.array_split(np.argsort(sure, kind="stable"), bins) if len(part)]
        gaps = [len(part) * abs(float(sure[part].mean()) - float(right[part].mean())) for part in parts]
        return sum(gaps) / n, fitted(np.ones(n, dtype=bool))


def outcomes(images: Iterable[tuple[str, tuple[int, ...], ImageErrors, float]], rule: Rule) -> Outcomes:
    """Decide images by their errors again.

    Args:
        images: as `rows.read_all` gives them.
        rule: the one that asked, or another that needs no more than there is.

    Raises:
        ValueError: the rule asks for more, or there are no images.
    """
    found = []
    for name, labels, errors, seconds in images:
        standing = rule.standing(errors)
        if standing.question is not None:
            raise ValueError(
                f"rule: got one that asks {standing.question} of {name}, expected one that the rows answer"
            )
        ranked, common = errors.classes[standing.ranking].astype(np.int32), errors.common()
        score = scores(common if common.samples else errors, "standardised").astype(np.float32)
        found.append((name, labels, ranked, score, int(errors.asked.sum()), seconds, errors.classes))
    if not found:
        raise ValueError("rows: got no images, expected some")
    found.sort(key=lambda row: row[0])
    return Outcomes(
        tuple(row[0] for row in found),
        tuple(row[1] for row in found),
        np.stack([row[2] for row in found]),
        np.stack([row[3] for row in found]),
        found[0][6],
        np.asarray([row[4] for row in found]),
        np.asarray([row[5] for row in found]),
    )
