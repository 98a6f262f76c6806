"""From rows of the benchmarks on a GPU to the table of which backend goes first for an op and a size.

    python -m benchmarks.backend_sizes --rows gpu/rows.csv --out gpu/backend_sizes.json

The file belongs into bigain_kernels/backends/measured/, named after the architecture (sm_90.json): from then on it
decides between "triton" and "cuda", see bigain_kernels/backends/sizes.py. Compared are median times in bfloat16 without
the host (mode "graph"); problems whose rows have the same size count alike, whatever their batch. Another backend than
the first of BACKENDS has to be faster by MARGIN.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from .problems import PROBLEMS, Problem

# By priority.
BACKENDS = ("triton", "cuda")
MARGIN = 0.03
Rows = list[dict[str, str]]


def elements(op: str, problem: Problem) -> int:
    """Elements of a row of the first tensor of a call, as sizes.first counts them."""
    if op == "merge_plan":
        return problem.tokens
    return (problem.tokens - problem.r if op == "token_unmerge" else problem.tokens) * problem.channels


def fastest(rows: Rows) -> dict[str, dict[int, str]]:
    """The fastest backend by op and elements of a row, where all of BACKENDS were measured."""
    times: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row["provider"] in BACKENDS and row["dtype"] == "bfloat16" and row["mode"] == "graph":
            times[row["op"], row["problem"]][row["provider"]] = float(row["median_us"])
    ratios: dict[tuple[str, int], list[dict[str, float]]] = defaultdict(list)
    for (op, name), found in times.items():
        if len(found) == len(BACKENDS) and not PROBLEMS[name].alike:
            usual = found[BACKENDS[0]]
            ratios[op, elements(op, PROBLEMS[name])].append({each: math.log(found[each] / usual) for each in BACKENDS})
    chosen: dict[str, dict[int, str]] = defaultdict(dict)
    for (op, size), logs in sorted(ratios.items()):
        mean = {each: sum(log[each] for log in logs) / len(logs) for each in BACKENDS}
        best = min(BACKENDS, key=mean.__getitem__)
        chosen[op][size] = best if mean[best] < math.log(1 - MARGIN) else BACKENDS[0]
    return chosen


def bounds(chosen: dict[int, str]) -> list[list[Any]]:
    """[elements from which on, backend], changing half-way (on a logarithmic scale) between measured sizes."""
    found: list[list[Any]] = []
    sizes = sorted(chosen)
    for below, size in zip([0, *sizes], sizes, strict=False):
        if not found or found[-1][1] != chosen[size]:
            found.append([round(math.sqrt(below * size)), chosen[size]])
    return found


def document(rows: Rows) -> dict[str, Any]:
    """The content of the file.

    Raises:
        ValueError: no op was measured on all of BACKENDS.
    """
    chosen = fastest(rows)
    if not chosen:
        raise ValueError(f"rows: got none of one op on {' and '.join(BACKENDS)} in bfloat16 and mode graph")
    row = next(each for each in rows if each["provider"] in BACKENDS)
    measured = f"{row['device']}, commit {row['commit']}, {row['command']}"
    return {"measured": measured, "ops": {op: bounds(found) for op, found in sorted(chosen.items())}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=Path, required=True, help="rows of `python -m benchmarks.run`")
    parser.add_argument("--out", type=Path, required=True, help="the table to write")
    arguments = parser.parse_args()
    with arguments.rows.open(newline="") as file:
        found = document(list(csv.DictReader(file)))
    arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for op, decided in found["ops"].items():
        print(f"{op:20} {', '.join(f'{name} from {bound}' for bound, name in decided)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
