"""What `bigain classify` classifies: an image folder, or else the test digits."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Protocol

import torch

from .checkpoints import Checkpoint
from .data import MNIST_SIZE, load_digits, load_mnist
from .folders import ImageFolder
from .images import DamagedImage, read_image

# Images read, encoded and kept in memory at a time.
_CHUNK = 64

Part = tuple[list[int], torch.Tensor, torch.Tensor]


class Inputs(Protocol):
    """Images with their labels.

    Attributes:
        indices: what each image goes by in the results.
        labels: the label of each image, by its index.
        damaged: the images that were left out so far.
    """

    indices: list[int]
    labels: dict[int, int]
    damaged: list[DamagedImage]

    def parts(self, known: Collection[int]) -> Iterator[Part]:
        """Indices, images (n, C, H, W) and labels (n,) of all images that are not `known`, some at a time."""
        ...


class DigitInputs:
    """The first `limit` test digits, of MNIST for a model as large as these; the index of one is its place among them.

    Raises:
        ValueError: the model draws images of another shape.
    """

    def __init__(self, checkpoint: Checkpoint, limit: int | None) -> None:
        mnist = checkpoint.image_shape == (1, MNIST_SIZE, MNIST_SIZE)
        self._digits = load_mnist("test") if mnist else load_digits("test")
        self.indices = list(range(len(self._digits)))[:limit]
        self.labels = dict(enumerate(self._digits.labels[: len(self.indices)].tolist()))
        self.damaged: list[DamagedImage] = []
        if checkpoint.image_shape != tuple(self._digits.images.shape[1:]):
            raise ValueError(f"images: got none, expected a folder: this model draws {checkpoint.image_shape} images")

    def parts(self, known: Collection[int]) -> Iterator[Part]:
        left = [index for index in self.indices if index not in known]
        for first in range(0, len(left), _CHUNK):
            part = left[first : first + _CHUNK]
            yield part, self._digits.images[part], self._digits.labels[part]


class FolderInputs:
    """The images of a folder; the index of one is its `images.identity`, whatever else lies in the folder.

    Args:
        checkpoint: gives the shape of images and the labels of class names.
        folder: the images.
        skip_damaged: leave out what cannot be read. Otherwise the first such file is raised, once all images before it
            have been given out.

    Raises:
        ValueError: a class folder has a name that is no class of the model.
        DamagedImage: a file cannot be opened.
    """

    def __init__(self, checkpoint: Checkpoint, folder: ImageFolder, skip_damaged: bool = False) -> None:
        self._checkpoint, self._folder, self._skip = checkpoint, folder, skip_damaged
        of_class = {name: checkpoint.label_of(name, "images") for name in folder.classes}
        self.damaged: list[DamagedImage] = []
        self._places: dict[int, int] = {}
        for place in range(len(folder)):
            try:
                self._places[folder.identity(place)] = place
            except DamagedImage as error:
                if not skip_damaged:
                    raise
                self.damaged.append(error)
        self.indices = list(self._places)
        self.labels = {index: of_class[folder.names[place]] for index, place in self._places.items()}

    def parts(self, known: Collection[int]) -> Iterator[Part]:
        left = [index for index in self.indices if index not in known]
        for first in range(0, len(left), _CHUNK):
            part, end = self._read(left[first : first + _CHUNK])
            if part is not None:
                yield part
            if end is not None:
                raise end

    def _read(self, indices: list[int]) -> tuple[Part | None, DamagedImage | None]:
        """What could be read of `indices`, and the damaged image at which it ended."""
        rows: list[tuple[int, torch.Tensor, int]] = []
        end = None
        for index in indices:
            place = self._places[index]
            try:
                pixels = read_image(self._folder.paths[place], self._checkpoint.image_shape)
            except DamagedImage as error:
                if not self._skip:
                    end = error
                    break
                self.damaged.append(error)
            else:
                rows.append((index, pixels, self.labels[index]))
        if not rows:
            return None, end
        chosen, images, labels = zip(*rows, strict=True)
        return (list(chosen), torch.stack(images), torch.tensor(labels)), end
