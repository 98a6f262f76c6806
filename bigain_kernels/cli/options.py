"""Options that several commands share, how their text is read, and the progress bar."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress


_MODEL, _RUN = "Model", "Run"

CheckpointOption = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        help="tiny-dit, mnist-unet or mnist-dit, which come with this package, the folder of a diffusers checkpoint (a "
        "pipeline, or transformer/ and scheduler/), or a hub id. Default: tiny-dit.",
        show_default=False,
        rich_help_panel=_MODEL,
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, ... Default: a GPU if there is one.", rich_help_panel=_MODEL)
]
DtypeOption = Annotated[str, typer.Option(help="float32, float16 or bfloat16.", rich_help_panel=_MODEL)]
SeedOption = Annotated[int, typer.Option(help="Of the noise, and of random choices of a method.", rich_help_panel=_RUN)]
BatchOption = Annotated[int | None, typer.Option(help="Rows of one forward pass.", rich_help_panel=_RUN)]
ThreadsOption = Annotated[
    int | None, typer.Option(help="CPU threads. Default: what torch chooses.", rich_help_panel=_RUN)
]


JsonOption = Annotated[
    bool, typer.Option("--json", help="JSON on stdout in place of text, and nothing else there.", rich_help_panel=_RUN)
]


def numbers(name: str, text: str) -> tuple[int, ...]:
    """Read "1,2,3"."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{name}: got {text!r}, expected whole numbers with commas between") from error


def fractions(name: str, text: str) -> tuple[float, ...]:
    """Read "0.3,0.5"."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{name}: got {text!r}, expected numbers with commas between") from error


def checkpoint_name(checkpoint: str | None) -> str:
    """What results say that they were made with."""
    return checkpoint or "tiny-dit"


def checkpoint_source(checkpoint: str | None) -> str | Path:
    from ..evaluation.checkpoints import TINY_DIT

    return TINY_DIT if checkpoint is None else checkpoint


def device_and_dtype(device: str | None, dtype: str) -> tuple[torch.device, torch.dtype]:
    import torch

    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in dtypes:
        raise ValueError(f"dtype: got {dtype!r}, expected one of {list(dtypes)}")
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: got {name!r}, expected a torch device such as cpu or cuda") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: got {name!r}, expected cpu: torch sees no GPU here")
    # A device that torch knows by name may be absent, or hold no data: only use tells. What torch raises depends on
    # the device; ImportError stands for a missing extension such as torch.hpu.
    try:
        torch.zeros(1, device=chosen).cpu()
    except (RuntimeError, NotImplementedError, AssertionError, ImportError) as error:
        raise ValueError(f"device: got {name!r}, expected one that torch can use here, such as cpu") from error
    return chosen, dtypes[dtype]


def set_threads(threads: int | None) -> None:
    import torch

    if threads is None:
        return
    if not 1 <= threads <= 1024:
        raise ValueError(f"threads: got {threads}, expected 1 to 1024")
    torch.set_num_threads(threads)


def progress_bar() -> Progress:
    """A bar with count, elapsed and remaining time, on stderr so that stdout holds results alone.

    It is for a person who waits: none where stderr is no terminal.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
