"""What the contract suite runs on: a backend, the device that its tensors are on, and what it computes in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import bigain_kernels as bk
from bigain_kernels import backends
from bigain_kernels.backends import Backend
from bigain_kernels.declaration import OPS

from ..shapes import DTYPES


@dataclass(frozen=True)
class Provider:
    """A backend under test. `provider.token_merge(x, plan)` is the public op of that name, run by the backend.

    Arguments are CPU tensors, which go to the device with the strides that they have; results come back to the CPU,
    where the float64 reference is computed.

    Attributes:
        backend: what is registered for the time of a test.
        device: where its tensors are.
        interpreted: it runs in Triton's interpreter, in a process of its own.
        order_of: sets an order of emulated blocks and threads; None where there is nothing to set.
    """

    backend: Backend
    device: str
    interpreted: bool = False
    order_of: Callable[[int], None] | None = None

    @property
    def name(self) -> str:
        return self.backend.name

    def implements(self, op: str) -> bool:
        """Whether the backend has an implementation of an op; the kernels of Triton are not imported for it."""
        return not self.backend.missing and self.backend.find(op) is not None

    def dtypes(self) -> list[torch.dtype]:
        """The floating dtypes that the backend does not refuse."""
        if self.interpreted:
            return [dtype for dtype in DTYPES if dtype != torch.float64]
        refuses = self.backend.refuses or (lambda op, arguments: "")
        return [
            dtype for dtype in DTYPES if not refuses("laplacian_score", (torch.zeros(1, 1, 1, dtype=dtype), 1, 1, "l1"))
        ]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        with backends.registered(self.backend), bk.use_backend(self.name):
            yield

    def orders(self) -> Iterator[None]:
        """Goes through all orders of blocks and threads; where there is but one, through that."""
        if self.order_of is None:
            yield
            return
        for order in (-1, 7, 0):
            self.order_of(order)
            yield

    def lgtm_plan(
        self,
        x: Tensor,
        grid: tuple[int, int],
        stride: tuple[int, int],
        r: int,
        window: int | None = None,
        share: int = 1,
    ) -> bk.MergePlan:
        """The op behind `bigain_kernels.lgtm_plan`, which takes a ratio."""
        x = to_device(x, self.device)
        tables = torch.ops.bigain.lgtm_plan(x, *grid, *stride, r, -1 if window is None else window, share)
        return bk.MergePlan(*(table.cpu() for table in tables), grid, x.shape[1] - r)

    def __getattr__(self, op: str) -> Callable[..., Any]:
        if op not in OPS:
            raise AttributeError(op)
        function = getattr(bk, op)

        def run(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = tree_map_only(Tensor, lambda x: to_device(x, self.device), (args, kwargs))
            return tree_map_only(Tensor, Tensor.cpu, function(*args, **kwargs))

        return run


def to_device(x: Tensor, device: str) -> Tensor:
    """`x` on a device with its strides and its offset: `to` alone makes slices contiguous."""
    if device == "cpu":
        return x
    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(device)
    return whole.as_strided(x.shape, x.stride(), x.storage_offset())


def of_backend(name: str) -> Provider | None:
    """What runs a backend on this machine; None when nothing can."""
    backend = backends.get(name)
    if name == "cuda" and (backend.missing or not torch.cuda.is_available()):
        # The kernels emulated; their library is built and loaded when the first test asks for it.
        emulated = backend._replace(devices=("cpu",), missing="", implement=_emulated)
        return Provider(emulated, "cpu", order_of=_set_order)
    if name == "triton" and not torch.cuda.is_available():
        # Nothing is asked of the backend here: what it says of CPU tensors, it says in the process that interprets.
        return None if backend.missing else Provider(backend, "cpu", interpreted=True)
    if backend.missing:
        return None
    device = "cuda" if torch.cuda.is_available() and not backend.serves("cpu") else "cpu"
    return Provider(backend, device)


# Ops that the CUDA library has; to ask the library itself would build it while tests are collected.
_CUDA_OPS = frozenset(OPS) - {"kv_downsample_attention", "pooled_kv_projection"}


@functools.cache
def _load_emulated() -> None:
    from ..csrc.cuda.conftest import emulated_library

    torch.ops.load_library(emulated_library())


def _emulated(op: str) -> Any:
    if op not in _CUDA_OPS:
        return None

    def run(*arguments: Any) -> Any:
        _load_emulated()
        return getattr(torch.ops.bigain_cuda, op).default(*arguments)

    return run


def _set_order(order: int) -> None:
    _load_emulated()
    torch.ops.bigain_emulate.set_order(order)
