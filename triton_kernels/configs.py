"""Launch configs are data: tuned/<architecture>.json, picked by op and size.

A file holds, per op, the candidate configs (all of them correct, all of them bitwise equal) and the index of the
candidate for each size class. Upper-case entries are constants of the kernel, the others options of its compilation;
"maxnreg" keeps ptxas from spilling a few registers for the sake of one more program per multiprocessor, or from putting
off loads to do with fewer.

"tuned" says whether a measurement chose; until one did, the choice is a rule of thumb, and `pick` logs that once per op
and architecture.

"routes" says, for ops that have two implementations (pool first, or pool inside another kernel), which one is taken in
each size class; see registration.py.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

_log = logging.getLogger(__name__)
_FOLDER = Path(__file__).parent / "tuned"
FALLBACK = "sm_90"
# Whose file a GPU takes that has none of its own, where FALLBACK's asks for more shared memory than there is (99 KiB a
# block in sm_86, sm_89 and sm_12x) or for instructions of another generation.
_LIKE = {"sm_86": "sm_120", "sm_87": "sm_80", "sm_89": "sm_120", "sm_103": "sm_100", "sm_121": "sm_120"}
# Bytes that an op moves (or, for matching, similarities per row) from which on a call is "large".
LARGE = 1 << 24

Config = dict[str, Any]


def path_of(architecture: str) -> Path:
    """The file of an architecture, which need not exist."""
    return _FOLDER / f"{architecture}.json"


@functools.cache
def table(architecture: str) -> dict[str, Any]:
    """The content of one file; an architecture without a file gets that of one like it, or else of FALLBACK."""
    path = path_of(architecture)
    if not path.exists():
        other = _LIKE.get(architecture, FALLBACK)
        _log.debug("no configs for %s: using those of %s", architecture, other)
        path = path_of(other)
    return json.loads(path.read_text())


@functools.cache
def architecture(device: torch.device) -> str:
    """`sm_90`, `gfx942`, ...; FALLBACK for a CPU, where the kernels run in Triton's interpreter."""
    if device.type != "cuda":
        return FALLBACK
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _entry(op: str, architecture_name: str) -> dict[str, Any]:
    """The entry of an op; a file that has none, as for an op that is new, uses that of FALLBACK."""
    return table(architecture_name)["ops"].get(op) or table(FALLBACK)["ops"][op]


def candidates(op: str, architecture_name: str = FALLBACK) -> list[Config]:
    """All configs shipped for an op."""
    return _entry(op, architecture_name)["candidates"]


@functools.cache
def _pick(op: str, architecture_name: str, size: str) -> Config:
    entry = _entry(op, architecture_name)
    if not table(architecture_name)["tuned"]:
        _log.debug("%s: configs of %s are untuned, taking the rule of thumb for size %r", op, architecture_name, size)
    return entry["candidates"][entry["choice"][size]]


class Chooser:
    """Chooses what the tables say. `tune` and the report put others in its place for a while, with `use_chooser`."""

    def multiprocessors(self, device: torch.device) -> int:
        return _multiprocessors(device)

    def route(self, op: str, device: torch.device, size: str) -> str:
        return table(architecture(device))["routes"][op][size]

    def pick(self, op: str, device: torch.device, size: str) -> Config:
        return _pick(op, architecture(device), size)


_BY_TABLES = Chooser()
_chooser: ContextVar[Chooser] = ContextVar("bigain_chooser", default=_BY_TABLES)


def is_by_tables() -> bool:
    """Whether the tables decide here, and no other chooser."""
    return _chooser.get() is _BY_TABLES


@contextmanager
def use_chooser(chooser: Chooser) -> Iterator[None]:
    """Let `chooser` decide in the block, in this thread or task."""
    token = _chooser.set(chooser)
    try:
        yield
    finally:
        _chooser.reset(token)


def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least; 1 for the interpreter."""
    return _chooser.get().multiprocessors(device)


def _size(work: int) -> str:
    return "large" if work >= LARGE else "small"


def route(op: str, device: torch.device, work: int) -> str:
    """Which of two implementations of an op, "fused" or "pooled"; `work` is the measure that LARGE is compared with."""
    return _chooser.get().route(op, device, _size(work))


def pick(op: str, device: torch.device, work: int) -> Config:
    """The config for one call; `work` is the measure that LARGE is compared with."""
    return _chooser.get().pick(op, device, _size(work))
