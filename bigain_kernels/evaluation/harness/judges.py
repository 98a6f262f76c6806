"""Networks that look at drawings: features for distances, logits for the inception score, and how well text fits.

None but the digit classifier comes with the package, and nothing is fetched: what is not on disk is left out, with a
line that says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoints import TINY_DIT, load_classifier
from ..data import DIGITS_SIZE, load_digits
from ..strict_loading import check_finite, naming

# The weights of Heusel et al. as torch-fidelity and pytorch-fid give them, by their names, which end in their hash.
INCEPTION_HASH = "6726825d"
INCEPTION_FILES = (
    f"weights-inception-2015-12-05-{INCEPTION_HASH}.pth",
    f"pt_inception-2015-12-05-{INCEPTION_HASH}.pth",
)
INCEPTION_SIDE = 299


class Look(NamedTuple):
    """(n, features) and (n, classes) of n images."""

    features: Tensor
    logits: Tensor


class Judge(Protocol):
    """A network that gives features of images.

    Attributes:
        name: what the report calls it.
    """

    name: str

    def look(self, images: Tensor) -> Look:
        """What it sees in (n, 3 or 1, H, W) images in [-1, 1]; on the CPU."""
        ...


class DigitJudge:
    """The classifier of digits of 16 x 16 that the package brings; its features scaled to order one for the kernel."""

    name = "the digit classifier of the package"

    def __init__(self) -> None:
        self._model = load_classifier(TINY_DIT)
        self._scale = self._model.features(load_digits("validation").images).detach().square().mean().sqrt()

    @torch.no_grad()
    def look(self, images: Tensor) -> Look:
        features = self._model.features(images[:, :1])
        return Look(features / self._scale, self._model.head(features))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def find_inception(given: Path | None = None) -> Path:
    """The file of Inception's weights, its hash checked.

    Args:
        given: the file; None looks in torch's cache, `$TORCH_HOME/hub/checkpoints`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is another file.
    """
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    candidates = [cache / name for name in INCEPTION_FILES] if given is None else [given]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        where = f"{given}" if given else f"none in {cache}"
        raise FileNotFoundError(f"inception: got {where}, expected {INCEPTION_FILES[0]}")
    found = _sha256(path)
    if not found.startswith(INCEPTION_HASH):
        raise ValueError(
            f"inception: got {path} with SHA-256 {found[:8]}..., expected {INCEPTION_HASH}... (the weights of "
            "2015-12-05 that FID is defined by; those of torchvision and timm are of another network)"
        )
    return path


class InceptionJudge:
    """Inception v3 with the weights that FID is defined by, as torch-fidelity has it.

    Args:
        path: of the weights, from `find_inception`.
        device: where.

    Raises:
        ImportError: torch-fidelity, or the torchvision that it needs, is not there or does not load.
        ValueError: the file holds other weights.
    """

    name = "Inception v3"

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError) as error:
            # A torchvision that was built for another torch fails with a RuntimeError.
            reason = str(error).splitlines()[0]
            raise ImportError(
                f"inception: needs pip install torch-fidelity, and a torchvision that fits this torch ({reason})"
            ) from error
        with naming(path, "the weights of Inception v3 for FID", "inception"):
            # What loads so is no program: torch-fidelity itself reads the file without that check.
            torch.load(path, weights_only=True, map_location="cpu")
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
            check_finite(network, path)
        self._network, self._device = network.to(device), device

    @torch.no_grad()
    def look(self, images: Tensor) -> Look:
        pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        features, logits = self._network(pixels.expand(-1, 3, -1, -1).to(self._device))
        return Look(features.cpu(), logits.cpu())


class ClipJudge:
    """How well text fits images: 100 times the cosine of their embeddings, at least 0.

    Hessel et al., "CLIPScore", 2021, without its factor of 2.5.

    Args:
        folder: of a CLIP of transformers, with its tokenizer and image processor.
        device: where.

    Raises:
        ImportError: transformers is not there.
        ValueError: the folder holds no such model.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        try:
            from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel
        except ImportError as error:
            raise ImportError(f"clip: got {folder}, which needs: pip install transformers") from error
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"clip: got {folder}, expected the folder of a CLIP model with config.json")
        with naming(folder, "a CLIP of transformers with tokenizer and image processor", "clip"):
            model: Any = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            self._tokens: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._pixels: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True, use_fast=False)
            check_finite(model, folder)
        self._model, self._device = model.to(device).eval(), device

    @torch.no_grad()
    def score(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """(n,) scores of (n, 3 or 1, H, W) images in [-1, 1] and their texts, cut where the model ends."""
        from PIL import Image

        from ..generate import to_pixels

        pictures = [Image.fromarray(pixels) for pixels in to_pixels(images)]
        longest = self._model.config.text_config.max_position_embeddings
        tokens = self._tokens(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        pixels = self._pixels(images=pictures, return_tensors="pt")["pixel_values"]
        found = self._model(**tokens.to(self._device), pixel_values=pixels.to(self._device))
        # Of length one already.
        return (100 * (found.image_embeds * found.text_embeds).sum(dim=1)).clamp_min(0).cpu()


@dataclass(frozen=True)
class Judges:
    """Who judges the drawings, and in a line each who does not."""

    features: Judge | None = None
    clip: ClipJudge | None = None
    missing: tuple[str, ...] = ()


def find_judges(
    shape: tuple[int, int, int], digits: bool, inception: Path | None, clip: Path | None, device: torch.device | str
) -> Judges:
    """The judges that are there.

    Args:
        shape: (C, H, W) of the drawings.
        digits: whether these are the digits of the package.
        inception, clip: file and folder that were asked for; then what is wrong with them ends the run.
        device: where they compute.

    Raises:
        ValueError, FileNotFoundError, ImportError: of what was asked for by name.
    """
    features: Judge | None = None
    missing = []
    if inception is None and digits and shape == (1, DIGITS_SIZE, DIGITS_SIZE):
        features = DigitJudge()
    else:
        try:
            features = InceptionJudge(find_inception(inception), device)
        except (FileNotFoundError, ImportError) as error:
            if inception is not None:
                raise
            missing.append(f"KID, FID, IS, precision and recall: {error} (--inception)")
    text = None if clip is None else ClipJudge(clip, device)
    if clip is None:
        missing.append("CLIP score: no model (--clip)")
    return Judges(features, text, tuple(missing))


def as_published(images: Tensor, jpeg: bool) -> Tensor:
    """Images (n, 3, H, W) in [-1, 1] as pytorch-fid sees them: 299 x 299, squashed, bilinear, without smoothing.

    Args:
        images: drawings, or a whole picture of any shape.
        jpeg: pass them through JPEG of quality 100 first, as the published code stores its drawings.
    """
    if jpeg:
        images = torch.cat([_through_jpeg(image) for image in images])
    side = (INCEPTION_SIDE, INCEPTION_SIDE)
    return F.interpolate(images.float(), size=side, mode="bilinear", align_corners=False)


def _through_jpeg(image: Tensor) -> Tensor:
    import io

    import numpy as np
    from PIL import Image

    from ..generate import to_pixels

    buffer = io.BytesIO()
    Image.fromarray(to_pixels(image[None])[0]).save(buffer, format="JPEG", quality=100)
    pixels = np.asarray(Image.open(buffer), dtype=np.float32)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1
