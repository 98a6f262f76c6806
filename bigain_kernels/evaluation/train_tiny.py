"""Training of the tiny DiT and of the digit classifier, deterministic for one seed and one thread count."""

from __future__ import annotations

import csv
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .data import Digits, load_digits
from .output import replacing
from .tiny_models import NUM_CLASSES, DigitClassifier, build_scheduler, build_tiny_dit

# Timesteps at which the validation error is logged; past 700 the digits drown in noise.
_VALIDATION_TIMESTEPS = (50, 150, 250, 350, 450, 600)


def check_settings(config: Any, counts: Sequence[str], limits: Mapping[str, float]) -> None:
    """ValueError naming the first setting out of its range: counts from 1 up, others from 0 to their limit, and
    `warmup` and `seed`, whole numbers from 0 up."""
    for name in counts:
        if not 1 <= getattr(config, name) <= 10**9:
            raise ValueError(f"{name}: got {getattr(config, name)}, expected 1 to 1e9")
    for name, high in limits.items():
        if not 0 <= getattr(config, name) <= high:
            raise ValueError(f"{name}: got {getattr(config, name)}, expected 0 to {high:g}")
    for name in ("warmup", "seed"):
        if not 0 <= getattr(config, name) < 2**63:
            raise ValueError(f"{name}: got {getattr(config, name)}, expected a whole number of at least 0")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the result of `train_tiny_dit`, apart from the thread count and the torch version."""

    steps: int = 12000
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup: int = 200
    ema: float = 0.999
    label_dropout: float = 0.1
    weight_decay: float = 0.01
    log_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {"learning_rate": 1e3, "weight_decay": 1e3, "ema": 1.0, "label_dropout": 1.0}
        check_settings(self, ("steps", "batch_size", "log_every"), limits)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shifts of up to one pixel, rotations of up to 8 degrees, scales of up to 5 %; (n, 1, s, s) in and out."""
    n, size = images.shape[0], images.shape[-1]

    def uniform(limit: float) -> torch.Tensor:
        return (torch.rand(n, generator=generator) * 2 - 1) * limit

    angle, scale = uniform(math.radians(8.0)), 1.0 + uniform(0.05)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    row_x = torch.stack([cos, -sin, uniform(2.0 / size)], dim=1)
    row_y = torch.stack([sin, cos, uniform(2.0 / size)], dim=1)
    grid = F.affine_grid(torch.stack([row_x, row_y], dim=1), list(images.shape), align_corners=False)
    # Digits are black outside, which is -1 here, while grid_sample pads with 0.
    return F.grid_sample(images + 1.0, grid, mode="bilinear", align_corners=False) - 1.0


def drop_labels(labels: torch.Tensor, fraction: float, generator: torch.Generator) -> torch.Tensor:
    """`labels` (n,), about a `fraction` of them replaced by the null label."""
    dropped = torch.rand(len(labels), generator=generator) < fraction
    return torch.where(dropped, NUM_CLASSES, labels)


def spread_timesteps(n: int, steps: int, generator: torch.Generator) -> torch.Tensor:
    """(n,) timesteps below `steps`, one from each of n equal strata: the same expectation with less variance."""
    strata = torch.arange(n) + torch.rand(n, generator=generator)
    # In float32 the last stratum may round up to its end.
    return (strata / n * steps).long().clamp_(max=steps - 1)


@torch.no_grad()
def average_into(average: torch.nn.Module, model: torch.nn.Module, decay: float, step: int) -> None:
    """Move `average` towards `model` after step `step`, from 0; the first steps, which are far off, fade faster."""
    decay = min(decay, (step + 1) / (step + 10))
    for averaged, current in zip(average.parameters(), model.parameters(), strict=True):
        averaged.lerp_(current, 1 - decay)


