"""The demo: both jobs of BiGain, classification and generation, on real images under every method.

The work is cut into chunks, and every method does a chunk before the next begins. So all methods see the same images
under the same conditions of the machine, and whenever the demo is stopped its results are of equal numbers of images.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..methods import CompressionConfig
from ..methods.registry import make_config, options_of
from .checkpoints import TINY_DIT, load_checkpoint, load_classifier
from .classify import ClassifierConfig, classify
from .compression import tokens_kept
from .data import load_digits
from .generate import GenerateConfig, generate


@dataclass(frozen=True)
class DemoMethod:
    """One row of the table.

    `shared`: one plan for rows that belong together. `proportional`: keys weighed by size. `rival`: key of the method
    it is compared with.
    """

    key: str
    title: str
    method: str
    shared: bool = False
    proportional: bool = False
    rival: str | None = None


METHODS = (
    DemoMethod("none", "none", "none"),
    DemoMethod("tome", "ToMe", "tome", rival="none"),
    DemoMethod("lgtm", "L-GTM", "lgtm", rival="tome"),
    DemoMethod("abm", "ABM", "abm", rival="tome"),
    DemoMethod("tome_shared", "ToMe, shared", "tome", shared=True, rival="tome"),
    DemoMethod("lgtm_shared", "L-GTM, shared", "lgtm", shared=True, rival="lgtm"),
    DemoMethod("tome_proportional", "ToMe, proportional", "tome", proportional=True, rival="tome"),
    DemoMethod("lgtm_proportional", "L-GTM, proportional", "lgtm", proportional=True, rival="lgtm"),
    DemoMethod("todo", "ToDo", "todo", rival="none"),
    DemoMethod("avgpool", "average pooling", "avgpool", rival="todo"),
    DemoMethod("iekvd", "IE-KVD", "iekvd", rival="todo"),
)


@dataclass(frozen=True)
class DemoConfig:
    """How much the demo does. The default fits four minutes on two CPU cores.

    Attributes:
        images: held-out digits to classify, at most 400.
        samples: images to generate for each guidance; errors of the kernel distance need three.
        steps: DDIM steps.
        guidances: of classifier-free guidance.
        ratio, factor, alpha: of the merge methods, of the pooling methods, and of IE-KVD.
        stages, timesteps: of the classifier. With two noise samples for an image the methods have room to differ; with
            four, which are the default of `ClassifierConfig` and what `--full` takes, they come closer.
        seed: of all noise.
        threads: of torch.
        image_chunk, sample_chunk: what a method does before the next has its turn.
        picture_strides: a picture of each photograph is drawn for each of these tiles.
    """

    images: int = 400
    samples: int = 200
    steps: int = 16
    guidances: tuple[float, ...] = (1.5, 3.0)
    ratio: float = 0.7
    factor: int = 2
    alpha: float = 0.9
    stages: tuple[tuple[int, int], ...] = ((1, 4), (2, 1))
    timesteps: tuple[int, ...] = (350, 150)
    seed: int = 0
    threads: int = 2
    image_chunk: int = 50
    sample_chunk: int = 50
    picture_strides: tuple[int, ...] = (2, 4)

    def __post_init__(self) -> None:
        limits = {"images": (1, 400), "samples": (3, 100_000), "steps": (1, 1000), "threads": (1, 1024)}
        limits |= {"image_chunk": (1, 400), "sample_chunk": (3, 100_000)}
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected {least} to {most}")


FULL = DemoConfig(samples=1000, steps=50, stages=ClassifierConfig().stages, timesteps=ClassifierConfig().timesteps)


@dataclass
class Outcome:
    """What one method has done so far.

    Attributes:
        tokens: tokens that attention sees, in words.
        correct: (n,) bool, for the images classified.
        samples: by guidance, (n, 1, 16, 16).
        seconds: of each chunk of "classify" and "generate".
    """

    tokens: str
    correct: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    samples: dict[float, torch.Tensor] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"classify": [], "generate": []})


class Demo:
    """The work and its outcomes.

    Args:
        config: how much to do.
        folder: the checkpoint of the tiny DiT and its classifier.

    Raises:
        FileNotFoundError: no checkpoint there.
    """

    def __init__(self, config: DemoConfig | None = None, folder: Path = TINY_DIT) -> None:
        self.config = config = config or DemoConfig()
        self.checkpoint = load_checkpoint(folder)
        self.classifier = load_classifier(folder)
        self.digits = load_digits("test")
        self.labels = torch.arange(config.samples) % self.checkpoint.denoiser.num_classes
        side: Any = self.checkpoint.denoiser.model.config
        self.grid = (side.sample_size // side.patch_size,) * 2
        self.compressions = {method.key: _compression(method, config) for method in METHODS}
        self.outcomes = {key: Outcome(tokens_kept(used, self.grid)) for key, used in self.compressions.items()}

    @property
    def total(self) -> int:
        """Chunks of work in all, over all methods."""
        config = self.config
        images = len(range(0, config.images, config.image_chunk))
        samples = len(range(0, config.samples, config.sample_chunk)) * len(config.guidances)
        return (images + samples) * len(METHODS)

    def run(self, progress: Callable[[str], None] | None = None) -> None:
        """Do all the work; `progress` is called with a description after each of `total` chunks."""
        threads = torch.get_num_threads()
        torch.set_num_threads(self.config.threads)
        try:
            self._warm_up()
            self._classify_all(progress or (lambda _: None))
            self._generate_all(progress or (lambda _: None))
        finally:
            torch.set_num_threads(threads)

    def _warm_up(self) -> None:
        """Every method once on a chunk, so that first-call costs fall on none of them."""
        for method in METHODS:
            self._classify(method, slice(0, min(8, self.config.images)))
            self._generate(method, slice(0, 2), self.config.guidances[0], steps=1)

    def _classify(self, method: DemoMethod, part: slice) -> torch.Tensor:
        images, labels = self.digits.images[: self.config.images], self.digits.labels[: self.config.images]
        return classify(
            self.checkpoint.denoiser,
            images[part],
            labels[part],
            ClassifierConfig(self.config.stages, self.config.timesteps, seed=self.config.seed),
            compression=self.compressions[method.key],
            share_plan=method.shared,
            indices=range(len(images))[part],
        ).correct

    def _generate(self, method: DemoMethod, part: slice, guidance: float, steps: int) -> torch.Tensor:
        config = GenerateConfig(steps, guidance, self.config.seed, self.config.sample_chunk)
        return generate(
            self.checkpoint.denoiser,
            self.labels[part],
            config,
            compression=self.compressions[method.key],
            share_plan=method.shared,
            indices=range(len(self.labels))[part],
        )

    def _classify_all(self, progress: Callable[[str], None]) -> None:
        for chunk, first in enumerate(range(0, self.config.images, self.config.image_chunk)):
            part = slice(first, first + self.config.image_chunk)
            for method in _turn(chunk):
                outcome = self.outcomes[method.key]
                started = time.perf_counter()
                correct = self._classify(method, part)
                outcome.seconds["classify"].append(time.perf_counter() - started)
                outcome.correct = torch.cat([outcome.correct, correct])
                progress(f"classifying: {method.title}")

    def _generate_all(self, progress: Callable[[str], None]) -> None:
        chunk = 0
        for first in range(0, self.config.samples, self.config.sample_chunk):
            part = slice(first, first + self.config.sample_chunk)
            for guidance in self.config.guidances:
                for method in _turn(chunk):
                    outcome = self.outcomes[method.key]
                    started = time.perf_counter()
                    made = self._generate(method, part, guidance, self.config.steps)
                    outcome.seconds["generate"].append(time.perf_counter() - started)
                    before = [outcome.samples[guidance]] if guidance in outcome.samples else []
                    outcome.samples[guidance] = torch.cat([*before, made])
                    progress(f"generating at guidance {guidance}: {method.title}")
                chunk += 1


def _compression(method: DemoMethod, config: DemoConfig) -> CompressionConfig | None:
    """What a row of the table applies: the values of the demo for the options that its method has."""
    values = {name: getattr(config, name) for name in ("ratio", "factor", "alpha", "seed")}
    options = {name: value for name, value in values.items() if name in options_of(method.method)}
    return make_config(method.method, options | ({"proportional": True} if method.proportional else {}))


def _turn(chunk: int) -> tuple[DemoMethod, ...]:
    """The methods, a different one first in each chunk."""
    first = chunk % len(METHODS)
    return METHODS[first:] + METHODS[:first]
