"""A model without compression against methods: time, memory, and quality by denoising error, on images of its own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..methods.mixed import Compression
from .checkpoints import Checkpoint
from .compression import compressed
from .denoisers import diffuse
from .noise import seeded_noise

# Fractions of the noise schedule at which the error is taken.
LEVELS = (0.2, 0.5, 0.8)


@dataclass(frozen=True)
class BenchRow:
    """What one method costs and does.

    Attributes:
        method: its title.
        milliseconds: median time of one forward pass of `batch_size` rows.
        fastest, slowest: the least and the most of them.
        speed: median over the turns of the time without compression by that of the method in the same turn.
        memory: MiB of tensors at the peak of a pass, beyond what was there before.
        error: mean squared denoising error over images and noise levels.
        distance: mean squared difference to the prediction without compression, by the mean square of that.
    """

    method: str
    milliseconds: float
    fastest: float
    slowest: float
    speed: float
    memory: float
    error: float
    distance: float


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(call: Any, device: torch.device) -> float:
    """MiB of tensors at the peak of a call, beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    now = most = 0
    results: Any = profile.profiler
    for event in sorted(results.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most / 2**20


@torch.no_grad()
def bench(
    checkpoint: Checkpoint,
    methods: Mapping[str, Compression | None],
    images: Tensor,
    *,
    turns: int = 5,
    seed: int = 0,
) -> list[BenchRow]:
    """Run a model under each method in turn.

    Args:
        checkpoint: the model; its denoiser is called with "no class".
        methods: what to compare by title; the first is None, the model as it is.
        images: (n, C, H, W) in [-1, 1], of any size that the model takes.
        turns: forward passes that are timed, after one that is not; methods take turns, so that a disturbance of the
            machine hits all.
        seed: of the noise.

    Returns:
        A row for each method, in their order.

    Raises:
        ValueError: the first method is not None, or there are no turns or images.
    """
    if not methods or next(iter(methods.values())) is not None:
        raise ValueError(f"methods: got {list(methods)}, expected None, the model as it is, in front")
    for name, count in (("turns", turns), ("images", len(images))):
        if count < 1:
            raise ValueError(f"{name}: got {count}, expected at least 1")
    denoiser, device = checkpoint.denoiser, checkpoint.device
    clean = checkpoint.encode(images)
    length = len(denoiser.scheduler.alphas_cumprod)
    labels = torch.full((len(clean),), denoiser.num_classes, device=device)
    noise = seeded_noise([(seed, row) for row in range(len(clean))], tuple(clean.shape[1:])).to(device, clean.dtype)
    samples = []
    for level in LEVELS:
        timestep = torch.full((len(clean),), round(level * (length - 1)), device=device)
        samples.append((*diffuse(denoiser.scheduler, clean, noise, timestep), timestep))
    noisy, _, middle = samples[len(samples) // 2]

    def step() -> None:
        denoiser(noisy, middle, labels)

    predictions: dict[str, list[Tensor]] = {}
    errors, memory = {}, {}
    for title, config in methods.items():
        with compressed(denoiser, config):
            predictions[title] = [denoiser(x, t, labels).float() for x, _, t in samples]
            pairs = zip(predictions[title], samples, strict=True)
            errors[title] = statistics.fmean(float((mine - target).square().mean()) for mine, (_, target, _) in pairs)
            memory[title] = _peak(step, device)
    plain = predictions[next(iter(methods))]
    times = times_in_turns(denoiser, methods, step, turns, device)

    def row(title: str) -> BenchRow:
        took, base = times[title], times[next(iter(methods))]
        pairs = list(zip(predictions[title], plain, strict=True))
        return BenchRow(
            title,
            1e3 * statistics.median(took),
            1e3 * min(took),
            1e3 * max(took),
            statistics.median(theirs / mine for theirs, mine in zip(base, took, strict=True)),
            memory[title],
            errors[title],
            statistics.fmean(float((a - b).square().mean() / b.square().mean()) for a, b in pairs),
        )

    return [row(title) for title in methods]


def times_in_turns(
    denoiser: Any, methods: Mapping[str, Compression | None], step: Any, turns: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each turn by method; a disturbance of the machine hits all methods of a turn alike."""
    times: dict[str, list[float]] = {title: [] for title in methods}
    for turn in range(turns + 1):
        for title, config in methods.items():
            with compressed(denoiser, config):
                step()  # what the patch, caches and clocks need first
                _synchronize(device)
                begin = time.perf_counter()
                step()
                _synchronize(device)
                if turn:
                    times[title].append(time.perf_counter() - begin)
    return times


HEAD = ("method", "ms", "least to most", "speed", "memory MiB", "denoising error", "distance to none")


def cells(row: BenchRow) -> tuple[str, ...]:
    """A row as text, under `HEAD`."""
    return (
        row.method,
        f"{row.milliseconds:.1f}",
        f"{row.fastest:.1f} to {row.slowest:.1f}",
        f"{row.speed:.2f}x",
        f"{row.memory:.1f}",
        f"{row.error:.5f}",
        f"{row.distance:.2e}",
    )


def markdown(rows: Sequence[BenchRow], heading: str) -> str:
    """The rows as a Markdown table under a line that says what was run."""
    lines = [heading, "", f"| {' | '.join(HEAD)} |", f"| {' | '.join('---' for _ in HEAD)} |"]
    return "\n".join([*lines, *(f"| {' | '.join(cells(row))} |" for row in rows)]) + "\n"


def draw(rows: Sequence[BenchRow], path: Path, heading: str) -> None:
    """A picture, time against denoising error: down and left is better."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        axes.errorbar(
            row.milliseconds,
            row.error,
            xerr=[[row.milliseconds - row.fastest], [row.slowest - row.milliseconds]],
            fmt="o",
            capsize=3,
        )
        axes.annotate(row.method, (row.milliseconds, row.error), xytext=(5, 5), textcoords="offset points")
    axes.axhline(rows[0].error, color="gray", linewidth=0.8, linestyle=":")
    axes.set(xlabel="ms a forward pass (median, least to most)", ylabel="denoising error", xlim=(0, None))
    axes.set_title(heading, fontsize=9, wrap=True)
    figure.savefig(path, dpi=120, format="png")
