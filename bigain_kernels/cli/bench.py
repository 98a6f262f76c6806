"""`bigain bench`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as opt
from .text import counted, say_lines

if TYPE_CHECKING:
    import torch

    from ..evaluation.checkpoints import Checkpoint
    from ..methods.mixed import Compression

_NAMES = ("table.md", "rows.json", "picture.png")
_PHOTOGRAPHS = ("china.jpg", "flower.jpg")


def bench(
    checkpoint: opt.CheckpointOption = None,
    size: Annotated[
        int | None, typer.Option(help="Side of the images in pixels. Default: that of the model.", show_default=False)
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of images. Default: test digits, or two photographs.", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images, and rows of a forward pass.")] = 2,
    ratio: Annotated[float, typer.Option(help="Of the merge methods.")] = 0.5,
    factor: Annotated[int, typer.Option(help="Of the pooling methods.")] = 2,
    config_file: Annotated[
        list[Path] | None,
        typer.Option("--config", help="A file of `bigain search`, compared too; may be given again."),
    ] = None,
    turns: Annotated[int, typer.Option(help="Forward passes of each method that are timed.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder for table.md, rows.json and picture.png.")] = Path("bench"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results in --out.")] = False,
    as_json: opt.JsonOption = False,
    seed: opt.SeedOption = 0,
    device: opt.DeviceOption = None,
    dtype: opt.DtypeOption = "float32",
    threads: opt.ThreadsOption = None,
) -> None:
    """Measure a model of your own: as it is against the methods, in time, memory and denoising error."""
    from ..evaluation.bench import bench as measure
    from ..evaluation.bench import draw, markdown
    from ..evaluation.checkpoints import load_checkpoint
    from ..evaluation.output import OutputFolder, json_text, replacing
    from ..methods import load_config

    opt.set_threads(threads)
    for name, count in (("batch_size", batch_size), ("turns", turns)):
        if count < 1:
            raise ValueError(f"{name}: got {count}, expected at least 1")
    more = {str(path): load_config(path) for path in config_file or ()}
    chosen_device, chosen_dtype = opt.device_and_dtype(device, dtype)
    with OutputFolder(out, _NAMES, again=overwrite) as output:
        loaded = load_checkpoint(
            opt.checkpoint_source(checkpoint), class_names=("picture",), device=chosen_device, dtype=chosen_dtype
        )
        pixels = _images(loaded, images, size, batch_size)
        rows = measure(loaded, {**_methods(loaded, ratio, factor), **more}, pixels, turns=turns, seed=seed)
        shown = f"{counted(len(pixels), 'image')} of {pixels.shape[-2]} x {pixels.shape[-1]}, {chosen_device}, {dtype}"
        heading = (
            f"{opt.checkpoint_name(checkpoint)}, {shown}, ratio {ratio}, factor {factor}, {counted(turns, 'turn')}"
        )
        output.clear()
        table = markdown(rows, heading)
        output.write_text("table.md", table)
        text = json_text([asdict(row) for row in rows])
        output.write_text("rows.json", text + "\n")
        with replacing(output.claim("picture.png")) as path:
            draw(rows, path, heading)
    say_lines(text if as_json else table)


def _methods(loaded: Checkpoint, ratio: float, factor: int) -> dict[str, Compression | None]:
    """Those to compare, at the first level at which the model has attention."""
    from ..diffusers.finding import find_model
    from ..methods import ABMConfig, IEKVDConfig, LGTMConfig, ToDoConfig, ToMeConfig

    model, family = find_model(loaded.denoiser.model)
    level = min(layer.level for layer in family.layers(model) if layer.kind == "attn1")
    merge: dict[str, Any] = {"ratio": ratio, "max_downsample": level}
    pool: dict[str, Any] = {"factor": factor, "max_downsample": level}
    return {
        "none": None,
        "ToMe": ToMeConfig(**merge),
        "L-GTM": LGTMConfig(**merge),
        "L-GTM, proportional": LGTMConfig(**merge, proportional=True),
        "ABM": ABMConfig(**merge),
        "ToDo": ToDoConfig(**pool),
        "IE-KVD": IEKVDConfig(**pool),
    }


def _images(loaded: Checkpoint, folder: Path | None, size: int | None, count: int) -> torch.Tensor:
    """(count, C, H, W) images for the model."""
    import torch
    import torch.nn.functional as F

    from ..evaluation.data import load_digits, load_photograph
    from ..evaluation.images import read_image

    channels, height, width = loaded.image_shape
    if size is not None:
        if size < 8:
            raise ValueError(f"size: got {size}, expected at least 8 pixels")
        height = width = size
    if folder is not None:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())[:count]
        if not paths:
            raise FileNotFoundError(f"images: got {folder}, expected a folder with images")
        return torch.stack([read_image(path, (channels, height, width)) for path in paths])
    if channels == 1:
        found = load_digits("test").images[:count]
    else:
        photographs = [load_photograph(_PHOTOGRAPHS[row % 2]) * 2 - 1 for row in range(count)]
        found = torch.stack([picture[:, :, 106:533] for picture in photographs])
    return F.interpolate(found, (height, width), mode="bicubic", antialias=True).clamp(-1, 1)
