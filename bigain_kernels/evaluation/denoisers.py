"""One calling convention for every noise-predicting diffusers model: `denoiser(noisy, timestep, labels)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn as nn

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class Denoiser(Protocol):
    """A class-conditional diffusion model.

    Attributes:
        model: the module that token compression is applied to.
        scheduler: a diffusers scheduler with `alphas_cumprod`; its config holds the prediction type and the schedule.
        num_classes: labels run from 0 to num_classes - 1; label `num_classes` means "no class".
        sample_shape: (C, H, W) of what the model denoises: pixels, or latents of a VAE.
    """

    model: nn.Module
    scheduler: Any
    num_classes: int
    sample_shape: tuple[int, int, int]

    def __call__(self, noisy: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Predict for `noisy` (B, C, H, W), `timestep` (B,) int64 and `labels` (B,) int64; returns (B, C, H, W)."""
        ...


def prediction_type(scheduler: Any) -> str:
    """What the model predicts: "epsilon", "v_prediction" or "sample".

    Raises:
        ValueError: the scheduler is of another family, such as flow matching.
    """
    kind = getattr(scheduler.config, "prediction_type", None)
    if kind not in PREDICTION_TYPES or not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"scheduler: got {type(scheduler).__name__} with prediction_type {kind!r}, expected a scheduler with "
            f"alphas_cumprod and one of {list(PREDICTION_TYPES)}"
        )
    return kind


def diffuse(
    scheduler: Any, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The noisy sample at `timestep` (B,) and what the model should predict for it.

    With a = alphas_cumprod[t]: noisy = sqrt(a) clean + sqrt(1 - a) noise. The target is the noise, the clean sample, or
    v = sqrt(a) noise - sqrt(1 - a) clean (Salimans and Ho, "Progressive Distillation for Fast Sampling", 2022).
    """
    kind = prediction_type(scheduler)
    alpha = scheduler.alphas_cumprod.to(clean.device, torch.float32)[timestep].view(-1, 1, 1, 1)
    signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
    noisy = signal * clean + spread * noise
    if kind == "epsilon":
        return noisy, noise
    if kind == "sample":
        return noisy, clean
    return noisy, signal * noise - spread * clean


class LabelDenoiser:
    """`DiTTransformer2DModel`, in pixel space or in the latents of a VAE. Learned variances are cut off."""

    def __init__(self, model: nn.Module, scheduler: Any) -> None:
        prediction_type(scheduler)
        config: Any = model.config
        self.model, self.scheduler = model, scheduler
        self.num_classes = int(config.num_embeds_ada_norm)
        self.sample_shape = (int(config.in_channels), int(config.sample_size), int(config.sample_size))

    def __call__(self, noisy: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        weights = next(self.model.parameters())
        predicted = self.model(noisy.to(weights.dtype), timestep, labels).sample
        return predicted[:, : self.sample_shape[0]].to(noisy.dtype)


class PromptDenoiser:
    """`UNet2DConditionModel` with one text embedding for each class; the last embedding is that of no prompt.

    Args:
        model: the U-Net.
        scheduler: the scheduler it was trained with.
        embeddings: (classes + 1, L, D).
        pooled: (classes + 1, D') pooled text embeddings and
        time_ids: (6,) original size, crop and target size, both asked for by the U-Net of SDXL only.
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: Any,
        embeddings: torch.Tensor,
        pooled: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
    ) -> None:
        prediction_type(scheduler)
        config: Any = model.config
        self.model, self.scheduler = model, scheduler
        self.embeddings, self.pooled, self.time_ids = embeddings, pooled, time_ids
        self.num_classes = embeddings.shape[0] - 1
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.sample_shape = (int(config.in_channels), int(height), int(width))

    def __call__(self, noisy: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        dtype = next(self.model.parameters()).dtype
        extra = {}
        if self.pooled is not None and self.time_ids is not None:
            time_ids = self.time_ids.to(noisy.device, dtype).expand(noisy.shape[0], -1)
            extra = {"text_embeds": self.pooled[labels].to(dtype), "time_ids": time_ids}
        return self.model(
            noisy.to(dtype),
            timestep,
            encoder_hidden_states=self.embeddings[labels].to(dtype),
            added_cond_kwargs=extra or None,
        ).sample.to(noisy.dtype)


# Models that need nothing but themselves and a scheduler to classify and to generate: by class name, the class and what
# makes a denoiser of one. The class-conditional DiT is always among them.
_registered: dict[str, tuple[type[nn.Module], Callable[[Any, Any], Denoiser]]] = {}


def register_denoiser(model: type[nn.Module], make: Callable[[Any, Any], Denoiser]) -> None:
    """Let checkpoints of a class of models, as folders of model and scheduler, be classified with and generated from.

    Args:
        model: a `diffusers.ModelMixin`, which is loaded by its own config. Its family, where it has one, is
            registered by itself, see `bigain_kernels.diffusers.register_family`.
        make: makes a `Denoiser` of a model and a scheduler, such as `LabelDenoiser`.

    Raises:
        TypeError: it is no such class.
        ValueError: another class of that name is registered.
    """
    from diffusers import ModelMixin

    if not (isinstance(model, type) and issubclass(model, ModelMixin)):
        raise TypeError(f"model: got {model!r}, expected a class derived from diffusers.ModelMixin")
    known = class_conditional()
    if model.__name__ in known and known[model.__name__][0] is not model:
        raise ValueError(
            f"model: got {model!r}, another class of that name is registered, {known[model.__name__][0]!r}"
        )
    _registered[model.__name__] = model, make


def unregister_denoiser(model: type[nn.Module]) -> None:
    """Forget what `register_denoiser` was told of a class; ValueError if that is nothing."""
    if model.__name__ not in _registered:
        raise ValueError(f"model: got {model.__name__}, expected one of {list(_registered)}")
    del _registered[model.__name__]


def class_conditional() -> dict[str, tuple[type[nn.Module], Callable[[Any, Any], Denoiser]]]:
    """By class name, the models that `register_denoiser` knows: the class, and what makes a denoiser of one."""
    from diffusers import DiTTransformer2DModel

    return {"DiTTransformer2DModel": (DiTTransformer2DModel, LabelDenoiser), **_registered}
