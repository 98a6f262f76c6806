"""Which backend of a GPU goes first for an op and a size, where that was measured: measured/<architecture>.json.

    {"measured": "machine, commit and command", "ops": {"token_merge": [[0, "cuda"], [2000000, "triton"]]}}

says that calls whose rows have 2,000,000 elements or more run on "triton" if they can, smaller ones on "cuda". The size
is that of a row of the first tensor: backends add in different orders, so a row would not keep its bits in a larger
batch if the batch decided. Without a file for the architecture, or an entry for the op, priorities decide alone.
`python -m benchmarks.backend_sizes` writes a file from rows of the benchmarks.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "measured"


class Table(NamedTuple):
    """One file.

    Attributes:
        measured: on what machine, at which commit, by which command.
        ops: for each op, ascending, the elements of a row from which on a backend goes first, and its name.
    """

    measured: str
    ops: Mapping[str, list[tuple[int, str]]]


def read(path: Path) -> Table:
    """A file as a table.

    Raises:
        ValueError: the bounds of an op do not ascend from 0.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    ops = {op: [(int(bound), str(name)) for bound, name in bounds] for op, bounds in content["ops"].items()}
    for op, bounds in ops.items():
        found = [bound for bound, _ in bounds]
        if found[:1] != [0] or found != sorted(set(found)):
            raise ValueError(f"{path}: {op}: got bounds {found}, expected them to ascend from 0")
    return Table(content["measured"], ops)


# By architecture; read when this module is imported, and empty until something was measured.
TABLES: dict[str, Table] = {path.stem: read(path) for path in sorted(FOLDER.glob("*.json"))}


def architecture(index: int | None) -> str:
    """`sm_90` of a GPU of NVIDIA's, the current one for None; nothing for others."""
    if torch.version.cuda is None:
        return ""
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


@functools.cache
def _first(op: str, index: int | None, elements: int) -> str:
    table = TABLES.get(architecture(index))
    bounds = table.ops.get(op, []) if table else []
    return next((name for bound, name in reversed(bounds) if bound <= elements), "")


def first(op: str, arguments: tuple[Any, ...]) -> str:
    """The backend that goes first for a call on CUDA tensors; empty where priorities decide."""
    argument = arguments[0]
    tensor: Tensor = argument if isinstance(argument, Tensor) else argument[0]
    return _first(op, tensor.device.index, math.prod(tensor.shape[1:]))


def reason(op: str) -> str:
    """What decides about an op on the current GPU, in words; empty where priorities do."""
    name = architecture(None) if TABLES and torch.cuda.is_available() else ""
    table = TABLES.get(name)
    if table is None or op not in table.ops:
        return ""
    bounds = ", ".join(f"{backend} from {bound}" for bound, backend in table.ops[op])
    return f"by elements of a row, measured on {name}: {bounds} ({table.measured})"


@contextmanager
def use_tables(tables: Mapping[str, Table]) -> Iterator[None]:
    """Other tables in the place of those of the files, in the whole process; for tests and tools."""
    before = dict(TABLES)
    try:
        TABLES.clear()
        TABLES.update(tables)
        _first.cache_clear()
        yield
    finally:
        TABLES.clear()
        TABLES.update(before)
        _first.cache_clear()
