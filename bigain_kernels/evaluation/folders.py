"""A folder of images, one subfolder for each class, as what a model classifies."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .images import identity, read_image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
# Suffixes of pictures that nobody means to leave out. They are listed, and refused when they are read.
_OTHER_SUFFIXES = (".tif", ".tiff", ".avif", ".heic", ".heif", ".jp2", ".jxl")
# What operating systems and disk stations put beside the files, besides names that begin with a dot.
_SYSTEM_NAMES = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")


@dataclass(frozen=True)
class ImageFolder:
    """Images, in an order that mixes the classes.

    Attributes:
        root: the folder.
        paths, names: of each image, its file and its class.
        classes: all class names of the folder, sorted; also those of which `limit` left no image.
        left_out: in a line each, what lies there and is no image, counted.
    """

    root: Path
    paths: tuple[Path, ...]
    names: tuple[str, ...]
    classes: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def identity(self, i: int) -> int:
        """The number of image `i`, whatever else lies in the folder; see `images.identity`."""
        return identity(self.paths[i], self.root)


def _visible(folder: Path) -> list[Path]:
    """What lies in `folder`, sorted, without hidden and system files."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise OSError(f"images: got {folder}, expected a folder that can be read ({error.strerror})") from error
    return [folder / name for name in names if not name.startswith(".") and name not in _SYSTEM_NAMES]


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        # A link to nothing, or a loop of links: it may have been a class.
        raise OSError(f"images: got {path}, expected a class folder ({error.strerror})") from error


def _rank(path: Path, root: Path) -> bytes:
    """Sorts images in an order that mixes the classes, and in which no image moves when another comes or goes."""
    return hashlib.sha256(os.fsencode(path.relative_to(root).as_posix())).digest()


def find_images(root: Path, limit: int | None = None) -> ImageFolder:
    """All images one level below `root`, in a fixed shuffled order, so that the first `limit` are a fair sample.

    Hidden files and folders, and those of operating systems such as `__MACOSX`, are left out.

    Raises:
        FileNotFoundError: `root` is no folder, or it or a class folder holds no image.
        OSError: a class folder cannot be read.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"images: got {root}, expected a folder with one subfolder for each class")
    paths: list[Path] = []
    classes = []
    hidden = others = 0
    for folder in filter(_is_folder, _visible(root)):
        visible = _visible(folder)
        hidden += len(os.listdir(folder)) - len(visible)
        found = [path for path in visible if path.suffix.lower() in (*IMAGE_SUFFIXES, *_OTHER_SUFFIXES)]
        others += len(visible) - len(found)
        if not found:
            raise FileNotFoundError(
                f"images: got {folder}, expected {'/'.join(IMAGE_SUFFIXES)} files in a class folder"
            )
        classes.append(folder.name)
        paths += found
    if not paths:
        raise FileNotFoundError(f"images: got {root}, expected {'/'.join(IMAGE_SUFFIXES)} files in class subfolders")
    chosen = sorted(paths, key=lambda path: _rank(path, root))[:limit]
    names = tuple(path.parent.name for path in chosen)
    counted = {"hidden and system files": hidden, "files that are no images": others}
    left_out = tuple(f"{count} {what}" for what, count in counted.items() if count)
    return ImageFolder(root, tuple(chosen), names, tuple(classes), left_out)


def load_images(paths: Sequence[Path], shape: tuple[int, int, int]) -> torch.Tensor:
    """The images as (n, *shape) float32 in [-1, 1]; see `images.read_image`.

    Raises:
        DamagedImage: a file is damaged, or no image.
    """
    return torch.stack([read_image(path, shape) for path in paths])
