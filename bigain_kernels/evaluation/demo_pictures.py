"""The demo's pictures: frontier, accuracy against time, samples beside their differences, merge maps, real size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .demo import Jobs
from .demo_results import ModelResult
from .denoisers import diffuse
from .frontier import BUDGET
from .generate import to_pixels
from .noise import seeded_noise
from .output import replacing
from .points import NONE, Point
from .real_size import RealSizeRow
from .subjects import Subject

# Colours that people who see few colours can tell apart (Okabe and Ito).
_COLOURS = {
    "none": "#000000",
    "tome": "#E69F00",
    "lgtm": "#0072B2",
    "abm": "#56B4E9",
    "todo": "#CC79A7",
    "avgpool": "#999999",
    "iekvd": "#009E73",
    "searched": "#D55E00",
}
_NAMES = {
    "tome": "ToMe",
    "lgtm": "L-GTM",
    "abm": "ABM",
    "todo": "ToDo",
    "avgpool": "average pooling",
    "iekvd": "IE-KVD",
    "searched": "several, found by search",
}
_STRIP = 10
_MAP_TIMESTEPS = (250, 650)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as part:
        figure.savefig(part, format="png")


def _marker(point: Point) -> str:
    if point.options.get("blocks") or point.config is not None:
        return "D"
    if point.shared:
        return "*"
    return "^" if point.options.get("proportional") else "o"


def draw_frontier(model: ModelResult, chosen: Point | None, path: Path) -> None:
    """Rise of the denoising error, in percent, over speed; the chosen point circled."""
    figure = _figure(8.5, 5.0)
    axes = figure.add_subplot()
    for row in model.frontier:
        point = row.point
        if point == NONE:
            continue
        axes.errorbar(
            row.speed,
            row.rise.value,
            yerr=row.rise.error,
            fmt=_marker(point),
            color=_COLOURS[point.method],
            markersize=9 if point.shared else 6,
            linewidth=0.8,
        )
        size = point.options.get("ratio", point.options.get("factor"))
        label = "search" if size is None else f"{size:g}"
        axes.annotate(label, (row.speed, row.rise.value), xytext=(5, 3), textcoords="offset points", fontsize=7)
        if point == chosen:
            axes.plot(row.speed, row.rise.value, "o", markersize=19, markerfacecolor="none", color="#D55E00")
    axes.axhline(BUDGET, color="#D55E00", linewidth=0.8, linestyle=":")
    axes.axvline(1.0, color="black", linewidth=0.5)
    axes.set_yscale("symlog", linthresh=2.0)
    axes.set_yticks([0, 1, 2, 5, 10, 20, 50, 100, 200], ["0", "1", "2", "5", "10", "20", "50", "100", "200"])
    axes.set_xlabel("speed against no compression")
    axes.set_ylabel("rise of the denoising error, %")
    axes.set_title(f"{model.title}: cost and gain of compression (circled: chosen, dotted: {BUDGET:g} %)", fontsize=10)
    methods = {row.point.method for row in model.frontier}
    for method, name in ((key, name) for key, name in _NAMES.items() if key in methods):
        axes.plot([], [], "o", color=_COLOURS[method], label=name)
    shapes = {"o": "as published", "^": "proportional", "*": "proportional, shared plan", "D": "in some blocks alone"}
    used = {_marker(row.point) for row in model.frontier}
    for marker, name in shapes.items():
        if marker in used:
            axes.plot([], [], marker, color="white", markeredgecolor="black", label=name)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _save(figure, path)


def draw_accuracy(model: ModelResult, path: Path) -> None:
    """Accuracy with its interval over the time that classifying an image took."""
    figure = _figure(7.5, 4.0)
    axes = figure.add_subplot()
    for row in model.jobs:
        a, ms = row.accuracy, 1000 * row.seconds / row.images
        axes.errorbar(
            ms,
            100 * a.value,
            yerr=[[100 * (a.value - a.low)], [100 * (a.high - a.value)]],
            fmt=_marker(row.point),
            color=_COLOURS[row.point.method],
            capsize=3,
            markersize=10 if row.point.shared else 7,
            label=row.point.title + (" (chosen)" if row.role == "chosen" else ""),
        )
    axes.set_xlabel("time for an image, ms")
    axes.set_ylabel("accuracy, % (95 % interval)")
    axes.set_title(f"{model.title}: {model.jobs[0].images} test images classified", fontsize=10)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _save(figure, path)


def draw_samples(jobs: Jobs, model: ModelResult, path: Path) -> None:
    """One strip of samples for each point, from the same noise, each with its difference to the first below."""
    rows = model.jobs
    made = {row.point.key: torch.cat(jobs.outcomes[row.point.key].samples)[:_STRIP] for row in rows}
    plain = made[NONE.key].clamp(-1, 1)
    figure = _figure(7.5, 0.6 * (2 * len(rows) - 1) + 0.4)
    axes = figure.subplots(2 * len(rows) - 1, 1)
    line = 0
    for row in rows:
        images = made[row.point.key].clamp(-1, 1)
        loss = "" if row.point == NONE else f"\n{row.psnr.value:.1f} dB"
        # One part of a name a line: there is little room on the left.
        _strip(axes[line], to_pixels(images), row.point.title.replace(", ", ",\n", 2) + loss)
        line += 1
        if row.point != NONE:
            # Black where the two are alike, white where they are a whole range of values apart.
            _strip(axes[line], to_pixels((images - plain).abs() - 1), "difference")
            line += 1
    _save(figure, path)


def _strip(axes: Any, pixels: np.ndarray, name: str) -> None:
    """(n, h, w, 3) side by side, named on the left."""
    gap = np.full((pixels.shape[1], 1, 3), 255, dtype=np.uint8)
    axes.imshow(np.concatenate([part for image in pixels for part in (image, gap)], axis=1), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_frame_on(False)
    axes.set_ylabel(name, fontsize=6, rotation=0, ha="right", va="center")


def _first_states(subject: Subject, noisy: torch.Tensor, timestep: int, label: torch.Tensor) -> torch.Tensor:
    """(1, N, C): what a compressed layer gets; where several stand in a row the second: the first sees noise."""
    model: Any = subject.checkpoint.denoiser.model
    if hasattr(model, "transformer_blocks"):
        norm = model.transformer_blocks[min(1, len(model.transformer_blocks) - 1)].norm1
    else:
        norm = model.down_blocks[0].attentions[0].transformer_blocks[0].norm1
    seen: list[torch.Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    try:
        subject.checkpoint.denoiser(noisy, torch.tensor([timestep]), label)
    finally:
        handle.remove()
    return seen[0]


@torch.no_grad()
def draw_merge_maps(subject: Subject, points: tuple[Point, ...], seed: int, path: Path, image: int = 0) -> None:
    """A test image at two timesteps: noisy, and for each merging point its clusters, each in a colour of its own.

    Tokens that merged with none show the image; the others the mean of their cluster, tinted.
    """
    clean, label = subject.test.images[image : image + 1], subject.test.labels[image : image + 1]
    scheduler, grid = subject.checkpoint.denoiser.scheduler, subject.grid
    figure = _figure(2.1 * (1 + len(points)), 2.3 * len(_MAP_TIMESTEPS))
    axes = figure.subplots(len(_MAP_TIMESTEPS), 1 + len(points), squeeze=False)
    for line, timestep in enumerate(_MAP_TIMESTEPS):
        noise = seeded_noise([(seed, image, timestep)], tuple(clean.shape[1:]))
        noisy, _ = diffuse(scheduler, clean, noise, torch.tensor([timestep]))
        states = _first_states(subject, noisy, timestep, label)
        _picture(axes[line][0], to_pixels(noisy)[0], f"timestep {timestep}")
        for axis, point in zip(axes[line][1:], points, strict=True):
            config: Any = point.compression()
            plan = config.plan(states, grid, config.ratio, torch.tensor([timestep]))
            _picture(axis, _clusters(clean, plan, grid), point.title)
    _save(figure, path)


def _picture(axes: Any, pixels: np.ndarray, title: str) -> None:
    axes.imshow(pixels, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title, fontsize=8)


def _clusters(clean: torch.Tensor, plan: Any, grid: tuple[int, int]) -> np.ndarray:
    slots, sizes = plan.slot[0].long(), plan.sizes()[0]
    tokens = (F.adaptive_avg_pool2d(clean, grid).flatten() + 1) / 2
    means = (torch.zeros(plan.num_slots).index_add_(0, slots, tokens) / sizes)[slots]
    colours = torch.rand(plan.num_slots, 3, generator=torch.Generator().manual_seed(0))[slots]
    alone = (sizes[slots] == 1)[:, None]
    painted = torch.where(alone, tokens[:, None].expand(-1, 3), 0.45 * means[:, None] + 0.55 * colours)
    return painted.view(*grid, 3).clamp(0, 1).numpy()


def draw_real_size(rows: list[RealSizeRow], path: Path) -> None:
    """Bars of milliseconds at real size. Random weights: speed only."""
    models = list(dict.fromkeys(row.model for row in rows))
    figure = _figure(4.2 * len(models), 2.6)
    for axes, model in zip(np.atleast_1d(figure.subplots(1, len(models))), models, strict=True):
        own = [row for row in rows if row.model == model]
        axes.barh([row.title for row in own], [row.milliseconds for row in own], color="#0072B2")
        for place, row in enumerate(own):
            axes.text(row.milliseconds, place, f" {row.speed:.2f}x", va="center", fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.18)
        axes.set_title(f"{model}\nrandom weights: speed only", fontsize=9)
        axes.set_xlabel("ms, one row, float32")
    _save(figure, path)
