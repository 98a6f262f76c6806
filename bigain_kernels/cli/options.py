"""Options that several commands share, how their text is read, and the progress bar."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress

    from ..evaluation.compression import MethodOptions


class Method(str, Enum):
    """The names of `evaluation.compression.METHODS`."""

    none = "none"
    lgtm = "lgtm"
    abm = "abm"
    tome = "tome"
    sito = "sito"
    iekvd = "iekvd"
    todo = "todo"
    avgpool = "avgpool"


_MODEL, _METHOD, _RUN = "Model", "Compression", "Run"

CheckpointOption = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        help="Folder of a diffusers checkpoint (a pipeline, or transformer/ and scheduler/) or a hub id. "
        "Default: the tiny digit model that comes with this package.",
        show_default=False,
        rich_help_panel=_MODEL,
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, ... Default: a GPU if there is one.", rich_help_panel=_MODEL)
]
DtypeOption = Annotated[str, typer.Option(help="float32, float16 or bfloat16.", rich_help_panel=_MODEL)]
MethodOption = Annotated[
    Method,
    typer.Option(
        help="none; merging: lgtm, abm, tome, sito; pooling of keys and values: iekvd, todo (nearest), avgpool.",
        rich_help_panel=_METHOD,
    ),
]
RatioOption = Annotated[
    str,
    typer.Option(
        help="Fraction of tokens merged; or FIRST,LAST: from the noisiest to the cleanest timestep.",
        rich_help_panel=_METHOD,
    ),
]
StrideOption = Annotated[
    str, typer.Option(help="Tile of the merge methods, in tokens: 2 or ROWSxCOLUMNS.", rich_help_panel=_METHOD)
]
FactorOption = Annotated[int, typer.Option(help="Pooling factor of iekvd, todo and avgpool.", rich_help_panel=_METHOD)]
AlphaOption = Annotated[
    str,
    typer.Option(
        help="iekvd: 1 is nearest, 0 average, beyond extrapolates; or FIRST,LAST over the timesteps.",
        rich_help_panel=_METHOD,
    ),
]
BlocksOption = Annotated[
    str | None,
    typer.Option(help="Indices of the blocks to compress, such as 0,1,2. Default: all.", rich_help_panel=_METHOD),
]
ProportionalOption = Annotated[
    bool,
    typer.Option(
        "--proportional",
        help="Weigh every merged key by the number of tokens it stands for (merge methods).",
        rich_help_panel=_METHOD,
    ),
]
SeedOption = Annotated[int, typer.Option(help="Of the noise, and of random choices of a method.", rich_help_panel=_RUN)]
BatchOption = Annotated[int | None, typer.Option(help="Rows of one forward pass.", rich_help_panel=_RUN)]
ThreadsOption = Annotated[
    int | None, typer.Option(help="CPU threads. Default: what torch chooses.", rich_help_panel=_RUN)
]


def numbers(name: str, text: str) -> tuple[int, ...]:
    """Read "1,2,3"."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{name}: got {text!r}, expected whole numbers with commas between") from error


def schedule(name: str, text: str) -> float | tuple[float, float]:
    """Read "0.9" or "0.8,1.2"."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{name}: got {text!r}, expected a number or FIRST,LAST") from error
    if len(values) > 2:
        raise ValueError(f"{name}: got {text!r}, expected a number or FIRST,LAST")
    return values[0] if len(values) == 1 else (values[0], values[1])


def pair(name: str, text: str) -> tuple[int, int]:
    """Read "2" or "2x4"."""
    values = numbers(name, text.replace("x", ","))
    if len(values) > 2:
        raise ValueError(f"{name}: got {text!r}, expected a number or ROWSxCOLUMNS")
    return values[0], values[-1]


def method_options(
    ratio: str, stride: str, factor: int, alpha: str, blocks: str | None, seed: int, proportional: bool
) -> MethodOptions:
    from ..evaluation.compression import MethodOptions

    return MethodOptions(
        ratio=schedule("ratio", ratio),
        stride=pair("stride", stride),
        factor=factor,
        alpha=schedule("alpha", alpha),
        seed=seed,
        blocks=None if blocks is None else numbers("blocks", blocks),
        proportional=proportional,
    )


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
    if threads < 1:
        raise ValueError(f"threads: got {threads}, expected at least 1")
    torch.set_num_threads(threads)


def progress_bar() -> Progress:
    """A bar with count, elapsed and remaining time, on stderr so that stdout holds results alone."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
