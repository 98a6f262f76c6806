"""What the demo leaves on disk and shows: tables, numbers, pictures, and a page that explains them."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..methods.mixed import parts_of
from .data import PHOTOGRAPHS
from .demo import Demo, Part
from .demo_pictures import draw_accuracy, draw_frontier, draw_merge_maps, draw_real_size, draw_samples
from .demo_results import KID_SAMPLES, DemoResult, ModelResult
from .frontier import BUDGET, FrontierRow
from .metrics import Fraction, Measured
from .output import OutputFolder, json_text, replacing
from .pictures import PictureConfig, draw_photograph
from .points import BY_KEY, NONE, SEARCHED, STRESS

Table = tuple[list[str], list[list[str]]]
_ROLES = {"none": "", "chosen": "chosen", "rival": "rival", "stress": "stress"}
# Merging as drawn on a digit.
_MAPPED = ("tome_0.5", "lgtm_0.5", f"lgtm_{STRESS:g}", "abm_0.5")


def _shown(measured: Measured, digits: int = 2) -> str:
    if math.isnan(measured.value):
        return "-"
    return f"{measured.value:.{digits}f} ± {measured.error:.{digits}f}"


def _percent(fraction: Fraction) -> str:
    """A fraction in percent, with its interval."""
    if math.isnan(fraction.value):
        return "-"
    return f"{100 * fraction.value:.1f} ({100 * fraction.low:.1f} to {100 * fraction.high:.1f})"


def frontier_cells(result: DemoResult) -> Table:
    """One line for each point: rise of the error and speed, for each model."""
    models = [model for model in result.models if model.frontier]
    heading = ["method"]
    of: list[dict[str, FrontierRow]] = []
    titles: dict[str, str] = {}
    for model in models:
        heading += [f"{model.title}:\nerror +%", "\nspeed"]
        of.append({row.point.key: row for row in model.frontier})
        titles |= {row.point.key: row.point.title for row in model.frontier}

    def cells(row: FrontierRow | None) -> list[str]:
        if row is None:
            return ["-", "-"]
        return ["0" if row.point == NONE else _shown(row.rise, 1), f"{row.speed:.2f}x"]

    lines = [[title, *(cell for rows in of for cell in cells(rows.get(key)))] for key, title in titles.items()]
    return heading, lines


def job_cells(model: ModelResult) -> Table:
    """One line for each point that did both jobs."""
    heading = ["method", "", "tokens", "accuracy %", "KID", "class right %", "PSNR dB", "speed"]
    rows = []
    for row in model.jobs:
        rows.append(
            [
                row.point.title,
                _ROLES[row.role],
                row.tokens,
                _percent(row.accuracy),
                _shown(row.kid, 3),
                _percent(row.consistency),
                _shown(row.psnr, 1),
                "-" if math.isnan(row.speed) else f"{row.speed:.2f}x",
            ]
        )
    return heading, rows


def seed_cells(model: ModelResult) -> Table:
    """One line for each point that did both jobs: what it did with each seed."""
    heading = ["method", "accuracy % by seed", "class right % by seed", "PSNR dB by seed"]
    rows = []
    for row in model.jobs:
        accuracies, right = (
            ", ".join(f"{100 * getattr(each, name):.1f}" for each in row.seeds) for name in ("accuracy", "consistency")
        )
        decibels = "-" if row.role == "none" else ", ".join(f"{each.psnr:.1f}" for each in row.seeds)
        rows.append([row.point.title, accuracies, right, decibels])
    return heading, rows


def real_size_cells(result: DemoResult) -> Table:
    """One line for each model and method."""
    heading = ["random weights: speed only", "method", "ms", "speed"]
    return heading, [[row.model, row.title, f"{row.milliseconds:.0f}", f"{row.speed:.2f}x"] for row in result.real_size]


def frontier_caption(demo: Demo) -> str:
    """What the frontier's numbers are."""
    threads = f"{demo.config.threads} thread{'s' if demo.config.threads > 1 else ''}"
    where = "; ".join(
        f"{part.subject.settings.title} at timesteps {', '.join(map(str, part.subject.settings.frontier))}, "
        f"{part.subject.grid[0] * part.subject.grid[1]} tokens"
        for part in demo.parts
    )
    return (
        f"error: rise of the denoising error over no compression, on {demo.config.frontier_images} validation images "
        f"({where}), with the label and without, mean ± one standard error. speed: median over forward passes of "
        f"{threads}, the methods in turns. “proportional”: attention weighs a merged key by its "
        "number of tokens. “shared”: one plan for rows that belong together." + "".join(map(_searched, demo.parts))
    )


