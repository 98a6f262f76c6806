"""Weights and configs of strangers: loaded whole, or refused in one sentence that names the file and the key.

diffusers and transformers leave parameters that a file does not hold as they were allocated, and say so in a log. Here
the names and shapes in the files are compared with those of the model before any memory is taken, and the values with
what numbers can be. Only JSON and safetensors are read: neither can hold code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import PickleError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

# The values of a config go unchecked into the constructors of other people's classes, which divide by them, look them
# up, or take memory for them: these are the errors that they end in. What is no such error is a bug of ours.
_OF_VALUES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    NameError,
    NotImplementedError,
    OSError,
    PickleError,
    RecursionError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)
# Larger numbers in a config of a model are mistakes; constructors would try to take the memory.
_LARGEST = 10**6
_LARGEST_SAMPLE = 1024
# Bytes of a JSON file. The index of a model of a thousand shards is smaller.
_LARGEST_FILE = 2**25
_STEMS = ("diffusion_pytorch_model", "model")


class BadCheckpoint(ValueError):
    """A checkpoint that is damaged, or of another kind; the message begins with the argument."""


@contextmanager
def naming(what: Path | str, expected: str, argument: str = "checkpoint") -> Iterator[None]:
    """Errors of the block, whatever value of a stranger's they come from, say which file it was."""
    try:
        yield
    except BadCheckpoint:
        raise
    except _OF_VALUES as error:
        reason = " ".join(str(error).split()) or "no reason given"
        reason = reason if len(reason) <= 300 else reason[:300] + "..."
        raise BadCheckpoint(
            f"{argument}: got {what}, expected {expected} ({type(error).__name__}: {reason})"
        ) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Of a key that stands twice readers take the first or the last: which was meant nobody knows."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
    return content


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        BadCheckpoint: the file cannot be read, or holds something else.
    """
    with naming(path, "a file with a JSON object"):
        # Opening a pipe would wait for ever.
        if path.exists() and not path.is_file():
            raise ValueError("no regular file")
        if path.stat().st_size > _LARGEST_FILE:
            raise ValueError(f"{path.stat().st_size} bytes, more than {_LARGEST_FILE}")
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__} stands there")
    return content


def _flat(value: Any) -> Iterator[Any]:
    """`value`, or what lies in its lists, in however many."""
    for part in value if isinstance(value, list) else ():
        yield from _flat(part)
    if not isinstance(value, list):
        yield value


def _check_layers(path: Path, config: Mapping[str, Any], weights: int) -> None:
    """Every layer has a weight of its own. More than there are would be built one by one, for hours."""
    for key in (key for key in config if "layers" in key):
        for number in _flat(config[key]):
            if isinstance(number, int) and number > weights:
                raise BadCheckpoint(
                    f"checkpoint: got {key}={number} in {path}, expected no more than there are weights for"
                )


def check_numbers(path: Path, config: Mapping[str, Any]) -> None:
    """No number of a model's config is negative, not finite, or beyond all models."""
    for key, value in config.items():
        for number in _flat(value):
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                continue
            largest = _LARGEST_SAMPLE if key == "sample_size" else _LARGEST
            if not (-1 <= number <= largest):
                raise BadCheckpoint(f"checkpoint: got {key}={number!r} in {path}, expected at most {largest}")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder.

    Raises:
        BadCheckpoint: there is none, or an index names files that are not there or lie elsewhere.
    """
    for stem in _STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.exists():
            names = read_config(index).get("weight_map")
            if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
                raise BadCheckpoint(f"checkpoint: got {index}, expected a weight_map from keys to files")
            for name in sorted(set(names.values())):
                if Path(name).name != name or not (folder / name).is_file():
                    raise BadCheckpoint(f"checkpoint: got {name!r} in {index}, expected a file beside it")
            return [folder / name for name in sorted(set(names.values()))]
        if (folder / f"{stem}.safetensors").is_file():
            return [folder / f"{stem}.safetensors"]
    raise BadCheckpoint(
        f"checkpoint: got {folder} without weights, expected {_STEMS[0]}.safetensors (pickled weights are not read)"
    )


def shapes_in(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in safetensors files, from their headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        with naming(path, "a whole safetensors file"), safe_open(path, framework="pt") as file:
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return shapes


def check_weights(model: nn.Module, folder: Path) -> None:
    """The files of a folder hold the parameters and buffers of `model`, no more and no less, in their shapes.

    Args:
        model: of the folder's config, on the meta device.
        folder: with safetensors files.

    Raises:
        BadCheckpoint: naming the first key that is missing, unexpected or of another shape.
    """
    files = weight_files(folder)
    found = shapes_in(files)
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    # Old checkpoints call the projections of a VAE's attention otherwise; diffusers renames them while it loads.
    renamed = {_modern(key): shape for key, shape in found.items()}
    where = files[0] if len(files) == 1 else folder
    for key in sorted({*wanted, *renamed}):
        if key not in renamed:
            raise BadCheckpoint(f"checkpoint: got {where} without {key}, expected all parameters of the model")
        if key not in wanted:
            raise BadCheckpoint(f"checkpoint: got {key} in {where}, expected only parameters of the model")
        if renamed[key] != wanted[key]:
            raise BadCheckpoint(
                f"checkpoint: got {key} of shape {renamed[key]} in {where}, expected {wanted[key]} as its config says"
            )


def _modern(key: str) -> str:
    """The present name of a parameter."""
    if ".attentions." not in key or "mid_block" not in key:
        return key
    old = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
    for before, after in old.items():
        key = key.replace(before, after)
    return key


def check_finite(model: nn.Module, what: Path | str) -> None:
    """No parameter is infinite or NaN; BadCheckpoint naming the first that is."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise BadCheckpoint(f"checkpoint: got {name} with values that are not finite in {what}, expected numbers")


