"""Op `bigain::lgtm_plan`: the whole of L-GTM planning in one call, for backends that fuse it.

`bigain_kernels.lgtm_plan` is the public function; the op takes checked arguments.
"""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ._library import define
from .merge_plan import _fake_tables, _Tables, _tables

# An op schema has no optional pair; this window compares with all destinations.
NO_WINDOW = -1


def _reference(x: Tensor, height: int, width: int, sy: int, sx: int, r: int, window: int, share: int) -> _Tables:
    return _tables(reference.lgtm_plan(x, (height, width), (sy, sx), r, None if window == NO_WINDOW else window, share))


def _fake(x: Tensor, height: int, width: int, sy: int, sx: int, r: int, window: int, share: int) -> _Tables:
    return _fake_tables(x.new_empty((x.shape[0] // share, x.shape[1])), x.shape[1] - r)


define(
    "lgtm_plan(Tensor x, SymInt height, SymInt width, SymInt sy, SymInt sx, SymInt r, SymInt window, SymInt share)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _reference,
    _fake,
)
