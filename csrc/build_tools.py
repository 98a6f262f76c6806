"""What the builds of the native libraries need: a C++ compiler that works, ninja, and the torch to build against.

Whatever is missing or broken raises `CannotBuild` with one line, before anything is compiled.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = (2, 11)
NAMESPACE = "bigain"  # as in bigain_kernels/declaration.py
TARGET_VERSION = f"0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"

# Needs the C++ runtime and libtorch_cpu: a C compiler or one for another architecture cannot link it.
PROBE = """
#include <optional>
#include <vector>
extern "C" int torch_parallel_for();
std::optional<std::vector<int>> probe(int n) { return std::vector<int>(n, torch_parallel_for()); }
"""
# All symbols of a library are known when it is linked; on a Mac those of torch need not be.
DEFINED = ("-undefined", "dynamic_lookup") if platform.system() == "Darwin" else ("-Wl,-z,defs",)
# What stands in the line of a compiler or linker that says what went wrong.
TELLING = "error|undefined|unrecognized|incompatible|not found"
PYTHON = "BIGAIN_BUILD_PYTHON"
FIND_TORCH = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"


class CannotBuild(RuntimeError):
    """Something that the build needs is missing; the message says what."""


def run(command: list[str], folder: Path | str | None = None) -> tuple[bool, str]:
    """Whether a program succeeds, and the line of its output that tells most."""
    try:
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
        )
    except OSError as error:
        return False, f"does not start: {error.strerror}"
    except subprocess.TimeoutExpired:
        return False, "does not end within a minute"
    lines = [line for line in os.fsdecode(done.stdout + done.stderr).splitlines() if line.strip()]
    telling = [line for line in lines if re.search(TELLING, line, re.IGNORECASE)]
    return done.returncode == 0, (telling or lines[-1:] or [f"exit status {done.returncode}"])[0].strip()


def words(command: str, variable: str) -> list[str]:
    """The program that an environment variable names and its arguments; the program as an absolute path."""
    try:
        # A path may hold spaces; otherwise they separate arguments, as in CXX="ccache g++".
        found = [command] if shutil.which(command) else shlex.split(command)
    except ValueError as error:
        raise CannotBuild(f"${variable}: got {command!r}, expected a program and arguments ({error})") from None
    program = shutil.which(found[0]) if found else None
    if program is None:
        raise CannotBuild(f"${variable}: got {command!r}, expected a program that exists")
    return [os.path.abspath(program), *found[1:]]


@functools.cache
def find_compiler() -> list[str]:
    """The C++ compiler and its arguments: $CXX, or the first of c++, g++ and clang++. It has built a library."""
    named = os.environ.get("CXX", "").strip()
    found = [named] if named else [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
    if not found:
        raise CannotBuild("no C++ compiler found: looked for $CXX, c++, g++ and clang++")
    compiler = words(found[0], "CXX")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "probe.cpp").write_text(PROBE)
        options = ["-std=c++17", "-fPIC", "-shared", "probe.cpp", "-o", "probe.so", f"-L{find_torch() / 'lib'}"]
        works, said = run([*compiler, *options, "-ltorch_cpu", *DEFINED], folder)
        if works and not (Path(folder) / "probe.so").exists():
            works, said = False, "it makes no file"
        if not works:
            raise CannotBuild(f"the C++ compiler {shlex.join(compiler)} does not work: {said}")
    return compiler


@functools.cache
def find_ninja() -> str:
    """The ninja of this Python environment, or the one on PATH."""
    found = shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise CannotBuild("no ninja found: pip install ninja")
    works, said = run([found, "--version"])
    if not works:
        raise CannotBuild(f"the ninja {found} does not work: {said}")
    return found


def torch_of(python: str) -> str:
    """The folder of the torch that a Python has, as it is without the variables that hide packages; empty for none."""
    visible = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    try:
        done = subprocess.run(
            # Not in this folder, which Python would look through first.
            [python, "-c", FIND_TORCH],
            cwd=os.sep,
            env=visible,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def other_pythons() -> list[str]:
    """The Pythons on PATH, first things first, as of the environment that was active when the build began."""
    folders = [folder for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    found = [shutil.which(name, path=folder) for folder in folders for name in ("python3", "python")]
    return list(dict.fromkeys(python for python in found if python and python != sys.executable))


def locate_torch() -> str:
    """Where a torch lies, found without importing it; empty where there is none.

    An isolated build hides the packages of the environment that is installed into. But pip runs the Python of that
    environment, which shows them once it starts without the variables that hide them; uv and `python -m build` have
    that of the active environment behind their own on PATH. Any torch will do: of a stable interface, only headers and
    names are used.
    """
    named = os.environ.get(PYTHON, "").strip()
    if named:
        place = torch_of(words(named, PYTHON)[0])
        if not place:
            raise CannotBuild(f"${PYTHON}: got {named!r}, expected a Python that has torch")
        return place
    spec = importlib.util.find_spec("torch")
    if spec and spec.submodule_search_locations:
        return spec.submodule_search_locations[0]
    return next(filter(None, map(torch_of, (sys.executable, *other_pythons()))), "")


def version_of(torch: Path) -> str:
    """The version of the torch in a folder; empty where it says none."""
    found = re.search(r"__version__ = ['\"]([^'\"]*)", (torch / "version.py").read_text(encoding="utf-8"))
    return found[1] if found else ""


@functools.cache
def find_torch() -> Path:
    """The folder of a torch that is new enough."""
    place = locate_torch()
    if not place:
        raise CannotBuild(
            f"no torch found in {sys.prefix}, where the build ran, nor by a Python on PATH: install torch there first, "
            f"or set {PYTHON} to a Python that has it"
        )
    torch = Path(place)
    got = version_of(torch) or "of an unknown version"
    version = re.match(r"(\d+)\.(\d+)", got)
    if version is None or (int(version[1]), int(version[2])) < TORCH_TARGET:
        raise CannotBuild(f"torch {got} is too old: the library needs {TORCH_TARGET[0]}.{TORCH_TARGET[1]} or later")
    if not (torch / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
        raise CannotBuild(f"the torch in {torch} has no C++ headers")
    return torch


def max_jobs() -> int | None:
    """How many compilers run at once: $MAX_JOBS, or as many as ninja likes."""
    text = os.environ.get("MAX_JOBS", "").strip()
    if text and not (text.isdecimal() and int(text) > 0):
        raise ValueError(f"MAX_JOBS: got {text!r}, expected a positive number")
    return int(text) if text else None


def escape(path: Path | str) -> str:
    """A path in the list of inputs and outputs of a ninja file."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def quote(*parts: Path | str) -> str:
    """Arguments in a command or variable of a ninja file, which the shell reads."""
    return shlex.join(str(part) for part in parts).replace("$", "$$")


def torch_flags() -> str:
    """Compiles against the stable interface of torch."""
    return f"{quote('-isystem', find_torch() / 'include')} -DTORCH_TARGET_VERSION={TARGET_VERSION}"


def named(library: str, namespace: str) -> str:
    """Renames the namespace of a library's ops, which the sources call bigain_<library>."""
    return "" if namespace == NAMESPACE else f" -D{NAMESPACE}_{library}={namespace}_{library}"


def torch_library() -> str:
    """Links with libtorch_cpu: `import torch` loads it first, and by its name the loader finds it. No path is kept."""
    return f"{quote('-L' + str(find_torch() / 'lib'))} -ltorch_cpu"


def run_ninja(text: str, output: Path, folder: Path, jobs: int | None) -> None:
    """Run ninja in `folder` on the text of a build.ninja that makes `output`."""
    folder.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    # In the encoding of file names, whatever that is: the file holds little else that is not ASCII.
    (folder / "build.ninja").write_bytes(os.fsencode(text))
    limit = jobs or max_jobs()
    done = subprocess.run([find_ninja(), "-C", str(folder), *(["-j", str(limit)] if limit else [])], check=False)
    if done.returncode:
        raise CannotBuild(f"{output.name} was not built, the compiler said why above")
