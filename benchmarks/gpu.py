"""The one command for a machine with a GPU: `make gpu`, or `python -m benchmarks.gpu --out FOLDER [--tune] [--models]`.

Installs the project in the Python that runs it (no network, no dependencies), then runs the GPU tests, NVIDIA's
compute-sanitizer on small shapes, when asked the tuning of the Triton kernels, and all benchmarks. Each part is a
process with a time limit; what does not fit into --minutes is left out and named. Everything goes to one folder:

    summary.txt      a line per part: passed, failed, out of time or left out
    environment.txt  of the installation; versions, GPU, backends
    tests.txt        of pytest
    sanitizer.txt    of compute-sanitizer: memcheck, racecheck, initcheck
    tuned.json       the configs that tuning chose, with --tune
    backend_sizes.json   which backend was faster, by op and size, with --tune; backend_sizes.txt, to read
    rows.csv         of the benchmarks, for benchmarks/results/; benchmarks.txt is what they printed
    predicted.json   what the machine code lets expect at the same shapes; predicted.txt, to read
    measured_over_predicted.txt   the two side by side, per op and shape

The status is 1 when a part did not pass.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# Nothing is started with less than this left.
LEAST_SECONDS = 15.0


class Part(NamedTuple):
    """One process: its name, the file its output goes to, its command and the most seconds it may take."""

    name: str
    log: str
    command: Sequence[str]
    seconds: float
    environment: Mapping[str, str] = MappingProxyType({})


def parts(out: Path, tune: bool, models: bool, minutes: float) -> list[Part]:
    """What to run, in order; a compute-sanitizer that is not there is left for `run` to name."""
    python = sys.executable
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", "."]
    tests = [python, "-m", "tests.gpu.run", "--seconds", "280", "tests/csrc/cuda"]
    small = [python, "tests/gpu/small_launches.py"]
    switches = {"BIGAIN_BUILD_CUDA": "auto", "BIGAIN_CUDA_ARCHS": gpu_arch()}
    found = [
        Part("install", "environment.txt", install, 240, switches),
        Part("environment", "environment.txt", [python, "-m", "bigain_kernels.env"], 60),
        # In many processes: nearly all of their time goes into compiling kernels.
        Part("tests", "tests.txt", tests, 300),
        # Once without the sanitizer, under which compiling would take too long.
        Part("small launches", "sanitizer.txt", small, 60),
    ]
    for tool in ("memcheck", "racecheck", "initcheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *small]
        found.append(Part(f"sanitizer {tool}", "sanitizer.txt", command, 60))
    if tune:
        command = [python, "-m", "bigain_kernels.tune", "--out", str(out / "tuned.json")]
        found.append(Part("tune", "tune.txt", command, 150))
    # What the machine code of this Triton promises, and how far from it the times are.
    report = [python, "-m", "bigain_kernels.aot", "--report", "--out", str(out / "predicted.json")]
    found.append(Part("predict", "predicted.txt", report, 120))
    rows = ["--device", "cuda", "--csv", str(out / "rows.csv")]
    ceilings = [python, "-m", "benchmarks.bench_ceilings", *rows]
    found.append(Part("ceilings", "benchmarks.txt", ceilings, 60))
    found.append(
        Part("benchmarks", "benchmarks.txt", [python, "-m", "benchmarks.run", "--no-plots", *rows], 60 * minutes)
    )
    if tune:
        # After the benchmarks, whose rows say which backend is faster.
        command = [python, "-m", "benchmarks.backend_sizes", "--rows", str(out / "rows.csv")]
        command += ["--out", str(out / "backend_sizes.json")]
        found.append(Part("backend sizes", "backend_sizes.txt", command, 30))
    files = ["--rows", str(out / "rows.csv"), "--predicted", str(out / "predicted.json")]
    found.append(Part("compare", "measured_over_predicted.txt", [python, "-m", "benchmarks.predictions", *files], 30))
    if models:
        models_command = [python, "-m", "benchmarks.bench_model", *rows]
        found.append(Part("models", "benchmarks.txt", models_command, 60 * minutes))
    return found


def gpu_arch() -> str:
    """What BIGAIN_CUDA_ARCHS shall be for the first GPU, `90` for sm_90; empty (all of them) where it is unknown."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].replace(".", "")


def run(part: Part, out: Path, seconds: float) -> str:
    """Run a part for at most so many seconds; "passed", or what happened instead."""
    if shutil.which(part.command[0]) is None:
        return f"left out: {part.command[0]} is not on PATH"
    seconds = min(part.seconds, seconds)
    command = list(part.command)
    if part.log == "benchmarks.txt":
        # They start nothing new when their own time is nearly over.
        command += ["--minutes", f"{max(seconds - 45, 5) / 60:.2f}"]
    with (out / part.log).open("a") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        environment = {**os.environ, **part.environment, "PYTHONUNBUFFERED": "1"}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return f"out of time after {seconds:.0f} s"
    return "passed" if done.returncode == 0 else f"failed with status {done.returncode}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder of all results")
    parser.add_argument("--tune", action="store_true", help="measure the launch configs before the benchmarks")
    parser.add_argument("--models", action="store_true", help="whole models after the benchmarks; needs diffusers")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together")
    parser.add_argument("--part", action="append", help="run only these parts, by name")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * arguments.minutes
    lines, passed = [], True
    for part in parts(out, arguments.tune, arguments.models, arguments.minutes):
        if arguments.part and part.name not in arguments.part:
            continue
        begin = time.monotonic()
        left = deadline - begin
        result = run(part, out, left) if left > LEAST_SECONDS else "left out: no time"
        passed &= result == "passed"
        lines.append(f"{part.name:22} {result} ({time.monotonic() - begin:.0f} s, see {part.log})")
        print(lines[-1], flush=True)
        if part.name == "compare" and result == "passed":
            print((out / part.log).read_text(), flush=True)
        (out / "summary.txt").write_text("\n".join(lines) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
