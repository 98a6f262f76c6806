"""One image file as what a model classifies. The files are strangers': read right, or refused by name."""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Pillow tries these and no others: some of its readers hand the file to another program (EPS to Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
# Bytes of one file. A picture that Pillow agrees to decode is far smaller, even uncompressed.
_MOST_BYTES = 2**30
# How the stored picture is to be turned to stand upright, by the value of EXIF's tag 274. `ImageOps.exif_transpose`
# also writes the other tags anew, and fails on those that it does not know.
_ORIENTATION_TAG = 274
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


class DamagedImage(ValueError):
    """A file that cannot be read as an image. The message names it and says why."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"images: got {path}, expected an image in {'/'.join(FORMATS)} ({reason})")


def _unreadable() -> tuple[type[Exception], ...]:
    """What Pillow raises for a damaged file, besides its own errors of the standard library's types.

    Its readers check little before they unpack: a short read ends as `struct.error`, `IndexError` or `EOFError`, a
    broken chunk as `SyntaxError`, `TypeError` or `KeyError`, a bad stream as `zlib.error`, an impossible size as
    `OverflowError` or `MemoryError`. Truncated data and unknown files are `OSError`.
    """
    from PIL import Image

    bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    broken = (SyntaxError, ValueError, TypeError, LookupError, EOFError, struct.error, zlib.error)
    return (OSError, *broken, OverflowError, MemoryError, *bombs)


def _check_file(path: Path) -> None:
    """Refuses what is no plain file before it is opened: opening a pipe would wait for ever."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise DamagedImage(path, error.strerror or type(error).__name__) from error
    if not stat.S_ISREG(status.st_mode):
        raise DamagedImage(path, "no regular file")
    if status.st_size > _MOST_BYTES:
        raise DamagedImage(path, f"{status.st_size} bytes, more than {_MOST_BYTES}")


def identity(path: Path, root: Path) -> int:
    """A number for one image of the folder `root`, drawn from its class, its name and its bytes.

    It depends on no other file. So results and noise that belong to it stay with it when files come or go, and a file
    whose pixels change is another image.

    Raises:
        DamagedImage: the file cannot be read.
    """
    _check_file(path)
    digest = hashlib.sha256(os.fsencode(path.relative_to(root).as_posix()) + b"\0")
    try:
        with path.open("rb") as file:
            while part := file.read(2**20):
                digest.update(part)
    except OSError as error:
        raise DamagedImage(path, error.strerror or type(error).__name__) from error
    # 60 bits: two of a million images share one with a chance of one in two million.
    return int(digest.hexdigest()[:15], 16)


def _scale_transparent_colour(image: Any) -> None:
    """Brings PNG's transparent colour to the 8 bits to which Pillow brings the pixels alone."""
    colour = image.info.get("transparency")
    packing = image.tile[0].args if colour is not None and image.tile else None
    if packing in ("L;2", "L;4"):
        image.info["transparency"] = colour * 255 // (2 ** int(packing[-1]) - 1)
    elif packing == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _opaque(image: Any) -> Any:
    """`image` as 8-bit "L" or "RGB". 16 bits are scaled; what is transparent shows white, as on a page."""
    from PIL import Image

    if image.mode.startswith("I"):
        # Of the formats above only PNG has this mode, with 16 bits in it, which Pillow would clip and not scale.
        values = np.asarray(image).astype(np.uint32)
        gray = ((values + 128) // 257).astype(np.uint8)
        if "transparency" in image.info:
            gray[values == image.info["transparency"]] = 255
        return Image.fromarray(gray)
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def fit(image: Any, width: int, height: int) -> Any:
    """The largest centred part of the shape, resized (bicubic); its edges may lie between pixels."""
    from PIL import Image, ImageOps

    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)


def paper(image: Any, width: int, height: int) -> Any:
    """As published: the shorter side is resized (bicubic) to the model's, and the centre cropped on whole pixels.

    The longer side is rounded down, and half a pixel of the crop to even, as torchvision does.
    """
    from PIL import Image

    w, h = image.size
    short = min(w, h)
    resized = image.resize((w * width // short, h * height // short), Image.Resampling.BICUBIC)
    left, top = round((resized.width - width) / 2), round((resized.height - height) / 2)
    return resized.crop((left, top, left + width, top + height))


TRANSFORMS = {"fit": fit, "paper": paper}


def read_image(path: Path, shape: tuple[int, int, int], transform: str = "fit") -> torch.Tensor:
    """An image as `shape` float32 in [-1, 1], upright.

    16 bits are read as 8, transparency as white, an animation as its first frame; colour profiles are not applied.

    Args:
        path: a PNG, JPEG, WebP, BMP or GIF file, whatever its suffix.
        shape: (channels, height, width); 1 channel makes it gray.
        transform: one of `TRANSFORMS`, how it is brought to that height and width.

    Raises:
        DamagedImage: the file is damaged, of another format, or has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    channels, height, width = shape
    return _read(path, channels, lambda image: TRANSFORMS[transform](image, width, height))


def read_whole(path: Path) -> torch.Tensor:
    """An image in its own size, (3, height, width), otherwise as `read_image`."""
    return _read(path, 3, lambda image: image)


def _read(path: Path, channels: int, transform: Callable[[Any], Any]) -> torch.Tensor:
    from PIL import Image, UnidentifiedImageError

    _check_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as opened:
                _scale_transparent_colour(opened)
                turn = _TURNS.get(opened.getexif().get(_ORIENTATION_TAG))
                image = _opaque(opened).convert("L" if channels == 1 else "RGB")
        if turn is not None:
            image = image.transpose(Image.Transpose[turn])
        fitted = transform(image)
    except UnidentifiedImageError as error:
        raise DamagedImage(path, "none of these") from error
    except _unreadable() as error:
        raise DamagedImage(path, str(error) or type(error).__name__) from error
    pixels = np.asarray(fitted, dtype=np.float32).reshape(fitted.height, fitted.width, channels)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 127.5 - 1