def _searched(part: Part) -> str:
    """What a search gave each block."""
    config = part.subject.searched
    if config is None:
        return ""
    given = (f"`{each.brief()}` in {_blocks(each.blocks)}" for each in parts_of(config))
    return f" “{SEARCHED}”: what `bigain search` gives the {part.subject.settings.title}, {'; '.join(given)}."


def _blocks(blocks: Sequence[int] | None) -> str:
    if blocks is None:
        return "all blocks"
    return f"block{'s' if len(blocks) > 1 else ''} {' and '.join(map(str, blocks))}"


def _seeds(demo: Demo) -> str:
    first, count = demo.config.seed, demo.config.seeds
    if count == 1:
        return f"seed {first}"
    return f"seeds {first} to {first + count - 1}, each with images and noise of its own"


def jobs_caption(demo: Demo, result: DemoResult) -> str:
    """What the numbers of the jobs are."""
    images = max((row.images for model in result.models for row in model.jobs), default=0)
    samples = max((model.samples for model in result.models), default=0)
    all_images = demo.config.images * demo.config.seeds
    shown = f"{images} test images"
    if images < all_images:
        shown = f"{images} of {all_images} test images (then --minutes were over, or it was stopped)"
    return (
        f"{shown} classified by denoising error; {samples} samples in {demo.config.steps} DDIM steps; "
        f"{_seeds(demo)}. “chosen”: of BiGain's and this project's points whose error rises by at most "
        f"{BUDGET:g} % on validation images the fastest, or within 5 % of its speed that of least error; “rival”: the "
        "same of what was there before; "
        f"“stress”: ratio {STRESS:g}, as in the paper's tables. In brackets 95 % intervals (Wilson), after ± one "
        "standard error. KID: kernel distance from validation and test images in the features of a small classifier, "
        f"brought to order one, near zero if like them; it takes {KID_SAMPLES} samples (--full). class right: samples "
        "that it takes for the digit asked for. "
        "PSNR: to the uncompressed samples from the same noise."
    )


def _flat(model: ModelResult) -> list[dict[str, Any]]:
    """All numbers of a model, one dictionary for each point and table."""
    rows: list[dict[str, Any]] = []
    for row in model.frontier:
        rows.append(
            {
                "model": model.key,
                "table": "frontier",
                "method": row.point.key,
                "rise_percent": row.rise.value,
                "rise_percent_se": row.rise.error,
                "moved_percent": row.moved,
                "speed": row.speed,
            }
        )
    for job in model.jobs:
        flat: dict[str, Any] = {
            "model": model.key,
            "table": "jobs",
            "method": job.point.key,
            "role": job.role,
            "tokens": job.tokens,
            "images": job.images,
        }
        for name in ("accuracy", "kid", "consistency", "psnr"):
            for key, value in asdict(getattr(job, name)).items():
                flat[name if key == "value" else f"{name}_{key}"] = value
        rows.append({**flat, "seconds": job.seconds, "speed": job.speed})
        if len(job.seeds) > 1:
            named = {"model": model.key, "table": "seeds", "method": job.point.key, "role": job.role}
            rows += [named | asdict(each) for each in job.seeds]
    return rows


