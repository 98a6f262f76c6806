"""Pictures of a result file: `python -m benchmarks.plot benchmarks/results/cpu.csv [--out FOLDER]`.

One PNG per op: a group of bars per problem, a bar per provider with its 20th and 80th percentile, and the floor. Where
rows repeat, the newest count. On a GPU the bars are graph replays, the time of the kernels alone.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    **{"cpp": "#d1495b", "triton": "#d1495b", "cuda": "#8d2f5f", "fused": "#c77dff", "pool": "#f4a261"},
    **{"pooled": "#2a9d8f", "full": "#264653", "unpatched": "#264653"},
    **{
        "reference": "#7d8597",
        "compiled": "#b8bfcc",
        "eager": "#30638e",
        "conv2d": "#00798c",
        "bmm": "#00798c",
        "tomesd": "#edae49",
    },
}


def newest(path: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    """The last row of each (op, problem, provider) in the mode to draw."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    mode = "graph" if any(row["mode"] == "graph" for row in rows) else "eager"
    return {(row["op"], row["problem"], row["provider"]): row for row in rows if row["mode"] == mode}


def plot_op(op: str, rows: dict[tuple[str, str], dict[str, str]], out: Path) -> None:
    """One picture; rows by (problem, provider)."""
    problems = list(dict.fromkeys(problem for problem, _ in rows))
    providers = list(dict.fromkeys(provider for _, provider in rows))
    width = 0.8 / len(providers)
    figure, axes = plt.subplots(figsize=(max(6.0, 1.6 * len(problems) + 2), 4), layout="constrained")
    for i, provider in enumerate(providers):
        places = [j for j, problem in enumerate(problems) if (problem, provider) in rows]
        own = [rows[problems[j], provider] for j in places]
        median = [float(row["median_us"]) for row in own]
        spread = [
            [m - float(row["p20_us"]) for m, row in zip(median, own, strict=True)],
            [float(row["p80_us"]) - m for m, row in zip(median, own, strict=True)],
        ]
        axes.bar(
            [j + (i - (len(providers) - 1) / 2) * width for j in places],
            median,
            width,
            yerr=spread,
            label=provider,
            color=COLOURS.get(provider),
            error_kw={"linewidth": 0.8},
        )
    for j, problem in enumerate(problems):
        floor = float(next(row["floor_us"] for (name, _), row in rows.items() if name == problem))
        axes.hlines(floor, j - 0.45, j + 0.45, color="black", linewidth=1.2, label="floor" if j == 0 else "")
    any_row = next(iter(rows.values()))
    axes.set(
        yscale="log",
        ylabel="microseconds",
        title=f"{op}, {any_row['dtype']}\n{any_row['device'].split(',')[0]}, torch {any_row['torch']}",
    )
    axes.set_xticks(range(len(problems)), problems)
    figure.legend(fontsize="small", loc="outside right upper")
    figure.savefig(out, dpi=130)
    plt.close(figure)


def plot_file(path: Path, out: Path) -> list[Path]:
    """Pictures of all ops of a result file, in the folder `out`; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    rows = newest(path)
    pictures = []
    for op in dict.fromkeys(op for op, _, _ in rows):
        picture = out / f"{path.stem}_{op}.png"
        plot_op(op, {(problem, provider): row for (o, problem, provider), row in rows.items() if o == op}, picture)
        pictures.append(picture)
    return pictures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("--out", type=Path, help="default: plots/ beside the file")
    arguments = parser.parse_args()
    for written in plot_file(arguments.csv, arguments.out or arguments.csv.parent / "plots"):
        print(written)
    sys.exit(0)
