"""Laplacian-gated token merging (L-GTM), BiGain, arXiv 2603.12240."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..checks import check_window
from ..ops import laplacian_score, select_destinations
from ..ops.lgtm_plan import call
from ..plan import MergePlan
from ..tokens import share_mean
from ._video import Grid, by_frame, check_video, plan_frames
from .config import MergeConfig
from .options import Flag, Window, option


def lgtm_plan(
    x: Tensor,
    grid: Grid,
    ratio: float,
    stride: tuple[int, int] = (2, 2),
    *,
    window: int | tuple[int | None, int] | None = None,
    over_time: bool = False,
    share_plan: int | None = None,
) -> MergePlan:
    """Plan of Laplacian-gated token merging.

    The smoothest token of each sy x sx tile (lowest L1 Laplacian score) becomes a destination; the int(N * ratio)
    sources most similar to a destination merge into it. Source: BiGain, arXiv 2603.12240.

    Args:
        x: (B, N, C) hidden states in raster order.
        grid: (H, W) with H * W = N; or of a video (T, H, W) with T * H * W = N, one frame after another. Tiles lie in
            one frame, and all tokens of the video are ranked together: a frame with less in it is merged more.
        ratio: fraction of tokens removed, 0 to `max_ratio(grid, stride)`.
        stride: (sy, sx), the size of a tile in tokens.
        window: compare only with destinations of tiles at most this many tiles away; None compares with all. In a video
            those are of the same frame, and with (tiles, frames) of those at most so many frames away too.
        over_time: score the tokens of a video against the frames before and after as well; see `laplacian_score`.
        share_plan: k rows share one plan, made from their mean: batch row b uses plan row b mod (B / k).

    Returns:
        MergePlan with B rows (B / k with `share_plan`) and N - int(N * ratio) slots; its grid of a video is (T * H, W).

    Raises:
        TypeError, ValueError: wrong type, dtype, rank, grid, ratio, stride, window or share_plan.
    """
    frames, frame, stride, r, share = check_video(x, grid, ratio, stride, share_plan)
    tiles, _ = check_window(window)
    if frames is None:
        slot, offsets, members, anchor = call(x, *frame, *stride, r, -1 if tiles is None else tiles, share)
        return MergePlan(slot, offsets, members, anchor, frame, x.shape[1] - r)
    x = share_mean(x.detach(), share)
    score = by_frame(laplacian_score(x, (frames, *frame)), frames) if over_time else None
    if score is None:
        score = laplacian_score(by_frame(x, frames), frame)
    return plan_frames(x, select_destinations(score, frame, stride), r, frames, frame, stride, window)


@dataclass(frozen=True, kw_only=True)
class LGTMConfig(MergeConfig):
    """Laplacian-gated token merging (BiGain, arXiv 2603.12240); see `bigain_kernels.lgtm_plan`.

    Args:
        window: compare a source only with destinations of tiles at most this many tiles away; by default with all. In a
            video those are of its own frame. (TILES, FRAMES) compares with frames at most so many away too, and TILES
            may be None for all of such a frame; then all tokens of a video are ranked together.
        over_time: in a video, score tokens against the frames before and after as well, and rank all tokens together.
        others: see `MergeConfig` and `CompressionConfig`.
    """

    method: ClassVar[str] = "lgtm"

    window: int | tuple[int | None, int] | None = option(None, Window())
    over_time: bool = option(False, Flag())

    @property
    def spans_frames(self) -> bool:
        return self.over_time or check_window(self.window)[1] > 0

    def plan(self, x: Tensor, grid: Grid, ratio: float, timestep: Tensor | None = None) -> MergePlan:
        return lgtm_plan(
            x, grid, ratio, self.stride, window=self.window, over_time=self.over_time, share_plan=self.share_plan
        )