def save_model(model: Any, folder: Path) -> None:
    """`save_pretrained` whose files each take the place of the one before as a whole."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as part:
        model.save_pretrained(part)
        for path in Path(part).iterdir():
            os.replace(path, folder / path.name)


@torch.no_grad()
def _validation_error(model: torch.nn.Module, data: Digits) -> float:
    scheduler = build_scheduler()
    noise = torch.randn(data.images.shape, generator=torch.Generator().manual_seed(1))
    errors = []
    for timestep in _VALIDATION_TIMESTEPS:
        t = torch.full((len(data),), timestep)
        noisy = scheduler.add_noise(data.images, noise, t)
        errors.append(F.mse_loss(model(noisy, t, data.labels).sample, noise))
    return torch.stack(errors).mean().item()


def train_tiny_dit(
    out: Path, config: TrainConfig, on_log: Callable[[dict[str, float]], None] | None = None
) -> dict[str, float]:
    """Train the tiny DiT on the digits and save it as a diffusers checkpoint.

    Writes `out/transformer/`, `out/scheduler/` and `out/training_log.csv` (step, loss, validation error of the averaged
    weights, seconds). The log grows while training runs; the weights are written at every log line, so an interrupted
    run leaves its last state.

    Args:
        out: folder of the checkpoint; made if missing.
        config: all settings of the run.
        on_log: called with each row of the log.

    Returns:
        The last row of the log.
    """
    out.mkdir(parents=True, exist_ok=True)
    train, validation = load_digits("train"), load_digits("validation")
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model, average = build_tiny_dit().train(), build_tiny_dit().eval()
    average.load_state_dict(model.state_dict())
    scheduler = build_scheduler()
    scheduler.save_pretrained(out / "scheduler")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.99)
    )

    def rate(step: int) -> float:
        if step < config.warmup:
            return (step + 1) / config.warmup
        done = (step - config.warmup) / max(1, config.steps - config.warmup)
        return 0.5 * (1 + math.cos(math.pi * done))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    started, losses, row = time.perf_counter(), [], {}
    with open(out / "training_log.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "loss", "validation_error", "seconds"])
        for step in range(config.steps):
            index = torch.randint(len(train), (config.batch_size,), generator=generator)
            images = augment(train.images[index], generator)
            labels = drop_labels(train.labels[index], config.label_dropout, generator)
            t = spread_timesteps(config.batch_size, scheduler.config.num_train_timesteps, generator)
            noise = torch.randn(images.shape, generator=generator)
            predicted = model(scheduler.add_noise(images, noise, t), t, labels).sample
            loss = F.mse_loss(predicted, noise)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average_into(average, model, config.ema, step)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise ValueError(f"loss: got {losses[-1]} at step {step + 1}, expected a finite one: training diverged")
            if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
                row = {
                    "step": step + 1,
                    "loss": sum(losses) / len(losses),
                    "validation_error": _validation_error(average, validation),
                    "seconds": time.perf_counter() - started,
                }
                losses.clear()
                writer.writerow([row["step"]] + [f"{row[k]:.5g}" for k in ("loss", "validation_error", "seconds")])
                file.flush()
                save_model(average, out / "transformer")
                if on_log is not None:
                    on_log(row)
    return row


def train_classifier(
    out: Path, epochs: int = 60, seed: int = 0, data: Callable[[str], Digits] = load_digits
) -> dict[str, float]:
    """Train the digit classifier and save it as `out/classifier.safetensors`.

    `data`: gives images of 16 x 16 pixels for "train" and "test".

    Returns:
        `{"test_accuracy": ..., "seconds": ...}`; the accuracy is over the test images.
    """
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    train, test = data("train"), data("test")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitClassifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for index in torch.randperm(len(train), generator=generator).split(64):
            loss = F.cross_entropy(model(augment(train.images[index], generator)), train.labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(test.images).argmax(1) == test.labels).float().mean().item()
    with replacing(out / "classifier.safetensors") as part:
        save_file(model.state_dict(), part)
    return {"test_accuracy": accuracy, "seconds": time.perf_counter() - started}


def describe(config: Any) -> dict[str, object]:
    """The settings of a run and the versions that produced it, to be kept beside the checkpoint."""
    import diffusers

    return {
        **asdict(config),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "threads": torch.get_num_threads(),
    }
