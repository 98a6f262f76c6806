"""The report of an experiment: tables in the form of the paper, its numbers beside ours, and how sure they are."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml

from ..bench import times_in_turns
from ..metrics import holm, mcnemar
from ..noise import seeded_noise
from ..output import json_text, replacing, write_text
from .engine import default_batch
from .experiment import Method
from .flops import row_flops
from .generation_report import generation_table
from .judges import Judges
from .queries import Outcomes, outcomes
from .reproduce import Reproduction
from .rows import read_all
from .statistics import bootstrap
from .tables import Line, Table, p_value, percent, signed

# Holm-corrected p below which a difference is called one.
LEVEL = 0.05
# Rows of a forward pass that is timed, and how often each method is.
_TIMED_ROWS, _TURNS = 8, 7


@dataclass
class Classified:
    """All seeds of one method."""

    method: Method
    seeds: list[Outcomes]

    @property
    def correct(self) -> np.ndarray:
        """(seeds, images) bool."""
        return np.stack([outcome.correct.numpy() for outcome in self.seeds])


def read_classified(job: Reproduction) -> list[Classified]:
    """What is finished, by method; one without a single image of each seed is left out."""
    found = []
    for method in job.experiment.methods:
        parts = [part for part in job.classified if part.method is method]
        if all(part.folder.done() == part.folder.shards for part in parts):
            found.append(Classified(method, [outcomes(read_all([part.folder.path]), job.rule) for part in parts]))
    return found


@torch.no_grad()
def row_times(job: Reproduction, methods: Sequence[Method]) -> dict[str, tuple[float, float]]:
    """By title, milliseconds of a row and the speed against the first method.

    Methods take turns on the same rows, when the work is done: the times of the rows on disk are of different moments,
    beside whatever else the machine did then, other processes of the run among it.
    """
    denoiser, seed = job.checkpoint.denoiser, job.experiment.classify.seeds[0]
    device = job.checkpoint.device
    rows = min(_TIMED_ROWS, default_batch(denoiser.sample_shape))
    noisy = seeded_noise([(seed, row) for row in range(rows)], denoiser.sample_shape).to(device)
    timestep = torch.full((rows,), job.timesteps[0], device=device)
    labels = torch.full((rows,), job.labels[0], device=device)
    configs = {method.title: job.compressions[method.title, seed] for method in methods}
    times = times_in_turns(denoiser, configs, lambda: denoiser(noisy, timestep, labels), _TURNS, device)
    base = times[methods[0].title]
    return {
        title: (
            1000 * statistics.median(took) / rows,
            statistics.median(theirs / mine for theirs, mine in zip(base, took, strict=True)),
        )
        for title, took in times.items()
    }


def classification_table(job: Reproduction, found: Sequence[Classified]) -> Table:
    """Accuracy under every method; the first is what the others are compared with."""
    base = found[0]
    tests = [mcnemar(each.seeds[0].correct, base.seeds[0].correct) for each in found[1:]]
    corrected = [math.nan, *holm(tests)]
    several = any(len(labels) > 1 for labels in base.seeds[0].labels)
    times = row_times(job, [each.method for each in found])
    lines = []
    for each, p in zip(found, corrected, strict=True):
        first = each.seeds[0]
        gap = "-" if each is base else signed(*bootstrap(each.correct, base.correct))
        calibrated, _ = first.calibration()
        paper = each.method.paper.get("top-1")
        seed = job.experiment.classify.seeds[0]
        flops = row_flops(job.checkpoint.denoiser, job.compressions[each.method.title, seed])
        milliseconds, speed = times[each.method.title]
        cells = [
            percent(first.top(1)),
            "-" if paper is None else f"{paper:.2f}",
            gap,
            p_value(p),
            f"{100 * each.correct.mean():.2f}",
            percent(first.top(5)),
            *([f"{100 * first.mean_average_precision():.2f}"] if several else []),
            f"{calibrated:.3f}",
            f"{np.mean(first.evaluations):.1f}",
            f"{milliseconds:.2f}",
            f"{speed:.2f}x",
            f"{flops / 1e9:.4g}",
        ]
        points = {"accuracy": first.top(1).value, "ms": milliseconds, "GFLOP": flops / 1e9}
        lines.append(Line(each.method.title, cells, points))
    columns = ["method", "top-1 %", "paper", f"minus {base.method.title}", "p", "all seeds %", "top-5 %"]
    columns += [*(["mAP %"] if several else []), "ECE", "rows", "ms a row", "speed", "GFLOP a row"]
    images, seeds = len(base.seeds[0].paths), len(base.seeds)
    caption = (
        f"{images} images, {seeds} seed{'s' if seeds > 1 else ''} of noise. top-1, top-5: of the first seed, with "
        "Wilson's 95 % interval. minus: mean difference in points over all seeds, 95 % by bootstrap over images and "
        "seeds. p: McNemar's exact test of the first seed, corrected by Holm. ECE: calibration error after fitting a "
        "temperature on the other half. rows: of the model, for an image. ms, speed: median of turns that the methods "
        "took on the same rows when all was done, on this machine."
    )
    return Table("Classification", columns, lines, caption)


def not_run(job: Reproduction, drawn: Table | None, missing: Sequence[str]) -> list[str]:
    """In a line each, what the experiment could hold and does not."""
    lines = []
    for part in [*job.classified, *job.drawn]:
        left = part.folder.shards - part.folder.done()
        if left:
            lines.append(f"{part.folder.path.relative_to(job.out)}: {left} of {part.folder.shards} shards are left")
    if job.experiment.generate is None:
        lines.append("generation: the experiment asks for none")
    elif drawn is not None:
        lines += missing
    return lines


def _plots(job: Reproduction, tables: Sequence[Table]) -> list[str]:
    """Accuracy and KID against time and FLOPs, a PNG each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    costs = {line.title: line.points for line in tables[0].lines}
    names = []
    for table in tables:
        for what in ("accuracy", "KID"):
            for cost, label in (("ms", "ms a row"), ("GFLOP", "GFLOP a row")):
                points = [
                    (costs[line.title][cost], line.points[what], line.title)
                    for line in table.lines
                    if what in line.points and line.title in costs
                ]
                if not points:
                    continue
                figure = Figure(figsize=(5, 3.5), dpi=120, layout="constrained")
                FigureCanvasAgg(figure)
                axes = figure.add_subplot()
                better = max if what == "accuracy" else min
                for x, y, title in points:
                    beaten = any((a <= x and y != b and better(y, b) == b) or (a < x and y == b) for a, b, _ in points)
                    axes.plot(x, y, "o", color="tab:gray" if beaten else "tab:red")
                    axes.annotate(
                        title, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8, parse_math=False
                    )
                axes.margins(0.2)
                axes.set_xlabel(label)
                axes.set_ylabel(what)
                axes.set_title("red: nothing is both cheaper and better", fontsize=9, loc="left")
                name = f"{what.lower()}-{cost.lower()}.png"
                with replacing(job.out / name) as part:
                    figure.savefig(part, format="png")
                names.append(name)
    return names


