"""Small trees in the layouts in which the data sets are published."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

WNIDS = {"n01440764": "tench, Tinca tinca", "n01443537": "goldfish, Carassius auratus", "n02012849": "crane"}
PETS = (("Abyssinian", 1, 1), ("american_bulldog", 2, 2), ("Bombay", 5, 1))


def picture(path: Path, value: int = 128, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, 127, size[0] * size[1]).reshape(size[1], size[0])
    Image.fromarray((ramp + value / 2).astype(np.uint8)).convert("RGB").save(path)


def imagenet(root: Path, wnids: dict[str, str] = WNIDS) -> Path:
    for i, wnid in enumerate(wnids):
        for n in range(2):
            picture(root / "val" / wnid / f"ILSVRC2012_val_{i:04d}{n:04d}.JPEG", 40 * i)
    lines = [f"{wnid} {names}" for wnid, names in wnids.items()]
    (root / "LOC_synset_mapping.txt").write_text("\n".join(lines) + "\n")
    return root


def pets(root: Path) -> Path:
    lines = ["#Image CLASS-ID SPECIES BREED ID"]
    for breed, label, species in PETS:
        for n in range(2):
            picture(root / "images" / f"{breed}_{n}.jpg", 60 * n)
            lines.append(f"{breed}_{n} {label} {species} 1")
    # What comes with the archive and is no test image.
    (root / "images" / "._Abyssinian_0.jpg").write_bytes(b"\0\5\x16\7")
    (root / "images" / "Abyssinian_100.mat").write_bytes(b"MATLAB")
    (root / "annotations").mkdir()
    (root / "annotations" / "test.txt").write_text("\n".join(lines) + "\n")
    return root


def coco(root: Path) -> Path:
    names = {1: "person", 18: "dog", 44: "bottle"}
    marked = {139: (18, 1, 1), 285: (44,), 632: ()}
    for image in marked:
        picture(root / "val2017" / f"{image:012d}.jpg")
    content = {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in marked],
        "categories": [{"id": i, "name": name} for i, name in sorted(names.items(), reverse=True)],
        "annotations": [{"image_id": i, "category_id": c} for i, labels in marked.items() for c in labels],
    }
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    captions = [{"image_id": 139, "id": 9, "caption": "second"}, {"image_id": 139, "id": 4, "caption": " A dog. "}]
    (root / "annotations" / "captions_val2017.json").write_text(json.dumps({"annotations": captions}))
    return root
