"""An experiment from its description to rows and images on disk; `report` says what they mean."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from ...methods import MergeConfig
from ..checkpoints import SHIPPED, Checkpoint, load_checkpoint
from ..compression import settings_of
from ..data import MNIST_SIZE, load_digits, load_mnist
from ..denoisers import PromptDenoiser
from ..generate import GenerateConfig
from ..output import write_text
from .datasets import READERS, DataSet, imagenet_labels, with_prompts
from .deciding import changes, digest, machine
from .drawing import check_files, draw_shards
from .engine import Asking, Engine
from .experiment import Experiment, Method, slug
from .judges import Judges, find_judges
from .latents import CachedLatents
from .protocols import protocol
from .rules import Rule, Stages
from .run import RunFolder, run_shards, shard_slices

_FILE = "experiment.json"
# What loading a checkpoint leaves, before any work.
_PROMPTS = "prompts"
_IMAGES = "images.json"
_POLL = 0.2


class Progress(Protocol):
    """Told how much of all there is to do is done."""

    def __call__(self, what: str, done: int) -> None: ...


class DigitImages:
    """The test digits that the package brings, those of MNIST for a model of images as large."""

    def __init__(self, shape: tuple[int, int, int], limit: int | None) -> None:
        digits = load_mnist("test") if shape == (1, MNIST_SIZE, MNIST_SIZE) else load_digits("test")
        if tuple(digits.images.shape[1:]) != shape:
            raise ValueError(f"data: got digits for a model of {shape} images, expected the shape of the digits")
        self._images = digits.images[:limit]
        self.paths = tuple(f"{i:04d}.png" for i in range(len(self._images)))
        self.labels = tuple((int(label),) for label in digits.labels[:limit])
        self.classes = tuple(map(str, range(10)))
        self.captions: dict[str, str] = {}

    def read(self, i: int) -> torch.Tensor:
        return self._images[i]


@dataclass(frozen=True)
class Part:
    """One run of an experiment: a method and a seed."""

    method: Method
    seed: int
    folder: RunFolder


class Reproduction:
    """The work of an experiment and where it lies.

    Args:
        experiment: what to do.
        out: the folder.
        device: where.

    Raises:
        ValueError, OSError: something of the experiment that does not fit, named; a folder of another experiment.
    """

    def __init__(self, experiment: Experiment, out: Path, device: torch.device) -> None:
        self.experiment, self.out = experiment, out
        written = json.loads(experiment.model_dump_json())
        data = self._data()
        self._claim(written)
        self.checkpoint = self._load(data, device)
        self.images, labels = self._bind(data)
        self.labels = tuple(labels)
        self.drawer, self._captions = self._captioned()
        # It holds the text encoder, which is done.
        self.checkpoint, self.drawer = (replace(each, prompted=None) for each in (self.checkpoint, self.drawer))
        chosen = experiment.classify
        classes = len(labels)
        self.compressions = {
            (m.title, seed): m.compression(seed)
            for m in experiment.methods
            for seed in {*chosen.seeds, *(experiment.generate.seeds if experiment.generate else ())}
        }
        base = protocol(chosen.protocol, classes, half_errors=chosen.half_errors)
        self.timesteps, self.transform = chosen.timesteps or base.timesteps, base.transform
        self.rule: Rule = base.rule
        if chosen.stages is not None:
            assert isinstance(base.rule, Stages)
            self.rule = Stages(chosen.stages, base.rule.score)
        elif chosen.rule is not None:
            names = [*zip(self.images.classes, getattr(self.images, "keys", None) or self.images.classes, strict=True)]
            self.rule = chosen.rule.make(names, len(self.timesteps))
        self.rule.check(classes)
        self._weights = self.checkpoint.fingerprint()
        self._everywhere = {
            "weights": self._weights,
            "dtype": experiment.dtype,
            "data": experiment.data.kind,
            "transform": self.transform,
            **machine(device),
        }
        # The last that can refuse the experiment: what follows leaves files of it.
        check_files(self.draws()[0])
        self._claim_images()
        self.classified = [self._classification(m, seed) for m in experiment.methods for seed in chosen.seeds]
        self.drawn = self._generation()
        latents = digest({**self._everywhere, "size": chosen.shard, "paths": list(self.images.paths)})
        self._latents = CachedLatents(out / "latents" / latents, self.checkpoint)

    def _claim(self, written: dict[str, Any]) -> None:
        """Keeps experiments apart: the folder is new, empty, that of this one, or of one that never came to work."""
        file = self.out / _FILE
        names = {path.name for path in self.out.iterdir()} if self.out.exists() else set()
        others = {name for name in names if not name.startswith(".")} - {_FILE, _PROMPTS}
        # Looked for after the others: a process that began at the same moment writes it first of all.
        if file.exists():
            there = json.loads(file.read_text(encoding="utf-8"))
            if there == written:
                return
            if others:
                differs = ", ".join(f"{line:.80}" for line in changes(there, written))
                raise ValueError(
                    f"out: got {self.out} with another experiment ({differs}), expected another folder or the same"
                )
        elif others or _PROMPTS in names:
            raise ValueError(f"out: got {self.out} with files in it, expected an empty folder or one of this command")
        write_text(file, json.dumps(written, indent=2) + "\n")

    def _claim_images(self) -> None:
        """Shards and batches are numbers over a list of images: with another list they would be other images."""
        paths, file = list(self.images.paths), self.out / _IMAGES
        now = {"images": len(paths), "digest": digest({"paths": paths, "labels": list(self.images.labels)})}
        if not file.exists():
            write_text(file, json.dumps(now, indent=2) + "\n")
            return
        there = json.loads(file.read_text(encoding="utf-8"))
        if there != now:
            raise ValueError(
                f"data: got {len(paths)} images, not the {there['images']} that {self.out} was begun with, or of other "
                "names or labels, expected the same images, or another folder"
            )

    def _data(self) -> DataSet | None:
        data = self.experiment.data
        if data.kind == "digits":
            return None
        if data.root is None:
            raise ValueError(
                f"data: got none, expected the folder of the data set: --data, or root under data (kind {data.kind})"
            )
        found = READERS[data.kind](data.root)
        return found if data.prompts is None else with_prompts(found, data.prompts)

    def _load(self, data: DataSet | None, device: torch.device) -> Checkpoint:
        source = self.experiment.checkpoint
        return load_checkpoint(
            SHIPPED.get(source, source),
            class_names=() if data is None else data.prompts,
            template="{}",
            device=device,
            dtype=getattr(torch, self.experiment.dtype),
            prompt_cache=self.out / _PROMPTS,
        )

    def _bind(self, data: DataSet | None) -> tuple[Any, Sequence[int]]:
        """The images as the model knows them, and its labels of the classes."""
        limit = self.experiment.data.limit
        if data is None:
            digits = DigitImages(self.checkpoint.image_shape, limit)
            return digits, range(len(digits.classes))
        if isinstance(self.checkpoint.denoiser, PromptDenoiser) and self.checkpoint.vae is not None:
            labels: Sequence[int] = range(len(data.classes))
        elif self.experiment.data.kind == "imagenet" and self.checkpoint.denoiser.num_classes == 1000:
            assert self.experiment.data.root is not None
            labels = imagenet_labels(data, self.experiment.data.root)
        else:
            labels = [self.checkpoint.label_of(key, "data") for key in data.keys]
        transform = protocol(self.experiment.classify.protocol, len(labels)).transform
        return data.first(limit).bound(labels, self.checkpoint.image_shape, transform), labels

    def _captioned(self) -> tuple[Checkpoint, tuple[str, ...]]:
        """What draws: the model with the captions of the images as its prompts, where both are there, or as it is."""
        paths = self.images.paths[: self.experiment.generate.limit] if self.experiment.generate else ()
        captions = self.images.captions
        if self.checkpoint.prompted is None or not paths or not captions:
            return self.checkpoint, ()
        missing = [path for path in paths if path not in captions]
        if missing:
            raise ValueError(
                f"data: got no caption of {missing[0]} and {len(missing) - 1} others, expected one of each"
            )
        texts = tuple(dict.fromkeys(captions[path] for path in paths))
        return self.checkpoint.prompted(texts), texts

    def asking(self, method: Method, seed: int) -> Asking:
        chosen = self.experiment.classify
        merges = isinstance(self.compressions[method.title, seed], MergeConfig)
        base = protocol(chosen.protocol, len(self.labels), merges=merges, half_errors=chosen.half_errors)
        return Asking(
            self.rule,
            self.timesteps,
            seed,
            chosen.batch_size,
            self.labels,
            method.plans or base.plans,
            base.half_errors,
            chosen.half_schedule,
        )

    def _classification(self, method: Method, seed: int) -> Part:
        chosen, asking = self.experiment.classify, self.asking(method, seed)
        settings = {
            **self._everywhere,
            "classes": list(self.labels),
            "compression": settings_of(self.compressions[method.title, seed]),
            "rule": {"kind": type(self.rule).__name__, **asdict(self.rule)},  # type: ignore[call-overload]
            "timesteps": list(self.timesteps),
            "seed": seed,
            "plans": asking.plans,
            "half_errors": asking.half_errors,
            "half_schedule": asking.half_schedule,
            "batch_size": chosen.batch_size,
            "shard": chosen.shard,
        }
        shards = len(shard_slices(len(self.images.paths), chosen.shard))
        return Part(method, seed, RunFolder(self.out / "classify" / f"{slug(method.title)}-{seed}", settings, shards))

    def _generation(self) -> list[Part]:
        chosen = self.experiment.generate
        if chosen is None:
            return []
        found = []
        weights = self.drawer.fingerprint() if self._captions else self._weights
        for method in self.experiment.methods:
            for seed in chosen.seeds:
                settings = {
                    **self._everywhere,
                    "weights": weights,
                    "compression": settings_of(self.compressions[method.title, seed]),
                    **chosen.model_dump(exclude={"seeds", "limit", "protocol"}),
                    "seed": seed,
                    "prompts": digest({"labels": self.draws()[1]}),
                }
                shards = len(shard_slices(len(self.draws()[0]), chosen.batch_size))
                folder = self.out / "generate" / f"{slug(method.title)}-{seed}"
                found.append(Part(method, seed, RunFolder(folder, settings, shards, "done/{:06d}")))
        return found

    def draws(self) -> tuple[tuple[str, ...], list[int]]:
        """Paths of the drawings and the label that `drawer` has for each: of its caption, or of its first class."""
        limit = self.experiment.generate.limit if self.experiment.generate else 0
        paths = self.images.paths[:limit]
        if self._captions:
            place = {text: i for i, text in enumerate(self._captions)}
            return paths, [place[self.images.captions[path]] for path in paths]
        return paths, [labels[0] for labels in self.images.labels[:limit]]

    def texts(self) -> list[str]:
        """What each drawing is of, in words."""
        if self._captions:
            return [self._captions[label] for label in self.draws()[1]]
        names = getattr(self.images, "prompts", None) or [f"a photo of a {name}" for name in self.images.classes]
        place = {label: i for i, label in enumerate(self.labels)}
        return [names[place[label]] for label in self.draws()[1]]

    @property
    def is_reportable(self) -> bool:
        """Whether the first method, which others are compared with, has classified all."""
        first = [part.folder for part in self.classified if part.method is self.experiment.methods[0]]
        return all(folder.done() == folder.shards for folder in first)

    @property
    def is_published_view(self) -> bool:
        """Whether drawings are compared with the data as published."""
        return self.experiment.generate is not None and self.experiment.generate.protocol == "paper"

    def judges(self, inception: Path | None = None, clip: Path | None = None) -> Judges:
        """Who looks at the drawings, see `judges.find_judges`."""
        digits = self.experiment.data.kind == "digits"
        return find_judges(self.checkpoint.image_shape, digits, inception, clip, self.checkpoint.device)

    @property
    def total(self) -> int:
        """Images to classify and to draw, over all methods and seeds."""
        return len(self.images.paths) * len(self.classified) + len(self.draws()[0]) * len(self.drawn)

    def done(self) -> int:
        """How many of `total` lie there finished."""
        found = 0
        for parts, size, images in (
            (self.classified, self.experiment.classify.shard, len(self.images.paths)),
            (self.drawn, self.experiment.generate.batch_size if self.experiment.generate else 1, len(self.draws()[0])),
        ):
            slices = shard_slices(images, size)
            for part in parts:
                found += sum(s.stop - s.start for i, s in enumerate(slices) if part.folder.rows_of(i).exists())
        return found

    def run(self, progress: Progress = lambda what, done: None, rank: int = 0) -> None:
        """Do what is left of all runs, together with whoever else is at it; comes back when all is done."""
        for part in self.classified:
            if part.folder.done() == part.folder.shards:
                continue
            title = f"classifying: {part.method.title}"
            asking = self.asking(part.method, part.seed)
            with Engine(self.checkpoint.denoiser, asking, self.compressions[part.method.title, part.seed]) as engine:
                run_shards(
                    part.folder,
                    self.images,
                    engine,
                    self._latents.encode,
                    self.experiment.classify.shard,
                    rank=rank,
                    record=lambda count, rows, title=title: progress(title, count),  # type: ignore[misc]
                )
        chosen = self.experiment.generate
        for part in self.drawn:
            assert chosen is not None
            paths, labels = self.draws()
            title = f"drawing: {part.method.title}"
            config = GenerateConfig(chosen.steps, chosen.guidance, part.seed, chosen.batch_size, chosen.scheduler)
            draw_shards(
                part.folder,
                paths,
                labels,
                self.drawer,
                config,
                self.compressions[part.method.title, part.seed],
                rank=rank,
                record=lambda count, title=title: progress(title, count),  # type: ignore[misc]
            )
