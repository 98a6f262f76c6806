"""`bigain reproduce`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as opt
from .text import say, say_lines


def reproduce(
    config: Annotated[
        str,
        typer.Argument(
            help="A YAML file, or tiny, sd2-pets, sd2-imagenet100, sd2-imagenet1k, sd2-coco or dit-xl2-imagenet100."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for rows, images and the report; gone on with if it has some.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the data set.", show_default=False)] = None,
    checkpoint: Annotated[str | None, typer.Option(help="In the place of that of the config.")] = None,
    limit: Annotated[int | None, typer.Option(help="The first images alone, to classify and to draw.")] = None,
    inception: Annotated[
        Path | None,
        typer.Option(
            help="Weights of Inception v3 for KID, FID, IS, precision and recall. Default: those in torch's cache.",
            show_default=False,
        ),
    ] = None,
    clip: Annotated[
        Path | None, typer.Option(help="Folder of a CLIP model, for the CLIP score.", show_default=False)
    ] = None,
    device: opt.DeviceOption = None,
    threads: opt.ThreadsOption = None,
    as_json: opt.JsonOption = False,
) -> None:
    """Run an experiment, a table of the paper or one's own, and write its report.

    Start the same command again to go on, and in several processes (torchrun, accelerate launch) or on several machines
    with the folder between them to share the work. Ctrl-C keeps what is finished, and reports on it.
    """
    from ..evaluation.harness.experiment import load_experiment
    from ..evaluation.harness.processes import member
    from ..evaluation.harness.report import write_report
    from ..evaluation.harness.reproduce import Reproduction

    opt.set_threads(threads)
    given: dict[str, Any] = {"data.root": data, "checkpoint": checkpoint, "data.limit": limit}
    experiment = load_experiment(config, {name: value for name, value in given.items() if value is not None})
    chosen, _ = opt.device_and_dtype(device, experiment.dtype)
    with member(chosen) as self:
        job = Reproduction(experiment, out or Path(Path(config).stem), self.device)
        # Looked for before the work, which may take days.
        judges = job.judges(inception, clip) if self.rank == 0 else None
        try:
            with opt.progress_bar() as bar:
                task = bar.add_task("starting", total=job.total, completed=job.done())
                job.run(lambda what, done: bar.update(task, advance=done, description=what), self.rank)
        except KeyboardInterrupt:
            if self.rank == 0 and job.is_reportable:
                _tell(write_report(job, judges), as_json)
            raise
        if self.rank == 0:
            _tell(write_report(job, judges), as_json)


def _tell(page: Path, as_json: bool) -> None:
    if as_json:
        numbers = json.loads((page.parent / "numbers.json").read_text(encoding="utf-8"))
        say_lines(json.dumps({"report": str(page), **numbers}, indent=2))
    else:
        say(f"Report: {page}")
