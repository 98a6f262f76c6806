"""Runs the GPU tests, the kernel checks and the contract suite on a GPU, in many processes.

    python -m tests.gpu.run [--processes 16] [--seconds 300] [more folders of tests]

Nearly all of their time goes into compiling kernels, on one core each, so the tests are dealt out to processes that
share the GPU. Prints what each of them reports; the status is 0 when all passed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("tests/gpu", "tests/triton_kernels/interpreted", "tests/contract")
NOTHING_COLLECTED = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folders", nargs="*", help="more to run beside these")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 16))
    parser.add_argument("--seconds", type=float, default=500, help="for everything; what is not done then has failed")
    options = parser.parse_args()
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "tests.gpu.shard", "-p", "no:cacheprovider"]
    command += ["-o", "addopts=-ra --strict-markers"]
    command += [*FOLDERS, "--backend", "triton", "--backend", "cuda", *options.folders]
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    deadline, failed = time.monotonic() + options.seconds, 0
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for i in range(options.processes):
            output = Path(folder, f"{i}.txt")
            own = {"BIGAIN_SHARD": f"{i}/{options.processes}", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
            with output.open("w") as target:
                process = subprocess.Popen(command, cwd=ROOT, env={**inherited, **own}, stdout=target, stderr=target)
            started.append((process, output))
        for i, (process, output) in enumerate(started):
            try:
                code = process.wait(timeout=max(deadline - time.monotonic(), 0))
                result = "passed" if code in (0, NOTHING_COLLECTED) else f"failed with status {code}"
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                result = "out of time"
            failed += result != "passed"
            sys.stdout.write(f"=== process {i} of {options.processes}: {result}\n{output.read_text()}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{options.processes - failed} of {options.processes} processes passed\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
