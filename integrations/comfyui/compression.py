"""What the nodes put into a model of ComfyUI: an attention override, and a wrapper that tells it of each call.

ComfyUI asks one override for every attention, `transformer_options["optimized_attention_override"]`. The wrapper
around the diffusion model knows the latents, whose size Flux does not tell its attention, and the step. What it finds
goes to the override in a copy of the call's options, so nothing is kept between calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bigain_kernels import MergePlan, kv_downsample, lgtm_plan, max_ratio, token_merge, token_unmerge

KEY = "bigain"
OVERRIDE = "optimized_attention_override"
# comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
WRAPPER = "diffusion_model"
# Diffusion models by the name of their class: "levels" tell each layer its grid, "text first" has text and then image.
LAYOUTS = {"UNetModel": "levels", "Flux": "text first"}
Attend = Callable[..., Tensor]


@dataclass(frozen=True)
class Method:
    """Fewer tokens: `ratio` of them merged (L-GTM), or keys and values pooled by `factor` and `alpha` (IE-KVD).

    `start` and `end` are sigmas, the noisiest and the cleanest at which to compress, or None for all.
    """

    ratio: float | None = None
    factor: int = 1
    alpha: float = 1.0
    min_tokens: int = 1
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class Image:
    """Where the image's tokens stand in one attention: behind `first` others, `grid` of them."""

    first: int
    grid: tuple[int, int]

    @property
    def stop(self) -> int:
        return self.first + self.grid[0] * self.grid[1]


