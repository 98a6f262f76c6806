"""The methods by name, as the command line and the demo offer them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

from .denoisers import Denoiser

MERGE_METHODS = ("lgtm", "abm", "tome", "sito")
POOL_METHODS = ("iekvd", "todo", "avgpool")
METHODS = ("none", *MERGE_METHODS, *POOL_METHODS)


@dataclass(frozen=True)
class MethodOptions:
    """Settings of all methods; each method reads those it has.

    `ratio`: fraction of tokens merged (lgtm, abm, tome, sito). `stride`: tile of the merge methods, (rows, columns).
    `factor`: pooling factor of keys and values (iekvd, todo, avgpool). `alpha`: interpolation of iekvd. `seed`: of the
    random choices of tome and sito. `proportional`: keys of merged tokens weighed by size (merge methods).
    """

    ratio: float | tuple[float, float] = 0.7
    stride: tuple[int, int] = (2, 2)
    factor: int = 2
    alpha: float | tuple[float, float] = 0.9
    seed: int = 0
    blocks: tuple[int, ...] | None = None
    proportional: bool = False


def make_config(method: str, options: MethodOptions | None = None) -> Any:
    """The config of `bigain_kernels.diffusers` for a method name, or None for "none".

    Raises:
        ValueError: `method` is unknown, an option is out of its range, or `proportional` meets a method that merges
            nothing.
    """
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, expected one of {list(METHODS)}")
    options = options or MethodOptions()
    if options.proportional and method not in MERGE_METHODS:
        raise ValueError(f"proportional: got True with method {method}, expected a merge method, {list(MERGE_METHODS)}")
    if method == "none":
        return None
    from .. import diffusers as integration

    merge: dict[str, Any] = {"ratio": options.ratio, "stride": options.stride, "blocks": options.blocks}
    merge["proportional"] = options.proportional
    makers: dict[str, Callable[[], Any]] = {
        "lgtm": lambda: integration.LGTMConfig(**merge),
        "abm": lambda: integration.ABMConfig(**merge),
        "tome": lambda: integration.ToMeConfig(**merge, seed=options.seed),
        "sito": lambda: integration.SiToConfig(**merge, seed=options.seed),
        "iekvd": lambda: integration.IEKVDConfig(factor=options.factor, alpha=options.alpha, blocks=options.blocks),
        "todo": lambda: integration.ToDoConfig(factor=options.factor, blocks=options.blocks),
        "avgpool": lambda: integration.AvgPoolConfig(factor=options.factor, blocks=options.blocks),
    }
    return makers[method]()


def can_share_plan(compression: Any) -> bool:
    """Whether `compression` builds merge plans, which alone can be shared."""
    return compression is not None and any(field.name == "share_plan" for field in fields(compression))


def with_shared_plan(compression: Any, rows: int) -> Any:
    """`compression` with one plan for each `rows` rows that belong together.

    Raises:
        ValueError: the method builds no plan, or there is none.
    """
    if not can_share_plan(compression):
        name = "method none" if compression is None else type(compression).__name__
        raise ValueError(f"share_plan: got {name}, expected a merge method, which builds plans")
    return replace(compression, share_plan=rows)


def compressed(denoiser: Denoiser, compression: Any) -> AbstractContextManager[Any]:
    """A context in which `compression` (or, for None, nothing) is applied to the model of `denoiser`."""
    if compression is None:
        return nullcontext()
    from ..diffusers import token_compression

    if compression.num_train_timesteps is None:
        compression = replace(compression, num_train_timesteps=len(denoiser.scheduler.alphas_cumprod))
    return token_compression(denoiser.model, compression)


def tokens_kept(method: str, options: MethodOptions, grid: tuple[int, int]) -> str:
    """How many tokens attention sees on a grid of (H, W) tokens, in words: "20 of 64", or "16 of 64 keys"."""
    tokens = grid[0] * grid[1]
    if method in POOL_METHODS:
        return f"{(grid[0] // options.factor) * (grid[1] // options.factor)} of {tokens} keys"
    if method == "none":
        return f"{tokens} of {tokens}"
    ratio = options.ratio if isinstance(options.ratio, float) else max(options.ratio)
    merged = int(tokens * ratio)
    if method == "abm":
        # Whole tiles only.
        merged -= merged % (options.stride[0] * options.stride[1] - 1)
    return f"{tokens - merged} of {tokens}"
