"""Builds the native CUDA library with nvcc and ninja, and its emulation on the CPU: used by setup.py and the tests.

    python csrc/build_cuda.py --output /tmp/_native_cuda.so [--archs "80;90"] [--emulate] [--jobs 2]

Neither a GPU nor a CUDA build of torch is needed: the headers of the stable ABI are those of any torch, and the one
function of libtorch_cuda that the library calls is linked against a stand-in of the same name. The CUDA runtime is
linked in, with its symbols hidden: the library loads beside a torch of any CUDA version that the driver supports.

The emulation compiles the same sources as C++ against csrc/emulate. Its ops take CPU tensors.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from build_native import SANITIZE
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
    run,
    run_ninja,
    torch_flags,
    torch_library,
    words,
)

SWITCH = "BIGAIN_BUILD_CUDA"
ARCHS = "BIGAIN_CUDA_ARCHS"
DEFAULT_ARCHS = "80;86;89;90;100;120"
# The newest architecture whose PTX the driver translates for all of 10.x, 11.x, 12.x and later; that of 120 would leave
# out 11.0 (Jetson Thor), and code for 100 runs on 10.x alone.
NEWEST_PTX = 100

OPS = tuple(sorted(path.stem for path in (ROOT / "cuda").glob("*.cu")))

# Nothing is contracted but what the source writes as fmaf: see common.cuh.
NVCC = "-std=c++17 -O3 -fmad=false -Xptxas -v -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra,-Wno-unused-parameter"
EMULATE = "-std=c++17 -ffp-contract=off -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unknown-pragmas"
EMULATE += " -x c++ -DBIGAIN_EMULATE -DBIGAIN_POISON"
SANITIZED = "-fsanitize=address,undefined"
STAND_IN = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n'


def find_nvcc() -> list[str]:
    """The CUDA compiler: $CUDACXX, or that of $CUDA_HOME, the one on PATH, or the one in /usr/local/cuda."""
    named, home = os.environ.get("CUDACXX", "").strip(), os.environ.get("CUDA_HOME")
    candidates = [named] if named else [home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"]
    found = [name for name in candidates if name and (named or shutil.which(name))]
    if not found:
        raise CannotBuild("no nvcc found: looked for $CUDACXX, $CUDA_HOME, nvcc and /usr/local/cuda")
    nvcc = words(found[0], "CUDACXX")
    works, said = run([*nvcc, "--version"])
    if not works:
        raise CannotBuild(f"the CUDA compiler {nvcc[0]} does not work: {said}")
    return nvcc


def host_compiler() -> list[str]:
    """The options that make nvcc use the C++ compiler: its program, past a launcher such as ccache, and its flags."""
    compiler = find_compiler()
    flags = next((i for i, word in enumerate(compiler) if word.startswith("-")), len(compiler))
    return ["-ccbin", compiler[flags - 1], *(f"-Xcompiler={flag}" for flag in compiler[flags:])]


def why_not() -> str:
    """Why the CUDA library cannot or shall not be built here; empty when it can.

    BIGAIN_BUILD_CUDA=1 builds it and makes a missing nvcc an error, BIGAIN_BUILD_CUDA=auto builds it where nvcc is
    found. By default it is left out: six architectures take minutes, and the Triton kernels need no build.
    """
    switch = os.environ.get(SWITCH, "")
    if switch not in ("", "0", "1", "auto"):
        raise ValueError(f"{SWITCH}: got {switch!r}, expected 0, 1 or auto")
    if switch in ("", "0"):
        return f"built only with {SWITCH}=1 or {SWITCH}=auto"
    architectures(), max_jobs()
    try:
        if platform.system() != "Linux":
            raise CannotBuild(f"{platform.system()} is not supported, Linux is")
        find_nvcc(), find_torch(), find_compiler(), find_ninja()
    except CannotBuild as error:
        if switch == "1":
            raise
        return str(error)
    return ""


def cuda_version() -> str:
    """The version of nvcc as PyTorch writes it: "130" is 13.0."""
    nvcc = find_nvcc()
    said = subprocess.run([*nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    if found is None:
        raise CannotBuild(f"the CUDA compiler {nvcc[0]} does not say its version")
    return found[1] + found[2]


def architectures(text: str | None = None) -> list[str]:
    """The GPU architectures to build for: of the text, of $BIGAIN_CUDA_ARCHS, or the default."""
    text = text or os.environ.get(ARCHS) or DEFAULT_ARCHS
    found = [part for part in re.split(r"[;, ]+", text) if part]
    if not found or not all(re.fullmatch(r"(8|9|1\d)\d[af]?", part) for part in found):
        raise ValueError(f"{ARCHS}: got {text!r}, expected architectures from 80 on, like {DEFAULT_ARCHS!r}")
    return found


def targets(archs: list[str]) -> str:
    """The options of nvcc that make code for each architecture, and PTX for GPUs that have none of it.

    PTX is that of the newest architecture up to NEWEST_PTX, or of the oldest one. Names with a suffix, as 90a, are for
    their own GPU (or family) and give no PTX that others can run.
    """
    plain = sorted(int(arch) for arch in archs if arch.isdigit())
    code = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs]
    if plain:
        ptx = max((arch for arch in plain if arch <= NEWEST_PTX), default=plain[0])
        code.append(f"-gencode arch=compute_{ptx},code=compute_{ptx}")
    return " ".join(code)


def ninja_file(
    output: Path, archs: list[str], line_info: bool = False, namespace: str = NAMESPACE, runtime: str = "static"
) -> str:
    """The text of build.ninja for the CUDA library."""
    define = f'-DBIGAIN_CUDA_ARCHS=\\"{",".join(archs)}\\"' + named("cuda", namespace)
    lines = [
        "ninja_required_version = 1.5",
        f"nvcc = {quote(*find_nvcc(), *host_compiler())}",
        f"cxx = {quote(*find_compiler())}",
        f"flags = {NVCC} {quote('-I' + str(ROOT / 'include'))} {torch_flags()} -DUSE_CUDA {define}",
        f"targets = {targets(archs)}{' -lineinfo' if line_info else ''}",
        # What ptxas says of registers, stack and spills stays beside the object, for the tests.
        "rule compile",
        "  command = $nvcc -MD -MF $out.d $flags $targets -c $in -o $out > $out.log 2>&1 || (cat $out.log && false)",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule portable",
        "  command = $cxx -std=c++17 -O2 -fPIC -fvisibility=hidden -c $in -o $out",
        "rule stand_in",
        "  command = $cxx -shared -fPIC -Wl,-soname,libtorch_cuda.so $in -o $out",
        "rule link",
        f"  command = $nvcc -shared -cudart {runtime} -Xlinker -z,defs,--exclude-libs,ALL $in -o $out $libraries",
        "  description = $out",
        "build stand_in/libtorch_cuda.so: stand_in stand_in.cpp",
        f"build portable.o: portable {escape(ROOT / 'portable.cpp')}",
    ]
    lines += [f"build {op}.o: compile {escape(ROOT / 'cuda' / f'{op}.cu')}" for op in OPS]
    lines += [
        f"build {escape(output)}: link portable.o {' '.join(f'{op}.o' for op in OPS)} | stand_in/libtorch_cuda.so",
        f"  libraries = -Lstand_in -ltorch_cuda {torch_library()}",
        f"default {escape(output)}",
    ]
    return "\n".join(lines) + "\n"


def emulated_ninja_file(output: Path, sanitize: bool) -> str:
    """The text of build.ninja for the library that runs the CUDA kernels on the CPU."""
    includes = quote(*(f"-I{ROOT / folder}" for folder in ("include", "emulate")))
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {quote(*find_compiler())}",
        f"flags = {EMULATE} {SANITIZE if sanitize else '-O2'} {includes} {torch_flags()}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        f"  command = $cxx -shared {SANITIZED if sanitize else quote(*DEFINED)} $in -o $out $libraries",
        "  description = $out",
    ]
    sources = [*(ROOT / "cuda" / f"{op}.cu" for op in OPS), *sorted((ROOT / "emulate").glob("*.cpp"))]
    objects = [f"{source.parent.name}.{source.stem}.o" for source in sources]
    lines += [f"build {name}: compile {escape(source)}" for name, source in zip(objects, sources, strict=True)]
    lines += [
        f"build {escape(output)}: link {' '.join(objects)}",
        f"  libraries = {torch_library()}",
        f"default {escape(output)}",
    ]
    return "\n".join(lines) + "\n"


def build(
    output: Path,
    folder: Path,
    archs: list[str] | None = None,
    jobs: int | None = None,
    line_info: bool = False,
    namespace: str = NAMESPACE,
    runtime: str = "static",
) -> None:
    """Build the CUDA library at `output`, with objects in `folder`; what is up to date is not built again.

    With `line_info`, the machine code says which line of source it comes from, for profilers and the static report. The
    ops are defined in torch.ops.<namespace>_cuda. With runtime="shared" the library takes the CUDA runtime of a torch
    of the same major version, and needs no newer glibc than that torch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stand_in = folder / "stand_in.cpp"
    if not stand_in.exists() or stand_in.read_text() != STAND_IN:
        stand_in.write_text(STAND_IN)
    text = ninja_file(output.resolve(), archs or architectures(), line_info, namespace, runtime)
    run_ninja(text, output, folder, jobs)


def build_emulated(output: Path, folder: Path, sanitize: bool = False, jobs: int | None = None) -> None:
    """Build the emulated library at `output`, with objects in `folder`; what is up to date is not built again."""
    run_ninja(emulated_ninja_file(output.resolve(), sanitize), output, folder, jobs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--archs", help=f"architectures, separated by semicolons; default {DEFAULT_ARCHS}")
    parser.add_argument("--emulate", action="store_true", help="the emulation on the CPU")
    parser.add_argument("--lines", action="store_true", help="with the lines of source, for profilers and the report")
    parser.add_argument("--jobs", type=int)
    arguments = parser.parse_args()
    objects = arguments.output.with_suffix(".objects")
    if arguments.emulate:
        build_emulated(arguments.output, objects, jobs=arguments.jobs)
    else:
        build(arguments.output, objects, architectures(arguments.archs), arguments.jobs, arguments.lines)
