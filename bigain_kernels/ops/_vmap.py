"""torch.func.vmap over an op: one call for each element of the mapped dimension.

torch would do the same by itself, but not for ops that take or return lists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..declaration import PUBLIC


def one_by_one(op: str) -> Callable[..., Any]:
    """The rule of an op, for `torch.library.register_vmap`."""
    overload = getattr(PUBLIC, op).default

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        if info.batch_size == 0:
            raise RuntimeError(f"bigain_kernels.{op}: got a mapped dimension of size 0, expected at least 1")
        results = [overload(*_at(i, args, in_dims)) for i in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = [torch.stack(each) for each in zip(*results, strict=True)]
        return type(results[0])(stacked), tree_map(lambda _: 0, type(results[0])(stacked))

    return rule


def _at(i: int, args: Any, in_dims: Any) -> list[Any]:
    """The arguments of one element: those that are mapped at index i of their dimension, the others as they are."""
    return [
        _at(i, arg, dim) if isinstance(arg, (list, tuple)) else arg if dim is None else arg.select(dim, i)
        for arg, dim in zip(args, in_dims, strict=True)
    ]
