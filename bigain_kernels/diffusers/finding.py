"""Which models of a pipeline are compressed, and of what family they are."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from ..methods import CompressionConfig
from .families import REFUSED, Family, family_of, registered


class Found(NamedTuple):
    """A model to patch.

    Attributes:
        name: of the pipeline's attribute that holds it; "" where it is the only one.
        model: without what torch.compile wrapped around it.
        family: of the model.
    """

    name: str
    model: Any
    family: Family


def find_models(model_or_pipe: Any) -> list[Found]:
    """The models to patch: the argument, or what denoises in a pipeline, its `unet`, or its `transformer` and
    `transformer_2`.

    The two of Wan 2.2 take a part of the steps each, that of much noise and that of little, and either may be missing.

    Raises:
        TypeError: there is none, or one of no family that is known.
    """
    if isinstance(model_or_pipe, nn.Module):
        return [_found("", model_or_pipe, model_or_pipe)]
    parts = {name: getattr(model_or_pipe, name, None) for name in ("unet", "transformer", "transformer_2")}
    names = [name for name, model in parts.items() if model is not None]
    if "unet" in names:
        names = ["unet"]
    if len(names) == 2 and parts[names[0]] is parts[names[1]]:
        del names[1]
    if not names:
        return [_found("", None, model_or_pipe)]
    return [_found(name if len(names) > 1 else "", parts[name], model_or_pipe) for name in names]


def _found(name: str, model: Any, came_as: Any) -> Found:
    model = getattr(model, "_orig_mod", model)
    family = family_of(model)
    if family is None:
        came = type(came_as).__name__
        if model is not None and model is not came_as:
            came += f" with {type(model).__name__}"
        if type(model).__name__ in REFUSED:
            raise TypeError(f"model_or_pipe: got {came}, which cannot be compressed: {REFUSED[type(model).__name__]}")
        known = "a model of diffusers"
        if any(cls.__module__.startswith("diffusers.") for cls in type(model).__mro__):
            names = [family.model.__name__ for family in registered()]
            known = f"a {', '.join(names[:-1])} or {names[-1]}"
        raise TypeError(
            f"model_or_pipe: got {came}, expected {known}, or a pipeline with one as unet or transformer; where it is "
            "wrapped in something, pass the pipeline or its unet or transformer (of DataParallel its .module)"
        )
    return Found(name, model, family)


def find_model(model_or_pipe: Any) -> tuple[Any, Family]:
    """The first of `find_models` and its family: what can be said of one says it of both."""
    _, model, family = find_models(model_or_pipe)[0]
    return model, family


def recommended_config(model_or_pipe: Any) -> CompressionConfig:
    """The config to begin with for a model or pipeline: that of its family, with its reason in docs/models.md.

    Raises:
        TypeError: the model is of no family that is known.
        ValueError: its family, one of another package, recommends nothing.
    """
    model, family = find_model(model_or_pipe)
    config = family.recommend(model)
    if config is None:
        raise ValueError(f"model_or_pipe: got {type(model).__name__}, expected a model with a recommendation")
    return config
