"""Images drawn for a data set: one file for each image, written as it is made, shared between processes like rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..checkpoints import Checkpoint
from ..folders import IMAGE_SUFFIXES
from ..generate import GenerateConfig, generate, to_pixels
from ..output import replacing
from .run import RunFolder, key_of, shard_slices


def image_file(folder: Path, path: str) -> Path:
    """Where the drawing that belongs to an image of the data set lies: under its path, as a PNG."""
    of_image = PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES
    return folder / "images" / (PurePosixPath(path).with_suffix(".png") if of_image else f"{path}.png")


def check_files(paths: Sequence[str]) -> None:
    """Refuse paths whose drawings would be one file.

    Raises:
        ValueError: there are two such, both named.
    """
    seen: dict[Path, str] = {}
    for path in paths:
        other = seen.setdefault(image_file(Path(), path), path)
        if other != path:
            raise ValueError(f"path: got {other} and {path}, expected different files for their drawings")


def draw_shards(
    folder: RunFolder,
    paths: Sequence[str],
    labels: Sequence[int],
    checkpoint: Checkpoint,
    config: GenerateConfig,
    compression: Any,
    *,
    share_plan: bool = False,
    rank: int = 0,
    record: Callable[[int], None] = lambda done: None,
) -> None:
    """Draw what is left; a drawing starts from the noise of (seed, path).

    Args:
        folder: of the run, a shard for each batch.
        paths: of the images that the drawings stand for, each of a file of its own: `check_files`.
        labels: of the model, one for each.
        checkpoint, config, compression, share_plan: see `generate`.
        rank: of this process.
        record: called with the drawings of each batch that this process finished.
    """
    slices = shard_slices(len(paths), config.batch_size)
    for shard in folder.claims(rank):
        part = slices[shard]
        # A batch that was cut off is drawn again as a whole: other batches round differently.
        made = generate(
            checkpoint.denoiser,
            torch.tensor(labels[part], device=checkpoint.device),
            replace(config, batch_size=part.stop - part.start),
            compression=compression,
            share_plan=share_plan,
            indices=[key_of(path) for path in paths[part]],
        )
        for path, pixels in zip(paths[part], to_pixels(checkpoint.decode(made)), strict=True):
            file = image_file(folder.path, path)
            with replacing(file) as unfinished:
                Image.fromarray(pixels).save(unfinished, format="PNG")
        folder.mark(shard)
        record(part.stop - part.start)


def read_drawings(folder: Path, paths: Sequence[str]) -> torch.Tensor:
    """(n, 3, H, W) float32 in [-1, 1]."""
    pixels = [np.asarray(Image.open(image_file(folder, path)).convert("RGB"), dtype=np.float32) for path in paths]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1
