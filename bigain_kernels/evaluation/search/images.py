"""The images of a search: some to search with and others to confirm it on."""

from __future__ import annotations

from itertools import chain

import torch

from ..checkpoints import Checkpoint
from ..data import DIGITS_SIZE, MNIST_SIZE, Digits, load_digits, load_mnist
from ..folders import ImageFolder
from ..inputs import FolderInputs
from ..mnist_models import SIZES, resized
from .measuring import Samples


def digits_for(checkpoint: Checkpoint, split: str) -> Digits:
    """The digits that come with the package, as the model of a shipped checkpoint sees them.

    Raises:
        ValueError: the model draws images of another shape.
    """
    channels, height, width = checkpoint.image_shape
    if channels == 1 and height == width == DIGITS_SIZE:
        return load_digits(split)
    if channels == 1 and height == width and height in (MNIST_SIZE, SIZES["dit"]):
        digits = load_mnist(split)
        kind = "unet" if height == MNIST_SIZE else "dit"
        return Digits(resized(kind, digits.images, height), digits.labels)
    raise ValueError(f"images: got none, expected a folder: this model draws {checkpoint.image_shape} images")


def digit_samples(checkpoint: Checkpoint, calibration: int, held_out: int) -> tuple[Samples, Samples]:
    """The first validation digits to search with, and the first test digits to confirm it on.

    Raises:
        ValueError: the model draws images of another shape, or there are not so many.
    """
    found = []
    for name, split, count in (("calibration", "validation", calibration), ("held_out", "test", held_out)):
        digits = digits_for(checkpoint, split)
        if count > len(digits):
            raise ValueError(f"{name}: got {count}, expected at most {len(digits)}, the {split} digits")
        clean = checkpoint.encode(digits.images[:count])
        found.append(Samples(clean, digits.labels[:count].to(clean.device), tuple(range(count))))
    return found[0], found[1]


def folder_samples(
    checkpoint: Checkpoint, folder: ImageFolder, calibration: int, held_out: int
) -> tuple[Samples, Samples]:
    """Of a folder in its fixed order, the first images to search with and the next to confirm it on.

    Raises:
        ValueError: there are not so many, one is damaged, or a class folder has a name that is no class of the model.
    """
    if len(folder) < calibration + held_out:
        raise ValueError(
            f"images: got {len(folder)} in {folder.root}, expected {calibration} to search with and {held_out} held out"
        )
    inputs = FolderInputs(checkpoint, folder, False)
    parts = list(inputs.parts(()))
    clean = torch.cat([checkpoint.encode(pixels) for _, pixels, _ in parts])
    labels = torch.cat([labels for _, _, labels in parts]).to(clean.device)
    keys = tuple(chain.from_iterable(indices for indices, _, _ in parts))
    bounds = slice(0, calibration), slice(calibration, calibration + held_out)
    first, second = (Samples(clean[part], labels[part], keys[part]) for part in bounds)
    return first, second
