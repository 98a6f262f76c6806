"""The configs that the model likes best. They are the ones that are chosen, until a measurement chooses."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from .. import configs
from ..launching import Launch, record_launches
from .capture import SHAPES, OnPaper, Shape, calls
from .table import ARCHITECTURE, Compiler

# What the calls of the report pick a config for.
OPS = (
    *("laplacian_score", "bipartite_match", "merge_plan"),
    *("row_stats", "token_merge", "token_unmerge", "kv_downsample"),
)
# Predictions this close to one another are equal.
EQUAL = 1.05


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


def predictions(op: str, compiler: Compiler, shapes: Iterable[Shape] = SHAPES) -> dict[str, list[float]]:
    """By size class, the geometric mean of what each candidate is predicted to take, in microseconds."""
    logs: dict[str, list[list[float]]] = {}
    candidates = configs.candidates(op, ARCHITECTURE)
    for i, config in enumerate(candidates):
        for shape in shapes:
            for call in calls(shape).values():
                asked = _Asked(op, config)
                with configs.use_chooser(asked), record_launches() as asked.launches:
                    call()
                for size, place in asked.found:
                    each = logs.setdefault(size, [[] for _ in candidates])
                    each[i].append(math.log(compiler.facts(asked.launches[place]).predicted))
    return {size: [math.exp(sum(each) / len(each)) for each in found] for size, found in logs.items()}


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
    for size, times in predictions(op, compiler, shapes).items():
        best = min(range(len(times)), key=times.__getitem__)
        if times[choice[size]] > EQUAL * times[best]:
            found[size] = best
    return found
