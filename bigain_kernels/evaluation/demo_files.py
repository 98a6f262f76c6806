"""What the demo leaves on disk: tables, sample grids, pictures, and a page that shows them."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..methods import MergeConfig
from .data import PHOTOGRAPHS
from .demo import METHODS, Demo
from .demo_results import DemoResult, Row, shown_p
from .generate import save_grid
from .metrics import Fraction, Measured
from .output import OutputFolder, replacing
from .pictures import PictureConfig, draw_photograph
from .pooling_order import PoolingOrder

# Samples of each class on a grid.
_COLUMNS = 10


def _shown(measured: Measured | None, scale: float = 1.0, digits: int = 2, sign: str = "") -> str:
    if measured is None or math.isnan(measured.value):
        return "-"
    return f"{scale * measured.value:{sign}.{digits}f} ± {scale * measured.error:.{digits}f}"


def _percent(fraction: Fraction) -> str:
    """A fraction in percent, with its interval."""
    if math.isnan(fraction.value):
        return "-"
    return f"{100 * fraction.value:.1f} ({100 * fraction.low:.1f} to {100 * fraction.high:.1f})"


def table_cells(result: DemoResult) -> tuple[list[str], list[list[str]]]:
    """Heading and cells of the table. A cell may have several lines, one for each guidance."""
    guidances = list(result.rows[0].generation)
    per = "\n" + " / ".join(f"{g:g}" for g in guidances) if guidances else ""
    heading = ["method", "tokens", "accuracy %", "difference\nto its rival"]
    heading += [f"KID{per}", f"class right %{per}", f"distance{per}", "time s", "speed"]

    def cells(row: Row) -> list[str]:
        made = row.generation.values()
        difference = "-"
        if row.difference is not None:
            difference = f"{row.difference.difference:+.1f}, {shown_p(row.difference.p)}\nto {row.rival}"
        return [
            row.title,
            row.tokens,
            _percent(row.accuracy),
            difference,
            "\n".join(_shown(g.kid, 1, 2) for g in made) or "-",
            "\n".join(_percent(g.consistency) for g in made) or "-",
            "\n".join(_shown(g.distance, 1, 3) for g in made) or "-",
            f"{row.seconds:.1f}",
            "-" if math.isnan(row.speed) else f"{row.speed:.2f}x",
        ]

    return heading, [cells(row) for row in result.rows]


def caption(demo: Demo, result: DemoResult) -> str:
    """What the numbers are, in a few sentences."""
    config = demo.config
    return (
        f"{result.rows[0].images} held-out digits classified by denoising error (timesteps "
        f"{', '.join(map(str, config.timesteps))}), {result.samples} samples for each "
        f"guidance in {config.steps} DDIM steps, {config.threads} threads; ratio {config.ratio:g}, factor "
        f"{config.factor}, alpha {config.alpha:g}, seed {config.seed}. In brackets stand 95 % intervals (Wilson), "
        "after ± one standard error. difference: points, with p of McNemar's exact test after Holm's correction. "
        "“shared”: one plan for all classes of an image when classifying, for both rows of a guidance pair when "
        "generating. “proportional”: attention weighs every merged key by the number of its tokens. "
        "KID: kernel distance from the 600 held-out digits in the 64 features of the small classifier, which are "
        "brought to order one. class right: "
        "samples that it takes for the digit asked for. distance: mean squared, to the samples of “none” from the same "
        "noise. time: median of the chunks of work, times their number. speed: median over the chunks, against “none”."
    )


ORDER_TITLE = "Pooling before or after norm and rotation"
ORDER_CAPTION = (
    "A small Flux model with random weights on a photograph with noise: distance of its output from that without "
    "pooling, in % of the latter, mean over sets of weights ± one standard error. “after”: keys and values pooled "
    "after norm and rotation, as IE-KVD is defined (the default). “before”: hidden states pooled before the "
    "projections, pooled keys rotated by the position of the nearest token. “before - after”: paired over the weights, "
    "negative where “before” is nearer. “apart”: between the two; at alpha 1 they take the same tokens. “sharpness”: "
    "factor on the queries. Random weights show the arithmetic of the two orders, not what either does to pictures."
)


def order_cells(orders: list[PoolingOrder]) -> tuple[list[str], list[list[str]]]:
    """Heading and cells of the table that compares the orders of pooling."""
    heading = ["sharpness", "alpha", "after %", "before %", "before - after", "apart %"]
    return heading, [
        [
            f"{o.sharpness:g}",
            f"{o.alpha:g}",
            _shown(o.keys, 100, 2),
            _shown(o.hidden, 100, 2),
            _shown(o.difference, 100, 2, "+"),
            _shown(o.apart, 100, 2),
        ]
        for o in orders
    ]


def _flat(row: Row) -> dict[str, Any]:
    flat: dict[str, Any] = {"method": row.key, "tokens": row.tokens, "images": row.images, "rival": row.rival}

    def put(name: str, measured: Fraction | Measured) -> None:
        flat.update({name if key == "value" else f"{name}_{key}": value for key, value in asdict(measured).items()})

    put("accuracy", row.accuracy)
    flat["difference"] = None if row.difference is None else row.difference.difference
    flat["difference_p"] = None if row.difference is None else row.difference.p
    for guidance, made in row.generation.items():
        for name in ("kid", "consistency", "distance"):
            put(f"{name}_guidance_{guidance:g}", getattr(made, name))
    return {**flat, "seconds": row.seconds, "speed": row.speed}


def write_numbers(demo: Demo, result: DemoResult, orders: list[PoolingOrder], output: OutputFolder) -> None:
    """`results.csv`, one line for each method, and `results.json` with the settings, versions and notes too."""
    import diffusers

    rows = [_flat(row) for row in result.rows]
    with replacing(output.claim("results.csv")) as part, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    content = {
        "config": asdict(demo.config),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "rows": [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows],
        "notes": result.notes,
        "pooling_orders": [asdict(order) for order in orders],
    }
    output.write_text("results.json", json.dumps(content, indent=2) + "\n")


def write_grids(demo: Demo, output: OutputFolder) -> list[Path]:
    """`samples/<method>_guidance_<g>.png` for every method and guidance that has samples."""
    names, paths = demo.checkpoint.class_names, []
    shown = _COLUMNS * len(names)
    for method in METHODS:
        for guidance, samples in demo.outcomes[method.key].samples.items():
            path = output.claim(f"samples/{method.key}_guidance_{guidance:g}.png")
            labels = demo.labels[: len(samples)][:shown]
            save_grid(samples[:shown], labels, names, path, f"{method.title}, guidance {guidance:g}")
            paths.append(path)
    return paths


def write_pictures(demo: Demo, output: OutputFolder) -> list[Path]:
    """`photographs/<name>_<stride>x<stride>.png` for each photograph and each tile size."""
    paths = []
    for name in PHOTOGRAPHS:
        for stride in demo.config.picture_strides:
            path = output.claim(f"photographs/{Path(name).stem}_{stride}x{stride}.png")
            draw_photograph(name, path, PictureConfig(ratio=demo.config.ratio, stride=(stride, stride)))
            paths.append(path)
    return paths


def _markdown_table(heading: list[str], rows: list[list[str]]) -> list[str]:
    lines = [heading, ["---"] * len(heading), *rows]
    return ["| " + " | ".join(cell.replace("\n", "<br>") for cell in line) + " |" for line in lines]


def write_index(
    demo: Demo,
    result: DemoResult,
    orders: list[PoolingOrder],
    output: OutputFolder,
    grids: list[Path],
    pictures: list[Path],
) -> Path:
    """`README.md` of the folder: the table, the lines under it, and every picture with what it shows."""
    merge = [
        m.title
        for m in METHODS
        if isinstance(demo.compressions[m.key], MergeConfig) and not (m.shared or m.proportional)
    ]
    lines = ["# What `bigain demo` measured", "", *_markdown_table(*table_cells(result)), "", caption(demo, result), ""]
    lines += [f"* {note}" for note in result.notes]
    lines += ["", "The same numbers: [results.csv](results.csv), [results.json](results.json).", ""]
    if orders:
        lines += [f"## {ORDER_TITLE}", "", *_markdown_table(*order_cells(orders)), "", ORDER_CAPTION, ""]
    if pictures:
        lines += ["## What is merged in a photograph", ""]
        lines += [
            "Each token is a patch of 8 x 8 pixels. From top to bottom: the tokens that others are merged into (a "
            f"detail, with the tiles), the clusters of {', '.join(merge)} (an unmerged token shows the photograph, a "
            "merged one the mean colour of its cluster), and the unmerged tokens alone: they follow the edges and the "
            "texture. With tiles of 2 x 2 a ratio of 0.7 merges nearly every source, so only the strongest edges stay; "
            "with tiles of 4 x 4 there are fewer destinations to pay for, and the edges stay whole.",
            "",
        ]
        lines += [f"![{path.stem}]({path.relative_to(output.path).as_posix()})\n" for path in pictures]
    if grids:
        lines += [
            "## Samples",
            "",
            "One row for each digit asked for; a place starts from the same noise in every grid.",
            "",
        ]
        lines += [f"![{path.stem}]({path.relative_to(output.path).as_posix()})" for path in grids]
    output.write_text("README.md", "\n".join(lines) + "\n")
    return output.path / "README.md"


def write_all(
    demo: Demo,
    result: DemoResult,
    output: OutputFolder,
    orders: list[PoolingOrder] | None = None,
    pictures: bool = True,
) -> Path:
    """Everything above into `output`; returns the page. `orders`: of `compare_pooling_orders`, if that was done."""
    orders = orders or []
    write_numbers(demo, result, orders, output)
    drawn = write_pictures(demo, output) if pictures else []
    return write_index(demo, result, orders, output, write_grids(demo, output), drawn)
