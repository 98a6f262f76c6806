"""The grid of a model that is told the position of every token instead of a picture's height and width."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# What positions of tokens are read from, and how often it was written to, with what was read.
_Seen = tuple[weakref.ref[Tensor], int, Any]


class GridReader:
    """Reads the grid of a model from the positions of its image tokens, which waits for the device.

    A pipeline passes one tensor of positions in all its steps, or one for each tile of a video; each is read once and
    what was read kept as long as that tensor lives and is not written to. `torch.compile` of a whole model cannot read
    it without breaking the graph.
    """

    def __init__(self) -> None:
        self._seen: dict[int, _Seen] = {}

    def __reduce__(self) -> tuple[type[GridReader], tuple[()]]:
        return GridReader, ()

    @torch.compiler.disable(reason='pass joint_attention_kwargs={"bigain_grid": (H, W)} to compile without this break')
    def __call__(self, ids: Tensor) -> tuple[int, int]:
        """(H, W) of the picture whose tokens have the positions `ids` (N, 3); see `grid_of_positions`."""
        return self._read(ids, grid_of_positions)

    @torch.compiler.disable(reason="pass num_frames, height and width to compile without this break")
    def video(self, coords: Tensor) -> tuple[tuple[int, int], int, int]:
        """Grid, start and frames of the video whose tokens have the positions `coords`; see `video_of_positions`."""
        return self._read(coords, video_of_positions)

    def _read(self, positions: Tensor, read: Callable[[Tensor], Any]) -> Any:
        # Tensors made in inference mode do not count what is written to them.
        version = None if positions.is_inference() else positions._version
        seen = self._seen.get(id(positions))
        if seen is not None and seen[0]() is positions and seen[1] == version:
            return seen[2]
        found = read(positions)
        if version is not None:
            # A new dict, as another thread may be looking at the old one.
            alive = {key: each for key, each in self._seen.items() if each[0]() is not None}
            self._seen = {**alive, id(positions): (weakref.ref(positions), version, found)}
        return found


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


def video_of_positions(coords: Tensor) -> tuple[tuple[int, int], int, int]:
    """The grid of a video among positioned tokens, the first of them, and its number of frames.

    A video begins at time 0, and its frames stand one behind the other. In the pipelines of LTX and LTX-2 it stands
    first, with what conditions it behind, or last, where the first token is of another time. What is behind goes back
    in time where positions are points (LTX); where they are intervals (LTX-2), it begins while the last frame lasts.

    Args:
        coords: (B, 3, N), time, row and column of each token, or (B, 3, N, 2), where these begin and end. The first row
            of the batch counts.

    Raises:
        ValueError: there is no such video, or its tokens do not stand in raster order on one grid.
    """
    positions = coords[0].detach().cpu()
    begins, ends = positions.unbind(-1) if positions.dim() == 3 else (positions, None)
    time, rows, columns = begins
    count = len(time)
    ascends = (rows[1:] > rows[:-1]) | ((rows[1:] == rows[:-1]) & (columns[1:] > columns[:-1]))
    breaks = ((time[1:] != time[:-1]) | ~ascends).nonzero().flatten() + 1
    frames = list(pairwise([0, *breaks.tolist(), count]))
    stands_first = bool(time[0] == 0)
    at_zero = [number for number, (first, _) in enumerate(frames) if time[first] == 0]
    begin = 0 if stands_first else max(at_zero, default=0)
    start, stop = frames[begin]

    def follows(number: int) -> bool:
        (first, _), (last, _) = frames[number], frames[number - 1]
        return bool(time[first] > time[last] if ends is None else time[first] == ends[0, last])

    def goes_on(number: int, beside: int) -> bool:
        """Whether a frame is the rest of the one beside it, whose tokens are in another order then."""
        first = frames[number][0]
        later = begins[1:, first].tolist() > begins[1:, start].tolist()
        return bool(time[first] == time[frames[beside][0]]) and later

    end = begin + 1
    while (
        end < len(frames)
        and follows(end)
        and torch.equal(positions[1:, slice(*frames[end])], positions[1:, start:stop])
    ):
        end += 1
    width = _leading(rows[start:stop])
    height = (stop - start) // width
    found = bool(at_zero) and height * width == stop - start and not (begin > 0 and goes_on(begin - 1, begin))
    if end < len(frames):
        found = found and stands_first and not follows(end) and not goes_on(end, end - 1)
    if not found or not _is_raster(begins[1:, start:stop].T.reshape(height, width, 2)):
        raise ValueError(
            f"video_coords: got positions of {count} tokens among which no video of frames in raster order begins at "
            "time 0, expected those that the pipelines of diffusers make, or num_frames, height and width of a video "
            "that is all the tokens"
        )
    return (height, width), start, end - begin


def _is_raster(positions: Tensor) -> bool:
    """Whether (H, W, 2) positions are those of rows and columns that ascend. Half precision may give neighbours one."""
    rows, columns = positions[:, :, 0], positions[:, :, 1]
    agree = (rows == rows[:, :1]).all() and (columns == columns[:1]).all()
    return bool(agree and (rows[1:] >= rows[:-1]).all() and (columns[:, 1:] >= columns[:, :-1]).all())


def _leading(values: Tensor) -> int:
    """How many of the first values are equal to the very first."""
    same = values == values[:1]
    return int(same.int().cumprod(0).sum())
