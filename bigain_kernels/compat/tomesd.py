"""The two functions of the `tomesd` package, over this package's kernels: change the import and keep the calls.

    from bigain_kernels.compat import tomesd
    tomesd.apply_patch(pipe, ratio=0.5)

What differs from tomesd: random destinations come from a generator of their own that gives equal patterns to equal
timesteps whatever the batch, float32 similarities decide which tokens merge, and means are accumulated in float32.
"""

from __future__ import annotations

from typing import TypeVar

from ..diffusers import ToMeConfig, apply_token_compression, remove_token_compression

Model = TypeVar("Model")


def apply_patch(
    model: Model,
    ratio: float = 0.5,
    max_downsample: int = 1,
    sx: int = 2,
    sy: int = 2,
    use_rand: bool = True,
    merge_attn: bool = True,
    merge_crossattn: bool = False,
    merge_mlp: bool = False,
) -> Model:
    """Patch a diffusers model or pipeline with ToMe, in place.

    Args:
        model: a pipeline or model that `bigain_kernels.diffusers.apply_token_compression` supports.
        ratio: fraction of tokens to merge, at most 1 - 1 / (sx * sy).
        max_downsample: deepest level to merge at: 1, 2, 4 or 8.
        sx: width of a tile in tokens.
        sy: height of a tile in tokens.
        use_rand: random destinations; otherwise the top-left token of each tile.
        merge_attn: merge around self-attention.
        merge_crossattn: merge around cross-attention.
        merge_mlp: must be False; merging around the MLP costs much quality and is not offered here.

    Returns:
        The model itself.

    Raises:
        TypeError, ValueError: wrong model or argument, or nothing to patch.
    """
    if merge_mlp:
        raise ValueError("merge_mlp: got True, expected False: merging around the MLP is not offered")
    modules = tuple(name for name, wanted in (("attn1", merge_attn), ("attn2", merge_crossattn)) if wanted)
    if not modules:
        raise ValueError("merge_attn: got False, expected it or merge_crossattn to be True")
    config = ToMeConfig(
        ratio=ratio,
        stride=(sy, sx),
        max_downsample=max_downsample,
        destinations="random" if use_rand else "first",
        modules=modules,
    )
    apply_token_compression(model, config)
    return model


def remove_patch(model: Model) -> Model:
    """Take the patch out again; a model without one stays as it is. Returns the model itself."""
    remove_token_compression(model)
    return model
