"""What the demo works on: a shipped model with the images, the classifier and the settings that belong to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..methods.files import load_config
from ..methods.mixed import Compression
from .checkpoints import SHIPPED, Checkpoint, load_checkpoint, load_classifier
from .data import DIGITS_SIZE, Digits, load_digits, load_mnist
from .mnist_models import resized
from .tiny_models import DigitClassifier

# In the folder of a checkpoint: a config that is shown beside the others.
SEARCHED_FILE = "searched.json"


@dataclass(frozen=True)
class Settings:
    """How a model is asked, as its validation images chose it.

    Attributes:
        title: what the model is called in tables.
        frontier: timesteps at which the denoising error is compared.
        stages, timesteps: of the classifier, see `ClassifierConfig`.
        guidance: of generation.
        blocks: transformer blocks that bear compression better than the others, if there are such.
    """

    title: str
    frontier: tuple[int, ...]
    stages: tuple[tuple[int, int], ...]
    timesteps: tuple[int, ...]
    guidance: float
    blocks: tuple[int, ...] = ()


SETTINGS = {
    "unet": Settings(
        "U-Net",
        (200, 400, 600),
        ((1, 5), (2, 4), (4, 2), (8, 1)),
        (750, 700, 650, 775, 675, 725, 600, 800),
        2.0,
    ),
    "dit": Settings("DiT", (200, 400, 600), ((1, 4), (2, 2), (4, 1)), (350, 250, 450, 200), 2.0, blocks=(0, 3)),
    "digits": Settings("DiT of 64 tokens", (100, 300, 500), ((1, 4), (2, 1)), (350, 150), 1.5),
}


@dataclass(frozen=True)
class Subject:
    """A model, its images and its judge.

    Attributes:
        key: "unet" or "dit", the models of MNIST, or "digits", the small one of tests.
        settings: see `Settings`.
        checkpoint: the model.
        classifier: names digits of 16 x 16 pixels; its features carry the kernel distance.
        validation, test: images as the model sees them; what is chosen is chosen on the first, what is reported is of
            the second.
        searched: the config that `bigain search` found for the model, where `SEARCHED_FILE` lies beside it.
    """

    key: str
    settings: Settings
    checkpoint: Checkpoint
    classifier: DigitClassifier
    validation: Digits
    test: Digits
    searched: Compression | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens of the finest layer, (rows, columns)."""
        config: Any = self.checkpoint.denoiser.model.config
        side = self.checkpoint.denoiser.sample_shape[-1] // int(config.get("patch_size") or 1)
        return side, side

    def judged(self, images: torch.Tensor) -> torch.Tensor:
        """Images (n, 1, s, s) of the model as the classifier sees them: (n, 1, 16, 16)."""
        if images.shape[-1] == DIGITS_SIZE:
            return images
        return torch.nn.functional.interpolate(images, size=(DIGITS_SIZE,) * 2, mode="area")


def load_subject(key: str, folder: Path | None = None) -> Subject:
    """The subject of a name of `SETTINGS`; `folder`: another checkpoint of the same kind.

    Raises:
        ValueError: no such name.
        FileNotFoundError: no checkpoint, classifier or images.
    """
    if key not in SETTINGS:
        raise ValueError(f"model: got {key!r}, expected one of {list(SETTINGS)}")
    folder = folder or SHIPPED["tiny-dit" if key == "digits" else f"mnist-{key}"]
    checkpoint = load_checkpoint(folder)

    def images(split: str) -> Digits:
        if key == "digits":
            return load_digits(split)
        digits = load_mnist(split)
        return Digits(resized(key, digits.images, checkpoint.denoiser.sample_shape[-1]), digits.labels)

    searched = load_config(folder / SEARCHED_FILE) if (folder / SEARCHED_FILE).is_file() else None
    classifier = load_classifier(folder)
    return Subject(key, SETTINGS[key], checkpoint, classifier, images("validation"), images("test"), searched)
