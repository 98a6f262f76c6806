"""`bigain classify`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as opt

if TYPE_CHECKING:
    import torch

    from ..evaluation.checkpoints import Checkpoint
    from ..evaluation.classify import ClassificationResult, ClassifierConfig
    from ..evaluation.folders import ImageFolder

# Images read, encoded and kept in memory at a time.
_CHUNK = 64


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
    method: opt.MethodOption = opt.Method.none,
    ratio: opt.RatioOption = "0.7",
    stride: opt.StrideOption = "2",
    factor: opt.FactorOption = 2,
    alpha: opt.AlphaOption = "0.9",
    blocks: opt.BlocksOption = None,
    proportional: opt.ProportionalOption = False,
    share_plan: Annotated[
        bool, typer.Option("--share-plan", help="One plan for all classes of an image (merge methods).")
    ] = False,
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
) -> None:
    """Classify images with a diffusion model: the class with the smallest denoising error wins.

    Results are written image by image. Ctrl-C keeps them, and --resume goes on.
    """
    from ..evaluation.checkpoints import load_checkpoint
    from ..evaluation.compression import make_config, with_shared_plan
    from ..evaluation.folders import find_images
    from ..evaluation.records import ResultsFile

    opt.set_threads(threads)
    options = opt.method_options(ratio, stride, factor, alpha, blocks, seed, proportional)
    compression = make_config(method.value, options)
    if share_plan:
        with_shared_plan(compression, 1)
    if limit is not None and limit < 1:
        raise ValueError(f"limit: got {limit}, expected at least 1")
    if resume and overwrite:
        raise ValueError("resume: got --overwrite with it, expected one of the two")
    path = out / "results.jsonl"
    if path.exists() and not (resume or overwrite):
        raise ValueError(f"out: got {out} with results in it, expected --resume, --overwrite or another folder")
    chosen_device, chosen_dtype = opt.device_and_dtype(device, dtype)
    folder = find_images(images, limit) if images is not None else None
    loaded = load_checkpoint(
        opt.checkpoint_source(checkpoint),
        class_names=folder.classes if folder is not None else (),
        template=template,
        device=chosen_device,
        dtype=chosen_dtype,
    )
    config = _config(loaded, timesteps, stages, score, seed, batch_size)
    data = _Data(loaded, folder, limit)
    count = len(data)
    settings = {
        "checkpoint": str(checkpoint or "tiny"),
        "images": str(images or "digits"),
        "compression": repr(compression),
        "share_plan": share_plan,
        "stages": config.stages,
        "timesteps": config.timesteps,
        "score": score,
        "seed": seed,
        "dtype": dtype,
        "template": template,
    }
    if folder is not None:
        settings["image_files"] = folder.digest
    with ResultsFile(path, settings, resume) as results:
        before = _first(results.result, count)
        if before.images:
            typer.echo(f"{len(before.images)} images were classified before")
        try:
            _run(loaded, data, config, compression, share_plan, results)
        finally:
            _summarise(_first(results.result, count), settings, out)


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


@dataclass(frozen=True)
class _Data:
    """The images to classify: an image folder, or else the test digits."""

    loaded: Checkpoint
    folder: ImageFolder | None
    limit: int | None

    def __len__(self) -> int:
        from ..evaluation.data import load_digits

        return len(self.folder) if self.folder is not None else len(load_digits("test").labels[: self.limit])

    def read(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        from ..evaluation.data import load_digits
        from ..evaluation.folders import load_images

        if self.folder is not None:
            labels = torch.tensor([self.loaded.label_of(self.folder.names[i]) for i in indices])
            return load_images([self.folder.paths[i] for i in indices], self.loaded.image_shape), labels
        digits = load_digits("test")
        if self.loaded.image_shape != tuple(digits.images.shape[1:]):
            raise ValueError(f"images: got none, expected a folder: this model draws {self.loaded.image_shape} images")
        return digits.images[indices], digits.labels[indices]


def _first(result: ClassificationResult, count: int) -> ClassificationResult:
    """The results of the first `count` images; a file that is gone on with may hold more."""
    from ..evaluation.classify import ClassificationResult

    return ClassificationResult([image for image in result.images if image.index < count])


def _run(
    loaded: Checkpoint, data: _Data, config: ClassifierConfig, compression: Any, share_plan: bool, results: Any
) -> None:
    from ..evaluation.classify import classify as classify_images

    known = {image.index for image in results.images}
    count = len(data)
    left = [i for i in range(count) if i not in known]
    with opt.progress_bar() as progress:
        task = progress.add_task("classifying", total=count, completed=count - len(left))

        def record(image: Any) -> None:
            results.add(image)
            done = _first(results.result, count)
            progress.update(task, advance=1, description=f"accuracy {done.accuracy:.3f}")

        for first in range(0, len(left), _CHUNK):
            indices = left[first : first + _CHUNK]
            pixels, labels = data.read(indices)
            latents = loaded.encode(pixels)
            classify_images(
                loaded.denoiser,
                latents,
                labels,
                config,
                compression=compression,
                share_plan=share_plan,
                indices=indices,
                record=record,
            )


def _summarise(result: ClassificationResult, settings: dict[str, Any], out: Path) -> None:
    summary = {
        "images": len(result.images),
        "accuracy": result.accuracy,
        "standard_error": result.standard_error,
        "evaluations": result.evaluations,
        "seconds": result.seconds,
    }
    if result.images:
        (out / "summary.json").write_text(json.dumps({**summary, "settings": settings}, indent=2) + "\n")
        typer.echo(
            f"accuracy {result.accuracy:.4f} ± {result.standard_error:.4f} on {len(result.images)} images; "
            f"{result.evaluations} forward evaluations in {result.seconds:.1f} s; results in {out}"
        )
