"""`bigain generate`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as opt
from .generate_prompts import draw_prompts
from .method_options import NOTHING_GIVEN, ConfigOption, GivenOptions, MethodName, read_compression
from .text import counted, say, say_lines

if TYPE_CHECKING:
    import torch

    from ..evaluation.checkpoints import Checkpoint
    from ..evaluation.generate import GenerateConfig
    from ..evaluation.output import OutputFolder

# What a run writes.
_NAMES = ("settings.json", "grid.png", "samples/*")
# Classes drawn when none are asked for.
_DEFAULT_CLASSES = 10
_DEFAULT_IMAGES, _MOST_IMAGES = 40, 10**6
# Pictures in grid.png; all of them are in samples/.
_MOST_IN_GRID = 100


def generate(
    checkpoint: opt.CheckpointOption = None,
    label: Annotated[
        list[str] | None,
        typer.Option(help="Class (name or number), or prompt of a text-to-image model; may be given several times."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="CSV file with the column prompt, and path if images are to have names: an image of each line, "
            "from the noise of its name, in images/. The same command goes on, also in several processes (torchrun).",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(
            help="How many images in all, over the classes in turn; of --prompts the first lines alone. Default: 40, "
            "or all lines.",
            show_default=False,
        ),
    ] = None,
    guidance: Annotated[float, typer.Option(help="Of classifier-free guidance; 1 is without.")] = 1.5,
    steps: Annotated[int, typer.Option(help="Steps of the scheduler.")] = 20,
    scheduler: Annotated[str, typer.Option(help="A class of diffusers.")] = "DDIMScheduler",
    out: Annotated[Path, typer.Option(help="Folder for grid.png, samples/ and settings.json.")] = Path("generated"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the images in --out.")] = False,
    method: MethodName = "none",
    given: GivenOptions = NOTHING_GIVEN,
    config_file: ConfigOption = None,
    share_plan: Annotated[
        bool, typer.Option("--share-plan", help="One plan for both rows of a guidance pair (merge methods).")
    ] = False,
    seed: opt.SeedOption = 0,
    batch_size: Annotated[int | None, typer.Option(help="Images made together.")] = None,
    device: opt.DeviceOption = None,
    dtype: opt.DtypeOption = "float32",
    threads: opt.ThreadsOption = None,
    as_json: opt.JsonOption = False,
) -> None:
    """Generate images with a diffusion model and classifier-free guidance, by DDIM or another scheduler.

    Images are written batch by batch; Ctrl-C keeps them.
    """
    from ..evaluation.checkpoints import load_checkpoint
    from ..evaluation.compression import settings_of, with_shared_plan
    from ..evaluation.generate import GenerateConfig
    from ..evaluation.output import OutputFolder

    opt.set_threads(threads)
    compression = read_compression(method, given, seed, config_file)
    if share_plan:
        with_shared_plan(compression, 2)
    if images is not None and not 1 <= images <= _MOST_IMAGES:
        raise ValueError(f"images: got {images}, expected 1 to {_MOST_IMAGES}")
    batch: dict[str, Any] = {} if batch_size is None else {"batch_size": batch_size}
    config = GenerateConfig(steps=steps, guidance=guidance, seed=seed, scheduler=scheduler, **batch)
    chosen_device, chosen_dtype = opt.device_and_dtype(device, dtype)
    if prompts is not None:
        if label or overwrite:
            raise ValueError(
                "prompts: got --label or --overwrite too, expected --prompts alone; a run goes on by itself"
            )
        draw_prompts(
            prompts,
            images,
            out,
            opt.checkpoint_source(checkpoint),
            config,
            compression,
            share_plan,
            chosen_device,
            chosen_dtype,
            as_json,
        )
        return
    with OutputFolder(out, _NAMES, again=overwrite) as output:
        loaded = load_checkpoint(
            opt.checkpoint_source(checkpoint),
            class_names=tuple(label or ()),
            template="{}",
            device=chosen_device,
            dtype=chosen_dtype,
        )
        classes = [loaded.label_of(name, "label") for name in label or loaded.class_names[:_DEFAULT_CLASSES]]
        labels = [classes[i % len(classes)] for i in range(images or _DEFAULT_IMAGES)]
        settings = {
            **asdict(config),
            "checkpoint": opt.checkpoint_name(checkpoint),
            "compression": settings_of(compression),
        }
        settings |= {"given": given, "share_plan": share_plan, "labels": [loaded.class_names[c] for c in labels]}
        _run(loaded, labels, config, compression, settings, output, as_json)


def _run(
    loaded: Checkpoint,
    labels: list[int],
    config: GenerateConfig,
    compression: object,
    settings: dict[str, Any],
    output: OutputFolder,
    as_json: bool,
) -> None:
    import torch

    from ..evaluation.generate import generate_batches, save_grid

    wanted, kept, count = torch.tensor(labels), [], 0
    batches = generate_batches(
        loaded.denoiser,
        wanted.to(loaded.device),
        config,
        compression=compression,
        share_plan=settings["share_plan"],
    )
    with opt.progress_bar() as progress:
        task = progress.add_task("generating", total=len(labels))
        try:
            for samples in batches:
                pixels = loaded.decode(samples)
                # Only now is it known that nothing refuses the call.
                if not count:
                    output.clear()
                    output.write_text("settings.json", json.dumps(settings, indent=2) + "\n")
                _save_samples(pixels, labels, count, output)
                kept += [pixels] if count < _MOST_IN_GRID else []
                count += len(pixels)
                progress.update(task, advance=len(pixels))
        finally:
            if count:
                made = torch.cat(kept)[:_MOST_IN_GRID]
                title = f"guidance {config.guidance:g}, {config.steps} steps"
                save_grid(made, wanted[: len(made)], loaded.class_names, output.claim("grid.png"), title)
                if as_json:
                    files = [str(output.path / _sample(i, labels)) for i in range(count)]
                    say_lines(json.dumps({"out": str(output.path), "files": files, **settings}, indent=2))
                else:
                    say(f"{counted(count, 'image')} in {output.path}")


def _sample(index: int, labels: list[int]) -> str:
    """The file of a sample, in the folder of the run."""
    return f"samples/{index:05d}_{labels[index]}.png"


def _save_samples(pixels: torch.Tensor, labels: list[int], first: int, output: OutputFolder) -> None:
    """`samples/<index>_<class>.png` for a batch that starts at sample `first`."""
    from PIL import Image

    from ..evaluation.generate import to_pixels
    from ..evaluation.output import replacing

    for i, image in enumerate(to_pixels(pixels), start=first):
        with replacing(output.claim(_sample(i, labels))) as part:
            Image.fromarray(image).save(part, format="PNG")
