"""What an experiment is: a YAML file, checked before anything is loaded. Unknown names are refused."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ...methods import CompressionConfig
from ...methods.registry import make_config, options_of
from .rule_options import RuleOptions


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def slug(text: str) -> str:
    """A name of a folder from a title."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "method"


def _different(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("one is there twice, expected different ones")
    return seeds


_Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), AfterValidator(_different)]


class Data(_Strict):
    """Images to classify, and classes or captions to draw.

    Attributes:
        kind: layout, see `datasets`; "digits" are the test digits that the package brings.
        root: the folder.
        prompts: CSV file of the published form, in the place of the prompts that the layout gives.
        limit: the first images alone.
    """

    kind: Literal["digits", "folder", "imagenet", "pets", "coco"]
    root: Path | None = None
    prompts: Path | None = None
    limit: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _has_root(self) -> Data:
        if self.kind == "digits" and (self.root or self.prompts):
            raise ValueError("digits come with the package, expected no root and no prompts")
        return self


class Method(_Strict):
    """One row of the tables.

    Attributes:
        title: what it is called.
        method, options: as of `bigain classify`.
        plans: where plans of the classifier come from; default that of the protocol.
        paper: numbers of the paper to stand beside ours: "top-1" in percent, "FID".
    """

    title: str = Field(min_length=1)
    method: str = "none"
    options: dict[str, Any] = Field(default_factory=dict)
    plans: Literal["own", "mean", "null", "published"] | None = None
    paper: dict[Literal["top-1", "FID"], float] = Field(default_factory=dict)

    def compression(self, seed: int) -> CompressionConfig | None:
        """The config, with the seed of the run where the method draws anything."""
        options = {name: tuple(v) if isinstance(v, list) else v for name, v in self.options.items()}
        if "seed" in options_of(self.method):
            options.setdefault("seed", seed)
        return make_config(self.method, options)


class Classification(_Strict):
    """How images are classified; what is left out is that of the protocol.

    Attributes:
        protocol: "paper" or "ours".
        stages: (samples, keep) pairs, scored as the protocol does.
        rule: in the place of stages: "stages", "halving", "racing" or "groups" as its `kind`, with its parameters, see
            `rule_options`.
        timesteps: of the samples in turn.
        seeds: of the noise; every method runs once with each.
        shard: images that a process does between two writes.
        batch_size: rows of a forward pass.
        half_errors: round errors to float16, as the published code does.
        half_schedule: round the noise schedule to float16, as it does too.
    """

    protocol: Literal["paper", "ours"] = "paper"
    stages: tuple[tuple[int, int], ...] | None = None
    rule: RuleOptions | None = None
    timesteps: tuple[int, ...] | None = None
    seeds: _Seeds = (0,)
    shard: int = Field(16, ge=1)
    batch_size: int | None = Field(None, ge=1)
    half_errors: bool = False
    half_schedule: bool = False

    @model_validator(mode="after")
    def _has_one_rule(self) -> Classification:
        if self.stages is not None and self.rule is not None:
            raise ValueError("stages and rule are both given, expected one of them")
        return self


class Generation(_Strict):
    """How images are drawn: one for each image of the data, of its class or its caption.

    Attributes:
        protocol: "paper" compares them as published: through JPEG, with all images of the data set as they are, both
            squashed to 299 x 299; "ours" with the images as they are classified.
        scheduler: a class of diffusers.
        steps, guidance: of it.
        seeds: of the starting noise; the tables are of the first, the drawings of the others are yours to look at.
        limit: the first images alone.
        batch_size: images made together.
    """

    protocol: Literal["paper", "ours"] = "ours"
    scheduler: str = "DDIMScheduler"
    steps: int = Field(50, ge=1)
    guidance: float = Field(7.5, ge=1)
    seeds: _Seeds = (0,)
    limit: int | None = Field(None, ge=1)
    batch_size: int = Field(8, ge=1)


class Experiment(_Strict):
    """A table of the paper, or one's own.

    Attributes:
        name: stands above the report.
        checkpoint: as of `bigain classify`.
        data, methods, classify, generate: see there; the first method is the one that others are compared with.
        dtype: of the model.
        notes: lines for the report.
    """

    name: str
    checkpoint: str
    data: Data
    methods: tuple[Method, ...] = Field(min_length=1)
    classify: Classification = Field(default_factory=lambda: Classification.model_validate({}))
    generate: Generation | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _whole(self) -> Experiment:
        titles = [method.title for method in self.methods]
        if len(set(titles)) != len(titles):
            raise ValueError(f"methods have the titles {titles}, expected different ones")
        folders: dict[str, str] = {}
        for title in titles:
            if folders.setdefault(slug(title), title) != title:
                raise ValueError(
                    f"methods have the titles {folders[slug(title)]!r} and {title!r}, expected them to differ in "
                    "letters of a to z or digits, by which their folders are named"
                )
        for method in self.methods:
            method.compression(0)
        if self.data.kind == "digits" and self.generate is not None and self.generate.protocol == "paper":
            raise ValueError("generate.protocol is paper for digits, expected ours: they are no photographs")
        return self


def presets() -> list[str]:
    """Experiments that come with the package, by name."""
    folder = resources.files(__package__) / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_experiment(source: str, changes: dict[str, Any] | None = None) -> Experiment:
    """Read an experiment.

    Args:
        source: a preset by name, or a YAML file.
        changes: values to take the place of those in the file, by their dotted name, such as "data.root".

    Raises:
        FileNotFoundError: there is neither.
        ValueError: it is no YAML, or says something that an experiment does not have; one line.
    """
    if source in presets():
        text = (resources.files(__package__) / "presets" / f"{source}.yaml").read_text(encoding="utf-8")
    elif Path(source).is_file():
        text = Path(source).read_text(encoding="utf-8")
    else:
        raise FileNotFoundError(f"config: got {source}, expected a YAML file or one of {presets()}")
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"config: got {source}, expected YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise ValueError(f"config: got {source} with {type(content).__name__}, expected names and values")
    for name, value in (changes or {}).items():
        *parents, last = name.split(".")
        place: Any = content
        for parent in parents:
            if not isinstance(place.get(parent), dict):
                place[parent] = {}
            place = place[parent]
        place[last] = value
    try:
        return Experiment.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "experiment"
        raise ValueError(f"config: got {source} with {where}: {first['msg']} ({first['input']!r:.80})") from error
    except TypeError as error:
        raise ValueError(f"config: got {source} with a method that cannot be made ({error})") from error
