"""Pictures of what the merge methods do to a photograph: score map, destinations, clusters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..methods import abm_plan, lgtm_plan, tome_plan
from ..ops import laplacian_score
from ..plan import MergePlan
from .data import load_photograph
from .output import replacing

# "Sharp" tokens are the fifth with the highest Laplacian score.
_SHARP = 0.8
_RULES = {
    "L-GTM": "merged into the smoothest of a tile",
    "ToMe": "merged into a random one of a tile",
    "ABM": "whole smooth tiles merged",
}


@dataclass(frozen=True)
class PictureConfig:
    """What is drawn: photographs of 427 x 640 fit a 2:3 grid of tokens, each a patch of `patch` x `patch` pixels."""

    grid: tuple[int, int] = (48, 72)
    patch: int = 8
    ratio: float = 0.7
    stride: tuple[int, int] = (2, 2)
    # Top-left token and size of the part in which destinations are drawn large, by photograph.
    detail: tuple[int, int, int, int] = (12, 18, 16, 24)


@dataclass(frozen=True)
class MergePicture:
    """One method on one photograph.

    Attributes:
        name: of the method.
        plan: (1 row) what was merged.
        painted: (H * patch, W * patch, 3) in [0, 1]: tokens with a slot of their own show the photograph, merged tokens
            the mean colour of their cluster.
        alone: (H, W) bool, tokens with a slot of their own.
        sharp_alone: fraction of the sharp tokens among them.
    """

    name: str
    plan: MergePlan
    painted: np.ndarray
    alone: np.ndarray
    sharp_alone: float


def patch_tokens(photograph: torch.Tensor, config: PictureConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut a photograph (3, h, w) into tokens.

    Returns:
        The resized photograph (3, H * patch, W * patch), and the tokens (1, H * W, 3 * patch^2): the pixels of each
        patch minus their mean over the photograph, since cosine similarity means nothing among all-positive vectors.
    """
    size = [side * config.patch for side in config.grid]
    image = F.interpolate(photograph[None], size=size, mode="bilinear", antialias=True, align_corners=False)
    tokens = F.unfold(image, config.patch, stride=config.patch).transpose(1, 2)
    return image[0], tokens - tokens.mean(dim=(0, 1), keepdim=True)


def merge_pictures(image: torch.Tensor, tokens: torch.Tensor, config: PictureConfig) -> list[MergePicture]:
    """L-GTM, ToMe and ABM at the same ratio on one photograph; arguments as `patch_tokens` returns them."""
    methods: dict[str, Callable[..., MergePlan]] = {"L-GTM": lgtm_plan, "ToMe": tome_plan, "ABM": abm_plan}
    score = laplacian_score(tokens, config.grid)[0]
    sharp = score > score.quantile(_SHARP)
    pictures = []
    for name, method in methods.items():
        plan = method(tokens, config.grid, config.ratio, config.stride)
        alone = plan.sizes()[0][plan.slot[0].long()] == 1
        pictures.append(
            MergePicture(
                name,
                plan,
                _paint(image, plan, alone, config),
                alone.view(config.grid).numpy(),
                alone[sharp].float().mean().item(),
            )
        )
    return pictures


def _paint(image: torch.Tensor, plan: MergePlan, alone: torch.Tensor, config: PictureConfig) -> np.ndarray:
    colours = F.avg_pool2d(image, config.patch).flatten(1)
    slots, sizes = plan.slot[0].long(), plan.sizes()[0]
    means = torch.zeros(3, plan.num_slots).index_add_(1, slots, colours) / sizes
    flat = means[:, slots].view(3, *config.grid)
    up: dict[str, Any] = {"scale_factor": float(config.patch), "mode": "nearest"}
    kept = F.interpolate(alone.float().view(1, 1, *config.grid), **up)[0]
    painted = kept * image + (1 - kept) * F.interpolate(flat[None], **up)[0]
    return painted.permute(1, 2, 0).numpy()


