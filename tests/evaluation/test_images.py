"""One image file: every kind is read right, or refused in words that name it."""

from __future__ import annotations

import os
import struct
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from bigain_kernels.evaluation.images import FORMATS, DamagedImage, identity, read_image

from .pictures import UPRIGHT, chunk, colours, encoded, orientation, png, samples, write

RAMP = np.linspace(0, 255, 64).astype(np.uint8)[None].repeat(64, 0)
SHAPES = [(3, 16, 16), (1, 16, 16)]


def _read(path: Path, content: bytes, shape: tuple[int, int, int] = (3, 16, 16)) -> torch.Tensor:
    return read_image(write(path, content), shape)


@pytest.mark.parametrize("name", samples())
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_is_an_image_of_the_right_shape_and_range(name: str, channels: int, tmp_path: Path) -> None:
    image = _read(tmp_path / "a.png", samples()[name], (channels, 8, 6))
    assert image.shape == (channels, 8, 6)
    assert image.dtype == torch.float32
    assert image.min() >= -1
    assert image.max() <= 1
    assert image.std() > 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_16_bit_pictures_look_like_8_bit_ones(shape: tuple[int, int, int], tmp_path: Path) -> None:
    ramp16 = RAMP.astype(np.uint16) * 257
    big = ramp16.astype(">u2")
    opaque, size = np.full_like(big, 65535), (64, 64)
    deep = {
        "gray by Pillow": encoded(Image.fromarray(ramp16), "PNG"),
        "gray": png(size, 16, 0, [row.tobytes() for row in big]),
        "gray and alpha": png(size, 16, 4, [row.tobytes() for row in np.stack([big, opaque], -1)]),
        "RGB": png(size, 16, 2, [row.tobytes() for row in np.stack([big] * 3, -1)]),
        "RGBA": png(size, 16, 6, [row.tobytes() for row in np.stack([big] * 3 + [opaque], -1)]),
    }
    expected = _read(tmp_path / "8.png", encoded(Image.fromarray(RAMP), "PNG"), shape)
    for name, content in deep.items():
        assert (_read(tmp_path / "16.png", content, shape) - expected).abs().max() < 0.01, name


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("value", range(1, 9))
def test_pictures_stand_upright(kind: str, value: int, tmp_path: Path) -> None:
    stored = np.zeros((16, 16, 3), np.uint8)
    stored[:8, :8], stored[:8, 8:], stored[8:, :8] = 255, 170, 85
    content = encoded(Image.fromarray(stored), kind, exif=orientation(value))
    image = ((_read(tmp_path / "a.jpg", content) + 1) * 127.5).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(image[4::8, 4::8], UPRIGHT[value](stored)[4::8, 4::8], atol=12)


def test_an_orientation_that_is_none_changes_nothing(tmp_path: Path) -> None:
    plain = _read(tmp_path / "a.png", encoded(colours().convert("RGB"), "PNG"))
    for value in (0, 9, 65535):
        content = encoded(colours().convert("RGB"), "PNG", exif=orientation(value))
        assert torch.equal(_read(tmp_path / "b.png", content), plain)


def _palette(index: int) -> Image.Image:
    image = Image.new("P", (8, 8), index)
    image.putpalette(bytes(768))
    return image


TRANSPARENT = {
    "png RGBA": encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "PNG"),
    "png LA": encoded(Image.new("LA", (8, 8), (0, 0)), "PNG"),
    "png P": encoded(Image.new("P", (8, 8), 0), "PNG", transparency=0),
    "png P with alphas": encoded(_palette(1), "PNG", transparency=b"\xff\x00"),
    "png L": encoded(Image.new("L", (8, 8), 7), "PNG", transparency=7),
    "png RGB": encoded(Image.new("RGB", (8, 8), (7, 8, 9)), "PNG", transparency=(7, 8, 9)),
    "png 1 bit": png((8, 8), 1, 0, [b"\x00"] * 8, [0]),
    "png 2 bits": png((8, 8), 2, 0, [b"\x55\x55"] * 8, [1]),
    "png 4 bits": png((8, 8), 4, 0, [b"\x33" * 4] * 8, [3]),
    "png 16 bits": png((8, 8), 16, 0, [b"\x12\x34" * 8] * 8, [0x1234]),
    "png 16 bits RGB": png((8, 8), 16, 2, [b"\x12\x34\x00\x00\xab\xcd" * 8] * 8, [0x1234, 0, 0xABCD]),
    "png 16 bits and alpha": png((8, 8), 16, 4, [b"\x12\x34\x00\x00" * 8] * 8),
    "webp": encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "WEBP", lossless=True),
    "gif": encoded(Image.new("P", (8, 8), 0), "GIF", transparency=0),
}


@pytest.mark.parametrize("name", TRANSPARENT)
@pytest.mark.parametrize("shape", SHAPES)
def test_transparency_shows_white(name: str, shape: tuple[int, int, int], tmp_path: Path) -> None:
    assert (_read(tmp_path / "a.png", TRANSPARENT[name], shape) == 1).all()


