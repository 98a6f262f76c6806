"""Data sets in the layouts in which they are published, as lists of files with their classes; nothing is fetched."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..folders import find_images
from ..images import TRANSFORMS, read_image

# Where the names of ImageNet's classes stand, in the forms in which they come with it.
_SYNSETS = ("LOC_synset_mapping.txt", "synset_words.txt", "words.txt", "Labels.json", "imagenet_class_index.json")
_PETS = 37


@dataclass(frozen=True)
class DataSet:
    """Images with their classes, by name. What a model calls them is settled by `bound`.

    Attributes:
        root: the folder that paths are relative to.
        paths: of each image, with "/", in a fixed order.
        labels: of each image its classes, by place in `classes`; more than one where it shows several things.
        classes: names.
        prompts: of each class, as the published protocol asks for it.
        keys: what a class is called in the layout, such as a wnid; the names where it has no other.
        left_out: in a line each, what lies there and was left out, counted.
        shape, transform: (channels, height, width) and the way that images are brought to it, once `bound`.
        captions: of each image that has one, by its path.
        references: images that drawings are compared with as published, where these are not `paths`.
    """

    root: Path
    paths: tuple[str, ...]
    labels: tuple[tuple[int, ...], ...]
    classes: tuple[str, ...]
    prompts: tuple[str, ...]
    keys: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    shape: tuple[int, int, int] = (3, 512, 512)
    transform: str = "fit"
    captions: Mapping[str, str] = field(default_factory=dict)
    references: tuple[str, ...] = ()

    def read(self, i: int) -> torch.Tensor:
        """Image i, see `images.read_image`."""
        return read_image(self.root / self.paths[i], self.shape, self.transform)

    def first(self, limit: int | None) -> DataSet:
        """The first images alone; the classes stay."""
        return replace(self, paths=self.paths[:limit], labels=self.labels[:limit])

    def bound(self, labels: Sequence[int], shape: tuple[int, int, int], transform: str) -> DataSet:
        """For a model that calls class i `labels[i]`, and draws images of `shape`."""
        if transform not in TRANSFORMS:
            raise ValueError(f"transform: got {transform!r}, expected one of {list(TRANSFORMS)}")
        if transform == "paper" and shape[1] != shape[2]:
            raise ValueError(f"transform: got 'paper' for {shape[1]} x {shape[2]}, expected a model of square images")
        if len(labels) != len(self.classes):
            raise ValueError(f"labels: got {len(labels)}, expected one for each of {len(self.classes)} classes")
        known = tuple(tuple(labels[place] for place in image) for image in self.labels)
        return replace(self, labels=known, shape=shape, transform=transform)


def _a_photo(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"a photo of a {name}" for name in names)


def _expect(path: Path, what: str) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"data: got no {path}, expected {what}")
    return path


def image_folder(root: Path) -> DataSet:
    """One subfolder of images for each class, named by it; see `folders.find_images`."""
    found = find_images(root)
    place = {name: i for i, name in enumerate(found.classes)}
    return DataSet(
        root,
        tuple(path.relative_to(root).as_posix() for path in found.paths),
        tuple((place[name],) for name in found.names),
        found.classes,
        _a_photo(found.classes),
        found.classes,
        found.left_out,
    )


def _synset_names(root: Path) -> dict[str, str]:
    """The first name of each wnid, from the first file of `_SYNSETS` that is there, beside the images or above."""
    for folder in (root, root.parent, root.parent.parent):
        for name in _SYNSETS:
            path = folder / name
            if not path.is_file():
                continue
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".json":
                # {"n01440764": "tench, Tinca tinca"}, or {"0": ["n01440764", "tench"]}
                pairs = [v if isinstance(v, list) else (k, v) for k, v in json.loads(text).items()]
            else:
                pairs = [line.replace("\t", " ").split(" ", 1) for line in text.splitlines() if line.strip()]
            try:
                return {wnid: names.split(",")[0].strip().replace("_", " ") for wnid, names in pairs}
            except (ValueError, AttributeError) as error:
                raise ValueError(f"data: got {path}, expected a wnid and its names in each line ({error})") from error
    raise FileNotFoundError(
        f"data: got {root} without the names of its classes, expected one of {list(_SYNSETS)} there or above"
    )


def imagenet(root: Path) -> DataSet:
    """ImageNet's validation images by wnid, of 1,000 classes or of some: `val/<wnid>/*.JPEG` or `<wnid>/*.JPEG`.

    Classes that share their first name ("crane", "maillot") are told apart by their wnid in the labels, and are asked
    about by the same prompt, as in the published protocol.
    """
    top = root / "val" if (root / "val").is_dir() else root
    names = _synset_names(top)
    found = image_folder(top)
    unknown = [key for key in found.keys if key not in names]
    if unknown:
        raise ValueError(f"data: got {top / unknown[0]}, expected folders named by a wnid of the class names")
    classes = tuple(names[key] for key in found.keys)
    return replace(found, classes=classes, prompts=_a_photo(classes))


def imagenet_labels(data: DataSet, root: Path) -> list[int]:
    """The label of each class in a model of all of ImageNet: the place of its wnid among the sorted ones.

    Raises:
        ValueError: the names are not those of 1,000 classes.
    """
    wnids = sorted(_synset_names(root / "val" if (root / "val").is_dir() else root))
    if len(wnids) != 1000:
        raise ValueError(f"data: got the names of {len(wnids)} classes with {root}, expected those of all 1000")
    return [wnids.index(key) for key in data.keys]


def oxford_pets(root: Path) -> DataSet:
    """Oxford-IIIT Pets: `images/<Breed>_<n>.jpg` and the test split of `annotations/test.txt`."""
    listing = _expect(root / "annotations" / "test.txt", "the test split of Oxford-IIIT Pets")
    paths: list[str] = []
    labels: list[int] = []
    breeds: dict[int, str] = {}
    for number, line in enumerate(listing.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            name, label, species, _ = line.split()
            place = int(label) - 1
            breed = f"{name.rsplit('_', 1)[0].replace('_', ' ')} {('cat', 'dog')[int(species) - 1]}"
        except (ValueError, IndexError) as error:
            raise ValueError(f"data: got line {number} of {listing}, expected NAME CLASS SPECIES BREED") from error
        if not 0 <= place < _PETS or breeds.setdefault(place, breed) != breed:
            raise ValueError(f"data: got class {label} of {name} in {listing}, expected one breed from 1 to {_PETS}")
        paths.append(f"images/{name}.jpg")
        labels.append(place)
    order = sorted(breeds)
    where = {label: i for i, label in enumerate(order)}
    classes = tuple(breeds[label] for label in order)
    prompts = tuple(f"a photo of a {name}, a type of pet." for name in classes)
    # As published, drawings are compared with the whole folder, of which the test split is a half.
    references = tuple(f"images/{path.name}" for path in sorted((root / "images").glob("[!.]*.jpg")))
    return DataSet(
        root,
        tuple(paths),
        tuple((where[label],) for label in labels),
        classes,
        prompts,
        classes,
        references=references,
    )


def coco(root: Path, split: str = "val2017") -> DataSet:
    """COCO 2017, all classes that are marked in an image: `<split>/*.jpg`, `annotations/instances_<split>.json`.

    The first caption of each image comes along where `captions_<split>.json` is there.
    """
    path = _expect(root / "annotations" / f"instances_{split}.json", "the annotations of COCO 2017")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        categories = sorted(content["categories"], key=lambda category: category["id"])
        files = {image["id"]: f"{split}/{image['file_name']}" for image in content["images"]}
        place = {category["id"]: i for i, category in enumerate(categories)}
        marked: dict[int, set[int]] = {}
        for annotation in content["annotations"]:
            marked.setdefault(annotation["image_id"], set()).add(place[annotation["category_id"]])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"data: got {path}, expected annotations of COCO ({error!r})") from error
    chosen = sorted(image for image in files if image in marked)
    classes = tuple(category["name"] for category in categories)
    without = len(files) - len(chosen)
    captions: dict[str, str] = {}
    told = root / "annotations" / f"captions_{split}.json"
    if told.exists():
        for row in sorted(json.loads(told.read_text(encoding="utf-8"))["annotations"], key=lambda row: row["id"]):
            captions.setdefault(files.get(row["image_id"], ""), row["caption"].strip())
    return DataSet(
        root,
        tuple(files[image] for image in chosen),
        tuple(tuple(sorted(marked[image])) for image in chosen),
        classes,
        _a_photo(classes),
        classes,
        (f"{without} images in which nothing is marked",) if without else (),
        captions=captions,
    )


def with_prompts(data: DataSet, path: Path) -> DataSet:
    """The prompts of a CSV file with the columns `prompt`, `classname` and `classidx`, as the published code has them.

    Raises:
        ValueError: a class has no prompt or several, or the columns are others.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    prompts: dict[int, str] = {}
    for number, row in enumerate(rows, start=2):
        try:
            label, prompt = int(row["classidx"]), row["prompt"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"prompts: got line {number} of {path}, expected the columns prompt, classname and classidx"
            ) from error
        if label in prompts or not 0 <= label < len(data.classes) or not prompt:
            raise ValueError(
                f"prompts: got {prompt!r} for class {label} in line {number} of {path}, expected one for each of "
                f"{len(data.classes)} classes"
            )
        prompts[label] = prompt
    if len(prompts) != len(data.classes):
        raise ValueError(f"prompts: got {len(prompts)} in {path}, expected one for each of {len(data.classes)} classes")
    return replace(data, prompts=tuple(prompts[i] for i in range(len(prompts))))


READERS: dict[str, Callable[[Path], DataSet]] = {
    "folder": image_folder,
    "imagenet": imagenet,
    "pets": oxford_pets,
    "coco": coco,
}
