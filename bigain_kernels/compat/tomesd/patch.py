"""`tomesd.patch`: a model with ToMe in it, and without.

Where tomesd takes an argument and does less than it says, so does this, with a warning.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

from ...checks import check_number
from ...diffusers import ToMeConfig, apply_token_compression, remove_token_compression
from ...diffusers.finding import find_model


def _warn(message: str) -> None:
    warnings.warn(f"tomesd: {message}", UserWarning, stacklevel=3)


def apply_patch(
    model: Any,
    ratio: float = 0.5,
    max_downsample: int = 1,
    sx: int = 2,
    sy: int = 2,
    use_rand: bool = True,
    merge_attn: bool = True,
    merge_crossattn: bool = False,
    merge_mlp: bool = False,
) -> Any:
    """Patch a diffusers model or pipeline with ToMe, in place; a patch that is there is replaced.

    Args:
        model: a pipeline or model that `bigain_kernels.diffusers.apply_token_compression` supports.
        ratio: fraction of tokens to merge. As in tomesd, what is beyond 1 - 1 / (sx * sy) merges that much; here a
            warning says so. Below 0 nothing merges.
        max_downsample: deepest level to merge at: 1, 2, 4 or 8; values between mean the level below.
        sx: width of a tile in tokens.
        sy: height of a tile in tokens.
        use_rand: random destinations; otherwise the top-left token of each tile.
        merge_attn: merge around self-attention.
        merge_crossattn: merge around cross-attention.
        merge_mlp: merge around the MLP.

    Returns:
        The model itself.

    Raises:
        TypeError, ValueError: a model of another kind, or an argument that tomesd fails on later, such as a ratio that
            is no number.
    """
    check_number("ratio", ratio)
    asked = (("attn1", merge_attn), ("attn2", merge_crossattn), ("ff", merge_mlp))
    modules = tuple(name for name, wanted in asked if wanted)
    remove_token_compression(model)
    if not modules or max_downsample < 1:
        _warn(f"nothing merges with {merge_attn=}, {merge_crossattn=}, {merge_mlp=}, {max_downsample=}")
        return model
    config = ToMeConfig(
        ratio=0.0,
        stride=(sy, sx),
        # tomesd compares the level with it; levels are powers of two.
        max_downsample=1 << (int(min(max_downsample, 8)).bit_length() - 1),
        destinations="random" if use_rand else "first",
        modules=modules,
    )
    most = 1.0 - 1.0 / (config.stride[0] * config.stride[1])
    if ratio > most:
        _warn(f"ratio {ratio} merges as {most:g} does: one token of every {sy} x {sx} tile stays")
    if not _has_layers(model, config):
        _warn(f"nothing merges: the model has no layer of {modules} at {max_downsample=}")
        return model
    apply_token_compression(model, replace(config, ratio=min(max(float(ratio), 0.0), most)))
    return model


def _has_layers(model: Any, config: ToMeConfig) -> bool:
    """Whether the config is for any layer of the model: SDXL has no attention at full resolution."""
    found, family = find_model(model)
    layers = family.layers(found)
    layers += family.mlps(layers) if "ff" in config.modules and family.mlp else []
    return any(layer.kind in config.modules and config.compresses(layer.level) for layer in layers)


def remove_patch(model: Any) -> Any:
    """Take the patch out again; a model without one stays as it is.

    Returns:
        The model, and of a pipeline its `unet` where it has one, as tomesd does.
    """
    remove_token_compression(model)
    return getattr(model, "unet", model)
