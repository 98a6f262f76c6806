"""What a VAE makes of images, kept on disk: every method and every seed asks for the same latents."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from ..checkpoints import Checkpoint
from ..output import replacing


class CachedLatents:
    """Encodes images, or reads what was encoded before.

    Args:
        folder: of the files, named by the pixels that they were made of.
        checkpoint: with the VAE; models of pixels have nothing to keep.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint) -> None:
        self._folder, self._checkpoint = folder, checkpoint

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, C, H, W) pixels in [-1, 1] to what the model denoises, on its device.

        Raises:
            ValueError: a file that is there is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file, save_file

        if self._checkpoint.vae is None:
            return self._checkpoint.encode(pixels)
        name = hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()[:24]
        file = self._folder / f"{name}.safetensors"
        if file.exists():
            try:
                return load_file(file)["latents"].to(self._checkpoint.device)
            except (SafetensorError, KeyError) as error:
                raise ValueError(f"latents: got {file}, expected what bigain wrote there ({error})") from error
        latents = self._checkpoint.encode(pixels)
        with replacing(file) as part:
            save_file({"latents": latents.cpu().contiguous()}, part)
        return latents
