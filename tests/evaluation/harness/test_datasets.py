"""Readers on small trees in the exact layouts, and the published way to bring an image to size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bigain_kernels.evaluation.harness.datasets import (
    READERS,
    coco,
    image_folder,
    imagenet,
    imagenet_labels,
    oxford_pets,
    with_prompts,
)
from bigain_kernels.evaluation.images import DamagedImage, paper, read_image

from . import trees


def test_imagenet_has_the_real_names_by_wnid(tmp_path) -> None:
    found = imagenet(trees.imagenet(tmp_path))
    assert found.classes == ("tench", "goldfish", "crane")
    assert found.keys == tuple(trees.WNIDS)
    assert found.prompts[1] == "a photo of a goldfish"
    assert len(found.paths) == 6
    assert all(
        path.split("/")[0] == found.keys[label] for path, (label,) in zip(found.paths, found.labels, strict=True)
    )


def test_a_hundred_of_imagenet_keep_the_labels_of_the_thousand(tmp_path) -> None:
    wnids = {f"n{10 * i:08d}": f"name {i}, other" for i in range(1000)}
    chosen = {wnid: wnids[wnid] for wnid in list(wnids)[7::250]}
    trees.imagenet(tmp_path, chosen)
    (tmp_path / "LOC_synset_mapping.txt").write_text("\n".join(f"{w} {n}" for w, n in reversed(wnids.items())))
    found = imagenet(tmp_path)
    assert imagenet_labels(found, tmp_path) == [7, 257, 507, 757]
    bound = found.bound(imagenet_labels(found, tmp_path), (3, 16, 16), "paper")
    assert {label for labels in bound.labels for label in labels} == {7, 257, 507, 757}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("synset_words.txt", "n01440764 tench\nn01443537 goldfish\nn02012849 crane\n"),
        ("words.txt", "n01440764\ttench\nn01443537\tgoldfish\nn02012849\tcrane\n"),
        ("Labels.json", '{"n01440764": "tench, x", "n01443537": "goldfish", "n02012849": "crane"}'),
        (
            "imagenet_class_index.json",
            '{"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"], "134": ["n02012849", "crane"]}',
        ),
    ],
)
def test_names_come_in_every_form(tmp_path, name: str, text: str) -> None:
    trees.imagenet(tmp_path)
    (tmp_path / "LOC_synset_mapping.txt").unlink()
    (tmp_path / name).write_text(text)
    assert imagenet(tmp_path).classes == ("tench", "goldfish", "crane")


def test_pets_are_the_test_split_with_species_in_the_prompt(tmp_path) -> None:
    found = oxford_pets(trees.pets(tmp_path))
    assert found.classes == ("Abyssinian cat", "american bulldog dog", "Bombay cat")
    assert found.prompts[0] == "a photo of a Abyssinian cat, a type of pet."
    assert found.paths[:2] == ("images/Abyssinian_0.jpg", "images/Abyssinian_1.jpg")
    assert found.labels == ((0,), (0,), (1,), (1,), (2,), (2,))


def test_coco_has_all_classes_of_an_image_and_its_first_caption(tmp_path) -> None:
    found = coco(trees.coco(tmp_path))
    assert found.classes == ("person", "dog", "bottle")
    assert found.paths == ("val2017/000000000139.jpg", "val2017/000000000285.jpg")
    assert found.labels == ((0, 1), (2,))
    assert found.left_out == ("1 images in which nothing is marked",)
    assert found.captions == {"val2017/000000000139.jpg": "A dog."}


def test_hidden_files_are_counted(tmp_path) -> None:
    for name in ("a", "b"):
        trees.picture(tmp_path / name / "1.png")
        (tmp_path / name / ".DS_Store").write_bytes(b"x")
    (tmp_path / "a" / "notes.txt").write_text("x")
    found = image_folder(tmp_path)
    assert len(found.paths) == 2
    assert found.left_out == ("2 hidden and system files", "1 files that are no images")


def test_prompts_of_a_csv_file(tmp_path) -> None:
    found = oxford_pets(trees.pets(tmp_path))
    path = tmp_path / "prompts.csv"
    path.write_text('prompt,classname,classidx\n"a cat, of sorts",Abyssinian,0\ndog,x,1\nblack,y,2\n')
    assert with_prompts(found, path).prompts == ("a cat, of sorts", "dog", "black")
    for text in ("prompt,classidx\nx,0\n", "prompt,classidx\nx,0\ny,0\nz,1\n", "words\nx\n", "prompt,classidx\nx,9\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"^prompts: got"):
            with_prompts(found, path)


def test_a_damaged_image_is_named(tmp_path) -> None:
    found = oxford_pets(trees.pets(tmp_path)).bound([0, 1, 2], (3, 16, 16), "paper")
    (tmp_path / found.paths[0]).write_bytes((tmp_path / found.paths[0]).read_bytes()[:200])
    with pytest.raises(DamagedImage, match="Abyssinian_0"):
        found.read(0)
    assert found.read(1).shape == (3, 16, 16)


@pytest.mark.parametrize("mode", ["CMYK", "P", "LA", "I;16", "1"])
def test_every_mode_is_read_like_its_rgb(tmp_path, mode: str) -> None:
    ramp = np.tile(np.linspace(0, 255, 32).astype(np.uint8), (32, 1))
    image = Image.fromarray(ramp)
    if mode == "I;16":
        stored = Image.fromarray(ramp.astype(np.uint16) * 257)
    elif mode == "1":
        stored = image.point(lambda v: 255 * (v > 127)).convert("1")
        ramp = np.where(ramp > 127, 255, 0)
    else:
        stored = image.convert("RGB").convert(mode) if mode == "CMYK" else image.convert(mode)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    stored.save(path, quality=100) if mode == "CMYK" else stored.save(path)
    found = read_image(path, (3, 32, 32), "paper")
    expected = np.asarray(ramp, dtype=np.float32) / 127.5 - 1
    assert np.abs(found.numpy() - expected).max() <= (0.06 if mode in ("CMYK", "P") else 1e-6)


def test_the_published_transform_resizes_the_shorter_side_and_crops_whole_pixels() -> None:
    # 101 x 60 to 20: 33 x 20, of which 7 (6.5 to even is 6) columns are left out on the left.
    image = Image.fromarray(np.arange(101 * 60 * 3, dtype=np.uint32).reshape(60, 101, 3).astype(np.uint8))
    found = paper(image, 20, 20)
    expected = image.resize((33, 20), Image.Resampling.BICUBIC).crop((6, 0, 26, 20))
    assert found.size == (20, 20)
    assert np.array_equal(np.asarray(found), np.asarray(expected))
    upright = paper(image.transpose(Image.Transpose.ROTATE_90), 20, 20)
    assert upright.size == (20, 20)


def test_the_published_transform_of_a_photograph() -> None:
    """Stored numbers of china.jpg at 512: a change of Pillow, or of ours, shows."""
    from sklearn.datasets import load_sample_image

    pixels = np.asarray(paper(Image.fromarray(load_sample_image("china.jpg")), 512, 512)).astype(np.int64)
    assert pixels.shape == (512, 512, 3)
    assert [pixels[i, i].tolist() for i in (0, 100, 256, 511)] == GOLDEN
    assert pixels.sum() == TOTAL


GOLDEN = [[186, 213, 243], [110, 88, 48], [203, 192, 202], [16, 16, 8]]
TOTAL = 113428393


@pytest.mark.parametrize("name", sorted(READERS))
def test_another_layout_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(FileNotFoundError):
        READERS[name](tmp_path)
