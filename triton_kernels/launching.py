"""Where launchers meet the device: `programs(kernel, *grid)(...)` does what `kernel[grid](...)` does, with less work on
the host (see `direct`), unless launches are recorded.

`aot` and the tests look at launches without a device; they take them down with `record_launches`, on meta tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import direct

_ONES = (1, 1, 1)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own is made for kernels as well and takes ten times as long on the host."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The lowest power of two that is at least n, 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()


def workspace(device: torch.device, *shapes: tuple[tuple[int, int], torch.dtype]) -> list[Tensor]:
    """Empty tensors of int32, float32 or int64 that share one allocation, each aligned to 16 bytes.

    For what lives no longer than a call: results of an op may not share memory with one another.
    """
    places, words = [], 0
    for (rows, columns), dtype in shapes:
        width = columns * dtype.itemsize // 4
        places.append((rows, width, words, dtype))
        words += (rows * width + 3) & ~3
    block = torch.empty((words,), dtype=torch.int32, device=device)
    views = [block.as_strided((rows, width), (width, 1), at) for rows, width, at, _ in places]
    return [view if dtype == torch.int32 else view.view(dtype) for view, (*_, dtype) in zip(views, places, strict=True)]


class Launch(NamedTuple):
    """One recorded launch: the kernel, its grid of programs and its arguments by name (options included)."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__.removesuffix("_kernel")


# What stands in for launching in this thread or task: given a kernel and its grid, it returns what is called.
_instead: ContextVar[Callable[[Any, tuple[int, ...]], Callable[..., Any]] | None] = ContextVar(
    "bigain_launches", default=None
)


def programs(kernel: Any, *grid: int) -> Callable[..., Any]:
    """What launches `kernel` on a grid of programs when it is called with the arguments of the kernel."""
    make = _instead.get()
    return launching(kernel, grid) if make is None else make(kernel, grid)


def launching(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """What launches `kernel`, whether others look at launches or not."""
    launcher = direct.launcher(kernel)
    return kernel[grid] if launcher is None else partial(launcher.launch, *grid, *_ONES[len(grid) :])


def is_watched() -> bool:
    """Whether something stands in for launching in this thread or task."""
    return _instead.get() is not None


@contextmanager
def instead(make: Callable[[Any, tuple[int, ...]], Callable[..., Any]]) -> Iterator[None]:
    """Let `make`, given a kernel and its grid, say what is called in the place of the launches of the block."""
    token = _instead.set(make)
    try:
        yield
    finally:
        _instead.reset(token)


@contextmanager
def _taking_down(run: bool) -> Iterator[list[Launch]]:
    launches: list[Launch] = []

    def make(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
        def take_down(*args: Any, **kwargs: Any) -> None:
            launches.append(Launch(kernel, grid, dict(zip(kernel.arg_names, args, strict=False)) | kwargs))
            if run:
                launching(kernel, grid)(*args, **kwargs)

        return take_down

    with instead(make):
        yield launches


def record_launches() -> AbstractContextManager[list[Launch]]:
    """Take down the launches of the block instead of running them; works on meta tensors."""
    return _taking_down(False)


def observe_launches() -> AbstractContextManager[list[Launch]]:
    """Take down the launches of the block and run them."""
    return _taking_down(True)
