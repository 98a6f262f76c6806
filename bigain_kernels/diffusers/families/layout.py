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


def of_img_shapes(family: Family, model: Any, call: dict[str, Any], given: Grid | None) -> Place:
    """`place` where `img_shapes` hold the grids of all pictures, and all of `encoder_hidden_states` stands in front.

    Raises:
        ValueError: a picture that is drawn has several frames, or layers have several sizes.
    """
    # As the model takes it: a shape, or those of the rows, which are equal, each a shape or those of its pictures.
    shapes = call["img_shapes"]
    pictures = shapes[0] if isinstance(shapes, list) else shapes
    pictures = pictures if isinstance(pictures, list) else [pictures]
    # Those that are drawn: the first, or in Qwen-Image-Layered all but the last, the one that is taken apart.
    layered = getattr(model.config, "use_layer3d_rope", False) and len(pictures) > 1
    drawn = pictures[:-1] if layered else pictures[:1]
    frames, height, width = drawn[0]
    if frames != 1:
        raise ValueError(f"img_shapes: got {drawn[0]}, expected one frame: pooling is over one H x W grid")
    if len(set(drawn)) != 1:
        raise ValueError(f"img_shapes: got layers of {drawn}, expected one size")
    return Place((height, width), call["encoder_hidden_states"].shape[1], len(drawn))


def video_place(model: Any, call: dict[str, Any], size: int = 1, time: int = 1) -> Place:
    """The place of a video by its `num_frames`, `height` and `width`, if it is all the tokens, or by `video_coords`.

    Args:
        model, call: as `place` has them.
        size, time: what is a token of these sizes, in space and in time.

    Raises:
        ValueError: it is neither, or both and of two sizes.
    """
    coords, sizes = call["video_coords"], (call["num_frames"], call["height"], call["width"])
    tokens = 0
    if None not in sizes:
        sizes = sizes[0] // time, sizes[1] // size, sizes[2] // size
        tokens = sizes[0] * sizes[1] * sizes[2]
        if coords is None or tokens == call["hidden_states"].shape[1]:
            return Place(sizes[1:], 0, sizes[0])
    if coords is None:
        raise ValueError("video_coords: got None, expected positions, or num_frames, height and width")
    grid, start, frames = model._bigain.grid_reader.video(coords)
    # LTX's pipeline of long videos gives the sizes of one token.
    if tokens > 1 and sizes != (frames, *grid):
        raise ValueError(f"video_coords: got a video of {(frames, *grid)} tokens, expected the sizes given, {sizes}")
    return Place(grid, start, frames)


def sigma(family: Family, config: CompressionConfig) -> TimestepRange:
    """`told` where it is sigma itself."""
    return SIGMA


def steps_of_sigma(family: Family, config: CompressionConfig) -> TimestepRange:
    """`told` where it is sigma times the number of training steps."""
    return sigma_steps(config.train_timesteps)


def one_minus_sigma(family: Family, config: CompressionConfig) -> TimestepRange:
    """`told` where it is 1 - sigma."""
    return TimestepRange(1.0, 0.0)
