"""A folder of images, one subfolder for each class, as what a model classifies."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class ImageFolder:
    """Images, in an order that mixes the classes.

    Attributes:
        paths, names: of each image, its file and its class.
        classes: all class names of the folder, sorted; also those of which `limit` left no image.
        digest: hash of the list of all files, those that `limit` left out included: the order depends on them.
    """

    paths: tuple[Path, ...]
    names: tuple[str, ...]
    classes: tuple[str, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.paths)


def find_images(root: Path, limit: int | None = None) -> ImageFolder:
    """All images one level below `root`, in a fixed shuffled order, so that the first `limit` are a fair sample.

    Raises:
        FileNotFoundError: `root` is no folder, or holds no image in a subfolder.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"images: got {root}, expected a folder with one subfolder for each class")
    paths = sorted(path for path in root.glob("*/*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise FileNotFoundError(f"images: got {root}, expected {'/'.join(IMAGE_SUFFIXES)} files in class subfolders")
    order = np.random.RandomState(0).permutation(len(paths))[:limit]
    chosen = [paths[i] for i in order]
    classes = sorted({path.parent.name for path in paths})
    files = "\n".join(path.relative_to(root).as_posix() for path in paths)
    digest = hashlib.sha256(files.encode(errors="surrogateescape")).hexdigest()[:16]
    return ImageFolder(tuple(chosen), tuple(path.parent.name for path in chosen), tuple(classes), digest)


def load_images(paths: Sequence[Path], shape: tuple[int, int, int]) -> torch.Tensor:
    """The images as (n, *shape) float32 in [-1, 1], cropped to the centre and resized (bicubic).

    Args:
        paths: n image files.
        shape: (channels, height, width); 1 channel makes them gray.

    Raises:
        ValueError: a file is no image.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    channels, height, width = shape
    rows = []
    for path in paths:
        try:
            with Image.open(path) as opened:
                image = opened.convert("L" if channels == 1 else "RGB")
        except UnidentifiedImageError as error:
            raise ValueError(f"images: got {path}, expected an image") from error
        pixels = np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC), dtype=np.float32)
        rows.append(torch.from_numpy(pixels.reshape(height, width, channels).copy()).permute(2, 0, 1) / 127.5 - 1)
    return torch.stack(rows)
