"""Plans of videos: tiles inside a frame, matches inside it or with those near it, one ranking over all frames.

Tokens are (B, T * H * W, C), one frame after another. Matching knows rows and columns; here a video is said in those
words, so that every backend has it and the (N, D) matrix is held nowhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_frames, check_pair, check_tensor, check_window, merged_count
from ..ops import bipartite_match, merge_plan
from ..plan import MergePlan
from ._common import check_share

Pair = tuple[int, int]
Grid = tuple[int, int] | tuple[int, int, int]


def check_video(
    x: Tensor, grid: Grid, ratio: float, stride: Pair, share_plan: int | None
) -> tuple[int | None, Pair, Pair, int, int]:
    """Check the arguments of a method that knows videos.

    Returns:
        T, None of a picture; (H, W); stride; r = int(N * ratio); the rows per plan.
    """
    check_tensor("x", x, 3)
    frames, frame = check_frames(grid, x.shape[1], "x")
    stride = check_pair("stride", stride)
    return frames, frame, stride, merged_count(ratio, frame, stride, frames or 1), check_share(share_plan, x)


def by_frame(x: Tensor, frames: int) -> Tensor:
    """(B, T * N, ...) to (B * T, N, ...)."""
    return x.unflatten(1, (frames, -1)).flatten(0, 1)


def plan_frames(x: Tensor, chosen: Tensor, r: int, frames: int, grid: Pair, stride: Pair, window: object) -> MergePlan:
    """The second half of every method that merges into destinations, of videos.

    Args:
        x: (B, T * H * W, C).
        chosen: (B * T, D) int32, the destinations of each frame as tokens of it, ascending.
        r: how many tokens of a video go.
        frames, grid, stride: T, (H, W) and the size of a tile.
        window: see `checks.check_window`.
    """
    tiles, near = check_window(window)
    first = torch.arange(frames, dtype=torch.int32, device=x.device)[:, None] * (grid[0] * grid[1])
    destinations = (chosen.unflatten(0, (-1, frames)) + first).flatten(1)
    tall = (frames * grid[0], grid[1])
    if tiles is None and near > 0:
        # A whole frame is a tile of the tall picture.
        similarity, match = bipartite_match(x.detach(), destinations, near, tall, grid)
    else:
        found = _match_near(x.detach(), chosen, destinations, frames, grid, stride, tiles, min(near, frames - 1))
        similarity, match = found
    return merge_plan(similarity, match, destinations, r, tall)


def _match_near(
    x: Tensor, chosen: Tensor, destinations: Tensor, frames: int, grid: Pair, stride: Pair, tiles: int | None, near: int
) -> tuple[Tensor, Tensor]:
    """`bipartite_match` frame by frame: with the destinations of the frame itself, then with those of each near one."""
    batch, count = x.shape[0], grid[0] * grid[1]
    similarity = torch.full((batch, frames, count), -torch.inf, dtype=torch.float32, device=x.device)
    if chosen.shape[1] == 0:
        itself = torch.arange(frames * count, dtype=torch.int32, device=x.device)
        return similarity.flatten(1), itself.repeat(batch, 1)
    match = destinations[:, :1, None].repeat(1, frames, count)
    x, chosen = x.unflatten(1, (frames, count)), chosen.unflatten(0, (batch, frames))
    # Frames ascend, and only what is more similar takes the place of what was before: ties go to the lowest token.
    for away in range(-near, near + 1):
        here = slice(max(-away, 0), frames - max(away, 0))
        there = slice(max(away, 0), frames + min(away, 0))
        tokens, to = x[:, here].flatten(0, 1), chosen[:, there].flatten(0, 1)
        if away == 0:
            found, token = bipartite_match(tokens, to, tiles, grid, stride)
        else:
            # A picture of both frames, whose columns alternate: a tile is where it was, and twice as wide.
            pair = torch.stack([tokens, x[:, there].flatten(0, 1)], dim=2).flatten(1, 2)
            wide = (grid[0], 2 * grid[1]), (stride[0], 2 * stride[1])
            found, token = (each[:, ::2] for each in bipartite_match(pair, 2 * to + 1, tiles, *wide))
            token = token // 2
        found, token = (each.unflatten(0, (batch, -1)) for each in (found, token))
        first = torch.arange(frames, dtype=torch.int32, device=x.device)[there, None] * count
        better = found > similarity[:, here]
        similarity[:, here] = torch.where(better, found, similarity[:, here])
        match[:, here] = torch.where(better, token + first, match[:, here])
    index = destinations.long()
    return similarity.flatten(1).scatter(1, index, -torch.inf), match.flatten(1).scatter(1, index, destinations)
