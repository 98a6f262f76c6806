"""Op `bigain::lgtm_plan`: the whole of L-GTM planning in one call, for backends that fuse it."""

from __future__ import annotations

from ..declaration import Op, count, grid, pair, tensor, window
from ._flops import matching
from ._library import define
from ._shapes import PLAN, fake_tables, tiles

OP = Op(
    "lgtm_plan",
    (tensor("x"), grid(), pair("stride", "sy", "sx"), count("r"), window(), count("share")),
    PLAN,
    fake=lambda x, grid, stride, r, window, share: fake_tables(x, x.shape[1] - r, share),
    flops=lambda x, grid, stride, r, window, share: (
        matching(x, tiles("stride", grid, stride), window, grid, stride) // share
    ),
    samples=lambda s: {
        "": (s.x, s.grid, s.stride, s.r, None, 1),
        "window": (s.x, s.grid, s.stride, s.r, 1, 1),
        "share": (s.x, s.grid, s.stride, s.r, None, 2),
    },
    selects=True,
)
# For `bigain_kernels.lgtm_plan`, the public function, which checks the arguments.
call = define(OP)