def test_half_transparency_is_mixed_with_white(tmp_path: Path) -> None:
    image = _read(tmp_path / "a.png", encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 128)), "PNG"))
    torch.testing.assert_close(image[:, 0, 0], torch.tensor([1.0, -0.004, -0.004]), atol=0.01, rtol=0)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_an_animation_is_its_first_frame(kind: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), gray) for gray in ("black", "white", "white")]
    image = _read(tmp_path / "a.gif", encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert image.max() < -0.98


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2)])
def test_any_shape_of_picture_fits(size: tuple[int, int], tmp_path: Path) -> None:
    assert _read(tmp_path / "a.png", encoded(Image.new("L", size, 255), "PNG")).min() == 1


@cache
def _broken() -> dict[str, bytes]:
    rgb = colours((200, 200)).convert("RGB")
    whole = {kind: encoded(rgb, kind) for kind in FORMATS}
    bomb = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0))
    large = chunk(b"IHDR", struct.pack(">IIBBBBB", 10000, 10000, 8, 0, 0, 0, 0))
    magic = b"\x89PNG\r\n\x1a\n"
    return {
        **{f"{kind} without its second half": content[: len(content) // 2] for kind, content in whole.items()},
        **{f"{kind}, its first bytes alone": content[:20] for kind, content in whole.items()},
        "empty": b"",
        "text": b"no image",
        "eps": encoded(rgb, "EPS"),
        "pdf": b"%PDF-1.4\n",
        "tiff": encoded(rgb, "TIFF"),
        "tiff F": encoded(Image.new("F", (4, 4), 0.5), "TIFF"),
        "tiff I": encoded(Image.new("I", (4, 4), 70000), "TIFF"),
        "ppm": encoded(rgb, "PPM"),
        "ico": encoded(rgb, "ICO"),
        "resource fork": b"\x00\x05\x16\x07\x00\x02\x00\x00",
        "pointer of git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "png of no width": png((0, 8), 8, 0, [b""] * 8),
        "png of no height": png((8, 0), 8, 0, []),
        "png without pixels": magic + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)),
        "png of 3.6e9 pixels": magic + bomb + chunk(b"IDAT", b""),
        "png of 1e8 pixels": magic + large + chunk(b"IDAT", b""),
        "png with a bomb of text": magic
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0))
        + chunk(b"zTXt", b"k\0\0" + zlib.compress(b"\0" * 2**24))
        + chunk(b"IEND", b""),
        "png with EXIF that is none": encoded(rgb, "PNG", exif=b"Exif\0\0nonsense"),
    }


@pytest.mark.parametrize("name", _broken())
def test_a_broken_file_is_named(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = tmp_path / "bad.png"
    with pytest.raises(DamagedImage, match=r"^images: got .*bad\.png, expected an image in PNG/JPEG") as caught:
        _read(path, _broken()[name])
    assert caught.value.path == path
    assert caught.value.reason
    assert not recwarn.list


def test_no_other_program_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*arguments: object, **_: object) -> None:
        raise AssertionError(f"started {arguments}")

    monkeypatch.setattr("subprocess.Popen.__init__", started)
    for suffix in ("png", "eps", "ps"):
        with pytest.raises(DamagedImage):
            _read(tmp_path / f"a.{suffix}", encoded(Image.new("RGB", (8, 8)), "EPS"))


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _loop(path: Path) -> None:
    path.symlink_to(path)


def _broken_link(path: Path) -> None:
    path.symlink_to(path.with_name("gone"))


@pytest.mark.parametrize("make", [Path.mkdir, _pipe, _loop, _broken_link, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_named_without_being_opened(make, tmp_path: Path) -> None:
    path = tmp_path / "cat" / "odd.png"
    path.parent.mkdir()
    make(path)
    for call in (lambda: read_image(path, (3, 8, 8)), lambda: identity(path, tmp_path)):
        with pytest.raises(DamagedImage, match=r"odd\.png"):
            call()


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may read everything, so the refusal is put in.
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path / "cat" / "secret.png", samples()["png L"])
    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("io.open", refuse)
    for call in (lambda: read_image(path, (3, 8, 8)), lambda: identity(path, tmp_path)):
        with pytest.raises(DamagedImage, match=r"secret\.png, expected an image .*\(.*Permission denied"):
            call()


def test_a_file_of_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "vast.png"
    with path.open("wb") as file:
        file.truncate(2**31)
    for call in (lambda: read_image(path, (3, 8, 8)), lambda: identity(path, tmp_path)):
        with pytest.raises(DamagedImage, match=r"vast\.png.*2147483648 bytes"):
            call()


def test_identity_is_that_of_class_name_and_bytes(tmp_path: Path) -> None:
    content = samples()["png L"]
    first = identity(write(tmp_path / "cat" / "a.png", content), tmp_path)
    assert identity(write(tmp_path / "elsewhere" / "cat" / "a.png", content), tmp_path / "elsewhere") == first
    others = [
        identity(write(tmp_path / "dog" / "a.png", content), tmp_path),
        identity(write(tmp_path / "cat" / "b.png", content), tmp_path),
        identity(write(tmp_path / "cat" / "a.png", content + b"\0"), tmp_path),
    ]
    assert len({first, *others}) == 4
    assert all(0 <= number < 2**60 for number in (first, *others))


def test_pillow_can_read_what_is_on_offer() -> None:
    assert all(features.check(name) for name in ("jpg", "zlib", "webp"))