def _masked(photograph: np.ndarray, shown: np.ndarray, config: PictureConfig) -> np.ndarray:
    """The photograph (H * patch, W * patch, 3) where `shown` (H, W) is true, black elsewhere."""
    pixels = shown.repeat(config.patch, axis=0).repeat(config.patch, axis=1)[..., None]
    return np.where(pixels, photograph, 0.0)


def _destinations(axes: Any, picture: MergePicture, photograph: np.ndarray, config: PictureConfig) -> None:
    """Dots on the tokens that others were merged into, over the tiles; a detail of the photograph."""
    top, left, height, width = config.detail
    patch = config.patch
    axes.imshow(photograph)
    anchors = picture.plan.anchor[0].long()
    chosen = anchors[picture.plan.sizes()[0] > 1].numpy()
    rows, columns = np.divmod(chosen, config.grid[1])
    axes.scatter((columns + 0.5) * patch, (rows + 0.5) * patch, s=16, c="white", edgecolors="black", linewidths=0.7)
    axes.set_xlim(left * patch, (left + width) * patch)
    axes.set_ylim((top + height) * patch, top * patch)
    for row in range(top, top + height + 1, config.stride[0]):
        axes.axhline(row * patch, color="white", linewidth=0.3)
    for column in range(left, left + width + 1, config.stride[1]):
        axes.axvline(column * patch, color="white", linewidth=0.3)


def draw_photograph(name: str, path: Path, config: PictureConfig | None = None) -> dict[str, float]:
    """Draw one photograph with its score map, destinations, and what L-GTM, ToMe and ABM merge, as a PNG.

    Args:
        name: "china.jpg" or "flower.jpg".
        path: the PNG.
        config: grid, ratio and stride.

    Returns:
        For each method the fraction of sharp tokens (the fifth with the highest score) that keep a slot of their own.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    config = config or PictureConfig()
    image, tokens = patch_tokens(load_photograph(name), config)
    photograph = image.permute(1, 2, 0).clamp(0, 1).numpy()
    pictures = merge_pictures(image, tokens, config)
    score = laplacian_score(tokens, config.grid)[0].view(config.grid).numpy()

    figure = Figure(figsize=(19, 9.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{name}: {config.grid[0]} x {config.grid[1]} tokens of {config.patch} x {config.patch} pixels, ratio "
        f"{config.ratio}, tiles of {config.stride[0]} x {config.stride[1]}; "
        f"{pictures[0].plan.num_slots} of {pictures[0].plan.num_tokens} tokens stay"
    )
    axes = figure.subplots(3, 1 + len(pictures), squeeze=False)
    axes[0, 0].imshow(photograph)
    axes[0, 0].set_title("photograph")
    axes[1, 0].imshow(score, cmap="magma", vmax=float(np.quantile(score, 0.98)))
    axes[1, 0].set_title("Laplacian score (bright: edges and texture)")
    axes[2, 0].imshow(_masked(photograph, score > np.quantile(score, _SHARP), config))
    axes[2, 0].set_title("the sharpest fifth of the tokens")
    for column, picture in enumerate(pictures, start=1):
        _destinations(axes[0, column], picture, photograph, config)
        axes[0, column].set_title(f"{picture.name}, detail: {_RULES[picture.name]}")
        axes[1, column].imshow(picture.painted.clip(0, 1))
        axes[1, column].set_title(f"{picture.name}: clusters in their mean colour")
        axes[2, column].imshow(_masked(photograph, picture.alone, config))
        axes[2, column].set_title(f"{picture.name}: unmerged, {picture.sharp_alone:.0%} of the sharpest fifth")
    for panel in axes.flat:
        panel.set_xticks([])
        panel.set_yticks([])
    with replacing(path) as part:
        figure.savefig(part, format="png")
    return {picture.name: picture.sharp_alone for picture in pictures}
