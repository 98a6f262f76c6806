"""The configs that the model likes best. They are the ones that are chosen, until a measurement chooses."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from .. import configs
from ..launching import Launch, record_launches
from .capture import SHAPES, OnPaper, Shape, calls
from .model import Facts
from .table import ARCHITECTURE, Compiler

# What the calls of the report pick a config for.
OPS = (
    *("laplacian_score", "bipartite_match", "bipartite_match_narrow", "match_near", "merge_plan"),
    *("row_stats", "token_merge", "token_unmerge", "kv_downsample"),
)
# Predictions this close to one another are equal.
EQUAL = 1.05
# What fills less is chosen only where all that fills more takes longer by a fifth.
FILLED, LONGER = 0.85, 1.2


class _Asked(OnPaper):
    """Gives one op one config, and notes its size classes and which launches it is for."""

    def __init__(self, op: str, config: dict[str, Any]) -> None:
        self.op, self.config = op, config
        self.launches: list[Launch] = []
        self.found: list[tuple[str, int]] = []

    def pick(self, op: str, device: torch.device, size: str) -> dict[str, Any]:
        if op != self.op:
            return super().pick(op, device, size)
        # Launchers pick right before they launch.
        self.found.append((size, len(self.launches)))
        return self.config


class Promise(NamedTuple):
    """What a candidate is predicted to do in a size class.

    Attributes:
        time: geometric mean over the launches, in microseconds.
        filled: the least share of the multiprocessors' time that programs fill.
    """

    time: float
    filled: float


def predictions(
    op: str, compiler: Compiler, shapes: Iterable[Shape] = SHAPES, candidates: list[configs.Config] | None = None
) -> dict[str, list[Promise]]:
    """By size class, what each candidate promises; those that are shipped, where none are given."""
    found: dict[str, list[list[Facts]]] = {}
    candidates = configs.candidates(op, ARCHITECTURE) if candidates is None else candidates
    for i, config in enumerate(candidates):
        for shape in shapes:
            for call in calls(shape).values():
                asked = _Asked(op, config)
                with configs.use_chooser(asked), record_launches() as asked.launches:
                    call()
                for size, place in asked.found:
                    each = found.setdefault(size, [[] for _ in candidates])
                    each[i].append(compiler.facts(asked.launches[place]))
    return {size: [_promise(facts) for facts in each] for size, each in found.items()}


def _promise(facts: list[Facts]) -> Promise:
    mean = math.exp(sum(math.log(each.predicted) for each in facts) / len(facts))
    return Promise(mean, min(each.wave_efficiency for each in facts))


def improved(compiler: Compiler) -> dict[str, Any]:
    """The table of sm_90 with the choices of the model; a table that was measured stays as it is."""
    table = configs.table(ARCHITECTURE)
    ops = {op: {**entry, "choice": dict(entry["choice"])} for op, entry in table["ops"].items()}
    for op in () if table["tuned"] else OPS:
        ops[op]["choice"].update(better(op, compiler))
    return {**table, "ops": ops}


def better(op: str, compiler: Compiler, shapes: Iterable[Shape] = SHAPES) -> dict[str, int]:
    """By size class, the candidate that is predicted to be faster than the chosen one, where there is one."""
    choice = configs.table(ARCHITECTURE)["ops"][op]["choice"]
    found = {}
    for size, promises in predictions(op, compiler, shapes).items():
        # The model knows little of what an empty multiprocessor costs beside others that share one memory.
        most = LONGER * min(each.time for each in promises)
        full = [i for i, each in enumerate(promises) if each.filled >= FILLED and each.time <= most]
        full = full or list(range(len(promises)))
        best = min(full, key=[each.time for each in promises].__getitem__)
        chosen = choice[size]
        if chosen not in full or promises[chosen].time > EQUAL * promises[best].time:
            found[size] = best
    return found
