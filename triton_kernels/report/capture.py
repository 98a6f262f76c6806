"""The launches that the ops make at the design's shapes, with the configs that they pick, taken down without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import configs
from ..launching import Launch, record_launches
from ..registration import IMPLEMENTATIONS


class Shape(NamedTuple):
    """An attention layer: B rows of H x W tokens with C channels in `heads` heads."""

    name: str
    batch: int
    grid: tuple[int, int]
    channels: int
    heads: int

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def removed(self) -> int:
        return int(self.tokens * RATIO)


# Named as in the benchmarks: SD 2 at 512 and 768, SDXL, DiT-XL/2 at 512 with 2 and 32 rows, Flux-class, a video model.
SHAPES = (
    Shape("sd2_512", 2, (64, 64), 320, 5),
    Shape("sd2_768", 2, (96, 96), 320, 5),
    Shape("sdxl_1024", 2, (64, 64), 640, 10),
    Shape("dit_512", 2, (32, 32), 1152, 16),
    Shape("dit_512_b32", 32, (32, 32), 1152, 16),
    Shape("flux_1024", 1, (64, 64), 3072, 24),
    Shape("video_32760", 1, (630, 52), 1536, 12),
)
RATIO, STRIDE, FACTOR, ALPHA = 0.7, (2, 2), (2, 2), 0.9
# In tiles: what sources are compared with where matching is kept to their neighbourhood.
WINDOW = 1
# An H100 and an H200 have as many.
MULTIPROCESSORS = 132


class OnPaper(configs.Chooser):
    """Chooses as on a GPU with MULTIPROCESSORS multiprocessors, whatever this machine has."""

    def multiprocessors(self, device: torch.device) -> int:
        return MULTIPROCESSORS


def calls(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> dict[str, Callable[[], Any]]:
    """The calls of a layer, by op: L-GTM, its plan within a window, a merged LayerNorm, and pooling of two tensors."""

    def meta(*size: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=of, device="meta")

    b, n, c, m = shape.batch, shape.tokens, shape.channels, shape.tokens - shape.removed
    x, y, row = meta(b, n, c), meta(b, m, c), meta(b, c)
    tables = [meta(b, width, of=torch.int32) for width in (n, m + 1, n, m)]
    run = IMPLEMENTATIONS
    return {
        "lgtm_plan": lambda: run["lgtm_plan"](x, *shape.grid, *STRIDE, shape.removed, -1, 1),
        "lgtm_plan_window": lambda: run["lgtm_plan"](x, *shape.grid, *STRIDE, shape.removed, WINDOW, 1),
        "token_merge": lambda: run["token_merge"](x, *tables, "mean", None),
        "token_unmerge": lambda: run["token_unmerge"](y, *tables, x, None),
        "token_merge_norm": lambda: run["token_merge_norm"](x, *tables, None, 1e-6, None, None, row, row),
        "kv_downsample": lambda: run["kv_downsample"]([x, x], *shape.grid, *FACTOR, ALPHA, None),
    }


class Captured(NamedTuple):
    """One launch of one call."""

    shape: Shape
    op: str
    launch: Launch


def capture(shapes: tuple[Shape, ...] = SHAPES, chooser: configs.Chooser | None = None) -> Iterator[Captured]:
    """Every launch at every shape, in the order of a forward pass."""
    for shape in shapes:
        with configs.use_chooser(chooser or OnPaper()):
            found = calls(shape)
            for op, call in found.items():
                with record_launches() as launches:
                    call()
                yield from (Captured(shape, op, launch) for launch in launches)
