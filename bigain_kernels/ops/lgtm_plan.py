"""Op `bigain::lgtm_plan`: the whole of L-GTM planning in one call, for backends that fuse it.

`methods.lgtm_plan` is the public function; the op takes checked arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ._library import define
from .merge_plan import _fake_tables, _Tables, _tables


def _reference(
    x: Tensor, height: int, width: int, sy: int, sx: int, r: int, window: int, share: int
) -> tuple[Tensor, ...]:
    grid, stride = (height, width), (sy, sx)
    if share > 1:
        rows = x.unflatten(0, (share, x.shape[0] // share))
        x = rows.to(torch.promote_types(x.dtype, torch.float32)).mean(0).to(x.dtype)
    destinations = reference.select_destinations(reference.laplacian_score(x, grid), grid, stride)
    similarity, match = reference.bipartite_match(x, destinations, None if window < 0 else window, grid, stride)
    return _tables(reference.merge_plan(similarity, match, destinations, r, grid))


def _fake(x: Tensor, height: int, width: int, sy: int, sx: int, r: int, window: int, share: int) -> _Tables:
    return _fake_tables(x.new_empty((x.shape[0] // share, x.shape[1])), x.shape[1] - r)


define(
    # window = -1 compares with all destinations.
    "lgtm_plan(Tensor x, SymInt height, SymInt width, SymInt sy, SymInt sx, SymInt r, SymInt window, SymInt share)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _reference,
    _fake,
)
