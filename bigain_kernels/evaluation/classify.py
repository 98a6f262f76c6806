"""The diffusion classifier: of all classes, take the one whose conditional denoising error is smallest.

Li et al., "Your Diffusion Model is Secretly a Zero-Shot Classifier", 2023. For one image every class is asked about the
same timesteps and the same noise, so that the difference of two classes' errors is not drowned by the noise they would
otherwise not share. In stages, classes that are clearly behind are dropped and the others get more samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from .compression import compressed, with_shared_plan
from .denoisers import Denoiser, diffuse
from .metrics import Fraction, fraction_true
from .noise import seeded_noise

SCORES = ("standardised", "mean")


# More noise samples of one image than anybody waits for.
_MOST_SAMPLES = 10**5


@dataclass(frozen=True)
class ClassifierConfig:
    """Settings of the diffusion classifier.

    The defaults are what served the uncompressed shipped model best on the 200 validation digits. There the
    standardised score was at least as good as the mean for nearly every choice of timesteps.

    Attributes:
        stages: (samples, keep) pairs. In each stage the classes still in the running are brought to `samples` noise
            samples in all, then the best `keep` stay. The last stage keeps one.
        timesteps: the timestep of sample j is timesteps[j % len(timesteps)].
        score: "mean" averages the squared errors; "standardised" first divides the errors of one image and one sample
            by their standard deviation over the classes, so that every timestep has the same say. A plain mean is
            dominated by the low timesteps, where the classes' errors differ most in absolute terms.
        seed: of the noise.
        batch_size: rows of one forward pass at most. The result does not depend on it.
    """

    stages: tuple[tuple[int, int], ...] = ((2, 4), (4, 1))
    timesteps: tuple[int, ...] = (350, 150, 100, 250)
    score: str = "standardised"
    seed: int = 0
    batch_size: int = 320

    def __post_init__(self) -> None:
        samples, keeps = [s for s, _ in self.stages], [k for _, k in self.stages]
        growing = all(a < b for a, b in pairwise([0, *samples]))
        shrinking = all(a > b for a, b in pairwise(keeps))
        if samples and max(samples) > _MOST_SAMPLES:
            raise ValueError(f"stages: got {max(samples)} samples, expected at most {_MOST_SAMPLES}")
        if not (self.stages and growing and shrinking and keeps[-1] == 1):
            raise ValueError(
                f"stages: got {self.stages}, expected (samples, keep) pairs with growing samples and falling keep, "
                "the last keep being 1"
            )
        if not self.timesteps or min(self.timesteps) < 0:
            raise ValueError(f"timesteps: got {self.timesteps}, expected at least one, none negative")
        if self.score not in SCORES:
            raise ValueError(f"score: got {self.score!r}, expected one of {list(SCORES)}")
        for name, least in (("seed", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least {least}")


@dataclass(frozen=True)
class ImageResult:
    """What the classifier found for one image.

    `errors` holds for each class the mean squared denoising error over the samples that the class was asked about;
    classes dropped early have seen fewer.
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


def _sample_errors(
    denoiser: Denoiser, clean: torch.Tensor, noise: torch.Tensor, timestep: int, classes: torch.Tensor
) -> torch.Tensor:
    """Mean squared errors (P, k) of `classes` (P, k) for `clean` (P, C, H, W) and `noise`, in one class-major batch."""
    rows, k = classes.shape
    t = torch.full((rows,), timestep, device=clean.device)
    noisy, target = diffuse(denoiser.scheduler, clean, noise, t)
    # Row c * P + p is class c of image p: the order in which one plan row serves all classes of its image.
    predicted = denoiser(noisy.repeat(k, 1, 1, 1), t.repeat(k), classes.T.reshape(-1))
    errors = (predicted.float() - target.float().repeat(k, 1, 1, 1)).square().mean(dim=(1, 2, 3))
    return errors.view(k, rows).T