def _markdown(title: str, tables: Sequence[Table], lists: dict[str, list[str]], code: str, plots: list[str]) -> str:
    def cell(text: str) -> str:
        return text.replace("|", "\\|")

    lines = [f"# {title}", ""]
    for table in tables:
        lines += [f"## {table.heading}", "", "| " + " | ".join(map(cell, table.columns)) + " |"]
        lines.append("|" + "|".join(["---", *["---:"] * (len(table.columns) - 1)]) + "|")
        lines += ["| " + " | ".join(map(cell, [line.title, *line.cells])) + " |" for line in table.lines]
        lines += ["", table.caption, ""]
    lines += [f"![{name.removesuffix('.png')}]({name})" for name in plots] + [""]
    for heading, items in lists.items():
        lines += [f"## {heading}", "", *[f"* {item}" for item in items or ["nothing"]], ""]
    return "\n".join([*lines, "## Settings", "", "```yaml", code.rstrip(), "```", ""])


def _html(title: str, tables: Sequence[Table], lists: dict[str, list[str]], code: str, plots: list[str]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    style = (
        "body{font:15px sans-serif;margin:2em}td,th{padding:.2em .7em;text-align:right}td:first-child{text-align:left}"
    )
    out = [f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{style}</style>"]
    out.append(f"<h1>{html.escape(title)}</h1>")
    for table in tables:
        out += [f"<h2>{html.escape(table.heading)}</h2><table>", row(table.columns, "th")]
        out += [row([line.title, *line.cells], "td") for line in table.lines]
        out += ["</table>", f"<p>{html.escape(table.caption)}</p>"]
    out += [f'<img src="{name}" alt="{name}">' for name in plots]
    for heading, items in lists.items():
        items = [f"<li>{html.escape(item)}</li>" for item in items or ["nothing"]]
        out += [f"<h2>{html.escape(heading)}</h2><ul>", *items, "</ul>"]
    return "\n".join([*out, f"<h2>Settings</h2><pre>{html.escape(code)}</pre>", ""])


def write_report(job: Reproduction, judges: Judges | None = None) -> Path:
    """`report.md`, `report.html`, `numbers.json`, `per_class.csv` and the plots; from what is on disk, all or a part.

    Args:
        job: what was done.
        judges: of the drawings; None are those that the package brings, see `judges.find_judges`.

    Returns:
        The page in Markdown.

    Raises:
        ValueError: not even the first method is finished.
    """
    found = read_classified(job)
    if not found or found[0].method is not job.experiment.methods[0]:
        raise ValueError(f"out: got {job.out} with nothing finished of {job.experiment.methods[0].title}, expected it")
    judges = judges or job.judges()
    drawn, missing = generation_table(job, judges)
    tables = [classification_table(job, found), *([drawn] if drawn else [])]
    damaged = sorted({item for part in job.classified for item in part.folder.damaged()})
    left_out = [f"{path}: {reason}" for path, reason in damaged] + list(getattr(job.images, "left_out", ()))
    lists = {
        "Not run": not_run(job, drawn, missing),
        "Left out": left_out,
        "Notes": list(job.experiment.notes),
    }
    settings = {
        "experiment": json.loads(job.experiment.model_dump_json()),
        "decided by": job.classified[0].folder.settings,
    }
    code = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=110)
    plots = _plots(job, tables)
    arguments = (job.experiment.name, tables, lists, code, plots)
    write_text(job.out / "report.html", _html(*arguments))
    write_text(job.out / "per_class.csv", _per_class(found))
    numbers = {table.heading: {line.title: line.points for line in table.lines} for table in tables}
    write_text(job.out / "numbers.json", json_text({**numbers, **lists}) + "\n")
    write_text(job.out / "report.md", _markdown(*arguments))
    return job.out / "report.md"


def _per_class(found: Sequence[Classified]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["method", "class", "accuracy", "low", "high"])
    for each in found:
        for label, value in each.seeds[0].per_class().items():
            table.writerow([each.method.title, label, *(f"{v:.4f}" for v in (value.value, value.low, value.high))])
    return text.getvalue()
