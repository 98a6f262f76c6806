"""Prompts as a pipeline encodes them, in parts, and kept on disk: every run asks for the same ones."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .output import replacing

# Prompts that are encoded together: the captions of a data set are thousands.
_BATCH = 64
_NAMES = ("embeddings", "pooled")


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: Sequence[str], cache: Path | None = None) -> dict[str, torch.Tensor]:
    """`embeddings` (n, L, D), and of SDXL `pooled` (n, D') beside them, on the device of the U-Net.

    Args:
        pipe: a pipeline of Stable Diffusion.
        prompts: n texts.
        cache: folder of what was encoded before, in files named by text encoders and prompts; None keeps nothing.

    Raises:
        ValueError: a file that is there is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    device = next(pipe.unet.parameters()).device
    file = None if cache is None else cache / f"{_name(pipe, prompts)}.safetensors"
    if file is not None and file.exists():
        try:
            return {name: tensor.to(device) for name, tensor in load_file(file).items()}
        except SafetensorError as error:
            raise ValueError(f"prompts: got {file}, expected what bigain wrote there ({error})") from error
    parts = []
    for first in range(0, len(prompts), _BATCH):
        encoded = pipe.encode_prompt(
            list(prompts[first : first + _BATCH]),
            device=device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        is_xl = pipe.unet.config.addition_embed_type == "text_time"
        parts.append((encoded[0], encoded[2]) if is_xl else (encoded[0],))
    found = {name: torch.cat(part) for name, part in zip(_NAMES, zip(*parts, strict=True), strict=False)}
    if file is not None:
        with replacing(file) as unfinished:
            save_file({name: tensor.cpu().contiguous() for name, tensor in found.items()}, unfinished)
    return found


def _name(pipe: Any, prompts: Sequence[str]) -> str:
    """24 hexadecimal digits of everything that decides the embeddings: text encoders, tokens, and their device kind."""
    digest = hashlib.sha256()
    for part in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        if part is None:
            continue
        device = next(part.parameters()).device.type
        for name, value in part.state_dict().items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)} {device}\n".encode())
            content: Any = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digest.update(content)
    for tokenizer in (pipe.tokenizer, getattr(pipe, "tokenizer_2", None)):
        if tokenizer is not None:
            tokens = tokenizer(list(prompts), padding=True, truncation=True)["input_ids"]
            digest.update(repr((tokenizer.model_max_length, tokens)).encode())
    return digest.hexdigest()[:24]


def read_prompts(path: Path) -> list[tuple[str, str]]:
    """Name and prompt of each line of a CSV file with the column `prompt`, and `path` where it has one.

    Without that column a line goes by its number, from 000000. What is drawn is of the noise of its name.

    Raises:
        ValueError: no such column, an empty prompt, a name twice, or one that leads out of the folder.
        FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"prompts: got {path}, expected a CSV file with the column prompt")
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    found: dict[str, str] = {}
    for number, row in enumerate(rows):
        name, prompt = row.get("path") or f"{number:06d}", (row.get("prompt") or "").strip()
        if not prompt:
            raise ValueError(f"prompts: got {path} without a prompt in line {number + 2}, expected the column prompt")
        if name in found or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"prompts: got path {name!r} in line {number + 2} of {path}, expected each once, below")
        found[name] = prompt
    if not found:
        raise ValueError(f"prompts: got {path} with no lines, expected the column prompt and a line for each image")
    return list(found.items())
