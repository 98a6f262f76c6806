"""Builds the native CPU library with ninja: used by setup.py, and by itself for test builds.

    python csrc/build_native.py --output /tmp/_native.so [--sanitize] [--jobs 2]

The library is a plain shared object on the stable ABI of LibTorch: it has no Python in it, and one file serves torch
2.11 and later on every Python. Nothing is tuned to the machine that builds: the loops over channels are compiled once
per instruction set, and isa.cpp chooses on the machine that runs.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
from pathlib import Path

from build_tools import (
    DEFINED,
    NAMESPACE,
    ROOT,
    CannotBuild,
    escape,
    find_compiler,
    find_ninja,
    find_torch,
    max_jobs,
    named,
    quote,
    run_ninja,
    torch_flags,
    torch_library,
)

SWITCH = "BIGAIN_BUILD_CPU"

# Compiled for each instruction set.
KERNELS = ("row_kernels", "match_kernel")
# Compiled on top of avx512 where the compiler knows the flags (GCC 11, clang 12); isa.cpp is told by the macro.
BF16_KERNELS = {
    "match_vdpbf16": ("-mavx512bf16", "BIGAIN_VDPBF16"),
    "match_amx": ("-mavx512bf16 -mamx-tile -mamx-bf16", "BIGAIN_AMX"),
}
# All other sources are compiled once.
ONCE = tuple(sorted({path.stem for path in (ROOT / "cpu").glob("*.cpp")} - {*KERNELS, *BF16_KERNELS}))
# Name of the namespace, and what the compiler may use there. isa.cpp asks the machine for exactly these.
ISAS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl",
}

COMMON = "-std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra"
# Fused multiply-add, but sums in the order of the source, and NaN and infinities as IEEE says.
FAST = "-O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math"
SANITIZE = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined -DBIGAIN_POISON"


def why_not() -> str:
    """Why the library cannot or shall not be built here; empty when it can.

    BIGAIN_BUILD_CPU=0 leaves it out, BIGAIN_BUILD_CPU=1 makes a missing compiler an error instead of a reason.
    """
    switch = os.environ.get(SWITCH, "")
    if switch not in ("", "0", "1"):
        raise ValueError(f"{SWITCH}: got {switch!r}, expected 0 or 1")
    if switch == "0":
        return f"left out with {SWITCH}=0"
    max_jobs()
    try:
        if platform.system() not in ("Linux", "Darwin"):
            raise CannotBuild(f"{platform.system()} is not supported, Linux and macOS are")
        find_torch(), find_compiler(), find_ninja()
    except CannotBuild as error:
        if switch == "1":
            raise
        return str(error)
    return ""


def takes(compiler: list[str], flags: str) -> bool:
    """Whether the compiler knows the flags."""
    command = [*compiler, *flags.split(), "-x", "c++", "-E", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def ninja_file(output: Path, sanitize: bool, namespace: str = NAMESPACE) -> str:
    """The text of build.ninja; the ops are defined in torch.ops.<namespace>_cpp."""
    compiler = find_compiler()
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    is_clang, is_x86 = "clang" in version, platform.machine().lower() in ("x86_64", "amd64")
    optimize = SANITIZE if sanitize else FAST
    # GCC's own headers of AVX-512 read an undefined register on purpose, and warn of it.
    quiet = "" if is_clang else " -Wno-uninitialized -Wno-maybe-uninitialized"
    op_flags = torch_flags() + (" -DBIGAIN_X86_ISAS" if is_x86 else "") + named("cpp", namespace)
    bf16_kernels = {}
    # Without Linux there is nobody to ask for the registers of AMX, and no machine to try vdpbf16ps on.
    if is_x86 and platform.system() == "Linux":
        bf16_kernels = {stem: flags for stem, (flags, _) in BF16_KERNELS.items() if takes(compiler, flags)}
    op_flags += "".join(f" -D{BF16_KERNELS[stem][1]}" for stem in bf16_kernels)
    link = quote("-shared", *DEFINED)
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {quote(*compiler)}",
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
        lines.extend([f"build {name}.o: compile {escape(ROOT / 'cpu' / f'{stem}.cpp')}", f"  extra = {extra}"])

    for stem in ONCE:
        compile_one(stem, stem, op_flags)
    if platform.system() == "Linux":
        compile_one("../portable", "portable", "")
    for isa, machine in ISAS.items():
        if isa == "baseline" or is_x86:
            for stem in KERNELS:
                extra = f"{machine}{quiet if isa == 'avx512' else ''} -DBIGAIN_ISA={isa}"
                compile_one(stem, f"{stem}.{isa}", extra)
    for stem, flags in bf16_kernels.items():
        compile_one(stem, stem, f"{ISAS['avx512']} {flags}{quiet}")
    lines += [
        f"build {escape(output)}: link {' '.join(objects)}",
        f"  libraries = {torch_library()}",
        f"default {escape(output)}",
    ]
    return "\n".join(lines) + "\n"


def build(
    output: Path, folder: Path, sanitize: bool = False, jobs: int | None = None, namespace: str = NAMESPACE
) -> None:
    """Build the library at `output`, with objects in `folder`; what is up to date is not built again."""
    run_ninja(ninja_file(output.resolve(), sanitize, namespace), output, folder, jobs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sanitize", action="store_true", help="AddressSanitizer, UndefinedBehaviorSanitizer, poison")
    parser.add_argument("--jobs", type=int)
    arguments = parser.parse_args()
    build(arguments.output, arguments.output.with_suffix(".objects"), arguments.sanitize, arguments.jobs)
