"""Builds the native CPU library with ninja: used by setup.py, and by itself for test builds.

    python csrc/build_native.py --output /tmp/_native.so [--sanitize] [--jobs 2]

The library is a plain shared object on the stable ABI of LibTorch: it has no Python in it, and one file serves torch
2.11 and later on every Python. Nothing is tuned to the machine that builds: the loops over channels are compiled once
per instruction set, and isa.cpp chooses on the machine that runs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = (2, 11)
TARGET_VERSION = f"0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"
SWITCH = "BIGAIN_BUILD_CPU"

OPS = ("isa", "laplacian_score", "bipartite_match", "merge_plan", "token_merge", "kv_downsample")
KERNELS = ("row_kernels", "match_kernel")
# Name of the namespace, and what the compiler may use there. isa.cpp asks the machine for exactly these.
ISAS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma",
    "avx512": "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl",
}

# The matrix unit, on top of avx512, where the compiler knows it (GCC 11, clang 12).
AMX = "-mamx-tile -mamx-bf16"

COMMON = "-std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra"
# Fused multiply-add and reordered sums where the source asks for them (omp simd), but NaN and infinities as IEEE says.
FAST = "-O3 -fopenmp-simd -ffp-contract=fast -fno-math-errno -fno-trapping-math"
SANITIZE = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined -DBIGAIN_POISON"


class CannotBuild(RuntimeError):
    """Something that the build needs is missing; the message says what."""


def find_compiler() -> str:
    """The C++ compiler: $CXX, or the first of c++, g++ and clang++."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    raise CannotBuild("no C++ compiler found: looked for $CXX, c++, g++ and clang++")


def find_ninja() -> str:
    """The ninja of this Python environment, or the one on PATH."""
    found = shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise CannotBuild("no ninja found: pip install ninja")
    return found


def find_torch() -> Path:
    """The folder of a torch that is new enough, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise CannotBuild("torch is not installed where the build runs: install with --no-build-isolation")
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < TORCH_TARGET:
        raise CannotBuild(f"torch {version} is too old: the library needs {TORCH_TARGET[0]}.{TORCH_TARGET[1]} or later")
    return Path(spec.submodule_search_locations[0])


def why_not() -> str:
    """Why the library cannot or shall not be built here; empty when it can.

    BIGAIN_BUILD_CPU=0 leaves it out, BIGAIN_BUILD_CPU=1 makes a missing compiler an error instead of a reason.
    """
    switch = os.environ.get(SWITCH, "")
    if switch not in ("", "0", "1"):
        raise ValueError(f"{SWITCH}: got {switch!r}, expected 0 or 1")
    if switch == "0":
        return f"left out with {SWITCH}=0"
    try:
        if platform.system() not in ("Linux", "Darwin"):
            raise CannotBuild(f"{platform.system()} is not supported, Linux and macOS are")
        find_compiler(), find_ninja(), find_torch()
    except CannotBuild as error:
        if switch == "1":
            raise
        return str(error)
    return ""


def takes(compiler: str, flags: str) -> bool:
    """Whether the compiler knows the flags."""
    command = [*compiler.split(), *flags.split(), "-x", "c++", "-E", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def escape(path: Path | str) -> str:
    """A path as ninja writes it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_file(output: Path, sanitize: bool) -> str:
    """The text of build.ninja."""
    compiler, torch = find_compiler(), find_torch()
    version = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True, check=True).stdout
    is_clang, is_x86 = "clang" in version, platform.machine().lower() in ("x86_64", "amd64")
    optimize = SANITIZE + " -fopenmp-simd" if sanitize else FAST
    # Clang does not peel loops for alignment. GCC must not: the order of a sum would depend on the address.
    kernel_flags = "" if is_clang else "--param=vect-max-peeling-for-alignment=0"
    op_flags = f"-isystem {escape(torch / 'include')} -DTORCH_TARGET_VERSION={TARGET_VERSION}"
    has_amx = is_x86 and platform.system() == "Linux" and takes(compiler, AMX)
    if is_x86:
        op_flags += " -DBIGAIN_X86_ISAS"
    if has_amx:
        op_flags += " -DBIGAIN_AMX"
    link = "-shared -undefined dynamic_lookup" if platform.system() == "Darwin" else "-shared -Wl,-z,defs"
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {compiler}",
        f"flags = {COMMON} {optimize}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags $extra -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        f"  command = $cxx {link} {'-fsanitize=address,undefined' if sanitize else ''} $in -o $out $libraries",
        "  description = $out",
    ]
    objects = []

    def compile_one(stem: str, name: str, extra: str) -> None:
        objects.append(f"{name}.o")
        lines.extend([f"build {name}.o: compile {escape(ROOT / 'cpu' / stem)}.cpp", f"  extra = {extra}"])

    for stem in OPS:
        compile_one(stem, stem, op_flags)
    for isa, machine in ISAS.items():
        if isa == "baseline" or is_x86:
            for stem in KERNELS:
                compile_one(stem, f"{stem}.{isa}", f"{kernel_flags} {machine} -DBIGAIN_ISA={isa}")
    if has_amx:
        # GCC's own header reads an undefined register on purpose, and warns of it.
        quiet = "" if is_clang else " -Wno-maybe-uninitialized"
        compile_one("match_amx", "match_amx", f"{ISAS['avx512']} {AMX}{quiet}")
    # libtorch_cpu is loaded before by `import torch`; naming it here lets the loader find its symbols, no path is kept.
    lines += [
        f"build {escape(output)}: link {' '.join(objects)}",
        f"  libraries = -L{escape(torch / 'lib')} -ltorch_cpu",
        f"default {escape(output)}",
    ]
    return "\n".join(lines) + "\n"


def run_ninja(text: str, output: Path, folder: Path, jobs: int | None) -> None:
    """Run ninja in `folder` on the text of a build.ninja that makes `output`."""
    folder.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(text)
    limit = jobs or int(os.environ.get("MAX_JOBS", 0))
    subprocess.run([find_ninja(), "-C", str(folder), *(["-j", str(limit)] if limit else [])], check=True)


def build(output: Path, folder: Path, sanitize: bool = False, jobs: int | None = None) -> None:
    """Build the library at `output`, with objects in `folder`; what is up to date is not built again."""
    run_ninja(ninja_file(output.resolve(), sanitize), output, folder, jobs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sanitize", action="store_true", help="AddressSanitizer, UndefinedBehaviorSanitizer, poison")
    parser.add_argument("--jobs", type=int)
    arguments = parser.parse_args()
    build(arguments.output, arguments.output.with_suffix(".objects"), arguments.sanitize, arguments.jobs)
