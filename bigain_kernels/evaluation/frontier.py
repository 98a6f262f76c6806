"""What each point costs and gives: rise of the denoising error against measured speed, and the choice between them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from .compression import compressed
from .denoisers import diffuse
from .metrics import Measured, paired_difference
from .noise import seeded_noise
from .points import NONE, Point, points_of
from .subjects import Subject

# With its own label and with none, as guidance asks: two rows that belong together.
_ROWS = 2
# Rise of the denoising error, in percent, that the choice allows.
BUDGET = 2.0
_SAME_SPEED = 0.95


@dataclass
class Measurements:
    """Of one point, for every chunk that is done: errors (images,), distances (images,) and seconds."""

    errors: list[torch.Tensor] = field(default_factory=list)
    moved: list[torch.Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class FrontierRow:
    """One point: `rise` of the error and how far the prediction `moved`, both in percent of the uncompressed error."""

    point: Point
    rise: Measured
    moved: float
    speed: float


class Frontier:
    """Denoising errors of validation images at some timesteps under every point, and the time that they take.

    The points take turns on every chunk of images, so that all see the same machine.

    Args:
        subject: the model and its images.
        images: how many of its validation images.
        chunk: images of one forward pass, two rows each; few, so that every point is timed often.
        seed: of the noise, and of methods that choose at random.
        points: what is compared, the first being no compression; by default all, see `points_of`.
    """

    def __init__(
        self, subject: Subject, images: int, chunk: int = 4, seed: int = 0, points: Sequence[Point] | None = None
    ) -> None:
        self.subject, self.images, self.chunk, self.seed = subject, images, chunk, seed
        self.points = points_of(subject.settings.blocks, subject.searched) if points is None else tuple(points)
        self.measured = {point.key: Measurements() for point in self.points}

    @property
    def total(self) -> int:
        """Forward passes in all."""
        return len(self._chunks()) * len(self.points)

    def _chunks(self) -> list[tuple[int, int]]:
        # All timesteps of an image follow each other, so that an interrupted run knows some images wholly.
        firsts = range(0, self.images, self.chunk)
        return [(timestep, first) for first in firsts for timestep in self.subject.settings.frontier]

    @torch.no_grad()
    def run(self, progress: Callable[[str], None]) -> None:
        """Do all the work; `progress` is called with a description after each forward pass."""
        title = self.subject.settings.title
        for turn, (timestep, first) in enumerate(self._chunks()):
            part = slice(first, min(first + self.chunk, self.images))
            clean, labels = self.subject.validation.images[part], self.subject.validation.labels[part]
            noise = seeded_noise([(self.seed, i, timestep) for i in range(self.images)[part]], tuple(clean.shape[1:]))
            scheduler = self.subject.checkpoint.denoiser.scheduler
            noisy, target = diffuse(scheduler, clean, noise, torch.full((len(clean),), timestep))
            plain, _ = self._predict(NONE, noisy, timestep, labels)
            offset = turn % len(self.points)
            for point in (*self.points[offset:], *self.points[:offset]):
                predicted, seconds = self._predict(point, noisy, timestep, labels)
                done = self.measured[point.key]
                done.errors.append(_per_image(predicted - target.repeat(_ROWS, 1, 1, 1)))
                done.moved.append(_per_image(predicted - plain))
                done.seconds.append(seconds)
                progress(f"{title}, frontier: {point.title}")

    def _predict(
        self, point: Point, noisy: torch.Tensor, timestep: int, labels: torch.Tensor
    ) -> tuple[torch.Tensor, float]:
        denoiser = self.subject.checkpoint.denoiser
        both = torch.cat([labels, torch.full_like(labels, denoiser.num_classes)])
        t = torch.full((len(both),), timestep)
        with compressed(denoiser, point.compression(_ROWS)):
            started = time.perf_counter()
            predicted = denoiser(noisy.repeat(_ROWS, 1, 1, 1), t, both)
            return predicted, time.perf_counter() - started

    def rows(self) -> list[FrontierRow]:
        """The points by the images that all of them have done at every timestep; none before there are any."""
        timesteps = len(self.subject.settings.frontier)
        chunks = min(len(done.errors) for done in self.measured.values()) // timesteps * timesteps
        if not chunks:
            return []
        none = self.measured[NONE.key]
        return [self._row(point, self.measured[point.key], none, chunks) for point in self.points]

    def _row(self, point: Point, mine: Measurements, none: Measurements, chunks: int) -> FrontierRow:
        plain = self._percent(none.errors[:chunks], none.errors)
        rise = paired_difference(self._percent(mine.errors[:chunks], none.errors), plain)
        moved = self._percent(mine.moved[:chunks], none.errors).mean().item()
        speeds = [a / b for a, b in zip(none.seconds[:chunks], mine.seconds[:chunks], strict=True)]
        return FrontierRow(point, rise, moved, statistics.median(speeds))

    def _percent(self, parts: Sequence[torch.Tensor], plain: Sequence[torch.Tensor]) -> torch.Tensor:
        """(images,) of each image the mean over timesteps, in percent of the mean error of the uncompressed model.

        A timestep of small errors counts as much as one of large ones. What one image says at several timesteps is
        one observation, not several.
        """
        timesteps = len(self.subject.settings.frontier)
        rows = []
        for place in range(timesteps):
            mine, base = (torch.cat(list(each[place : len(parts) : timesteps])) for each in (parts, plain))
            rows.append(100 * mine / base.mean())
        return torch.stack(rows).mean(dim=0)


def _per_image(difference: torch.Tensor) -> torch.Tensor:
    """(rows * n, C, H, W) to the mean squares (n,) of images, over their rows."""
    return difference.double().square().mean(dim=(1, 2, 3)).view(_ROWS, -1).mean(dim=0)


def choose(rows: Sequence[FrontierRow], ours: bool, budget: float = BUDGET) -> Point:
    """The best point whose error rises by at most `budget` percent; where none does, the one that rises least.

    The best is the fastest, or, as timings are never that exact, the one of least error within `_SAME_SPEED` of it.
    `ours`: among the methods of BiGain and of this project, or among those that were there before.
    """
    found = [row for row in rows if row.point.ours == ours and row.point.method != "none"]
    within = [row for row in found if row.rise.value <= budget]
    if within:
        fastest = max(row.speed for row in within)
        return min((r for r in within if r.speed >= fastest * _SAME_SPEED), key=lambda row: row.rise.value).point
    return min(found, key=lambda row: row.rise.value).point
