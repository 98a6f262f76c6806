"""`bigain classify`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as opt
from .method_options import NOTHING_GIVEN, ConfigOption, GivenOptions, MethodName, read_compression
from .text import counted, say, say_lines

if TYPE_CHECKING:
    from ..evaluation.checkpoints import Checkpoint
    from ..evaluation.classify import ClassificationResult, ClassifierConfig
    from ..evaluation.inputs import Inputs
    from ..evaluation.output import OutputFolder

_RESULTS, _SUMMARY = _NAMES = ("results.jsonl", "summary.json")


def classify(
    checkpoint: opt.CheckpointOption = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder with one subfolder of images for each class. Default: the test digits.", show_default=False
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Classify so many images only.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for results.jsonl and summary.json.")] = Path("classified"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the results in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew over the results in --out.")] = False,
    skip_damaged: Annotated[
        bool, typer.Option("--skip-damaged", help="Leave out images that cannot be read, and list them.")
    ] = False,
    method: MethodName = "none",
    given: GivenOptions = NOTHING_GIVEN,
    config_file: ConfigOption = None,
    share_plan: Annotated[
        bool, typer.Option("--share-plan", help="--plans mean: one plan for all classes of an image (merge methods).")
    ] = False,
    plans: Annotated[
        str | None,
        typer.Option(
            help="own: every class merges for itself (default). mean: one plan for the classes of an image, from their "
            "mean; they fill one batch. null: one from the null prompt, for any number of classes."
        ),
    ] = None,
    timesteps: Annotated[
        str | None, typer.Option(help="Timesteps of the noise samples in turn, such as 300,500.")
    ] = None,
    stages: Annotated[
        str | None,
        typer.Option(help="SAMPLES:KEEP,...: 2:4,4:1 draws 2 samples, keeps 4 classes, draws up to 4, keeps 1."),
    ] = None,
    score: Annotated[
        str, typer.Option(help="standardised (every timestep has the same say) or mean.")
    ] = "standardised",
    template: Annotated[str, typer.Option(help="Prompt of a class, for text-to-image models.")] = "a photo of a {}",
    seed: opt.SeedOption = 0,
    batch_size: opt.BatchOption = None,
    device: opt.DeviceOption = None,
    dtype: opt.DtypeOption = "float32",
    threads: opt.ThreadsOption = None,
    as_json: opt.JsonOption = False,
) -> None:
    """Classify images with a diffusion model: the class with the smallest denoising error wins.

    Results are written image by image. Ctrl-C keeps them, and --resume goes on.
    """
    from ..evaluation.checkpoints import load_checkpoint
    from ..evaluation.compression import settings_of, with_shared_plan
    from ..evaluation.folders import find_images
    from ..evaluation.harness.deciding import machine
    from ..evaluation.harness.kept_plans import PlanBook, with_kept_plans
    from ..evaluation.inputs import DigitInputs, FolderInputs
    from ..evaluation.output import OutputFolder
    from ..evaluation.records import ResultsFile

    opt.set_threads(threads)
    compression = read_compression(method, given, seed, config_file)
    if share_plan and plans not in (None, "mean"):
        raise ValueError(f"plans: got {plans!r} with --share-plan, which is --plans mean, expected one of the two")
    if share_plan:
        with_shared_plan(compression, 2)
    plans = plans or ("mean" if share_plan else "own")
    if plans == "published":
        raise ValueError("plans: got 'published', expected own, mean or null; that one is of `bigain reproduce`")
    with_kept_plans(compression, plans, PlanBook())
    if limit is not None and limit < 1:
        raise ValueError(f"limit: got {limit}, expected at least 1")
    if skip_damaged and images is None:
        raise ValueError("skip_damaged: got it without --images, expected a folder that it is for")
    if resume and overwrite:
        raise ValueError("resume: got --overwrite with it, expected one of the two")
    chosen_device, chosen_dtype = opt.device_and_dtype(device, dtype)
    folder = find_images(images, limit) if images is not None else None
    with OutputFolder(out, _NAMES, again=resume or overwrite, hint="--resume, --overwrite") as output:
        loaded = load_checkpoint(
            opt.checkpoint_source(checkpoint),
            class_names=folder.classes if folder is not None else (),
            template=template,
            device=chosen_device,
            dtype=chosen_dtype,
        )
        config = _config(loaded, timesteps, stages, score, seed, batch_size)
        data = DigitInputs(loaded, limit) if folder is None else FolderInputs(loaded, folder, skip_damaged)
        settings = {
            "checkpoint": opt.checkpoint_name(checkpoint),
            "weights": loaded.fingerprint(),
            "images": "digits" if images is None else str(images.resolve()),
            "compression": settings_of(compression),
            "plans": plans,
            "stages": config.stages,
            "timesteps": config.timesteps,
            "score": score,
            "seed": seed,
            "dtype": dtype,
            "template": template,
            **machine(loaded.device),
        }
        if folder is not None:
            # One class more makes another question of every image.
            settings["class_names"] = hashlib.sha256(json.dumps(loaded.class_names).encode()).hexdigest()[:16]
        results = ResultsFile(
            output.claim(_RESULTS),
            settings,
            resume,
            classes=loaded.denoiser.num_classes,
            before_first=lambda: (out / _SUMMARY).unlink(missing_ok=True),
        )
        for image in results.images:
            if image.label != data.labels.get(image.index, image.label):
                raise ValueError(
                    f"resume: got {results.path} with label {image.label} for image {image.index}, expected "
                    f"{data.labels[image.index]}, its class"
                )
        with results:
            before = _results_of(data, results.result)
            if before.images:
                say(f"{counted(len(before.images), 'image')} classified before", aside=as_json)
            try:
                _run(loaded, data, config, compression, plans, results)
            finally:
                summary = _summarise(_results_of(data, results.result), data, settings, given, output)
                _show(summary, data, output, as_json)
    if data.damaged and len(data.damaged) == len(folder or ()):
        raise ValueError(f"images: got {images} with damaged images alone, expected some that can be read")


def _config(
    loaded: Checkpoint, timesteps: str | None, stages: str | None, score: str, seed: int, batch_size: int | None
) -> ClassifierConfig:
    from ..evaluation.classify import ClassifierConfig, default_stages

    given: dict[str, Any] = {"score": score, "seed": seed, "stages": default_stages(loaded.denoiser.num_classes)}
    if timesteps is not None:
        given["timesteps"] = opt.numbers("timesteps", timesteps)
    if batch_size is not None:
        given["batch_size"] = batch_size
    if stages is not None:
        pairs = [opt.numbers("stages", part.replace(":", ",")) for part in stages.split(",")]
        if any(len(stage) != 2 for stage in pairs):
            raise ValueError(f"stages: got {stages!r}, expected SAMPLES:KEEP,...")
        given["stages"] = tuple(pairs)
    return ClassifierConfig(**given)


def _results_of(data: Inputs, result: ClassificationResult) -> ClassificationResult:
    """The results of these images; a file that is gone on with may hold more."""
    from ..evaluation.classify import ClassificationResult

    chosen = set(data.indices)
    return ClassificationResult([image for image in result.images if image.index in chosen])


def _run(
    loaded: Checkpoint, data: Inputs, config: ClassifierConfig, compression: Any, plans: str, results: Any
) -> None:
    from ..evaluation.classify import Classifier

    known = {image.index for image in results.images}
    before = _results_of(data, results.result).correct
    done, right = len(before), int(before.sum())
    with (
        opt.progress_bar() as progress,
        Classifier(loaded.denoiser, config, compression=compression, share_plan=plans) as classifier,
    ):
        task = progress.add_task("classifying", total=len(data.indices), completed=done)

        def record(image: Any) -> None:
            nonlocal done, right
            results.add(image)
            done, right = done + 1, right + image.correct
            progress.update(task, advance=1, description=f"accuracy {right / done:.3f}")

        for indices, pixels, labels in data.parts(known):
            classifier.classify(loaded.encode(pixels), labels, indices=indices, record=record)


def _summarise(
    result: ClassificationResult, data: Inputs, settings: dict[str, Any], given: GivenOptions, output: OutputFolder
) -> dict[str, Any] | None:
    """Write `summary.json`, and return its content; None where no image is classified yet."""
    if not result.images:
        return None
    summary: dict[str, Any] = {
        "images": len(result.images),
        "damaged": [str(image.path) for image in data.damaged],
        "accuracy": result.accuracy,
        "accuracy_interval": [result.interval.low, result.interval.high],
        "evaluations": result.evaluations,
        "seconds": result.seconds,
        "settings": settings,
        "given": given,
    }
    output.write_text(_SUMMARY, json.dumps(summary, indent=2) + "\n")
    return summary


def _show(summary: dict[str, Any] | None, data: Inputs, output: OutputFolder, as_json: bool) -> None:
    for image in data.damaged:
        say(f"left out {image.path}: {image.reason}", aside=as_json)
    if summary is None:
        return
    if as_json:
        say_lines(json.dumps({**summary, "out": str(output.path)}, indent=2))
        return
    damaged = f", {len(data.damaged)} damaged left out" if data.damaged else ""
    low, high = summary["accuracy_interval"]
    images = counted(summary["images"], "image")
    say(
        f"accuracy {summary['accuracy']:.4f} (95 %: {low:.4f} to {high:.4f}) on {images}{damaged}; "
        f"{summary['evaluations']} forward evaluations in {summary['seconds']:.1f} s; results in {output.path}"
    )