def load_model(cls: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A diffusers model of class `cls` from its folder, with every parameter from the files.

    Raises:
        BadCheckpoint: config or weights are damaged, or do not belong together.
    """
    path = folder / "config.json"
    config = read_config(path)
    check_numbers(path, config)
    _check_layers(path, config, len(shapes_in(weight_files(folder))))
    with naming(path, f"the config of a {cls.__name__}"), torch.device("meta"):
        empty = cls.from_config(config)
    check_weights(empty, folder)
    with naming(folder, f"the weights of a {cls.__name__}"):
        model = cls.from_pretrained(folder, dtype=dtype, low_cpu_mem_usage=False, use_safetensors=True)
    check_finite(model, folder)
    return model


def load_text_encoder(kind: str, folder: Path, dtype: torch.dtype) -> Any:
    """A text encoder of transformers, with every parameter from its files; BadCheckpoint as `load_model`."""
    import transformers

    weight_files(folder)
    with naming(folder, f"a {kind} of transformers"):
        cls = getattr(transformers, kind)
        model, loaded = cls.from_pretrained(folder, dtype=dtype, use_safetensors=True, output_loading_info=True)
    for what in ("missing_keys", "mismatched_keys"):
        for key in sorted(map(str, loaded[what])):
            raise BadCheckpoint(f"checkpoint: got {folder} with {what.replace('_', ' ')} such as {key}, expected none")
    check_finite(model, folder)
    return model


def check_scheduler(scheduler: Any, path: Path | str) -> None:
    """The schedule is one of diffusion in numbered steps, which the classifier and DDIM can follow.

    Raises:
        BadCheckpoint: it is of another family, such as flow matching, or its numbers make no schedule.
    """
    schedule = getattr(scheduler, "alphas_cumprod", None)
    # Some schedulers of numbered steps can be told to follow a flow, and keep a schedule that they do not use.
    if schedule is None or scheduler.config.get("use_flow_sigmas"):
        raise BadCheckpoint(
            f"checkpoint: got {type(scheduler).__name__} in {path}, expected a scheduler of diffusion in numbered "
            "steps (with alphas_cumprod), not flow matching"
        )
    schedule = torch.as_tensor(schedule)
    if (
        not len(schedule)
        or not bool(schedule.isfinite().all())
        or float(schedule.min()) < 0
        or float(schedule.max()) > 1
    ):
        raise BadCheckpoint(f"checkpoint: got {path} whose noise schedule is none, expected values from 0 to 1")


def check_vae(vae: Any, channels: int, what: Path | str) -> None:
    """Latents of the VAE are those of the denoiser, once scaled by one number.

    Args:
        vae: of the pipeline.
        channels: of what the denoiser takes.
        what: the checkpoint, for the message.

    Raises:
        BadCheckpoint: they have other channels, no such number, or are to be shifted as well.
    """
    config = vae.config
    scale = config.get("scaling_factor")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < float("inf"):
        raise BadCheckpoint(f"checkpoint: got scaling_factor={scale!r} of the VAE in {what}, expected a number above 0")
    for key in ("shift_factor", "latents_mean", "latents_std"):
        if config.get(key) is not None:
            raise BadCheckpoint(
                f"checkpoint: got {key}={config[key]!r} of the VAE in {what}, expected latents that are only scaled"
            )
    if config["latent_channels"] != channels:
        raise BadCheckpoint(
            f"checkpoint: got latent_channels={config['latent_channels']} of the VAE in {what}, expected {channels}, "
            "those that its denoiser takes"
        )
