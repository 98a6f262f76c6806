"""Where launchers meet the device: `programs(kernel, *grid)(...)` is `kernel[grid](...)`, unless launches are recorded.

`aot` and the tests look at launches without a device; they take them down with `record_launches`, on meta tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple


class Launch(NamedTuple):
    """One recorded launch: the kernel, its grid of programs and its arguments by name (options included)."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__.removesuffix("_kernel")


_record: ContextVar[list[Launch] | None] = ContextVar("bigain_launches", default=None)


def _take_down(launches: list[Launch], kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    launches.append(Launch(kernel, grid, dict(zip(kernel.arg_names, args, strict=False)) | kwargs))


def programs(kernel: Any, *grid: int) -> Callable[..., Any]:
    """What launches `kernel` on a grid of programs when it is called with the arguments of the kernel."""
    launches = _record.get()
    return kernel[grid] if launches is None else functools.partial(_take_down, launches, kernel, grid)


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Take down the launches of the block instead of running them; works on meta tensors."""
    launches: list[Launch] = []
    token = _record.set(launches)
    try:
        yield launches
    finally:
        _record.reset(token)
