"""One forward pass of whole models on the CPU: time, peak memory and FLOPs of every method.

    python -m benchmarks.whole_models [--model sd2_512] [--dtype bfloat16] [--method lgtm_0.5] [--turns 5]

The methods of a model take turns in one process, so that a disturbance of the machine hits all of them; a model and
dtype is a process, and its rows are written to benchmarks/results/models_cpu.csv when it is through. A run that was cut
off goes on with what the file does not have of this commit, machine and number of threads. Weights are random, at the
models' real sizes. "tomesd" is the patch of the tomesd package as it comes, with random destinations.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigain_kernels.diffusers import IEKVDConfig, LGTMConfig, apply_token_compression, remove_token_compression
from bigain_kernels.evaluation.harness.flops import counter
from bigain_kernels.evaluation.output import replacing

from . import harness, machine
from .bench_memory import resident
from .bench_model import MODELS

RESULTS = Path("benchmarks/results/models_cpu.csv")
MEASURED = ("dit_256", "unet_small", "dit_512", "sd2_512")
DTYPES = ("float32", "bfloat16")
COLUMNS = [
    *("model", "dtype", "method", "calls", "speed", "least_s", "median_s", "peak_mib", "gflop"),
    *("quiet_before", "quiet_after"),
    *("device", "torch", "commit", "command"),
]
# What a row is known by.
KEY = ("model", "dtype", "method", "device", "torch", "commit")
# Applies a method to a model; returns what takes it off again.
Patch = Callable[[nn.Module], Callable[[], object]]


def _tomesd(ratio: float) -> Patch:
    def patch(model: nn.Module) -> Callable[[], object]:
        import tomesd

        # Patching a DiT, whose tokens are patches of 2 x 2 latents: tomesd counts that as a level of a U-Net.
        tomesd.apply_patch(model, ratio=ratio, max_downsample=getattr(model.config, "patch_size", None) or 1)
        return lambda: tomesd.remove_patch(model)

    return patch


def _ours(config: Any) -> Patch:
    def patch(model: nn.Module) -> Callable[[], object]:
        apply_token_compression(model, config)
        return lambda: remove_token_compression(model)

    return patch


METHODS: dict[str, Patch] = {
    "none": lambda model: lambda: None,
    "tomesd_0.5": _tomesd(0.5),
    "tomesd_0.7": _tomesd(0.7),
    "lgtm_0.5": _ours(LGTMConfig(ratio=0.5)),
    "lgtm_0.7": _ours(LGTMConfig(ratio=0.7)),
    "iekvd_2": _ours(IEKVDConfig(factor=2, alpha=0.9)),
}


def _rest() -> float | None:
    """What this process holds in memory once everything that is free has been given back; the peak begins anew."""
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    clear.write_text("5")
    return resident("VmRSS")


def in_turns(name: str, dtype: str, methods: Sequence[str], turns: int) -> dict[str, dict[str, Any]]:
    """Measure all methods on one model; run it in a fresh process.

    Returns:
        By method: the calls that were timed; the median over the turns of the time that no compression took over the
        time of the method; the least and the median seconds; the GFLOP of a call; and the MiB that it needs at its peak
        on top of weights and inputs (None where the system does not tell).
    """
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    model = MODELS[name]
    module = model.build().to(harness.DTYPES[dtype]).eval()
    inputs = model.inputs("cpu", harness.DTYPES[dtype])
    # tomesd reads the size of the latents from the first argument.
    first = inputs.pop(next(iter(inputs)))

    def call(method: str) -> tuple[Tensor, float]:
        take_off = METHODS[method](module)
        start = time.perf_counter()
        out = module(first, **inputs, return_dict=False)[0]
        seconds = time.perf_counter() - start
        take_off()
        return out, seconds

    rows: dict[str, dict[str, Any]] = {}
    for method in methods:
        before = _rest()
        with counter() as counted:
            out, _ = call(method)
        peak = None if before is None else resident("VmHWM") - before
        assert out.isfinite().all(), f"{name} {dtype} {method}: not finite"
        rows[method] = {"calls": turns, "peak_mib": peak, "gflop": counted.get_total_flops() / 1e9}
    times: dict[str, list[float]] = {method: [] for method in methods}
    for turn in range(turns):
        # Another one first each time.
        for method in (*methods[turn % len(methods) :], *methods[: turn % len(methods)]):
            times[method].append(call(method)[1])
    for method, own in times.items():
        ratios = [none / mine for none, mine in zip(times["none"], own, strict=True)]
        rows[method] |= {
            "speed": statistics.median(ratios),
            "least_s": min(own),
            "median_s": statistics.median(own),
        }
    return rows


def measured(name: str, dtype: str, methods: Sequence[str], turns: int, threads: int) -> dict[str, dict[str, Any]]:
    """`in_turns` in a process of its own; RuntimeError with its last lines when it fails."""
    command = [sys.executable, "-m", "benchmarks.whole_models", "--once", "--turns", str(turns)]
    command += ["--model", name, "--dtype", dtype, "--threads", str(threads)]
    command += [part for method in methods for part in ("--method", method)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    if run.returncode:
        raise RuntimeError(f"{name} {dtype}: {' '.join(run.stderr.splitlines()[-1:])}")
    return dict(json.loads(run.stdout.splitlines()[-1]))


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if rows and list(rows[0]) != COLUMNS:
        raise ValueError(f"out: {path} has the columns {list(rows[0])}, expected {COLUMNS}")
    return rows


def append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows behind those of the file, in the place of the ones that are known by the same; all of it at once."""
    new = {tuple(row[key] for key in KEY) for row in rows}
    kept = [row for row in rows_of(path) if tuple(row[key] for key in KEY) not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *rows])


