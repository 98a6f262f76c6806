"""The CUDA kernels under test: on a GPU where there is one and this installation has the library, else emulated.

The emulated library is built from the sources of this checkout on the first use; a second run finds it up to date.
BIGAIN_EMULATED_LIBRARY names another build of it.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import bigain_kernels as bk
from bigain_kernels import backends, native

ROOT = Path(__file__).resolve().parents[3]
BUILD = ROOT / "build" / "tests"
sys.path.insert(0, str(ROOT / "csrc"))
import build_cuda  # noqa: E402

OPS = (
    "laplacian_score",
    "select_destinations",
    "bipartite_match",
    "merge_plan",
    "block_merge_plan",
    "lgtm_plan",
    "token_merge",
    "token_merge_norm",
    "token_unmerge",
    "kv_downsample",
)


@contextmanager
def locked(folder: Path):
    """One process at a time builds in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def emulated_library() -> Path:
    """The library that runs the CUDA kernels on the CPU."""
    override = os.environ.get("BIGAIN_EMULATED_LIBRARY")
    if override:
        return Path(override)
    library = BUILD / "emulated" / "_emulated.so"
    built(library.parent, lambda folder: build_cuda.build_emulated(library, folder, jobs=2))
    return library


def built(folder: Path, build: Callable[[Path], None]) -> None:
    """Run a build in a folder, or skip and say what it needs."""
    try:
        with locked(folder):
            build(folder)
    except build_cuda.CannotBuild as error:
        pytest.skip(str(error))


@dataclass(frozen=True)
class CudaOps:
    """torch.ops.bigain_cuda, and the device of the tensors that it takes."""

    ops: Any
    device: str

    @property
    def emulated(self) -> bool:
        return self.device == "cpu"

    def set_order(self, order: int) -> None:
        """Which blocks and threads go first, see csrc/emulate; a GPU has its own order."""
        if self.emulated:
            torch.ops.bigain_emulate.set_order(order)

    def launches(self) -> int:
        """Kernels launched so far; skips on a GPU, where nobody counts."""
        if not self.emulated:
            pytest.skip("launches are counted by the emulator")
        return torch.ops.bigain_emulate.launches()


def loads(ops: CudaOps) -> tuple[int, int]:
    """Vectors read so far: by all threads, and, summed over blocks, by the busiest thread of each."""
    if not ops.emulated:
        pytest.skip("loads are counted by the emulator")
    return tuple(torch.ops.bigain_emulate.loads())


@pytest.fixture(scope="session")
def cuda_ops() -> CudaOps:
    if not native.CUDA_REASON and torch.cuda.is_available():
        return CudaOps(torch.ops.bigain_cuda, "cuda")
    torch.ops.load_library(emulated_library())
    return CudaOps(torch.ops.bigain_cuda, "cpu")


@pytest.fixture
def on_cuda(cuda_ops) -> Iterator[CudaOps]:
    """The public ops run on the CUDA kernels, which the emulator brings to CPU tensors."""
    cuda = backends.get("cuda")
    with (
        backends.registered(cuda._replace(devices=("cpu",), missing="") if cuda_ops.emulated else cuda),
        bk.use_backend("cuda"),
    ):
        yield cuda_ops


@pytest.fixture(params=[0, -1, 7], ids=["forward", "backward", "shuffled"])
def order(request, cuda_ops):
    """Runs a test in several orders of blocks and threads: results that depend on them differ."""
    cuda_ops.set_order(request.param)
    yield request.param
    cuda_ops.set_order(0)


@pytest.fixture(scope="session")
def cuda_library() -> Path:
    """The CUDA library built by nvcc for two architectures, beside the objects and what ptxas said of them."""
    folder = BUILD / "cuda"
    built(folder, lambda folder: build_cuda.build(folder / "_native_cuda.so", folder, ["80", "90"], 2))
    return folder / "_native_cuda.so"
