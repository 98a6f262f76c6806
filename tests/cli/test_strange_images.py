"""`bigain classify` on folders of strangers: damaged files, names that terminals and printing stumble over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from bigain_kernels.cli.main import main
from bigain_kernels.cli.text import printable
from bigain_kernels.evaluation import generate as generation
from bigain_kernels.evaluation.data import load_digits
from bigain_kernels.evaluation.folders import find_images


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Six test digits."""
    digits, root = load_digits("test"), tmp_path / "images"
    for i in range(6):
        folder = root / str(int(digits.labels[i]))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generation.to_pixels(digits.images[i : i + 1])[0]).save(folder / f"{i}.png")
    return root


def _classify(images: Path, out: Path, *options: str) -> int:
    return main(["classify", "--images", str(images), "--out", str(out), *options])


def _finished(out: Path) -> list[int]:
    return [json.loads(line)["index"] for line in (out / "results.jsonl").read_text().splitlines()[1:]]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def _last_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.rstrip("\n").split("\n")[-1]


def test_a_damaged_image_is_named_and_costs_no_other(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    order = find_images(images)
    _cut(order.paths[4])
    assert _classify(images, out) == 2
    assert _last_line(capsys).startswith(f"bigain: images: got {order.paths[4]}, expected an image")
    assert _finished(out) == [order.identity(i) for i in range(4)]
    assert json.loads((out / "summary.json").read_text())["images"] == 4
    order.paths[4].unlink()
    assert _classify(images, out, "--resume") == 0
    assert "4 images classified before" in capsys.readouterr().out
    assert _finished(out) == [order.identity(i) for i in (0, 1, 2, 3, 5)]
    assert _classify(images, fresh) == 0
    assert _finished(fresh) == _finished(out)


def test_damaged_images_are_counted_and_listed_when_skipped(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, order = tmp_path / "out", find_images(images)
    _cut(order.paths[1])
    order.paths[4].unlink()
    order.paths[4].symlink_to(tmp_path / "gone")
    for options in (["--skip-damaged"], ["--skip-damaged", "--resume"]):
        assert _classify(images, out, *options) == 0
        shown = capsys.readouterr().out
        for path in (order.paths[1], order.paths[4]):
            assert f"left out {path}: " in shown
        assert "on 4 images, 2 damaged left out;" in shown
        summary = json.loads((out / "summary.json").read_text())
        assert summary["images"] == 4
        assert sorted(summary["damaged"]) == sorted(str(order.paths[i]) for i in (1, 4))
    # Without the option the run that can be gone on with says which file is in its way.
    assert _classify(images, out, "--resume") == 2
    assert str(order.paths[4]) in _last_line(capsys)


def test_a_folder_of_damaged_images_alone_is_no_success(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in images.glob("*/*"):
        _cut(path)
    assert _classify(images, tmp_path / "out", "--skip-damaged") == 2
    assert _last_line(capsys) == (
        f"bigain: images: got {images} with damaged images alone, expected some that can be read"
    )
    assert not (tmp_path / "out" / "summary.json").exists()


ODD = ["a\nb", "\x1b[31mred", "[red]x", "[]", "$x^$", "'\"`", "%s{0}", os.fsdecode(b"caf\xe9"), "\u202etxt"]


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_odd_names_of_classes_end_in_one_line(
    name: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / name).mkdir()
    (images / name / f"{name}.png").write_bytes(next(images.glob("*/*.png")).read_bytes())
    assert _classify(images, tmp_path / "out") == 2
    assert _last_line(capsys).startswith("bigain: images: got class ")


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_odd_names_of_files_and_folders_are_classified_and_printed(
    name: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = images.rename(tmp_path / name)
    path = find_images(odd).paths[0]
    path.rename(path.with_name(f"{name}.png"))
    (path.parent / f"{name}.jpg").write_bytes(b"")
    out = tmp_path / f"out {name}"
    assert _classify(odd, out, "--skip-damaged") == 0
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out
    assert len(shown.out.splitlines()) == 2
    assert f"left out {printable(str(path.with_name(f'{name}.jpg')))}: " in shown.out
    assert shown.out.endswith(f"results in {printable(str(out))}\n")
    assert json.loads((out / "summary.json").read_text())["images"] == 6


def test_a_name_that_is_no_utf8_reaches_a_terminal(images: Path, tmp_path: Path) -> None:
    """In a process of its own, whose output is as strict as a terminal's."""
    odd = images.rename(tmp_path / os.fsdecode(b"caf\xe9"))
    command = [sys.executable, "-m", "bigain_kernels.cli.main", "classify", "--limit", "1", "--threads", "1"]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(
        [*command, "--images", str(odd), "--out", str(odd / "out")], capture_output=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert b"caf\\udce9" in done.stdout


def test_a_message_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", "--images", "\x1b[2J[red]nowhere"]) == 2
    assert _last_line(capsys).startswith("bigain: images: got \\x1b[2J[red]nowhere, expected a folder")


def test_printable_leaves_words_alone() -> None:
    assert printable("ünïcode — 日本語 [red] $x$") == "ünïcode — 日本語 [red] $x$"
    assert printable("a\nb\x1b[2J\u202e\udce9") == "a\\nb\\x1b[2J\\u202e\\udce9"
