"""The compiled libraries, one for CPU tensors and one for CUDA tensors: loads what this installation has and can use,
and knows why not otherwise.

The libraries (csrc/, on the stable ABI of LibTorch) define their ops in `torch.ops.bigain_cpp` and
`torch.ops.bigain_cuda`, with the schemas of the ops in `torch.ops.bigain`. Those call them when the backend "cpp" or
"cuda" is chosen.

Environment variables for tests: BIGAIN_NATIVE_LIBRARY and BIGAIN_CUDA_LIBRARY are paths of other builds to load,
BIGAIN_CPU_ISA (baseline, avx2, avx512, avx512_bf16 or amx) another instruction set that the machine has.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from .declaration import CPP, CUDA, OPS

_FOLDER = Path(__file__).parent
_LEFT_OUT = "left out "  # begins the reason that is written where that was wanted
_SLOW = "ops on CPU tensors run in plain PyTorch, which is slower"
_NOT_USED = "the CUDA library is not used"
_REINSTALL = "pip install --force-reinstall --no-deps --no-cache-dir ..."
_REMEDY = (
    f"To have it, install again where torch and a C++ compiler are: {_REINSTALL}; to do without it and without this "
    "warning, install with BIGAIN_BUILD_CPU=0"
)
_OUTDATED = (
    f"{{library}} was built for other op schemas ({{ops}}); build again: {_REINSTALL}, or in a checkout "
    "python csrc/{script} --output {library}"
)


def _find(stem: str, variable: str) -> tuple[Path | None, str]:
    """A library of this installation, or why there is none."""
    override = os.environ.get(variable)
    library = Path(override) if override else _FOLDER / f"{stem}.abi3.so"
    if override or library.exists():
        return library, ""
    reason = _FOLDER / f"{stem}_missing.txt"  # written by setup.py
    return None, reason.read_text(encoding="utf-8") if reason.exists() else "this installation was made without it"


def _load(library: Path, ops: Any) -> str:
    """Load a library; returns why it does not load, or nothing.

    LibTorch aborts the process when ops of the same names are defined again. So a second build of the library, say that
    of another version of this package, is refused before it is opened.
    """
    if hasattr(ops, "build_info"):
        loaded = os.path.realpath(library) in torch.ops.loaded_libraries
        return "" if loaded else f"{library} is not loaded: this process has another build of it already"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library} does not load: {error.__cause__ or error}"
    return "" if hasattr(ops, "build_info") else f"{library} is no library of bigain_kernels"


def _warn(message: str) -> None:
    """Once in a process, when this module is imported: the ops work without the library, only slower."""
    warnings.warn(f"bigain_kernels: {message}", RuntimeWarning, stacklevel=2)


def _load_cpu() -> str:
    library, reason = _find("_native", "BIGAIN_NATIVE_LIBRARY")
    if library is not None:
        reason = _load(library, CPP)
        if reason:
            _warn(f"{_SLOW}: {reason}")
    elif not reason.startswith(_LEFT_OUT):
        _warn(f"{_SLOW}, because the C++ library was not built: {reason}. {_REMEDY}")
    return reason


def _load_cuda() -> str:
    library, reason = _find("_native_cuda", "BIGAIN_CUDA_LIBRARY")
    if library is None:
        return reason
    # The library calls into libtorch_cuda, which only such a torch has.
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    reason = _load(library, CUDA)
    if reason:
        _warn(f"{_NOT_USED}: {reason}")
    return reason or CUDA.problem()


REASON = _load_cpu()
CUDA_REASON = _load_cuda()


def _differing(ops: Any) -> list[str]:
    """The ops that a library defines otherwise than `OPS`; further arguments with defaults are its own affair."""
    found = []
    for name, op in OPS.items():
        own = getattr(ops, name, None)
        declared = torch._C.parse_schema(f"{ops.name}::{op.schema.replace('SymInt', 'int')}")
        if own is not None and not own.default._schema.is_backward_compatible_with(declared):
            found.append(name)
    return found


def refuse_outdated() -> dict[str, str]:
    """Take for missing, from now on, what another version of the package left behind; to be called once all ops are
    declared. It loads without complaint, and its first call would fail with a message of torch about arguments.

    Returns:
        Why, by backend.
    """
    global REASON, CUDA_REASON
    found = {}
    if not REASON and (names := _differing(CPP)):
        library, _ = _find("_native", "BIGAIN_NATIVE_LIBRARY")
        REASON = found["cpp"] = _OUTDATED.format(library=library, ops=", ".join(names), script="build_native.py")
        _warn(f"{_SLOW}: {REASON}")
    if not CUDA_REASON and (names := _differing(CUDA)):
        library, _ = _find("_native_cuda", "BIGAIN_CUDA_LIBRARY")
        CUDA_REASON = found["cuda"] = _OUTDATED.format(library=library, ops=", ".join(names), script="build_cuda.py")
        _warn(f"{_NOT_USED}: {CUDA_REASON}")
    return found


def report() -> str:
    """One line: the instruction set that the CPU library uses and what it was built with, or why there is none."""
    return f"none: {REASON}" if REASON else CPP.build_info()


def cuda_report() -> str:
    """One line: the architectures that the CUDA library was built for, or why there is none."""
    return f"none: {CUDA_REASON}" if CUDA_REASON else CUDA.build_info()