def _stage_errors(
    denoiser: Denoiser,
    clean: torch.Tensor,
    indices: Sequence[int],
    alive: torch.Tensor,
    sample: int,
    config: ClassifierConfig,
) -> torch.Tensor:
    """Errors (P, k) of the classes `alive` (P, k) for one noise sample, in as many batches as `batch_size` asks for."""
    timestep = config.timesteps[sample % len(config.timesteps)]
    k = alive.shape[1]
    images, classes = max(1, config.batch_size // k), min(k, config.batch_size)
    rows = []
    for first in range(0, len(indices), images):
        part = slice(first, first + images)
        noise = seeded_noise([(config.seed, i, sample) for i in indices[part]], tuple(clean.shape[1:]))
        noise = noise.to(clean.device)
        rows.append(
            torch.cat(
                [_sample_errors(denoiser, clean[part], noise, timestep, c) for c in alive[part].split(classes, dim=1)],
                dim=1,
            )
        )
    return torch.cat(rows)


def _check_finite(errors: torch.Tensor, alive: torch.Tensor, indices: Sequence[int], timestep: int) -> None:
    wrong = (~errors.isfinite()).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        raise ValueError(
            f"denoising error: got {errors[row, column].item()} for class {alive[row, column].item()} at timestep "
            f"{timestep} of image {indices[row]}, expected a finite number (a 16-bit dtype may overflow: try float32)"
        )


@torch.no_grad()
def _classify_chunk(
    denoiser: Denoiser,
    clean: torch.Tensor,
    labels: Sequence[int],
    indices: Sequence[int],
    config: ClassifierConfig,
    compression: Any,
    share_plan: bool,
) -> list[ImageResult]:
    started = time.perf_counter()
    rows, classes = clean.shape[0], denoiser.num_classes
    alive = torch.arange(classes, device=clean.device).expand(rows, -1)
    total = torch.zeros(rows, classes, dtype=torch.float64, device=clean.device)
    score, count = torch.zeros_like(total), torch.zeros_like(total)
    done = 0
    for samples, keep in config.stages:
        shared = with_shared_plan(compression, alive.shape[1]) if share_plan else compression
        with compressed(denoiser, shared):
            for sample in range(done, samples):
                errors = _stage_errors(denoiser, clean, indices, alive, sample, config).double()
                _check_finite(errors, alive, indices, config.timesteps[sample % len(config.timesteps)])
                total.scatter_add_(1, alive, errors)
                count.scatter_add_(1, alive, torch.ones_like(errors))
                if config.score == "standardised" and alive.shape[1] > 1:
                    spread = errors.std(dim=1, keepdim=True)
                    errors = (errors - errors.mean(dim=1, keepdim=True)) / spread.clamp_min(1e-30)
                score.scatter_add_(1, alive, errors)
        done = samples
        best = score.gather(1, alive).argsort(dim=1, stable=True)[:, :keep]
        alive = alive.gather(1, best)
        if keep > 1:
            alive = alive.sort(dim=1).values
    evaluations = count.sum(dim=1).long().tolist()
    means, predictions = (total / count).float().tolist(), alive[:, 0].tolist()
    seconds = (time.perf_counter() - started) / rows
    return [
        ImageResult(i, label, prediction, tuple(mean), n, seconds)
        for i, label, prediction, mean, n in zip(indices, labels, predictions, means, evaluations, strict=True)
    ]


def classify(
    denoiser: Denoiser,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: ClassifierConfig | None = None,
    *,
    compression: Any = None,
    share_plan: bool = False,
    indices: Sequence[int] | None = None,
    record: Callable[[ImageResult], None] | None = None,
) -> ClassificationResult:
    """Classify images by the denoising errors of a class-conditional diffusion model.

    Args:
        denoiser: the model, see `Denoiser`.
        images: (n, C, H, W) in the space the model denoises: pixels in [-1, 1], or latents.
        labels: (n,) int64, the true classes.
        config: settings; the default suits the shipped model.
        compression: a config of `bigain_kernels.diffusers`, applied while this runs; None leaves the model as it is.
        share_plan: plan once per image and noise sample for all classes still in the running.
        indices: what the noise of each image is drawn for; default 0, 1, ..., n - 1. A part of the images, given with
            its indices, gets the results it gets in a run over all.
        record: called with the result of each image as soon as it is known.

    Returns:
        A `ClassificationResult` in the order of `images`.

    Raises:
        ValueError: shapes that do not fit together, the first stage keeping more classes than there are, a shared
            plan with a method that builds none or over more classes than `batch_size`, or a denoising error that is
            not finite.
    """
    config = config or ClassifierConfig()
    if images.ndim != 4 or tuple(images.shape[1:]) != denoiser.sample_shape:
        raise ValueError(f"images: got shape {tuple(images.shape)}, expected (n, *{denoiser.sample_shape})")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected ({images.shape[0]},)")
    chosen = list(range(images.shape[0])) if indices is None else list(indices)
    if len(chosen) != images.shape[0]:
        raise ValueError(f"indices: got {len(chosen)}, expected one for each of the {images.shape[0]} images")
    steps = len(denoiser.scheduler.alphas_cumprod)
    if max(config.timesteps) >= steps:
        raise ValueError(f"timesteps: got {max(config.timesteps)}, expected less than {steps}")
    if config.stages[0][1] > denoiser.num_classes:
        raise ValueError(f"stages: got keep {config.stages[0][1]}, expected at most {denoiser.num_classes} classes")
    if share_plan:
        with_shared_plan(compression, denoiser.num_classes)
        if config.batch_size < denoiser.num_classes:
            raise ValueError(
                f"batch_size: got {config.batch_size}, expected at least {denoiser.num_classes}: classes that share a "
                "plan go through the model together"
            )
    # The later stages hold fewer classes, so this many images fill a batch there; the first stage splits them.
    last = config.stages[-2][1] if len(config.stages) > 1 else denoiser.num_classes
    chunk = max(1, config.batch_size // last)
    results: list[ImageResult] = []
    for first in range(0, len(chosen), chunk):
        part = slice(first, first + chunk)
        found = _classify_chunk(
            denoiser, images[part], labels[part].tolist(), chosen[part], config, compression, share_plan
        )
        if record is not None:
            for image in found:
                record(image)
        results += found
    return ClassificationResult(results)


def default_stages(num_classes: int) -> tuple[tuple[int, int], ...]:
    """Two samples for every class, then two more for the best four tenths; one stage for very few classes."""
    keep = int(np.ceil(0.4 * num_classes))
    return ((2, keep), (4, 1)) if 1 < keep < num_classes else ((4, 1),)
