"""`bigain search`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as opt
from .text import say, say_lines

if TYPE_CHECKING:
    from ..evaluation.checkpoints import Checkpoint
    from ..evaluation.search.measuring import Samples
    from ..evaluation.search.search import Result, Search
    from ..evaluation.search.turns import TurnFile

_CONFIG, _REPORT, _NUMBERS, _TURNS = _NAMES = ("config.json", "report.md", "search.json", "turns.jsonl")
_GOAL, _SPACE, _IMAGES = "Goal", "What is chosen from", "Images"
# Of the noise schedule, where timesteps are not given.
_LEVELS = (0.2, 0.4, 0.6)
_MOST_ROWS = 16


def search(
    checkpoint: opt.CheckpointOption = None,
    speed: Annotated[
        float | None,
        typer.Option(help="The least error at so many times the speed, such as 1.3.", rich_help_panel=_GOAL),
    ] = None,
    error: Annotated[
        float | None,
        typer.Option(
            help="The most speed at which the denoising error rises by at most this fraction, such as 0.02.",
            rich_help_panel=_GOAL,
        ),
    ] = None,
    per: Annotated[
        str,
        typer.Option(help="block: each by itself; level: all blocks of a level of a U-Net.", rich_help_panel=_SPACE),
    ] = "block",
    methods: Annotated[
        str,
        typer.Option(
            help="By name, with commas between; those that merge do so proportionally.", rich_help_panel=_SPACE
        ),
    ] = "lgtm,iekvd",
    ratios: Annotated[str, typer.Option(help="Of methods that merge.", rich_help_panel=_SPACE)] = "0.3,0.5,0.7",
    factors: Annotated[
        str, typer.Option(help="Of methods that pool: 2, or 1x2 for two columns.", rich_help_panel=_SPACE)
    ] = "1x2,2,4",
    alphas: Annotated[
        str, typer.Option(help="Of IE-KVD: 0 is the average, 1 the nearest token.", rich_help_panel=_SPACE)
    ] = ("0,0.5,0.9,1"),
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder with one subfolder of images for each class. Default: validation and test digits.",
            show_default=False,
            rich_help_panel=_IMAGES,
        ),
    ] = None,
    calibration: Annotated[int, typer.Option(help="Images to search with.", rich_help_panel=_IMAGES)] = 32,
    held_out: Annotated[int, typer.Option(help="Other images, to confirm it on.", rich_help_panel=_IMAGES)] = 64,
    timesteps: Annotated[
        str | None,
        typer.Option(help="At which errors are taken. Default: 0.2, 0.4 and 0.6 of all.", rich_help_panel=_IMAGES),
    ] = None,
    template: Annotated[
        str, typer.Option(help="Prompt of a class, for text-to-image models.", rich_help_panel=_IMAGES)
    ] = "a photo of a {}",
    out: Annotated[Path, typer.Option(help="Folder for config.json, report.md, search.json, turns.jsonl.")] = Path(
        "search"
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what --out has; another goal needs no block measured again.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew over the results in --out.")] = False,
    as_json: opt.JsonOption = False,
    seed: opt.SeedOption = 0,
    batch_size: opt.BatchOption = None,
    device: opt.DeviceOption = None,
    dtype: opt.DtypeOption = "float32",
    threads: opt.ThreadsOption = None,
) -> None:
    """Find what to give each block, for a target speed or an error budget, and confirm it on held-out images.

    Every block is measured under every candidate alone; config.json is for --config, and for load_config in Python.
    Ctrl-C keeps what was measured, and --resume goes on.
    """
    from ..evaluation.checkpoints import load_checkpoint
    from ..evaluation.folders import find_images
    from ..evaluation.harness.engine import default_batch
    from ..evaluation.output import OutputFolder
    from ..evaluation.search.images import digit_samples, folder_samples
    from ..evaluation.search.search import Goal, Search
    from ..evaluation.search.space import candidates_of, groups_of
    from ..evaluation.search.turns import TurnFile
    from ..methods.options import Pair

    opt.set_threads(threads)
    goal = Goal(speed, error)
    candidates = candidates_of(
        methods.split(","),
        opt.fractions("ratios", ratios),
        [Pair().read("factors", part) for part in factors.split(",")],
        opt.fractions("alphas", alphas),
        seed,
    )
    for name, count in (("calibration", calibration), ("held_out", held_out)):
        if count < 2:
            raise ValueError(f"{name}: got {count}, expected at least 2 images")
    if resume and overwrite:
        raise ValueError("resume: got --overwrite with it, expected one of the two")
    given_timesteps = None if timesteps is None else opt.numbers("timesteps", timesteps)
    chosen_device, chosen_dtype = opt.device_and_dtype(device, dtype)
    folder = None if images is None else find_images(images, calibration + held_out)
    with OutputFolder(out, _NAMES, again=resume or overwrite, hint="--resume, --overwrite") as output:
        loaded = load_checkpoint(
            opt.checkpoint_source(checkpoint),
            class_names=() if folder is None else folder.classes,
            template=template,
            device=chosen_device,
            dtype=chosen_dtype,
        )
        groups = groups_of(loaded.denoiser.model, per)
        steps = len(loaded.denoiser.scheduler.alphas_cumprod)
        if folder is None:
            few, more = digit_samples(loaded, calibration, held_out)
        else:
            few, more = folder_samples(loaded, folder, calibration, held_out)
        if batch_size is None:
            batch_size = max(2, min(_MOST_ROWS, default_batch(loaded.denoiser.sample_shape)))
        asked = given_timesteps or [round(level * steps) for level in _LEVELS]
        job = Search(loaded.denoiser, few, more, goal, groups, candidates, asked, batch_size, seed)
        settings = _settings(loaded, few, more)
        settings |= {"timesteps": list(asked), "batch_size": batch_size, "seed": seed, "dtype": dtype}
        settings |= {"template": template} if folder is not None else {}
        file = TurnFile(out / _TURNS, settings, resume)
        if not resume:
            output.clear()
        output.claim(_TURNS)
        result = _run(job, file)
        _write(result, opt.checkpoint_name(checkpoint), settings, output, as_json)


def _settings(loaded: Checkpoint, few: Samples, more: Samples) -> dict[str, Any]:
    """What decides errors and times, besides options."""
    import torch

    from ..evaluation.harness.deciding import digest, machine

    return {
        "weights": loaded.fingerprint(),
        "images": digest({"search": few.keys, "held out": more.keys, "classes": loaded.class_names}),
        "threads": torch.get_num_threads(),
        **machine(loaded.device),
    }


def _run(job: Search, file: TurnFile) -> Result:
    with opt.progress_bar() as progress:
        task = progress.add_task("trying what fits", total=job.total)

        def done(stage: str, passes: int) -> None:
            progress.update(task, advance=passes, description=stage)

        result = job.run(file, done)
        # Candidates that do not fit, and equal ratios, are passes that were not needed.
        progress.update(task, completed=job.total, description="done")
    return result


def _write(result: Result, checkpoint: str, settings: dict[str, Any], output: Any, as_json: bool) -> None:
    from ..evaluation.output import json_text
    from ..evaluation.search.report import markdown, notes, numbers, summary
    from ..methods.files import config_text

    heading = f"Search: {checkpoint}"
    text = json_text({**numbers(result), "checkpoint": checkpoint, "settings": settings})
    about = {"checkpoint": checkpoint, "goal": str(result.goal), "notes": notes(result)}
    output.write_text(_REPORT, markdown(result, heading))
    output.write_text(_NUMBERS, text + "\n")
    output.write_text(_CONFIG, config_text(result.config, about))
    say_lines(text if as_json else summary(result, heading))
    say(f"Config: {output.path / _CONFIG}, report: {output.path / _REPORT}", aside=as_json)
