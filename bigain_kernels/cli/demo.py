"""`bigain demo`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import JsonOption, progress_bar
from .text import say, say_lines

if TYPE_CHECKING:
    from ..evaluation.demo import Demo
    from ..evaluation.demo_results import DemoResult
    from ..evaluation.output import OutputFolder

_NAMES = (
    "results.csv",
    "results.json",
    "README.md",
    "frontier_*.png",
    "accuracy_*.png",
    "samples_*.png",
    "merge_maps_*.png",
    "real_size.png",
    "photographs/*",
)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the tables and pictures.")] = Path("demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results in --out.")] = False,
    full: Annotated[bool, typer.Option("--full", help="More images, five seeds; takes about an hour.")] = False,
    model: Annotated[
        list[str] | None,
        typer.Option(help="unet, dit, or digits, a small one for tests; may be given again.", show_default="unet, dit"),
    ] = None,
    frontier_images: Annotated[int | None, typer.Option(help="Validation images of the frontier, at most 200.")] = None,
    images: Annotated[int | None, typer.Option(help="Test images of each seed, at most 400 in all.")] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="After these no test image is begun but the first few; frontier and samples take the time they take.",
            show_default="3.5; none with --full or --images",
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Images to generate for each seed.")] = None,
    steps: Annotated[int | None, typer.Option(help="DDIM steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of all noise.")] = None,
    seeds: Annotated[int | None, typer.Option(help="How many, from --seed on; 5 with --full.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    real_size: Annotated[bool | None, typer.Option(help="Time layers of real size, too.")] = None,
    pictures: Annotated[bool, typer.Option(help="Draw pictures.")] = True,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Another checkpoint of `bigain train-tiny`, for one --model.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What compression costs and gives on two shipped models, a U-Net and a DiT: tables and pictures.

    Options that are left out take the values of the demo, or those of --full. Ctrl-C shows and writes what is finished.
    """
    from ..evaluation.demo import FULL, Demo, DemoConfig
    from ..evaluation.output import OutputFolder
    from ..evaluation.subjects import SETTINGS

    for name in model or ():
        if name not in SETTINGS:
            raise ValueError(f"model: got {name!r}, expected one of {list(SETTINGS)}")
    given: dict[str, Any] = {
        "models": None if model is None else tuple(dict.fromkeys(model)),
        "frontier_images": frontier_images,
        "images": images,
        "minutes": minutes,
        "samples": samples,
        "steps": steps,
        "seed": seed,
        "seeds": seeds,
        "threads": threads,
        "real_size": real_size,
    }
    usual = FULL if full else DemoConfig()
    if images is not None:
        usual = replace(usual, minutes=None)
    config = replace(usual, **{k: v for k, v in given.items() if v is not None})
    with OutputFolder(out, _NAMES, again=overwrite) as output:
        _run(Demo(config, checkpoint), output, pictures, as_json)


def _run(job: Demo, output: OutputFolder, pictures: bool, as_json: bool) -> None:
    from ..evaluation.demo_files import write_all
    from ..evaluation.demo_results import summarise

    interrupted = False
    with progress_bar() as progress:
        task = progress.add_task("starting", total=job.total)
        try:
            job.run(lambda text: progress.update(task, advance=1, description=text))
            # Less to do: the choice or its rival is a point of the stress test, or time was over.
            progress.update(task, completed=job.total, description="done")
        except KeyboardInterrupt:
            interrupted = True
    result = summarise(job)
    if interrupted and not result.models[0].frontier:
        raise KeyboardInterrupt
    if not as_json:
        _show(job, result)
    output.clear()
    page = write_all(job, result, output, pictures=pictures)
    if as_json:
        say_lines((output.path / "results.json").read_text(encoding="utf-8"))
    else:
        say(f"Pictures and numbers: {page}")
    if interrupted:
        raise typer.Exit(130)


def _show(job: Demo, result: DemoResult) -> None:
    from ..evaluation.demo_files import (
        frontier_caption,
        frontier_cells,
        job_cells,
        jobs_caption,
        real_size_cells,
        seed_cells,
    )

    _print_table("What compression costs and gives", *frontier_cells(result), frontier_caption(job))
    told = [model for model in result.models if model.jobs]
    for model in told:
        caption = jobs_caption(job, result) if model is told[-1] else None
        _print_table(f"Both jobs: {model.title}", *job_cells(model), caption)
        if job.config.seeds > 1:
            _print_table(f"By seed: {model.title}", *seed_cells(model), None)
    for note in result.notes:
        _print(f"* {note}")
    if result.real_size:
        _print_table("Real size", *real_size_cells(result), None)


def _print(text: str) -> None:
    from rich.console import Console

    Console().print(text, highlight=False)


def _print_table(title: str, heading: list[str], rows: list[list[str]], caption: str | None) -> None:
    """Print a table, its title above and its caption below it."""
    from rich import box
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    console = Console()
    table = Table(box=box.SIMPLE, show_lines=False)
    for column, name in enumerate(heading):
        table.add_column(name, justify="right" if column and "method" not in name else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # Cells are never cut; a narrower terminal wraps the lines.
    console.width = max(console.width, Measurement.get(console, console.options.update(width=1000), table).maximum)
    console.print(f"\n{title}", style="bold", highlight=False)
    console.print(table)
    if caption:
        console.print(caption, style="dim", highlight=False)
