"""The grid of a model that is told the position of every token instead of a picture's height and width."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor


class GridReader:
    """Reads the grid of a Flux model from the positions of its image tokens, which waits for the device.

    A pipeline passes one tensor of positions in all its steps; its grid is read once and kept as long as that tensor
    lives and is not written to. `torch.compile` of a whole model cannot read it without breaking the graph.
    """

    def __init__(self) -> None:
        self._seen: tuple[weakref.ref[Tensor], int, tuple[int, int]] | None = None

    def __reduce__(self) -> tuple[type[GridReader], tuple[()]]:
        return GridReader, ()

    @torch.compiler.disable(reason='pass joint_attention_kwargs={"bigain_grid": (H, W)} to compile without this break')
    def __call__(self, ids: Tensor) -> tuple[int, int]:
        """(H, W) of the picture whose tokens have the positions `ids` (N, 3); see `grid_of_positions`."""
        # Tensors made in inference mode do not count what is written to them.
        version = None if ids.is_inference() else ids._version
        if self._seen is not None and self._seen[0]() is ids and self._seen[1] == version:
            return self._seen[2]
        grid = grid_of_positions(ids)
        self._seen = None if version is None else (weakref.ref(ids), version, grid)
        return grid


def grid_of_positions(ids: Tensor) -> tuple[int, int]:
    """The grid of the first picture among positioned tokens.

    Args:
        ids: (N, 3): picture, row and column of each token, in any unit; or (B, N, 3), of which the first row counts, as
            in diffusers. Flux.2 has a fourth number, which is not read. Tokens of further pictures, such as the
            reference of Flux Kontext, may stand behind.

    Raises:
        ValueError: the tokens of the first picture do not stand in raster order on one grid.
    """
    positions = (ids[0] if ids.dim() == 3 else ids).detach().cpu()
    count = _leading(positions[:, 0])
    width = _leading(positions[:count, 1])
    height = count // max(width, 1)
    whole = 0 < count == height * width
    if not whole or not _is_raster(positions[:count, 1:3].reshape(height, width, 2)):
        raise ValueError(
            f"img_ids: got positions of {count} tokens that are no grid in raster order, expected row and column of "
            "every token of one H x W picture, as FluxPipeline makes them"
        )
    return height, width


def _is_raster(positions: Tensor) -> bool:
    """Whether (H, W, 2) positions are those of rows and columns that ascend. Half precision may give neighbours one."""
    rows, columns = positions[:, :, 0], positions[:, :, 1]
    agree = (rows == rows[:, :1]).all() and (columns == columns[:1]).all()
    return bool(agree and (rows[1:] >= rows[:-1]).all() and (columns[:, 1:] >= columns[:, :-1]).all())


def _leading(values: Tensor) -> int:
    """How many of the first values are equal to the very first."""
    same = values == values[:1]
    return int(same.int().cumprod(0).sum())
