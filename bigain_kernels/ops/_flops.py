"""Floating-point operations of the ops, for `torch.utils.flop_counter.FlopCounterMode`.

As torch counts: a multiplication and an addition are two operations, products of matrices count (similarities,
attention, projections), and nothing else does. Pooling, scores, means and softmax are elementwise work or sums, which
torch leaves out for its own ops as well. The ops stand for all that they are made of, so nothing counts twice.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from torch import Tensor

from ..declaration import OPS, PUBLIC

_MODULE = "torch.utils.flop_counter"


def none(*arguments: Any) -> int:
    """An op without products of matrices."""
    return 0


def matching(
    x: Tensor, num_destinations: int, window: int | None, grid: tuple[int, int], stride: tuple[int, int]
) -> int:
    """The similarities of the sources of x (B, N, C) with the destinations that they are compared with."""
    batch, n, channels = x.shape
    pairs = (n - num_destinations) * num_destinations
    if window is not None:
        (rows, tile_rows), (columns, tile_columns) = (
            _in_window(size, each, window) for size, each in zip(grid, stride, strict=True)
        )
        # All tokens, without the destinations, of which there is one in each tile.
        pairs = rows * columns - tile_rows * tile_columns
    return 2 * batch * pairs * channels


def _in_window(size: int, stride: int, window: int) -> tuple[int, int]:
    """Along one axis: how many tiles the tokens see, and how many the tiles, each summed up."""
    tiles = size // stride
    seen = [min(i + window, tiles - 1) - max(i - window, 0) + 1 for i in range(tiles)]
    return sum(seen[min(token // stride, tiles - 1)] for token in range(size)) if tiles else 0, sum(seen)


def attention(q: Tensor, keys: int) -> int:
    """Scores and weighted values of q (B, heads, Nq, d) over so many keys."""
    batch, heads, queries, d = q.shape
    return 4 * batch * heads * queries * keys * d


def projections(x: Tensor, num_pooled: int, *weights: Tensor) -> int:
    """The products of the pooled tokens of x (B, N, C) with weights (inner, C)."""
    return sum(2 * x.shape[0] * num_pooled * w.shape[0] * w.shape[1] for w in weights)


def _register(module: ModuleType) -> None:
    for op in OPS.values():
        module.register_flop_formula(getattr(PUBLIC, op.name), get_raw=True)(_formula(op.of_public(op.flops)))


def _formula(flops: Callable[..., int]) -> Callable[..., int]:
    return lambda *args, out_val=None, **kwargs: flops(*args, **kwargs)


class _AfterImport(MetaPathFinder):
    """Registers the formulas when the counter is imported: importing it here would take longer than this package.

    It stays until then: who only asks whether there is such a module imports nothing.
    """

    _asking = False

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _MODULE or self._asking:
            return None
        self._asking = True
        try:
            spec = find_spec(fullname)
        finally:
            self._asking = False
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_formulas() -> None:
    """Give the counter of torch a formula for every op, now or when it is imported."""
    if _MODULE in sys.modules:
        _register(sys.modules[_MODULE])
    else:
        sys.meta_path.insert(0, _AfterImport())
