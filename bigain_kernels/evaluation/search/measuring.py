"""Denoising errors and times of configs, which take turns on the same images and the same noise."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...checks import check_count
from ...methods.mixed import Compression
from ..compression import compressed
from ..denoisers import Denoiser, diffuse
from ..metrics import Measured, paired_difference
from ..noise import seeded_noise
from .turns import TurnFile

NONE = "none"
# With its own label and with none, as guidance asks: what a pass of either job is made of.
ROWS = 2
# Configs by what they go by, one block of blocks after another; each block begins with the model as it is.
Asked = Sequence[Mapping[str, Compression]]


@dataclass(frozen=True)
class Samples:
    """Images as the model denoises them, (n, C, H, W), their labels (n,), and what the noise of each is drawn for."""

    clean: torch.Tensor
    labels: torch.Tensor
    keys: tuple[int, ...]


@dataclass
class Measurements:
    """What is known of configs on some images.

    Attributes:
        timesteps: of the turns.
        errors: of each config, for every turn the mean squared errors of its images.
        times: of each config, for every turn its time by that of the model as it is, measured just before.
        seconds: of the model as it is, a pass, for every turn.
    """

    timesteps: list[int] = field(default_factory=list)
    errors: dict[str, list[list[float]]] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    def add(self, timestep: int, turn: Mapping[str, Any]) -> None:
        self.timesteps.append(timestep)
        self.seconds.append(turn["seconds"])
        for mine, new in ((self.errors, turn["errors"]), (self.times, turn["times"])):
            for key, value in new.items():
                mine.setdefault(key, []).append(value)

    def percent(self, key: str) -> torch.Tensor:
        """(n,) the error of each image in percent of that of the model as it is, the mean over its timesteps.

        A timestep of small errors counts as much as one of large ones.
        """
        rows = []
        for timestep in dict.fromkeys(self.timesteps):
            turns = [turn for turn, own in enumerate(self.timesteps) if own == timestep]
            mine, plain = (
                torch.tensor([e for turn in turns for e in self.errors[each][turn]], dtype=torch.float64)
                for each in (key, NONE)
            )
            rows.append(100 * mine / plain.mean())
        return torch.stack(rows).mean(dim=0)

    def rise(self, key: str, other: str = NONE) -> Measured:
        """By how many percent the error is above that of the model as it is, or of another config."""
        return paired_difference(self.percent(key), self.percent(other))

    def saved(self, *keys: str) -> float:
        """The fraction of the time that is saved; of several configs that take the same time, from all of them."""
        # What was compiled or allocated in the first turn says nothing about the next.
        later = [self.times[key][1:] or self.times[key] for key in keys]
        return 1.0 - statistics.median(ratio for ratios in later for ratio in ratios)

    def speed(self, key: str) -> float:
        """How many times as fast as the model as it is."""
        return 1.0 / (1.0 - self.saved(key))


class Meter:
    """Runs a model on images at some timesteps.

    Args:
        denoiser: the model.
        samples: the images.
        timesteps: at which all of them are asked.
        batch_size: rows of a forward pass, two of each image; an odd one is rounded down.
        seed: of the noise.

    Raises:
        TypeError, ValueError: timesteps that the model does not have, a batch that holds no image, or a negative seed.
    """

    def __init__(
        self, denoiser: Denoiser, samples: Samples, timesteps: Sequence[int], batch_size: int, seed: int
    ) -> None:
        steps = len(denoiser.scheduler.alphas_cumprod)
        if not timesteps or not all(0 <= t < steps for t in timesteps) or len(set(timesteps)) < len(timesteps):
            raise ValueError(f"timesteps: got {list(timesteps)}, expected different ones from 0 to {steps - 1}")
        if batch_size < ROWS:
            raise ValueError(f"batch_size: got {batch_size}, expected at least {ROWS}, the rows of an image")
        check_count("seed", seed)
        self.denoiser, self.samples, self.seed = denoiser, samples, seed
        size = batch_size // ROWS
        parts = [slice(first, first + size) for first in range(0, len(samples.clean), size)]
        self.turns = [(timestep, part) for part in parts for timestep in timesteps]

    @torch.no_grad()
    def ask(self, turn: int, compression: Compression | None) -> tuple[list[float], float]:
        """The errors of the images of a turn, mean squares over both rows, and the seconds of the pass.

        Raises:
            ValueError: an error is not finite, or the model refuses the config.
        """
        timestep, part = self.turns[turn]
        clean, labels = self.samples.clean[part], self.samples.labels[part]
        noise = seeded_noise([(self.seed, key, timestep) for key in self.samples.keys[part]], tuple(clean.shape[1:]))
        t = torch.full((len(clean),), timestep, device=clean.device)
        noisy, target = diffuse(self.denoiser.scheduler, clean, noise.to(clean.device), t)
        both = torch.cat([labels, torch.full_like(labels, self.denoiser.num_classes)])
        with compressed(self.denoiser, compression):
            predicted, seconds = _timed(lambda: self.denoiser(noisy.repeat(ROWS, 1, 1, 1), t.repeat(ROWS), both), t)
        off = (predicted.double() - target.double().repeat(ROWS, 1, 1, 1)).square().mean(dim=(1, 2, 3))
        errors = off.view(ROWS, -1).mean(dim=0).tolist()
        if not all(map(math.isfinite, errors)):
            raise ValueError(
                f"denoising error: got {errors} at timestep {timestep}, expected finite numbers (a 16-bit dtype may "
                "overflow: try float32)"
            )
        return errors, seconds

    def passes(self, asked: Asked) -> int:
        """Forward passes of `measure`."""
        return len(self.turns) * sum(1 + len(block) for block in asked)

    def measure(self, stage: str, asked: Asked, file: TurnFile, progress: Callable[[str, int], None]) -> Measurements:
        """Ask about all configs in every turn.

        Args:
            stage: what these turns go by in `file`; people are told what stands in front of " #".
            asked: the configs.
            file: has what was measured before, and is told what is measured now.
            progress: called with the stage and with how many passes are done.
        """
        found = Measurements()
        names, title = {key for block in asked for key in block}, stage.partition(" #")[0]
        for number, (timestep, _) in enumerate(self.turns):
            turn = file.get(stage, number, names)
            if turn is None:
                turn = self._turn(number, asked, lambda: progress(title, 1))
                file.add(stage, number, turn)
            else:
                progress(title, self.passes(asked) // len(self.turns))
            found.add(timestep, turn)
        return found

    def _turn(self, number: int, asked: Asked, done: Callable[[], None]) -> dict[str, Any]:
        errors: dict[str, list[float]] = {}
        times: dict[str, float] = {}
        plain: list[float] = []
        for block in asked:
            errors[NONE], base = self.ask(number, None)
            plain.append(base)
            done()
            # None is always the one that comes behind a pass of another kind.
            order = list(block)
            offset = number % max(1, len(order))
            for key in (*order[offset:], *order[:offset]):
                errors[key], seconds = self.ask(number, block[key])
                times[key] = seconds / base
                done()
        return {"errors": errors, "times": times, "seconds": statistics.median(plain)}


def _timed(call: Callable[[], torch.Tensor], where: torch.Tensor) -> tuple[torch.Tensor, float]:
    """What a call gives and the seconds that it takes, by events of the device where `where` lies on a GPU.

    Of one thread on a CPU they are the processor's, which what else runs on the machine disturbs least.
    """
    if where.device.type != "cuda":
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        started = clock()
        return call(), clock() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(where.device)
    begin.record()
    result = call()
    end.record()
    torch.cuda.synchronize(where.device)
    return result, begin.elapsed_time(end) / 1e3
