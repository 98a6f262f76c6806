"""`python -m bigain_kernels.tune` (or `bigain tune`): measure the launch configs of the Triton kernels on this GPU.

Every candidate of `triton_kernels/tuned/<architecture>.json` is run on shapes of models in use. One whose result
differs in a single bit from that of the first candidate stops the run: configs are a matter of speed alone. In each
size class the candidate with the lowest geometric mean of its times is written down. Nothing tunes itself at run time.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from bigain_kernels.timing import time_cuda

from . import bipartite_match, configs, kv_downsample, laplacian_score, merge_plan, pooled_kv_projection, row_stats
from . import kv_downsample_attention as attention
from .lgtm_plan import launch_lgtm_plan
from .registration import IMPLEMENTATIONS
from .report.capture import ALPHA, FACTOR, RATIO, STRIDE
from .report.capture import SHAPES as DESIGN
from .token_merge import launch_token_merge
from .token_unmerge import launch_token_unmerge

# (batch, grid, channels, heads) of the design's shapes; rows of video models would take most of the time.
SHAPES = tuple(shape[1:] for shape in DESIGN if shape.tokens < 16_384)

Call = Callable[[], Any]
# Pool inside the kernel, or before it.
ROUTES = ("fused", "pooled")
# Microseconds of a call.
Measure = Callable[[Call], float]


def _measure(call: Call) -> float:
    return time_cuda(call, "graph", seconds=0.03).median


def attention_calls(x: Tensor, grid: tuple[int, int], heads: int) -> dict[str, Call]:
    """As `calls`, for the ops around attention."""
    q, k, v = (each.unflatten(2, (heads, -1)).transpose(1, 2) for each in (x, x.flip(1), x.flip(0, 1)))
    bias = torch.zeros((x.shape[0], x.shape[1]), dtype=torch.float32, device=x.device)
    weight = x.flatten(0, 1)[: x.shape[2]] * x.shape[2] ** -0.5

    def pooled() -> Any:
        return attention.launch_kv_downsample_attention(q, k, v, grid, FACTOR, ALPHA)

    def proportional() -> Any:
        return attention.launch_kv_downsample_attention(q, k, v, grid, (1, 1), 1.0, key_bias=bias)

    def projected() -> Any:
        return pooled_kv_projection.launch_pooled_kv_projection(x, grid, FACTOR, ALPHA, weight, weight)

    return {
        attention.config_op(x.dtype, q.shape[3], blends=True): pooled,
        # float32 has the same entry for both.
        attention.config_op(x.dtype, q.shape[3], blends=False): proportional,
        pooled_kv_projection.config_op(x.dtype): projected,
    }


def calls(x: Tensor, grid: tuple[int, int], heads: int) -> dict[str, Call]:
    """A call for every op of the tables, on tokens (B, N, C); the launchers pick their configs themselves."""
    r = int(x.shape[1] * RATIO)
    scored = laplacian_score.launch_score_and_select(x, grid, STRIDE)
    destinations = scored["destinations"].sort(dim=1).values
    similarity, match = bipartite_match.launch_bipartite_match(x, destinations)
    tables = launch_lgtm_plan(x, grid, STRIDE, r)
    merged, pair = launch_token_merge(x, *tables), [x, x.flip(1)]
    is_fp32 = x.dtype == torch.float32

    def matched() -> Any:
        return bipartite_match.launch_bipartite_match(x, destinations)

    def matched_within(window: int) -> Any:
        return bipartite_match.launch_bipartite_match(x, destinations, window, grid, STRIDE)

    return {
        "laplacian_score": lambda: laplacian_score.launch_score_and_select(x, grid, STRIDE),
        "row_stats": lambda: row_stats.launch_row_stats(x, "layernorm", 1e-5),
        "match_prepare": matched,
        bipartite_match.config_op(x.dtype, x.shape[2], None): matched,
        **({} if is_fp32 else {"bipartite_match_window": lambda: matched_within(2)}),
        "match_near": lambda: matched_within(1),
        "merge_plan": lambda: merge_plan.launch_merge_plan(similarity, match, destinations, r),
        "token_merge": lambda: launch_token_merge(x, *tables),
        "token_unmerge": lambda: launch_token_unmerge(merged, *tables, x, x[:, 0]),
        "kv_downsample": lambda: kv_downsample.launch_kv_downsample(pair, grid, FACTOR, ALPHA),
        **attention_calls(x, grid, heads),
    }


def routed(x: Tensor, grid: tuple[int, int], heads: int) -> dict[str, Call]:
    """A call for every op that has two implementations."""
    q, k, v = (each.unflatten(2, (heads, -1)).transpose(1, 2) for each in (x, x.flip(1), x.flip(0, 1)))
    weight = x.flatten(0, 1)[: x.shape[2]] * x.shape[2] ** -0.5
    pool = (*grid, *FACTOR, ALPHA, None)
    return {
        "kv_downsample_attention": lambda: IMPLEMENTATIONS["kv_downsample_attention"](
            q, k, v, *pool, None, None, 0, k.shape[2]
        ),
        "pooled_kv_projection": lambda: IMPLEMENTATIONS["pooled_kv_projection"](x, *pool, weight, weight, None, None),
    }


class _Asked(configs.Chooser):
    """Chooses a config or a route for one op, what the tables say for the rest, and notes the size class of the op."""

    def __init__(self, op: str, config: dict[str, Any] | None = None, route: str | None = None) -> None:
        self.op, self.asked_config, self.asked_route = op, config, route
        self.size = ""

    def pick(self, op: str, device: torch.device, size: str) -> dict[str, Any]:
        if op != self.op:
            return super().pick(op, device, size)
        self.size = self.size or size
        return self.asked_config or super().pick(op, device, size)

    def route(self, op: str, device: torch.device, size: str) -> str:
        if op != self.op:
            return super().route(op, device, size)
        self.size = self.size or size
        return self.asked_route or super().route(op, device, size)


def size_of(op: str, call: Call) -> str:
    """The size class that a call falls into for an op, "small" or "large"."""
    watching = _Asked(op)
    with configs.use_chooser(watching):
        call()
    if not watching.size:
        raise RuntimeError(f"{op}: the call that shall measure it uses no config of it; this is a bug")
    return watching.size


def route_times(op: str, call: Call, measure: Measure) -> tuple[str, list[float]]:
    """The size class of a call of an op with two implementations, and its microseconds by each of `ROUTES`."""
    found = []
    for route in ROUTES:
        asked = _Asked(op, route=route)
        with configs.use_chooser(asked):
            found.append(measure(call))
    return asked.size, found


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for each in (result.values() if isinstance(result, dict) else result) for tensor in _tensors(each)]


def _same_bits(one: Any, other: Any) -> bool:
    return all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(_tensors(one), _tensors(other), strict=True)
    )


def times(op: str, candidates: list[dict[str, Any]], call: Call, measure: Measure) -> list[float]:
    """Microseconds of a call with every candidate of an op.

    Raises:
        RuntimeError: two candidates give different bits.
    """
    found, first = [], None
    for config in candidates:
        with configs.use_chooser(_Asked(op, config)):
            result = call()
            first = result if first is None else first
            if not _same_bits(result, first):
                raise RuntimeError(f"{op}: config {config} gives other bits than {candidates[0]}; this is a bug")
            found.append(measure(call))
    return found


def best(measured: Iterable[list[float]]) -> int:
    """Index of the candidate with the lowest geometric mean over several calls; the first of equals."""
    sums = [sum(map(math.log, each)) for each in zip(*measured, strict=True)]
    return sums.index(min(sums))


def dump(table: dict[str, Any]) -> str:
    """The text of a table: a line per candidate."""
    head = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in table.items() if key != "ops"]
    ops = []
    for op, entry in table["ops"].items():
        candidates = ",\n".join(f"        {json.dumps(config)}" for config in entry["candidates"])
        ops.append(
            f'    {json.dumps(op)}: {{\n      "candidates": [\n{candidates}\n      ],\n'
            f'      "choice": {json.dumps(entry["choice"])}\n    }}'
        )
    return "\n".join(["{", *head, '  "ops": {', ",\n".join(ops), "  }", "}"]) + "\n"


def tune(
    table: dict[str, Any],
    device: str,
    note: str,
    shapes: Iterable[tuple[int, tuple[int, int], int, int]] = SHAPES,
    measure: Measure = _measure,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The table with the choices that measuring makes; ops and classes that no shape reaches keep theirs.

    Args:
        table: content of a file of tuned/.
        device: "cuda", or "cpu" in Triton's interpreter.
        note: what measured: GPU, versions, commit.
        shapes: (batch, grid, channels, heads) to measure on, in bfloat16, and the first also in float32.
        measure: microseconds of a call.
        log: is given a line for each op, shape and list of times.
    """
    measured: dict[tuple[str, str], list[list[float]]] = {}
    by_route: dict[tuple[str, str], list[list[float]]] = {}

    def note_times(op: str, x: Tensor, size: str, found: list[float]) -> None:
        log(f"{op} {tuple(x.shape)} {size}: {', '.join(f'{value:.1f}' for value in found)} us")

    todo = [(shape, torch.bfloat16) for shape in shapes]
    todo.append((todo[0][0], torch.float32))
    for (batch, grid, channels, heads), dtype in todo:
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn((batch, grid[0] * grid[1], channels), generator=generator, device=device).to(dtype)
        for op, call in calls(x, grid, heads).items():
            # Only some entries are for float32 alone.
            if dtype == torch.float32 and "_fp32" not in op:
                continue
            size = size_of(op, call)
            found = times(op, table["ops"][op]["candidates"], call, measure)
            measured.setdefault((op, size), []).append(found)
            note_times(op, x, size, found)
        if dtype != torch.float32:
            for op, call in routed(x, grid, heads).items():
                size, found = route_times(op, call, measure)
                by_route.setdefault((op, size), []).append(found)
                note_times(f"{op} {'/'.join(ROUTES)}", x, size, found)
    ops = {op: {**entry, "choice": dict(entry["choice"])} for op, entry in table["ops"].items()}
    for (op, size), lists in measured.items():
        ops[op]["choice"][size] = best(lists)
    routes = {op: dict(choice) for op, choice in table["routes"].items()}
    for (op, size), lists in by_route.items():
        routes[op][size] = ROUTES[best(lists)]
    return {**table, "tuned": True, "note": note, "routes": routes, "ops": ops}


def main(arguments: list[str] | None = None) -> int:
    """Measure and write the file; 2 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m bigain_kernels.tune", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, help="file to write; default: that of this GPU, in the installed package")
    parser.add_argument("--json", action="store_true", help="print the file as JSON on stdout, and times on stderr")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tune: found no GPU that torch can use, expected one to measure on", file=sys.stderr)
        return 2
    name = configs.architecture(torch.device("cuda", torch.cuda.current_device()))
    out = options.out or configs.path_of(name)
    note = f"measured on {torch.cuda.get_device_name()} with torch {torch.__version__} and triton {triton.__version__}"
    log = functools.partial(print, file=sys.stderr) if options.json else print
    with torch.no_grad():
        table = tune({**configs.table(name), "architecture": name}, "cuda", note, log=log)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(dump(table))
    log(f"wrote {out}")
    if options.json:
        print(dump(table), end="")
    return 0
