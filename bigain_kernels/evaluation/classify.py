"""The diffusion classifier: of all classes, take the one whose conditional denoising error is smallest.

Li et al., "Your Diffusion Model is Secretly a Zero-Shot Classifier", 2023. For one image every class is asked about the
same timesteps and the same noise, so that the difference of two classes' errors is not drowned by the noise they would
otherwise not share. In stages, classes that are clearly behind are dropped and the others get more samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import torch

from .compression import each_merging
from .denoisers import Denoiser
from .harness.engine import Asking, Engine, check_timesteps
from .harness.errors import SCORES, ImageErrors, scores
from .harness.rules import Stages, check_stages
from .metrics import Fraction, fraction_true


@dataclass(frozen=True)
class ClassifierConfig:
    """Settings of the diffusion classifier.

    The defaults are what served the uncompressed shipped model best on the 200 validation digits. There the
    standardised score was at least as good as the mean for nearly every choice of timesteps.

    Attributes:
        stages: (samples, keep) pairs. In each stage the classes still in the running are brought to `samples` noise
            samples in all, then the best `keep` stay. The last stage keeps one.
        timesteps: the timestep of sample j is timesteps[j % len(timesteps)].
        score: "mean" averages the squared errors; "standardised" gives every timestep the same say, see
            `harness.errors.scores`. A plain mean is dominated by the low timesteps, where the classes' errors differ
            most in absolute terms.
        seed: of the noise.
        batch_size: rows of one forward pass at most; None is what suits the size of the model's samples. The result
            does not depend on it.
    """

    stages: tuple[tuple[int, int], ...] = ((2, 4), (4, 1))
    timesteps: tuple[int, ...] = (350, 150, 100, 250)
    score: str = "standardised"
    seed: int = 0
    batch_size: int | None = None

    def __post_init__(self) -> None:
        check_stages(self.stages)
        check_timesteps(self.timesteps)
        if self.score not in SCORES:
            raise ValueError(f"score: got {self.score!r}, expected one of {list(SCORES)}")
        for name, least in (("seed", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: got {value}, expected at least {least}")


@dataclass(frozen=True)
class ImageResult:
    """What the classifier found for one image.

    `errors` holds for each class the mean squared denoising error over the samples that every class was asked about, so
    that classes can be compared by it. `prediction` rests on the later samples too, which only those still in the
    running were asked about.
    """

    index: int
    label: int
    prediction: int
    errors: tuple[float, ...]
    evaluations: int
    seconds: float

    @property
    def correct(self) -> bool:
        return self.prediction == self.label


@dataclass(frozen=True)
class ClassificationResult:
    """Results of all images, in the order they were given."""

    images: list[ImageResult] = field(default_factory=list)

    @property
    def predictions(self) -> torch.Tensor:
        """(n,) int64."""
        return torch.tensor([image.prediction for image in self.images], dtype=torch.int64)

    @property
    def errors(self) -> torch.Tensor:
        """(n, classes) float32, see `ImageResult`."""
        return torch.tensor([image.errors for image in self.images], dtype=torch.float32)

    @property
    def correct(self) -> torch.Tensor:
        """(n,) bool."""
        return torch.tensor([image.correct for image in self.images], dtype=torch.bool)

    @property
    def accuracy(self) -> float:
        return self.correct.float().mean().item() if self.images else float("nan")

    @property
    def interval(self) -> Fraction:
        """The accuracy with its 95 % interval."""
        return fraction_true(self.correct)

    @property
    def evaluations(self) -> int:
        """Rows that went through the model."""
        return sum(image.evaluations for image in self.images)

    @property
    def seconds(self) -> float:
        return sum(image.seconds for image in self.images)


class Classifier:
    """The diffusion classifier of one model and one compression, which is applied once. A context manager.

    Args:
        denoiser: the model, see `Denoiser`.
        config: settings; the default suits the shipped model.
        compression: a config of `bigain_kernels.diffusers`, applied inside the context; None leaves the model as it is.
        share_plan: whether one plan for each image and noise sample serves all classes: False or "own", True or "mean"
            (made from the mean of the classes still in the running, which go through the model together), or "null"
            (made from the null prompt, for any number of classes). See `harness.kept_plans`.

    Raises:
        ValueError: the first stage keeps more classes than there are, timesteps that the model does not have, a shared
            plan with a method that builds none, or one from the mean of more classes than `batch_size`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        config: ClassifierConfig | None = None,
        *,
        compression: Any = None,
        share_plan: bool | str = False,
    ) -> None:
        self.config = config = config or ClassifierConfig()
        plans = share_plan if isinstance(share_plan, str) else "mean" if share_plan else "own"
        if plans == "published":
            # Its patterns depend on the batches, which results of this class do not.
            raise ValueError("share_plan: got 'published', expected own, mean or null; it is of `bigain reproduce`")
        if plans != "own":
            # Refused under its name here; the engine calls it plans.
            each_merging(compression, lambda part: part, "share_plan")
        self._rule = Stages(config.stages, config.score)
        asking = Asking(self._rule, config.timesteps, config.seed, config.batch_size, plans=plans)
        self._engine = Engine(denoiser, asking, compression)

    def __enter__(self) -> Classifier:
        self._engine.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._engine.__exit__(kind, error, traceback)

    def classify(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        indices: Sequence[int] | None = None,
        record: Callable[[ImageResult], None] | None = None,
    ) -> ClassificationResult:
        """See `classify`."""
        self._engine.check_images(images)
        if labels.shape != images.shape[:1]:
            raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected ({images.shape[0]},)")
        chosen = list(range(images.shape[0])) if indices is None else list(indices)
        if len(chosen) != images.shape[0]:
            raise ValueError(f"indices: got {len(chosen)}, expected one for each of the {images.shape[0]} images")
        # The later stages hold fewer classes, so this many images fill a batch there; the first stage splits them.
        stages = self.config.stages
        last = stages[-2][1] if len(stages) > 1 else len(self._engine.classes)
        chunk = max(1, self._engine.batch_size // last)
        results: list[ImageResult] = []
        for first in range(0, len(chosen), chunk):
            part = slice(first, first + chunk)
            started = time.perf_counter()
            errors = self._engine.ask(images[part], chosen[part])
            seconds = (time.perf_counter() - started) / len(errors)
            for index, label, found in zip(chosen[part], labels[part].tolist(), errors, strict=True):
                results.append(self._result(index, label, found, seconds))
                if record is not None:
                    record(results[-1])
        return ClassificationResult(results)

    def _result(self, index: int, label: int, errors: ImageErrors, seconds: float) -> ImageResult:
        prediction = int(errors.classes[self._rule.standing(errors).ranking[0]])
        means = scores(errors.common()).astype(np.float32).tolist()
        return ImageResult(index, label, prediction, tuple(means), int(errors.asked.sum()), seconds)


def classify(
    denoiser: Denoiser,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: ClassifierConfig | None = None,
    *,
    compression: Any = None,
    share_plan: bool | str = False,
    indices: Sequence[int] | None = None,
    record: Callable[[ImageResult], None] | None = None,
) -> ClassificationResult:
    """Classify images by the denoising errors of a class-conditional diffusion model.

    Args:
        denoiser, config, compression, share_plan: see `Classifier`.
        images: (n, C, H, W) in the space the model denoises: pixels in [-1, 1], or latents.
        labels: (n,) int64, the true classes.
        indices: what the noise of each image is drawn for; default 0, 1, ..., n - 1. A part of the images, given with
            its indices, gets the results it gets in a run over all.
        record: called with the result of each image as soon as it is known.

    Returns:
        A `ClassificationResult` in the order of `images`.

    Raises:
        ValueError: shapes that do not fit together, settings that `Classifier` refuses, or a denoising error that is
            not finite.
    """
    with Classifier(denoiser, config, compression=compression, share_plan=share_plan) as classifier:
        return classifier.classify(images, labels, indices=indices, record=record)


def default_stages(num_classes: int) -> tuple[tuple[int, int], ...]:
    """Two samples for every class, then two more for the best four tenths; one stage for very few classes."""
    keep = int(np.ceil(0.4 * num_classes))
    return ((2, keep), (4, 1)) if 1 < keep < num_classes else ((4, 1),)
