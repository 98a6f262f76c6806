"""The compiled CPU library: loads it when this installation has one, and knows why not otherwise.

The library (csrc/, on the stable ABI of LibTorch) defines its ops in `torch.ops.bigain_cpp`, with the schemas of the
ops in `torch.ops.bigain`. Those call them when `backends` chooses the backend "cpp".

Two environment variables are for tests: BIGAIN_NATIVE_LIBRARY is the path of another build to load, BIGAIN_CPU_ISA
(baseline, avx2 or avx512) an instruction set below the best that the machine has.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parent
_NAMESPACE = "bigain_cpp"


def _load() -> str:
    """Load the library; returns why there is none, or nothing."""
    override = os.environ.get("BIGAIN_NATIVE_LIBRARY")
    library = Path(override) if override else next(iter(sorted(_FOLDER.glob("_native*.so"))), None)
    if library is None:
        reason = _FOLDER / "_native_missing.txt"  # written by setup.py
        return reason.read_text() if reason.exists() else "this installation was made without it"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        logging.getLogger(__name__).warning("%s does not load, the ops run without it: %s", library, error)
        return f"{library.name} does not load: {error}"
    return ""


REASON = _load()


def implementation(op: str) -> Callable[..., Any] | None:
    """The library's implementation of an op, or None."""
    packet = None if REASON else getattr(getattr(torch.ops, _NAMESPACE), op, None)
    return None if packet is None else packet.default


def report() -> str:
    """One line: the instruction set that the library uses and what it was built with, or why there is none."""
    if REASON:
        return f"none: {REASON}"
    return getattr(torch.ops, _NAMESPACE).build_info()
