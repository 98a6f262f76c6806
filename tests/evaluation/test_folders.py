"""Image folders: what counts as a class and as an image, and in which order."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from bigain_kernels.evaluation.folders import find_images, load_images

from .pictures import samples, write

PNG = samples()["png L"]


def _folder(root: Path, *names: str) -> Path:
    for name in names or ("cat/a.png", "dog/a.png"):
        write(root / name, PNG)
    return root


def test_classes_are_mixed_and_the_order_is_kept(tmp_path: Path) -> None:
    folder = find_images(_folder(tmp_path, *(f"{name}/{i}.png" for name in ("dark", "light") for i in range(8))))
    assert len(folder) == 16
    assert folder.classes == ("dark", "light")
    assert 2 <= folder.names[:8].count("dark") <= 6
    few = find_images(tmp_path, limit=3)
    assert few.paths == folder.paths[:3]
    assert few.classes == folder.classes
    assert find_images(tmp_path, limit=99).paths == folder.paths


def test_no_image_moves_when_another_comes_or_goes(tmp_path: Path) -> None:
    before = find_images(_folder(tmp_path, *(f"cat/{i}.png" for i in range(8))))
    before.paths[3].unlink()
    _folder(tmp_path, "cat/new.png", "dog/new.png")
    after = [path for path in find_images(tmp_path).paths if path.stem != "new"]
    assert after == [path for path in before.paths if path != before.paths[3]]
    now = find_images(tmp_path)
    kept = {path: now.identity(i) for i, path in enumerate(now.paths)}
    assert all(kept[path] == before.identity(i) for i, path in enumerate(before.paths) if i != 3)


HIDDEN = [
    ".ipynb_checkpoints/a.png",
    "__MACOSX/a.png",
    "__MACOSX/cat/._a.png",
    "@eaDir/a.png",
    "$RECYCLE.BIN/a.png",
    "#recycle/a.png",
    "System Volume Information/a.png",
    "lost+found/a.png",
    ".Trash-1000/a.png",
    ".git/a.png",
    "cat/._a.png",
    "cat/.hidden.png",
    "cat/.ipynb_checkpoints/a.png",
    "cat/@eaDir/a.png",
    "cat/.DS_Store",
    "cat/Thumbs.db",
    "cat/notes.txt",
    "cat/png",
    "labels.csv",
    ".png",
]


def test_hidden_and_system_files_are_no_classes_and_no_images(tmp_path: Path) -> None:
    folder = find_images(_folder(tmp_path, *HIDDEN, "cat/a.png", "dog/a.png"))
    assert folder.classes == ("cat", "dog")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in folder.paths) == ["cat/a.png", "dog/a.png"]


@pytest.mark.parametrize("suffix", ["PNG", "JPEG", "jpg", "webp", "bmp", "gif", "tif", "heic"])
def test_suffixes_of_pictures_are_listed(suffix: str, tmp_path: Path) -> None:
    assert len(find_images(_folder(tmp_path, f"cat/a.{suffix}"))) == 1


ODD = ["new\nline", "a b", "$x$", "[red]x", "\x1b[31mred", "'\"`", "ünïcode", "%s{}", "-rf", "~", "\u202eabc"]


@pytest.mark.parametrize("name", ODD)
def test_odd_names_are_classes_and_images(name: str, tmp_path: Path) -> None:
    folder = find_images(_folder(tmp_path, f"{name}/{name}.png"))
    assert folder.classes == (name,)
    assert load_images(folder.paths, (1, 8, 8)).shape == (1, 1, 8, 8)
    assert folder.identity(0) > 0


def test_names_that_are_no_utf8_are_classes_and_images(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    folder = find_images(_folder(tmp_path, f"{name}/{name}.png"))
    assert folder.classes == (name,)
    assert folder.identity(0) > 0
    assert torch.equal(load_images(folder.paths, (1, 8, 8)), load_images(folder.paths, (1, 8, 8)))


def _missing(root: Path) -> Path:
    return root / "missing"


def _file(root: Path) -> Path:
    return write(root / "missing", PNG)


def _empty(root: Path) -> Path:
    return root


def _flat(root: Path) -> Path:
    return _folder(root, "a.png", "b.png")


def _class_without_images(root: Path) -> Path:
    _folder(root)
    (root / "zebra").mkdir()
    return root


def _class_one_level_too_deep(root: Path) -> Path:
    return _folder(root, "cat/a.png", "zebra/more/a.png")


def _class_of_hidden_files(root: Path) -> Path:
    return _folder(root, "cat/a.png", "zebra/._a.png")


def _class_of_other_files(root: Path) -> Path:
    return _folder(root, "cat/a.png", "zebra/a.npy")


def _link_to_nothing(root: Path) -> Path:
    (_folder(root) / "zebra").symlink_to(root / "gone")
    return root


def _loop_of_links(root: Path) -> Path:
    (_folder(root) / "zebra").symlink_to(root / "zebra")
    return root


BAD = [
    (_missing, "missing"),
    (_file, "missing"),
    (_empty, ""),
    (_flat, ""),
    (_class_without_images, "zebra"),
    (_class_one_level_too_deep, "zebra"),
    (_class_of_hidden_files, "zebra"),
    (_class_of_other_files, "zebra"),
    (_link_to_nothing, "zebra"),
    (_loop_of_links, "zebra"),
]


@pytest.mark.parametrize(("make", "named"), BAD, ids=[make.__name__ for make, _ in BAD])
def test_a_folder_that_would_lose_a_class_is_named(make, named: str, tmp_path: Path) -> None:
    root = make(tmp_path)
    with pytest.raises(OSError, match=r"^images: got .*, expected ") as caught:
        find_images(root)
    assert named in str(caught.value)


def test_links_to_folders_and_files_are_followed(tmp_path: Path) -> None:
    _folder(tmp_path / "elsewhere", "cats/a.png", "b.png")
    root = _folder(tmp_path / "root", "dog/a.png")
    (root / "cat").symlink_to(tmp_path / "elsewhere" / "cats")
    (root / "dog" / "b.png").symlink_to(tmp_path / "elsewhere" / "b.png")
    folder = find_images(root)
    assert folder.classes == ("cat", "dog")
    assert len(folder) == 3
    assert len({folder.identity(i) for i in range(3)}) == 3


@pytest.mark.parametrize("secret", ["", "cat"])
def test_a_folder_that_cannot_be_read_is_named(secret: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may read everything, so the refusal is put in.
    listdir = os.listdir

    def refuse(path: Path) -> list[str]:
        if Path(path) == tmp_path / secret:
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    _folder(tmp_path)
    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(OSError, match=rf"^images: got {tmp_path / secret}, .*\(Permission denied\)$"):
        find_images(tmp_path)
