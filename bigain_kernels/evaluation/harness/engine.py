"""From images and a rule to denoising errors: what goes through the model, in which batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch

from ...methods import CompressionConfig
from ..compression import compressed
from ..denoisers import Denoiser, diffuse
from ..noise import seeded_noise
from .errors import METRICS, ImageErrors
from .kept_plans import PlanBook, with_kept_plans
from .rules import Rule

# Rows of 16 x 16 that a forward pass takes unless told otherwise, and as many pixels or latents of larger ones.
_ROWS, _AREA = 320, 16 * 16


def default_batch(sample_shape: tuple[int, int, int]) -> int:
    """Rows of a forward pass: what a model of samples of that shape takes without gigabytes of activations."""
    _, height, width = sample_shape
    return min(_ROWS, max(1, _ROWS * _AREA // (height * width)))


class Answer(NamedTuple):
    """What the model said to one question about one image.

    Attributes:
        image: its place among the images.
        first: first sample.
        timesteps: (s,) of the samples.
        places: (k,) of the classes.
        values: (3, s, k) float32, by `METRICS`.
        seconds: of each row of it, (s,).
    """

    image: int
    first: int
    timesteps: np.ndarray
    places: np.ndarray
    values: np.ndarray
    seconds: np.ndarray


@dataclass(frozen=True)
class Asking:
    """Settings of an `Engine`.

    Attributes:
        rule: decides what is asked.
        timesteps: the timestep of sample j is timesteps[j % len(timesteps)].
        seed: of the noise; sample j of an image has the noise of (seed, key of the image, j), whatever the class.
        batch_size: rows of a forward pass at most; None is `default_batch`.
        classes: labels that are asked about; None is all.
        plans: where merge plans come from, see `kept_plans.PLANS`.
        half_errors: round each error to 11 bits, as a mean in float16 is.
        half_schedule: round the noise schedule to 11 bits, as the published code does with its float16 models.
    """

    rule: Rule
    timesteps: tuple[int, ...]
    seed: int = 0
    batch_size: int | None = None
    classes: tuple[int, ...] | None = None
    plans: str = "own"
    half_errors: bool = False
    half_schedule: bool = False


def check_timesteps(timesteps: Sequence[int], steps: int | None = None) -> None:
    if not timesteps or min(timesteps) < 0:
        raise ValueError(f"timesteps: got {tuple(timesteps)}, expected at least one, none negative")
    if steps is not None and max(timesteps) >= steps:
        raise ValueError(f"timesteps: got {max(timesteps)}, expected less than {steps}")


class Engine:
    """Asks a model about images, under one compression that is applied once. A context manager.

    Args:
        denoiser: the model, see `Denoiser`.
        asking: what is asked.
        compression: a config of `bigain_kernels.diffusers`, applied inside the context; None leaves the model as it is.

    Raises:
        ValueError: timesteps or classes that the model does not have, a rule that does not fit the number of classes,
            plans that the method does not build, or plans from the mean of more classes than a batch holds.
    """

    def __init__(self, denoiser: Denoiser, asking: Asking, compression: CompressionConfig | None = None) -> None:
        check_timesteps(asking.timesteps, len(denoiser.scheduler.alphas_cumprod))
        chosen = range(denoiser.num_classes) if asking.classes is None else asking.classes
        self.classes = np.asarray(chosen, dtype=np.int64)
        wrong = [c for c in chosen if not 0 <= c < denoiser.num_classes]
        if wrong or len(set(chosen)) != len(self.classes) or not len(self.classes):
            raise ValueError(
                f"classes: got {wrong[0] if wrong else list(chosen)}, expected different labels below "
                f"{denoiser.num_classes}"
            )
        asking.rule.check(len(self.classes))
        self.denoiser, self.asking = denoiser, asking
        self.batch_size = asking.batch_size or default_batch(denoiser.sample_shape)
        self._scheduler = denoiser.scheduler
        if asking.half_schedule:
            self._scheduler = copy(denoiser.scheduler)
            self._scheduler.alphas_cumprod = denoiser.scheduler.alphas_cumprod.half().float()
        self._book = PlanBook()
        self._compression = with_kept_plans(compression, asking.plans, self._book)
        if asking.plans == "mean" and self.batch_size < len(self.classes):
            raise ValueError(
                f"batch_size: got {self.batch_size}, expected at least {len(self.classes)}: classes that share a plan "
                'made from their mean go through the model together (plans="null" has no such limit)'
            )
        self._stack = ExitStack()

    def __enter__(self) -> Engine:
        self._stack.enter_context(compressed(self.denoiser, self._compression))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def check_images(self, clean: torch.Tensor) -> None:
        """ValueError unless these are samples of the model's shape."""
        if clean.ndim != 4 or tuple(clean.shape[1:]) != self.denoiser.sample_shape:
            raise ValueError(f"images: got shape {tuple(clean.shape)}, expected (n, *{self.denoiser.sample_shape})")

    @torch.no_grad()
    def ask(
        self, clean: torch.Tensor, keys: Sequence[int], record: Callable[[Answer], None] = lambda _: None
    ) -> list[ImageErrors]:
        """All errors that the rule asks for.

        Args:
            clean: (n, C, H, W) in the space the model denoises.
            keys: what the noise of each image is drawn for.
            record: called with each answer as it comes.

        Raises:
            ValueError: wrong shapes, or a denoising error that is not finite.
        """
        self.check_images(clean)
        if len(keys) != len(clean):
            raise ValueError(f"indices: got {len(keys)}, expected one for each of the {len(clean)} images")
        self._book.restart((self.asking.seed, *keys[:1]))
        found = [ImageErrors.empty(self.classes) for _ in keys]
        open_images = list(range(len(keys)))
        while open_images:
            # Images that are asked about the same samples of as many classes go together.
            groups: dict[tuple[int, int, int], list[tuple[int, np.ndarray]]] = {}
            for i in open_images:
                question = self.asking.rule.standing(found[i]).question
                if question is not None:
                    key = (question.first, question.last, len(question.places))
                    groups.setdefault(key, []).append((i, question.places))
            for (first, last, k), members in groups.items():
                size = max(1, self.batch_size // k)
                for start in range(0, len(members), size):
                    for answer in self._answers(clean, keys, members[start : start + size], first, last):
                        found[answer.image] = found[answer.image].with_samples(
                            answer.first, answer.timesteps, answer.places, answer.values
                        )
                        record(answer)
            open_images = [i for members in groups.values() for i, _ in members]
        return found

    def _answers(
        self, clean: torch.Tensor, keys: Sequence[int], members: list[tuple[int, np.ndarray]], first: int, last: int
    ) -> list[Answer]:
        images = [i for i, _ in members]
        places = np.stack([p for _, p in members])
        labels = torch.from_numpy(self.classes[places]).to(clean.device)
        timesteps = np.asarray([self.asking.timesteps[s % len(self.asking.timesteps)] for s in range(first, last)])
        values = np.empty((len(METRICS), last - first, *places.shape), dtype=np.float32)
        seconds = np.empty(last - first)
        for j, sample in enumerate(range(first, last)):
            started = time.perf_counter()
            noise = seeded_noise([(self.asking.seed, keys[i], sample) for i in images], tuple(clean.shape[1:]))
            errors = self._errors(clean[images], noise.to(clean.device), int(timesteps[j]), labels)
            values[:, j] = (errors.half().float() if self.asking.half_errors else errors).cpu().numpy()
            seconds[j] = (time.perf_counter() - started) / places.size
            self._check_finite(values[:, j], labels, [keys[i] for i in images], int(timesteps[j]))
        return [Answer(i, first, timesteps, places[row], values[:, :, row], seconds) for row, i in enumerate(images)]

    def _errors(self, clean: torch.Tensor, noise: torch.Tensor, timestep: int, labels: torch.Tensor) -> torch.Tensor:
        """(3, P, k) errors of the classes `labels` (P, k) for `clean` (P, C, H, W) and `noise`."""
        self._book.rows = rows = len(labels)
        t = torch.full((rows,), timestep, device=clean.device)
        noisy, target = diffuse(self._scheduler, clean, noise, t)
        if self.asking.plans == "null":
            with self._book.recording():
                self.denoiser(noisy, t, torch.full_like(t, self.denoiser.num_classes))
        parts = []
        for part in labels.split(max(1, self.batch_size // rows), dim=1):
            self._book.rewind()
            count = part.shape[1]
            # Row c * P + p is class c of image p: the order in which one plan row serves all classes of its image.
            predicted = self.denoiser(noisy.repeat(count, 1, 1, 1), t.repeat(count), part.T.reshape(-1))
            off = (predicted.float() - target.float().repeat(count, 1, 1, 1)).flatten(1)
            size = off.abs()
            huber = torch.where(size < 1, 0.5 * off.square(), size - 0.5)
            means = torch.stack([off.square().mean(dim=1), size.mean(dim=1), huber.mean(dim=1)])
            parts.append(means.view(len(METRICS), count, rows).transpose(1, 2))
        return torch.cat(parts, dim=2)

    @staticmethod
    def _check_finite(values: np.ndarray, labels: torch.Tensor, keys: list[int], timestep: int) -> None:
        wrong = np.argwhere(~np.isfinite(values[0]))
        if len(wrong):
            row, column = wrong[0]
            raise ValueError(
                f"denoising error: got {values[0, row, column]} for class {labels[row, column].item()} at timestep "
                f"{timestep} of image {keys[row]}, expected a finite number (a 16-bit dtype may overflow: try float32)"
            )
