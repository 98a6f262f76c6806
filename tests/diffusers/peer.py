"""A pytest plugin under which diffusers' own tests get compressed models; see `test_peers_suite.py`."""

from __future__ import annotations

import inspect
import math
from typing import Any

import diffusers

from bigain_kernels.diffusers import IEKVDConfig, LGTMConfig, apply_token_compression

CONFIGS = {
    "DiTTransformer2DModel": LGTMConfig(ratio=0.5),
    "FluxTransformer2DModel": IEKVDConfig(factor=2),
    "SD3Transformer2DModel": IEKVDConfig(factor=2),
    "WanTransformer3DModel": LGTMConfig(ratio=0.5),
}


def _give_grid(model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The positions of those tests are random numbers, of square pictures."""
    side = math.isqrt(kwargs["hidden_states"].shape[1])
    given = {**(kwargs.get("joint_attention_kwargs") or {}), "bigain_grid": (side, side)}
    return args, {**kwargs, "joint_attention_kwargs": given}


def compressed(model: Any, config: Any) -> Any:
    """A subclass of a model's class, of the same name and arguments, whose instances are compressed."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        model.__init__(self, *args, **kwargs)
        if model.__name__.startswith("Flux"):
            self.register_forward_pre_hook(_give_grid, with_kwargs=True)
        apply_token_compression(self, config)

    __init__.__signature__ = inspect.signature(model.__init__)  # type: ignore[attr-defined]
    return type(model.__name__, (model,), {"__init__": __init__, "__module__": model.__module__})


for _name, _config in CONFIGS.items():
    setattr(diffusers, _name, compressed(getattr(diffusers, _name), _config))