class Compression:
    """The override: compresses self-attention and hands it to the override that was there before, or to ComfyUI."""

    def __init__(self, method: Method, layout: str, before: Callable[..., Tensor] | None) -> None:
        self.method, self.layout, self.before = method, layout, before

    def __call__(self, func: Attend, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        def attend(*tensors: Tensor) -> Tensor:
            if self.before is not None:
                return self.before(func, *tensors, heads, *args, **kwargs)
            return func(*tensors, heads, *args, **kwargs)

        apart = bool(kwargs.get("skip_reshape", False))
        image = self._image(q, k, apart, kwargs.get("transformer_options") or {})
        mask = kwargs.get("mask", args[0] if args else None)
        if image is None or mask is not None or v.shape[:-1] != k.shape[:-1]:
            return attend(q, k, v)
        return self._compressed(q, k, v, image, apart, bool(kwargs.get("skip_output_reshape", False)), attend)

    def _image(self, q: Tensor, k: Tensor, apart: bool, options: dict[str, Any]) -> Image | None:
        """The image's place among the tokens of this attention; None where it stays as it is."""
        told, call = options.get(KEY) or (None, None)
        # An older one that another override still calls is not the one that is told.
        if told is not self.method or call is None:
            return None
        tokens = q.shape[2] if apart else q.shape[1]
        if self.layout == "levels":
            shape = options.get("activations_shape")
            image = None if shape is None else Image(0, (shape[-2], shape[-1]))
            if image is not None and image.stop != tokens:
                image = None
        else:
            image = call if call.stop <= tokens else None
        inside = image is not None and image.stop - image.first >= self.method.min_tokens
        return image if inside and q.shape == k.shape else None

    def _compressed(
        self, q: Tensor, k: Tensor, v: Tensor, image: Image, apart: bool, out_apart: bool, attend: Attend
    ) -> Tensor:
        method = self.method
        keys = _tokens(k, apart)
        if method.ratio is None:
            if method.factor == 1 or method.factor > min(image.grid):
                return attend(q, k, v)
            parts = (keys, _tokens(v, apart))
            pooled = kv_downsample(
                [x[:, image.first : image.stop] for x in parts], image.grid, method.factor, method.alpha
            )
            k, v = (_heads(_with(x, image, y), like, apart) for x, y, like in zip(parts, pooled, (k, v), strict=True))
            return attend(q, k, v)
        ratio = min(method.ratio, max_ratio(image.grid, (2, 2)))
        if int(ratio * image.grid[0] * image.grid[1]) == 0:
            return attend(q, k, v)
        plan = lgtm_plan(keys[:, image.first : image.stop], image.grid, ratio)
        merged = (_heads(_merge(_tokens(x, apart), image, plan), x, apart) for x in (q, k, v))
        out = attend(*merged)
        flat = _tokens(out, out_apart)
        slots = replace(image, grid=(1, plan.num_slots))
        flat = _with(flat, slots, token_unmerge(flat[:, slots.first : slots.stop], plan))
        return _heads(flat, out, out_apart)


def _tokens(x: Tensor, apart: bool) -> Tensor:
    """(B, N, heads * d) of that or of (B, heads, N, d)."""
    return x.transpose(1, 2).flatten(2) if apart else x


def _heads(x: Tensor, like: Tensor, apart: bool) -> Tensor:
    """Back to the layout of `like`."""
    return x.unflatten(2, (like.shape[1], like.shape[3])).transpose(1, 2) if apart else x


def _with(x: Tensor, image: Image, tokens: Tensor) -> Tensor:
    """x, (B, N, C), with other tokens in the place of the image's."""
    if image.first == 0 and image.stop == x.shape[1]:
        return tokens
    return torch.cat([x[:, : image.first], tokens, x[:, image.stop :]], dim=1)


def _merge(x: Tensor, image: Image, plan: MergePlan) -> Tensor:
    return _with(x, image, token_merge(x[:, image.first : image.stop], plan))


class Watch:
    """The wrapper around the diffusion model: tells the override of the call, or, at other steps, nothing."""

    def __init__(self, method: Method, layout: str) -> None:
        self.method, self.layout = method, layout

    def __call__(self, executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        options = next((each for each in (*args, *kwargs.values()) if _is_options(each)), None)
        if options is None or not self._in_range(options.get("sigmas")):
            return executor(x, *args, **kwargs)
        told = {**options, KEY: (self.method, self._image(executor.class_obj, x, args, kwargs))}
        args = tuple(told if each is options else each for each in args)
        kwargs = {name: told if each is options else each for name, each in kwargs.items()}
        return executor(x, *args, **kwargs)

    def _in_range(self, sigmas: Tensor | None) -> bool:
        start, end = self.method.start, self.method.end
        if (start is None and end is None) or sigmas is None:
            return True
        sigma = float(sigmas.flatten()[0])  # waits for the device, once a call
        return (start is None or sigma <= start) and (end is None or sigma >= end)

    def _image(self, model: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Image:
        if self.layout == "levels":
            return Image(0, (x.shape[-2], x.shape[-1]))
        # (x, timestep, context, ...): text of as many tokens as the context has.
        context = kwargs["context"] if "context" in kwargs else args[1]
        size = model.patch_size
        return Image(context.shape[1], (-(-x.shape[-2] // size), -(-x.shape[-1] // size)))


def _is_options(value: Any) -> bool:
    return isinstance(value, dict) and OVERRIDE in value


def layout_of(model: Any) -> str:
    """The layout of a ModelPatcher's diffusion model.

    Raises:
        ValueError: no model whose tokens are known.
    """
    names = [cls.__name__ for cls in type(model.model.diffusion_model).__mro__]
    found = next((LAYOUTS[name] for name in names if name in LAYOUTS), None)
    if found is None:
        raise ValueError(f"model: got a {names[0]}, expected one of {sorted(LAYOUTS)}: SD1, SD2, SDXL or Flux")
    return found


def patched(model: Any, method: Method, start_percent: float = 0.0, end_percent: float = 1.0) -> Any:
    """A clone of a ModelPatcher with compression; one that is there already is replaced.

    Args:
        model: of ComfyUI.
        method: what to do; its `start` and `end` are set here.
        start_percent: fraction of the sampling at which compression begins, 0 the noisiest.
        end_percent: fraction at which it ends, at least `start_percent`.

    Raises:
        ValueError: a model of another kind, or fractions out of order.
    """
    if not 0.0 <= start_percent <= end_percent <= 1.0:
        raise ValueError(
            f"start_percent, end_percent: got {(start_percent, end_percent)}, expected 0 <= start <= end <= 1"
        )
    layout = layout_of(model)
    sampling = model.get_model_object("model_sampling")
    method = replace(
        method,
        start=None if start_percent == 0.0 else float(sampling.percent_to_sigma(start_percent)),
        end=None if end_percent == 1.0 else float(sampling.percent_to_sigma(end_percent)),
    )
    model = unpatched(model)
    options = model.model_options["transformer_options"]
    options[OVERRIDE] = Compression(method, layout, options.get(OVERRIDE))
    model.add_wrapper_with_key(WRAPPER, KEY, Watch(method, layout))
    return model


def unpatched(model: Any) -> Any:
    """A clone of a ModelPatcher without compression; overrides of others stay, before it and after it.

    One that was put around compression still calls it, and it hands on what it gets: nobody tells it of calls any more.
    """
    model = model.clone()
    model.remove_wrappers_with_key(WRAPPER, KEY)
    options = model.model_options["transformer_options"]
    if isinstance(options.get(OVERRIDE), Compression):
        before = options.pop(OVERRIDE).before
        if before is not None:
            options[OVERRIDE] = before
    return model
