"""The demo: what compression costs and gives on two shipped models, at a working point and beyond it.

For each model first the frontier (`frontier.py`): rise of the denoising error against speed, on validation images. Its
choice, the best of the rivals, no compression, and ratio 0.7, the paper's stress point, then do both jobs,
generation, and classification of test images. Methods take turns on every chunk of the work: all see the same images
under the same conditions of the machine, and whenever the demo is stopped its results are of equal numbers of images.
Classification, most of the work, comes last, and on a slow machine ends early.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .classify import ClassifierConfig, classify
from .frontier import Frontier, choose
from .generate import GenerateConfig, generate
from .points import BY_KEY, NONE, STRESS, Point
from .real_size import RealSize
from .subjects import SETTINGS, Subject, load_subject

MODELS = ("unet", "dit")
# Test images that every model of the demo has.
TEST_IMAGES = 400
_STRESS_KEYS = (f"tome_{STRESS:g}", f"lgtm_{STRESS:g}", f"lgtm_{STRESS:g}_proportional_shared")


@dataclass(frozen=True)
class DemoConfig:
    """How much the demo does. The default fits four minutes on two CPU cores, pictures included.

    Attributes:
        models: of `subjects.SETTINGS`.
        frontier_images: validation images at each timestep of the frontier.
        images: test images to classify for every seed, others for each.
        minutes: after these no images are begun but the first `image_chunk`; None: all, however long it takes.
        samples: images to generate for every seed, at least three.
        steps: DDIM steps.
        seed: of all noise; further seeds count up from it.
        seeds: how many.
        threads: of torch.
        image_chunk, sample_chunk: what a method does before the next has its turn.
        real_size: whether layers of real size are timed, too.
        picture_stride: tile of the pictures of photographs.
    """

    models: tuple[str, ...] = MODELS
    frontier_images: int = 8
    images: int = 40
    minutes: float | None = 3.5
    samples: int = 10
    steps: int = 10
    seed: int = 0
    seeds: int = 1
    threads: int = 2
    image_chunk: int = 5
    sample_chunk: int = 10
    real_size: bool = True
    picture_stride: int = 4

    def __post_init__(self) -> None:
        wrong = [model for model in self.models if model not in SETTINGS]
        if wrong or not self.models:
            raise ValueError(f"models: got {list(self.models)}, expected some of {list(SETTINGS)}")
        limits = {"seeds": (1, 100), "samples": (3, 100_000), "steps": (1, 1000), "threads": (1, 1024)}
        limits |= {"images": (1, TEST_IMAGES // self.seeds if 1 <= self.seeds <= 100 else TEST_IMAGES)}
        limits |= {"image_chunk": (1, 400), "sample_chunk": (1, 100_000), "frontier_images": (2, 200)}
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                of_seeds = f" with {self.seeds} seeds" if name == "images" and self.seeds > 1 else ""
                raise ValueError(f"{name}: got {getattr(self, name)}{of_seeds}, expected {least} to {most}")
        if self.minutes is not None and not 0 <= self.minutes < float("inf"):
            raise ValueError(f"minutes: got {self.minutes}, expected a number from 0 on, or None")


FULL = DemoConfig(frontier_images=40, images=80, samples=40, seeds=5, minutes=None, image_chunk=10)


@dataclass
class Outcome:
    """What one point has done of the two jobs so far.

    Attributes:
        correct: (n,) bool, for the images classified, one seed after another.
        samples: (n, 1, s, s), likewise.
        seconds: of each chunk of "classify" and "generate".
        sizes: images of each chunk of "classify".
    """

    correct: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    samples: list[torch.Tensor] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"classify": [], "generate": []})
    sizes: list[int] = field(default_factory=list)


class Jobs:
    """Classification of test images and generation, under some points of one model.

    Args:
        subject: the model.
        config: how much.
        chosen, rival: the working point and what it is compared with; `points` holds both and those of the stress test.
    """

    def __init__(
        self, subject: Subject, config: DemoConfig, chosen: Point, rival: Point, stress: Sequence[Point]
    ) -> None:
        self.subject, self.config, self.chosen, self.rival = subject, config, chosen, rival
        self.points = tuple({point.key: point for point in (NONE, chosen, rival, *stress)}.values())
        self.outcomes = {point.key: Outcome() for point in self.points}
        self.labels = (torch.arange(config.samples) % subject.checkpoint.denoiser.num_classes).repeat(config.seeds)
        self._turns = 0

    def generate(self, progress: Callable[[str], None]) -> None:
        """Generate all samples; `progress` is called with a description after each chunk of each point."""
        for seed in range(self.config.seeds):
            for part in _chunks(self.config.samples, self.config.sample_chunk):
                for point in self._turn():
                    outcome, started = self.outcomes[point.key], time.perf_counter()
                    outcome.samples.append(self._generate(point, seed, part))
                    outcome.seconds["generate"].append(time.perf_counter() - started)
                    progress(f"{self.subject.settings.title}, generating: {point.title}")

    def classify(self, seed: int, part: range, progress: Callable[[str], None]) -> None:
        """Classify a part of the images of a seed; `progress` as above."""
        for point in self._turn():
            outcome, started = self.outcomes[point.key], time.perf_counter()
            correct = self._classify(point, seed, part)
            outcome.seconds["classify"].append(time.perf_counter() - started)
            outcome.sizes.append(len(correct))
            outcome.correct = torch.cat([outcome.correct, correct])
            progress(f"{self.subject.settings.title}, classifying: {point.title}")

    def _turn(self) -> tuple[Point, ...]:
        """The points, a different one first each time."""
        offset = self._turns % len(self.points)
        self._turns += 1
        return self.points[offset:] + self.points[:offset]

    def _classify(self, point: Point, seed: int, part: range) -> torch.Tensor:
        settings, test = self.subject.settings, self.subject.test
        of_seed = slice(seed * self.config.images + part.start, seed * self.config.images + part.stop)
        return classify(
            self.subject.checkpoint.denoiser,
            test.images[of_seed],
            test.labels[of_seed],
            ClassifierConfig(settings.stages, settings.timesteps, seed=self.config.seed + seed, batch_size=40),
            compression=point.compression(),
            share_plan=point.shared,
            indices=range(of_seed.start, of_seed.stop),
        ).correct

    def _generate(self, point: Point, seed: int, part: range) -> torch.Tensor:
        config = self.config
        return generate(
            self.subject.checkpoint.denoiser,
            self.labels[part.start : part.stop],
            GenerateConfig(config.steps, self.subject.settings.guidance, config.seed + seed, config.sample_chunk),
            compression=point.compression(),
            share_plan=point.shared,
            indices=part,
        )


def _chunks(count: int, size: int) -> list[range]:
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


@dataclass
class Part:
    """All of one model: its frontier, and its jobs once the frontier has chosen."""

    subject: Subject
    frontier: Frontier
    jobs: Jobs | None = None


class Demo:
    """The work and its outcomes.

    Args:
        config: how much to do.
        folder: another checkpoint, for a demo of one model.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: a folder for several models.
    """

    def __init__(self, config: DemoConfig | None = None, folder: Path | None = None) -> None:
        self.config = config = config or DemoConfig()
        if folder is not None and len(config.models) > 1:
            raise ValueError(f"checkpoint: got one for {list(config.models)}, expected --model with it")
        self.parts = [self._part(load_subject(model, folder)) for model in config.models]
        self.real_size = RealSize() if config.real_size else None

    def _part(self, subject: Subject) -> Part:
        return Part(subject, Frontier(subject, self.config.frontier_images, seed=self.config.seed))

    @property
    def total(self) -> int:
        """Steps of progress in all."""
        config = self.config
        chunks = _chunks(config.images, config.image_chunk) + _chunks(config.samples, config.sample_chunk)
        jobs = (3 + len(_STRESS_KEYS)) * config.seeds * len(chunks)
        return sum(part.frontier.total + jobs for part in self.parts) + (self.real_size.total if self.real_size else 0)

    def run(self, progress: Callable[[str], None] | None = None) -> None:
        """Do all the work; `progress` is called with a description after each of about `total` steps."""
        told, started = progress or (lambda _: None), time.perf_counter()
        threads = torch.get_num_threads()
        torch.set_num_threads(self.config.threads)
        try:
            for part in self.parts:
                part.frontier.run(told)
            for part in self.parts:
                part.jobs = self._jobs(part)
                part.jobs.generate(told)
            if self.real_size is not None:
                self.real_size.run(told)
            self._classify(told, started)
        finally:
            torch.set_num_threads(threads)

    def _classify(self, told: Callable[[str], None], started: float) -> None:
        """Classify in rounds of a chunk for each model, all or those for which there is time after `started`."""
        config, began = self.config, time.perf_counter()
        chunks = [
            (seed, images) for seed in range(config.seeds) for images in _chunks(config.images, config.image_chunk)
        ]
        for done, chunk in enumerate(chunks):
            now = time.perf_counter()
            round_ends = now + (now - began) / max(done, 1)
            if done and config.minutes is not None and round_ends > started + 60 * config.minutes:
                return
            for part in self.parts:
                assert part.jobs is not None
                part.jobs.classify(*chunk, told)

    def _jobs(self, part: Part) -> Jobs:
        rows = part.frontier.rows()
        stress = [BY_KEY[key] for key in _STRESS_KEYS]
        return Jobs(part.subject, self.config, choose(rows, ours=True), choose(rows, ours=False), stress)
