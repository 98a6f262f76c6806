"""Op `bigain::lgtm_plan`: the whole of L-GTM planning in one call, for backends that fuse it.

`bigain_kernels.lgtm_plan` is the public function; the op takes checked arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import backends, native, reference
from ..reference.lgtm_plan import share_mean
from ._library import define
from .merge_plan import _fake_tables, _Tables, _tables

# An op schema has no optional pair; this window compares with all destinations.
NO_WINDOW = -1


def _reference(x: Tensor, height: int, width: int, sy: int, sx: int, r: int, window: int, share: int) -> _Tables:
    return _tables(reference.lgtm_plan(x, (height, width), (sy, sx), r, None if window == NO_WINDOW else window, share))


def _chain(op: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The op made of the single ops of a backend."""

    def run(x: Tensor, height: int, width: int, sy: int, sx: int, r: int, window: int, share: int) -> _Tables:
        x = share_mean(x, share)
        destinations = op["select_destinations"](op["laplacian_score"](x, height, width, "l1"), height, width, sy, sx)
        similarity, match = op["bipartite_match"](x, destinations, window, height, width, sy, sx)
        return op["merge_plan"](similarity, match, destinations, r)

    return run


def _fake(x: Tensor, height: int, width: int, sy: int, sx: int, r: int, window: int, share: int) -> _Tables:
    return _fake_tables(x.new_empty((x.shape[0] // share, x.shape[1])), x.shape[1] - r)


define(
    "lgtm_plan(Tensor x, SymInt height, SymInt width, SymInt sy, SymInt sx, SymInt r, SymInt window, SymInt share)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _reference,
    _fake,
)
_STEPS = ("laplacian_score", "select_destinations", "bipartite_match", "merge_plan")
_native = {name: function for name in _STEPS if (function := native.implementation(name)) is not None}
if len(_native) == len(_STEPS):
    backends.register("lgtm_plan", "cpp", "cpu")(_chain(_native))