def write_numbers(demo: Demo, result: DemoResult, output: OutputFolder) -> None:
    """`results.csv`, one line for each point of each table; `results.json` with settings, versions and notes too."""
    import diffusers

    rows = [row for model in result.models for row in _flat(model)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(output.claim("results.csv")) as part, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    content = {
        "config": asdict(demo.config),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "weights": {part.subject.key: part.subject.checkpoint.fingerprint() for part in demo.parts},
        "rows": rows,
        "real_size": [asdict(row) for row in result.real_size],
        "notes": result.notes,
    }
    output.write_text("results.json", json_text(content) + "\n")


def _markdown_table(heading: list[str], rows: list[list[str]]) -> list[str]:
    lines = [heading, ["---"] * len(heading), *rows]
    return ["| " + " | ".join(cell.replace("\n", " ").strip() for cell in line) + " |" for line in lines]


def _pictures_of_model(demo: Demo, part: Part, model: ModelResult, output: OutputFolder) -> dict[Path, str]:
    """Draws; by path, what is seen."""
    drawn: dict[Path, str] = {}
    jobs = part.jobs
    if model.frontier:
        path = output.claim(f"frontier_{model.key}.png")
        draw_frontier(model, jobs.chosen if jobs else None, path)
        drawn[path] = f"{model.title}: the frontier. Below the dotted line the error rises by less than {BUDGET:g} %."
    if jobs is None or not model.jobs:
        return drawn
    if model.jobs[0].images:
        path = output.claim(f"accuracy_{model.key}.png")
        draw_accuracy(model, path)
        drawn[path] = f"{model.title}: accuracy against time."
    if model.samples >= 3:
        path = output.claim(f"samples_{model.key}.png")
        draw_samples(jobs, model, path)
        drawn[path] = f"{model.title}: samples from the same noise, each row with its difference to the uncompressed."
    path = output.claim(f"merge_maps_{model.key}.png")
    draw_merge_maps(part.subject, tuple(BY_KEY[key] for key in _MAPPED), demo.config.seed, path)
    drawn[path] = (
        f"{model.title}: what merges in a test image at two timesteps. Tokens that merged with none show the image, "
        "each cluster has a colour."
    )
    return drawn


def write_pictures(demo: Demo, result: DemoResult, output: OutputFolder) -> dict[Path, str]:
    """All pictures; by path, what is seen."""
    drawn: dict[Path, str] = {}
    for part, model in zip(demo.parts, result.models, strict=True):
        drawn |= _pictures_of_model(demo, part, model, output)
    if result.real_size:
        path = output.claim("real_size.png")
        draw_real_size(result.real_size, path)
        drawn[path] = "Layers of real size with random weights: speed only."
    stride = demo.config.picture_stride
    for name in PHOTOGRAPHS:
        path = output.claim(f"photographs/{Path(name).stem}.png")
        draw_photograph(name, path, PictureConfig(ratio=STRESS, stride=(stride, stride)))
        drawn[path] = (
            f"A photograph, each token a patch of 8 x 8 pixels, ratio {STRESS:g}, tiles of {stride} x {stride}: the "
            "tokens that others merge into, clusters in their mean colour, and the tokens that merged with none."
        )
    return drawn


def write_all(demo: Demo, result: DemoResult, output: OutputFolder, pictures: bool = True) -> Path:
    """Everything above into `output`, and `README.md` that shows it; returns the page."""
    write_numbers(demo, result, output)
    drawn = write_pictures(demo, result, output) if pictures else {}
    lines = ["# What `bigain demo` measured", "", "## What compression costs and gives", ""]
    lines += [*_markdown_table(*frontier_cells(result)), "", frontier_caption(demo), ""]
    if any(model.jobs for model in result.models):
        lines += ["## Both jobs", ""]
        for model in result.models:
            if model.jobs:
                lines += [f"### {model.title}", "", *_markdown_table(*job_cells(model)), ""]
                if demo.config.seeds > 1:
                    lines += [*_markdown_table(*seed_cells(model)), ""]
        lines += [jobs_caption(demo, result), "", *(f"* {note}" for note in result.notes), ""]
    if result.real_size:
        lines += ["## Real size", "", *_markdown_table(*real_size_cells(result)), ""]
    lines += ["All numbers: [results.csv](results.csv), [results.json](results.json).", ""]
    for path, caption in drawn.items():
        name = path.relative_to(output.path).as_posix()
        lines += [f"![{path.stem}]({name})", "", caption, ""]
    output.write_text("README.md", "\n".join(lines))
    return output.path / "README.md"
