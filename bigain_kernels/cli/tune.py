"""`bigain tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import JsonOption


def tune(
    out: Annotated[
        Path | None, typer.Option(help="File to write; default: that of this GPU, in the installed package.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the launch configs of the Triton kernels on this GPU and write the best down."""
    from ..tune import main

    status = main([*([] if out is None else ["--out", str(out)]), *(["--json"] if as_json else [])])
    if status:
        raise typer.Exit(status)
