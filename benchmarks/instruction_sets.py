"""L-GTM on the CPU with each instruction set of this machine, against the published algorithm held to the same one.

    python -m benchmarks.instruction_sets [--seconds 1.5] [--csv benchmarks/results/cpu_instruction_sets.csv]

A machine with AVX-512 says so what older ones will see: PyTorch and the libraries under it are told to leave out what
the older machine has not. Each instruction set and dtype is a process of its own, `benchmarks.bench_lgtm`.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# What PyTorch, oneDNN and MKL call the instruction sets of BIGAIN_CPU_ISA. What the best one leaves to them is all.
LIMITS = {
    "baseline": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "MKL_CBWR": "COMPATIBLE",
    },
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx512_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "amx": {},
}
PROBLEMS, DTYPES = ("sd2_512", "dit_512"), ("float32", "bfloat16", "float16")


def available() -> list[str]:
    """The instruction sets of this machine and build, as the library tells those who ask for another."""
    code = "import torch, bigain_kernels as bk; bk.laplacian_score(torch.ones(1, 4, 2), (2, 2))"
    environment = {**os.environ, "BIGAIN_CPU_ISA": "none"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    found = re.search(r"BIGAIN_CPU_ISA: .* have: (.+)", run.stderr)
    if found is None:
        raise RuntimeError(f"the C++ library did not say what it can run: {run.stderr[-500:]}")
    return found[1].split(", ")


def measure(isa: str, dtype: str, seconds: float) -> list[dict[str, str]]:
    """The rows of one process."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.csv"
        command = [*(sys.executable, "-m", "benchmarks.bench_lgtm"), "--dtype", dtype, "--seconds", str(seconds)]
        command += [part for name in PROBLEMS for part in ("--problem", name)]
        command += [part for name in ("cpp", "eager", "tomesd") for part in ("--provider", name)]
        environment = {**os.environ, **LIMITS[isa], "BIGAIN_CPU_ISA": isa}
        # Its status says whether ratios are met on the best instruction set, which is not asked here.
        run = subprocess.run(
            [*command, "--csv", str(rows)], env=environment, capture_output=True, text=True, check=False
        )
        if not rows.exists():
            raise RuntimeError(f"{isa} {dtype}: {run.stdout[-1000:]}{run.stderr[-2000:]}")
        quiet = "NOT QUIET" not in run.stdout
        if not quiet:
            print(f"{isa} {dtype}: the machine was not quiet", flush=True)
        with rows.open(newline="") as file:
            return [{"isa": isa, "quiet": str(quiet), **row} for row in csv.DictReader(file)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.5, help="about how long each provider is timed")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    arguments = parser.parse_args()
    print(f"{'':12} {'':9} {'':8} {'ours ms':>9} {'eager':>7} {'tomesd':>7}")
    for isa in available():
        for dtype in DTYPES:
            rows = measure(isa, dtype, arguments.seconds)
            if arguments.csv is not None:
                is_new = not arguments.csv.exists()
                with arguments.csv.open("a", newline="") as file:
                    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
                    if is_new:
                        writer.writeheader()
                    writer.writerows(rows)
            for problem in PROBLEMS:
                times = {row["provider"]: float(row["median_us"]) for row in rows if row["problem"] == problem}
                ratios = " ".join(f"{times[other] / times['cpp']:6.2f}x" for other in ("eager", "tomesd"))
                print(f"{isa:12} {dtype:9} {problem:8} {times['cpp'] / 1e3:9.2f} {ratios}", flush=True)


if __name__ == "__main__":
    main()
