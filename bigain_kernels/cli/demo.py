"""`bigain demo`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import progress_bar
from .text import say

if TYPE_CHECKING:
    from rich.console import Console

    from ..evaluation.demo import Demo
    from ..evaluation.demo_results import DemoResult
    from ..evaluation.output import OutputFolder
    from ..evaluation.pooling_order import PoolingOrder

_NAMES = ("results.csv", "results.json", "README.md", "samples/*", "photographs/*")


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the tables, sample grids and pictures.")] = Path("demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results in --out.")] = False,
    full: Annotated[bool, typer.Option("--full", help="More images, samples and steps; takes longer.")] = False,
    images: Annotated[int | None, typer.Option(help="Digits to classify, at most 400.")] = None,
    samples: Annotated[int | None, typer.Option(help="Images to generate for each guidance.")] = None,
    steps: Annotated[int | None, typer.Option(help="DDIM steps.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Fraction of tokens merged.")] = None,
    factor: Annotated[int | None, typer.Option(help="Pooling factor.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Of IE-KVD.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of all noise.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    pictures: Annotated[bool, typer.Option(help="Draw what is merged in photographs.")] = True,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Another checkpoint of `bigain train-tiny`.", show_default=False)
    ] = None,
) -> None:
    """Classify real digits and generate digits under every method, and show it in one table.

    Options that are left out take the values of the demo, or those of --full. Ctrl-C shows and writes what is finished.
    """
    from ..evaluation.checkpoints import TINY_DIT
    from ..evaluation.demo import FULL, Demo, DemoConfig
    from ..evaluation.output import OutputFolder

    given: dict[str, Any] = {
        "images": images,
        "samples": samples,
        "steps": steps,
        "ratio": ratio,
        "factor": factor,
        "alpha": alpha,
        "seed": seed,
        "threads": threads,
    }
    config = replace(FULL if full else DemoConfig(), **{k: v for k, v in given.items() if v is not None})
    with OutputFolder(out, _NAMES, again=overwrite) as output:
        _run(Demo(config, checkpoint or TINY_DIT), output, pictures)


def _run(job: Demo, output: OutputFolder, pictures: bool) -> None:
    from ..evaluation.demo_files import write_all
    from ..evaluation.demo_results import summarise
    from ..evaluation.pooling_order import compare_pooling_orders

    interrupted = False
    orders: list[PoolingOrder] = []
    with progress_bar() as progress:
        task = progress.add_task("warming up", total=job.total)
        try:
            job.run(lambda text: progress.update(task, advance=1, description=text))
            progress.update(task, description="comparing orders of pooling")
            orders = compare_pooling_orders()
        except KeyboardInterrupt:
            interrupted = True
    result = summarise(job)
    if interrupted and not result.rows[0].images:
        raise KeyboardInterrupt
    _show(job, result)
    if orders:
        _show_orders(orders)
    output.clear()
    page = write_all(job, result, output, orders, pictures=pictures and not interrupted)
    say(f"Pictures and numbers: {page}")
    if interrupted:
        raise typer.Exit(130)


def _show(job: Demo, result: DemoResult) -> None:
    from ..evaluation.demo_files import caption, table_cells

    console = _print_table(*table_cells(result), left=2)
    console.print(caption(job, result), style="dim", highlight=False)
    for note in result.notes:
        console.print(f"* {note}", highlight=False)


def _show_orders(orders: list[PoolingOrder]) -> None:
    from ..evaluation.demo_files import ORDER_CAPTION, ORDER_TITLE, order_cells

    console = _print_table(*order_cells(orders), left=0, title=ORDER_TITLE)
    console.print(ORDER_CAPTION, style="dim", highlight=False)


def _print_table(heading: list[str], rows: list[list[str]], left: int, title: str | None = None) -> Console:
    """Print a table whose first `left` columns are flush left, and return the console, wide enough for it."""
    from rich import box
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    console = Console()
    table = Table(box=box.SIMPLE, show_lines=False)
    for column, name in enumerate(heading):
        table.add_column(name, justify="left" if column < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # Cells are never cut; a narrower terminal wraps the lines.
    console.width = max(console.width, Measurement.get(console, console.options.update(width=1000), table).maximum)
    if title:
        console.print(f"\n{title}", style="bold", highlight=False)
    console.print(table)
    return console
