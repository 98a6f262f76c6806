"""Damaged image files, drawn at random: each is an image of the right shape and range, or refused by name.

The files are drawn by a seeded generator of our own: hypothesis also draws constants that it finds in the modules which
happen to be imported, so what it draws depends on the tests that ran before.
"""

from __future__ import annotations

import random
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from bigain_kernels.evaluation.images import DamagedImage, read_image

from .pictures import samples

SHAPES = [(1, 8, 6), (3, 5, 9)]
# Numbers at which readers of lengths and sizes go wrong.
LENGTHS = [0, 1, 7, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1]
_MAGIC = b"\x89PNG\r\n\x1a\n"


def _mended(content: bytes) -> bytes:
    """A PNG whose checksums are right again, so that what its chunks hold is looked at."""
    whole, at = bytearray(content), len(_MAGIC)
    while at + 12 <= len(whole):
        end = at + 12 + struct.unpack(">I", whole[at : at + 4])[0]
        if end > len(whole):
            break
        whole[end - 4 : end] = struct.pack(">I", zlib.crc32(bytes(whole[at + 4 : end - 4])))
        at = end
    return bytes(whole)


def damaged_file(draw: random.Random) -> bytes:
    """A good file with bytes changed, cut, repeated or put in; half of the changes in its header."""
    content = bytearray(draw.choice(sorted(samples().values())))
    for _ in range(draw.randrange(5)):
        place = draw.randrange(draw.choice([80, 2**16])) % max(1, len(content))
        kind = draw.choice(["byte", "length", "cut", "remove", "insert", "repeat"])
        if kind == "byte":
            content[place : place + 1] = draw.randbytes(1)
        elif kind == "length":
            content[place : place + 4] = struct.pack(draw.choice("<>") + "I", draw.choice(LENGTHS))
        elif kind == "cut":
            del content[place:]
        elif kind == "remove":
            del content[place : place + draw.randint(1, 9)]
        elif kind == "insert":
            content[place:place] = draw.randbytes(draw.randint(1, 9))
        else:
            content[place:place] = content[place : place + draw.randint(1, 99)]
    if content.startswith(_MAGIC) and draw.random() < 0.5:
        return _mended(bytes(content))
    return bytes(content)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "drawn.png"


# The seed is fixed, so that every run draws the same files; another number draws others.
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("shape", SHAPES)
def test_every_outcome_is_an_image_or_names_the_file(shape: tuple[int, int, int], path: Path) -> None:
    outcomes = {"image": 0, "refused": 0}
    draw = random.Random(20261126)
    for _ in range(600):
        path.write_bytes(damaged_file(draw))
        refusal = None
        try:
            image = read_image(path, shape)
        except DamagedImage as error:
            refusal = error
        if refusal is not None:
            outcomes["refused"] += 1
            assert str(path) in str(refusal)
            assert refusal.reason
            continue
        outcomes["image"] += 1
        assert image.shape == shape
        assert image.isfinite().all()
        assert image.min() >= -1
        assert image.max() <= 1
    assert min(outcomes.values()) > 100, outcomes


@seed(20261127)
@settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=200), kind=st.sampled_from(["", "png", "jpeg", "webp", "bmp", "gif"]))
def test_bytes_behind_a_magic_number_are_refused(data: bytes, kind: str, path: Path) -> None:
    starts = {"": b"", "png": _MAGIC, "jpeg": b"\xff\xd8\xff", "webp": b"RIFF\x64\x00\x00\x00WEBPVP8 "}
    path.write_bytes({**starts, "bmp": b"BM", "gif": b"GIF89a"}[kind] + data)
    with pytest.raises(DamagedImage, match=r"drawn\.png"):
        read_image(path, (3, 8, 8))


def test_the_files_that_are_damaged_are_whole_before(path: Path) -> None:
    for name, content in samples().items():
        path.write_bytes(content)
        assert read_image(path, (3, 8, 8)).shape == (3, 8, 8), name