def show(rows: list[dict[str, str]]) -> None:
    """A line per row: seconds, speed, memory and FLOPs against the model that nothing was done to."""
    base = {(row["model"], row["dtype"]): row for row in rows if row["method"] == "none"}
    for row in rows:
        line = f"{row['model']:11} {row['dtype']:9} {row['method']:11} {float(row['least_s']):8.3f} s"
        first = base.get((row["model"], row["dtype"]))
        if first is not None and first is not row:
            line += f"  {float(row['speed']):5.2f}x"
            line += f"  {100 * float(row['gflop']) / float(first['gflop']):5.1f} % of the FLOPs"
        else:
            line += f"  {float(row['gflop']):9.1f} GFLOP"
        line += f"  peak {float(row['peak_mib']):7.1f} MiB" if row["peak_mib"] else ""
        print(line + ("" if min(map(float, (row["quiet_before"], row["quiet_after"]))) >= machine.QUIET else "  NOISY"))


def _shown(row: dict[str, Any]) -> dict[str, str]:
    return {key: f"{value:.4f}" for key, value in row.items() if isinstance(value, float)}


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--model", action="append", choices=tuple(MODELS), help=f"default: {', '.join(MEASURED)}")
    options.add_argument(
        "--dtype", action="append", choices=tuple(harness.DTYPES), help=f"default: {', '.join(DTYPES)}"
    )
    options.add_argument("--method", action="append", choices=tuple(METHODS), help="default: all")
    options.add_argument("--turns", type=int, default=5, help="how often each method is timed")
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    options.add_argument("--out", type=Path, default=RESULTS, help="the file that rows are added to")
    options.add_argument("--show", action="store_true", help="measure nothing, show the rows of the file")
    options.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    return options


def main() -> int:
    arguments = parser().parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.once:
        print(json.dumps(in_turns(arguments.model[0], arguments.dtype[0], arguments.method, arguments.turns)))
        return 0
    if arguments.show:
        show(rows_of(arguments.out))
        return 0
    facts = {
        "device": harness.device_name("cpu"),
        "torch": torch.__version__,
        "commit": harness.commit(),
        "command": shlex.join(["python", "-m", "benchmarks.whole_models", *sys.argv[1:]]),
    }
    print(f"{facts['device']}; {' '.join(machine.cpu_flags())}; torch {facts['torch']}; {platform.python_version()}")
    done = {tuple(row[key] for key in KEY) for row in rows_of(arguments.out)}
    methods = tuple(dict.fromkeys(("none", *(arguments.method or METHODS))))
    failures = []
    for name in arguments.model or MEASURED:
        for dtype in arguments.dtype or DTYPES:
            about = {"model": name, "dtype": dtype, **facts}
            missing = [m for m in methods if tuple((about | {"method": m})[key] for key in KEY) not in done]
            if not missing:
                continue
            before = machine.spin(arguments.threads)
            try:
                # All of them again, for rows of one process can be compared.
                found = measured(name, dtype, methods, arguments.turns, arguments.threads)
            except RuntimeError as error:
                failures.append(str(error))
                print(f"FAILED {error}", flush=True)
                continue
            quiet = {"quiet_before": before.share, "quiet_after": machine.spin(arguments.threads).share}
            rows = [about | {"method": method} | row | quiet for method, row in found.items()]
            append(arguments.out, [row | _shown(row) for row in rows])
            print(f"{name} {dtype}: " + ", ".join(f"{m} {row['speed']:.2f}x" for m, row in found.items()), flush=True)
    show([row for row in rows_of(arguments.out) if row["commit"] == facts["commit"]])
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
