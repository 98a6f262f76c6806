"""Measured over predicted: the rows of a run beside what `python -m bigain_kernels.aot --report` predicted.

    python -m benchmarks.predictions --rows gpu/rows.csv --predicted gpu/predicted.json

A ratio far from one is a term that the model of docs/performance.md lacks or overrates. Predictions are for a GPU of
sm_90 with 132 multiprocessors; the ratios of another one say little.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# By the name in the rows: the ops and the kernels whose launches it takes, all kernels where there is none.
LAUNCHES: dict[str, tuple[tuple[str, ...], str]] = {
    "lgtm_plan": (("lgtm_plan", "token_merge", "token_unmerge"), ""),
    "laplacian_score": (("lgtm_plan",), "laplacian_score"),
    "bipartite_match": (("lgtm_plan",), "bipartite_match"),
    "merge_plan": (("lgtm_plan",), "merge_plan"),
    "token_merge": (("token_merge",), ""),
    "token_unmerge": (("token_unmerge",), ""),
    "kv_downsample": (("kv_downsample",), ""),
}


def predicted(rows: list[dict[str, Any]], op: str, shape: str) -> float:
    """Microseconds that a benchmark is predicted to take; 0 where nothing is predicted."""
    ops, kernel = LAUNCHES.get(op, ((), ""))
    found = [each for each in rows if each["shape"] == shape and each["op"] in ops]
    return sum(each["predicted"] for each in found if not kernel or each["kernel"] == kernel)


def compare(measured: list[dict[str, str]], rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line for every measured row of the Triton kernels that something is predicted for."""
    yield f"{'op':18} {'problem':14} {'mode':6} {'measured us':>12} {'predicted us':>13} {'ratio':>6}"
    for each in measured:
        expected = predicted(rows, each["op"], each["problem"])
        if each["provider"] != "triton" or each["dtype"] != "bfloat16" or not expected:
            continue
        time = float(each["median_us"])
        names = f"{each['op']:18} {each['problem']:14} {each['mode']:6}"
        yield f"{names} {time:12.1f} {expected:13.1f} {time / expected:6.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=Path, required=True, help="rows of `python -m benchmarks.run`")
    parser.add_argument("--predicted", type=Path, required=True, help="file of `aot --report --out`")
    arguments = parser.parse_args()
    with arguments.rows.open(newline="") as file:
        measured = list(csv.DictReader(file))
    print("\n".join(compare(measured, json.loads(arguments.predicted.read_text())["rows"])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
