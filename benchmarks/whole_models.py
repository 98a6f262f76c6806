"""One forward pass of whole models on the CPU: time, peak memory and FLOPs of every method, row by row.

    python -m benchmarks.whole_models [--model sd2_512] [--dtype bfloat16] [--method lgtm_0.5] [--seconds 20]

Every row is measured in a process of its own and written at once to benchmarks/results/models_cpu.csv; a run that was
cut off goes on with the rows that the file does not have of this commit, machine and number of threads. Weights are
random, at the models' real sizes. "tomesd" is the patch of the tomesd package as it comes, with random destinations.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigain_kernels.diffusers import IEKVDConfig, LGTMConfig, apply_token_compression
from bigain_kernels.evaluation.harness.flops import counter
from bigain_kernels.timing import summary

from . import harness, machine
from .bench_memory import resident
from .bench_model import MODELS

RESULTS = Path("benchmarks/results/models_cpu.csv")
MEASURED = ("dit_256", "unet_small", "dit_512", "sd2_512")
DTYPES = ("float32", "bfloat16")
COLUMNS = [
    *("model", "dtype", "method", "calls", "least_s", "median_s", "peak_mib", "gflop", "quiet_before", "quiet_after"),
    *("device", "torch", "commit", "command"),
]
# What a row is known by.
KEY = ("model", "dtype", "method", "device", "torch", "commit")
Patch = Callable[[nn.Module], object]


def _tomesd(ratio: float) -> Patch:
    def patch(model: nn.Module) -> object:
        import tomesd

        # Patching a DiT, whose tokens are patches of 2 x 2 latents: tomesd counts that as a level of a U-Net.
        return tomesd.apply_patch(model, ratio=ratio, max_downsample=getattr(model.config, "patch_size", None) or 1)

    return patch


def _ours(config: Any) -> Patch:
    return lambda model: apply_token_compression(model, config)


METHODS: dict[str, Patch] = {
    "none": lambda model: None,
    "tomesd_0.5": _tomesd(0.5),
    "tomesd_0.7": _tomesd(0.7),
    "lgtm_0.5": _ours(LGTMConfig(ratio=0.5)),
    "lgtm_0.7": _ours(LGTMConfig(ratio=0.7)),
    "iekvd_2": _ours(IEKVDConfig(factor=2, alpha=0.9)),
}


def once(name: str, dtype: str, method: str, seconds: float, at_least: int = 3) -> dict[str, Any]:
    """Measure one row; run it in a fresh process.

    Returns:
        Calls that were timed, the least and the median seconds of one, the GFLOP of a call, and the MiB that it needs
        at its peak on top of weights and inputs (None where the system does not tell).
    """
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    model = MODELS[name]
    module = model.build().to(harness.DTYPES[dtype]).eval()
    METHODS[method](module)
    inputs = model.inputs("cpu", harness.DTYPES[dtype])
    # tomesd reads the size of the latents from the first argument.
    first = inputs.pop(next(iter(inputs)))

    def call() -> Tensor:
        return module(first, **inputs, return_dict=False)[0]

    with counter() as counted:
        out = call()
    assert out.isfinite().all(), f"{name} {dtype} {method}: not finite"
    clear = Path("/proc/self/clear_refs")
    before = None
    if clear.exists():
        clear.write_text("5")
        before = resident("VmRSS")
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < at_least or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return {
        "calls": len(times),
        "least_s": min(times),
        "median_s": summary(times).median,
        "peak_mib": None if before is None else resident("VmHWM") - before,
        "gflop": counted.get_total_flops() / 1e9,
    }


def measured(name: str, dtype: str, method: str, seconds: float, threads: int) -> dict[str, Any]:
    """`once` in a process of its own; RuntimeError with its last lines when it fails."""
    command = [sys.executable, "-m", "benchmarks.whole_models", "--once", "--seconds", str(seconds)]
    command += ["--model", name, "--dtype", dtype, "--method", method, "--threads", str(threads)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    if run.returncode:
        raise RuntimeError(f"{name} {dtype} {method}: {' '.join(run.stderr.splitlines()[-1:])}")
    return dict(json.loads(run.stdout.splitlines()[-1]))


def rows_of(path: Path) -> list[dict[str, str]]:
    """The whole rows of a file; a last line that was cut off is no row."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if rows and list(rows[0]) != COLUMNS:
        raise ValueError(f"out: {path} has the columns {list(rows[0])}, expected {COLUMNS}")
    return [row for row in rows if None not in row.values()]


def append(path: Path, row: dict[str, Any]) -> None:
    """One line, flushed; behind half a line a new one begins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text() if path.exists() else ""
    with path.open("a", newline="") as file:
        if text and not text.endswith("\n"):
            file.write("\n")
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not text:
            writer.writeheader()
        writer.writerow(row)


def show(rows: list[dict[str, str]]) -> None:
    """A line per row: seconds, speed, memory and FLOPs against the model that nothing was done to."""
    base = {(row["model"], row["dtype"]): row for row in rows if row["method"] == "none"}
    for row in rows:
        line = f"{row['model']:11} {row['dtype']:9} {row['method']:11} {float(row['least_s']):8.3f} s"
        first = base.get((row["model"], row["dtype"]))
        if first is not None and first is not row:
            line += f"  {float(first['least_s']) / float(row['least_s']):5.2f}x"
            line += f"  {100 * float(row['gflop']) / float(first['gflop']):5.1f} % of the FLOPs"
        else:
            line += f"  {float(row['gflop']):9.1f} GFLOP"
        line += f"  peak {float(row['peak_mib']):7.1f} MiB" if row["peak_mib"] else ""
        print(line + ("" if min(map(float, (row["quiet_before"], row["quiet_after"]))) >= machine.QUIET else "  NOISY"))


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--model", action="append", choices=tuple(MODELS), help=f"default: {', '.join(MEASURED)}")
    options.add_argument(
        "--dtype", action="append", choices=tuple(harness.DTYPES), help=f"default: {', '.join(DTYPES)}"
    )
    options.add_argument("--method", action="append", choices=tuple(METHODS), help="default: all")
    options.add_argument(
        "--seconds", type=float, default=20.0, help="about how long each row is timed, at least 3 calls"
    )
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    options.add_argument("--out", type=Path, default=RESULTS, help="the file that rows are added to")
    options.add_argument("--show", action="store_true", help="measure nothing, show the rows of the file")
    options.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    return options


def main() -> int:
    arguments = parser().parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.once:
        print(json.dumps(once(arguments.model[0], arguments.dtype[0], arguments.method[0], arguments.seconds)))
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
    failures = []
    for name in arguments.model or MEASURED:
        for dtype in arguments.dtype or DTYPES:
            for method in arguments.method or METHODS:
                row: dict[str, Any] = {"model": name, "dtype": dtype, "method": method, **facts}
                if tuple(row[key] for key in KEY) in done:
                    continue
                before = machine.spin(arguments.threads)
                try:
                    row |= measured(name, dtype, method, arguments.seconds, arguments.threads)
                except RuntimeError as error:
                    failures.append(str(error))
                    print(f"FAILED {error}", flush=True)
                    continue
                row |= {"quiet_before": before.share, "quiet_after": machine.spin(arguments.threads).share}
                numbers = {key: f"{value:.4f}" for key, value in row.items() if isinstance(value, float)}
                append(arguments.out, row | numbers)
                print(f"{name} {dtype} {method}: {row['least_s']:.3f} s", flush=True)
    show([row for row in rows_of(arguments.out) if row["commit"] == facts["commit"]])
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
