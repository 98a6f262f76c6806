"""Triton's CUDA driver without a GPU: its own launchers, on a libcuda that does nothing (libcuda_stub.c)."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime.driver import driver

SOURCE = Path(__file__).with_name("libcuda_stub.c")


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_ubyte * 64)]


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    ]


Observer = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Config), ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))


@functools.cache
def library(folder: Path) -> ctypes.CDLL:
    """The stub, compiled into a folder and loaded for the process under the name of the real one."""
    path = folder / "libcuda.so.1"
    include = Path(nvidia.__file__).parent / "include"
    command = ["-shared", "-fPIC", "-O2", "-Wl,-soname,libcuda.so.1", f"-I{include}", str(SOURCE), "-o", str(path)]
    subprocess.run([os.environ.get("CC", "gcc"), *command], check=True)
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


class Launched(NamedTuple):
    """What the driver was told to launch."""

    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int
    function: int
    attributes: tuple[int, ...]
    parameters: tuple[int, ...]


class StubDriver:
    """A driver for `triton.runtime.driver`. Its launchers take CPU tensors: nobody looks at what addresses lead to."""

    def __init__(self, folder: Path) -> None:
        self.stub = library(folder)
        nvidia.library_dirs.cache_clear()
        nvidia.libcuda_dirs.cache_clear()
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 7

    @contextmanager
    def observed(self, sizes: list[int]) -> Iterator[list[Launched]]:
        """Launches of the block; `sizes` are the bytes of the parameters that are looked at."""
        launches = []

        def observe(config: Any, function: int, parameters: Any) -> None:
            told = config.contents
            launches.append(
                Launched(
                    tuple(told.grid),
                    tuple(told.block),
                    told.shared,
                    told.stream,
                    function,
                    tuple(told.attributes[i].id for i in range(told.attribute_count)),
                    tuple(
                        int.from_bytes(ctypes.string_at(parameters[i], size), "little") for i, size in enumerate(sizes)
                    ),
                )
            )

        observer = Observer(observe)
        self.stub.stub_observe(observer)
        try:
            yield launches
        finally:
            self.stub.stub_observe(None)


@contextmanager
def stub_driver(folder: Path) -> Iterator[StubDriver]:
    """The stub, compiled into a folder, as Triton's driver. What Triton compiles goes there as well."""
    with knobs.nvidia.scope(), knobs.cache.scope():
        knobs.nvidia.libcuda_path = knobs.cache.dir = str(folder)
        before = driver._active
        driver.set_active(StubDriver(folder))
        try:
            yield driver.active
        finally:
            driver._active = before
