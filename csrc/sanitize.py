"""The tests of the native library under AddressSanitizer and UndefinedBehaviorSanitizer: `python csrc/sanitize.py`.

Builds the CPU library and the emulated CUDA library with both, with outputs filled with NaN before the kernels run,
into build/sanitize. The first finding ends the run. Arguments go to pytest.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import build_cuda
import build_native
from build_tools import find_compiler

ROOT = Path(__file__).resolve().parent.parent


def runtime(name: str) -> str:
    """Path of a runtime library of the compiler."""
    command = [*find_compiler(), f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(path):
        raise SystemExit(f"{name} is not installed beside {command[0]}")
    return path


def main() -> int:
    library = ROOT / "build" / "sanitize" / "_native.so"
    emulated = ROOT / "build" / "sanitize_emulated" / "_emulated.so"
    build_native.build(library, library.parent, sanitize=True)
    build_cuda.build_emulated(emulated, emulated.parent, sanitize=True)
    environment = {
        **os.environ,
        "BIGAIN_NATIVE_LIBRARY": str(library),
        "BIGAIN_EMULATED_LIBRARY": str(emulated),
        # Python is not linked with the sanitizer: it is loaded first by force, with the libstdc++ whose throws it sees.
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
        # Python frees little at exit. The threads of the emulator change stacks.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
    }
    # The sanitizer writes to the file of standard error, which pytest must not hide.
    options = ["-p", "no:cacheprovider", "-q", "--capture=sys"]
    # These build libraries of their own.
    builds = [
        "test_build.py",
        "test_install.py",
        "cuda/test_build.py",
        "cuda/test_machine_code.py",
        "cuda/test_emulator.py",
    ]
    contract = ["tests/contract", "--backend", "cpp", "--backend", "cuda"]
    tests = ["tests/csrc", *contract, *(f"--ignore=tests/csrc/{name}" for name in builds), *options, *sys.argv[1:]]
    return subprocess.run([sys.executable, "-m", "pytest", *tests], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
