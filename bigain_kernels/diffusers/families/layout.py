"""What families say of their kind of model in one word: where the image's tokens stand, and what is told as timestep.

Each function is a method that a family takes as its own, `place = of_latent`; see `Family`.
"""

from __future__ import annotations

from typing import Any

from ...methods import CompressionConfig
from ..context import Grid
from ..hooks import GRID_KEY
from ..schedulers import SIGMA, TimestepRange, sigma_steps
from .family import Family, Place


def latent_grid(model: Any, latent: Any) -> Grid:
    """(H, W) in tokens of a latent (..., H, W) that `patch_size` of the model's config cuts."""
    size = model.config.patch_size
    rows, columns = size[-2:] if isinstance(size, (tuple, list)) else (size, size)
    return latent.shape[-2] // rows, latent.shape[-1] // columns


def of_latent(family: Family, model: Any, call: dict[str, Any], given: Grid | None) -> Place:
    """`place` where the sample is a latent picture (B, C, H, W), or each frame a row of its own, and stands first.

    Raises:
        ValueError: it is tokens already, which do not say their grid.
    """
    x = call[family.sample]
    if x.dim() < 4:
        raise ValueError(f"{family.sample}: got {tuple(x.shape)}, expected a latent picture, which has a grid")
    return Place(latent_grid(model, x))


def of_latent_behind_text(family: Family, model: Any, call: dict[str, Any], given: Grid | None) -> Place:
    """`place` where it is a latent picture that all of `encoder_hidden_states` stands in front of."""
    return Place(latent_grid(model, call[family.sample]), call["encoder_hidden_states"].shape[1])


def of_latent_video(family: Family, model: Any, call: dict[str, Any], given: Grid | None) -> Place:
    """`place` where it is a latent video (B, C, frames, H, W) and stands first."""
    x, size = call[family.sample], model.config.patch_size
    time = size[0] if isinstance(size, (tuple, list)) else model.config.patch_size_t
    return Place(latent_grid(model, x), 0, x.shape[-3] // time)


def of_img_ids(family: Family, model: Any, call: dict[str, Any], given: Grid | None) -> Place:
    """`place` where `img_ids` hold the grid and all of `encoder_hidden_states` stands in front of it.

    Raises:
        ValueError: the caller gave a grid of more tokens than there are.
    """
    grid = model._bigain.grid_reader(call["img_ids"]) if given is None else given
    count, most = grid[0] * grid[1], call[family.sample].shape[1]
    if count > most:
        raise ValueError(f"{GRID_KEY}: got {grid}, that is {count} tokens, expected at most {most}, the image's")
    return Place(grid, call["encoder_hidden_states"].shape[1])


def sigma(family: Family, config: CompressionConfig) -> TimestepRange:
    """`told` where it is sigma itself."""
    return SIGMA


def steps_of_sigma(family: Family, config: CompressionConfig) -> TimestepRange:
    """`told` where it is sigma times the number of training steps."""
    return sigma_steps(config.train_timesteps)


def one_minus_sigma(family: Family, config: CompressionConfig) -> TimestepRange:
    """`told` where it is 1 - sigma."""
    return TimestepRange(1.0, 0.0)
