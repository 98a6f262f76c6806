"""Small image files of every kind that a stranger's folder holds."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# What orientation 1 to 8 of EXIF does to the stored picture to make it stand upright (rows, then columns).
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """`image` as a file of the format `kind`."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = value
    return exif


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(
    size: tuple[int, int], depth: int, kind: int, rows: Sequence[bytes], transparent: Sequence[int] | None = None
) -> bytes:
    """A PNG written by hand, for what Pillow reads and does not write.

    Args:
        size: (width, height).
        depth, kind: bits of a sample, and the colour type (0 gray, 2 RGB, 4 gray and alpha, 6 RGBA).
        rows: the samples of each row.
        transparent: the colour that stands for transparency.
    """
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, kind, 0, 0, 0))
    key = chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)) if transparent is not None else b""
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + key + data + chunk(b"IEND", b"")


def colours(size: tuple[int, int] = (17, 13)) -> Image.Image:
    """A fixed RGBA picture with half of it transparent."""
    width, height = size
    pixels = np.random.RandomState(0).randint(0, 256, (height, width, 4), dtype=np.uint8)
    pixels[..., 3] = np.where(np.arange(width) < width // 2, 0, 255)
    return Image.fromarray(pixels)


@cache
def samples() -> dict[str, bytes]:
    """Whole files that are to be read, one of each kind."""
    rgba = colours()
    rgb, gray, palette = rgba.convert("RGB"), rgba.convert("L"), rgba.convert("RGB").convert("P")
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    turned = rgba.transpose(Image.Transpose.ROTATE_90).resize(rgba.size)
    return {
        "png 1": encoded(gray.convert("1"), "PNG"),
        "png L": encoded(gray, "PNG"),
        "png L, one gray transparent": encoded(gray, "PNG", transparency=3),
        "png LA": encoded(rgba.convert("LA"), "PNG"),
        "png I;16": encoded(deep, "PNG"),
        "png P": encoded(palette, "PNG"),
        "png P, transparent": encoded(palette, "PNG", transparency=bytes(range(256))),
        "png RGB, turned": encoded(rgb, "PNG", exif=orientation(6)),
        "png RGBA": encoded(rgba, "PNG"),
        "png animated": encoded(rgba, "PNG", save_all=True, append_images=[turned]),
        "jpeg L": encoded(gray, "JPEG"),
        "jpeg RGB, turned": encoded(rgb, "JPEG", exif=orientation(8)),
        "jpeg RGB, progressive": encoded(rgb, "JPEG", progressive=True),
        "jpeg CMYK": encoded(rgb.convert("CMYK"), "JPEG"),
        "webp RGB, turned": encoded(rgb, "WEBP", exif=orientation(3)),
        "webp RGBA": encoded(rgba, "WEBP", lossless=True),
        "webp animated": encoded(rgba, "WEBP", save_all=True, append_images=[turned]),
        "bmp 1": encoded(gray.convert("1"), "BMP"),
        "bmp P": encoded(palette, "BMP"),
        "bmp RGB": encoded(rgb, "BMP"),
        "bmp RGBA": encoded(rgba, "BMP"),
        "gif": encoded(palette, "GIF"),
        "gif animated": encoded(palette, "GIF", save_all=True, append_images=[turned.convert("P")], transparency=0),
    }


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
