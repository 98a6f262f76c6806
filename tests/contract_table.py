"""The table at the end of a run: how many cases of the contract passed, by op, backend and dtype.

It stands beside tests/conftest.py, which every process of a parallel run loads; only its workers load that of
the contract.
"""

from __future__ import annotations

from collections import Counter

import torch

from .shapes import DTYPES

BACKENDS = ("reference", "cpp", "cuda", "triton")


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def table(rows: list[list[str]]) -> list[str]:
    """Lines that say how many cases of an op passed on a backend in a dtype."""
    counts = Counter(tuple(row) for row in rows)
    ops = sorted({op for op, _, _ in counts})
    columns = [
        (backend, short(dtype))
        for backend in dict.fromkeys(row[1] for row in sorted(rows, key=lambda row: (row[1] not in BACKENDS, row[1])))
        for dtype in DTYPES
        if any((op, backend, short(dtype)) in counts for op in ops)
    ]
    abbreviated = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
    width = max((len(backend) for backend, _ in columns), default=0) + 1
    head = [f"{'':24}" + "".join(f"{part:>{width}}" for part in line) for line in (
        [backend for backend, _ in columns], [abbreviated[dtype] for _, dtype in columns])]  # fmt: skip
    body = [f"{op:24}" + "".join(f"{counts[op, b, d] or '-':>{width}}" for b, d in columns) for op in ops]
    return [*head, *body]


def pytest_terminal_summary(terminalreporter):
    passed = terminalreporter.stats.get("passed", [])
    rows = [value for report in passed for name, value in report.user_properties if name == "contract"]
    if rows:
        terminalreporter.section("contract: cases passed by op, backend and dtype")
        for line in table(rows):
            terminalreporter.write_line(line)
