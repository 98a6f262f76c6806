"""The index of a block, which methods that draw at random draw by.

It hangs on a layer as a tensor, because compiled code would be specialised to an integer of each block. It is no
buffer: group offloading looks up all buffers of a block in a table that it made before, and offloading that empties
modules would take it away at every step. So it does not move with its model, and is moved here.
"""

from __future__ import annotations

from typing import Any

import torch

from .hooks import argument

_NAME = "bigain_block"


def number_layer(module: Any, index: int) -> None:
    """Tell a layer the index of its block."""
    device = next(module.parameters()).device
    # Offloading may have left nothing but a meta tensor there.
    setattr(module, _NAME, torch.tensor(index, device="cpu" if device.type == "meta" else device))


def forget_number(module: Any) -> None:
    """The inverse, of any module."""
    if _NAME in vars(module):
        delattr(module, _NAME)


def follow_model(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a model with numbered layers: numbers lie where it runs, or each would be copied every time.

    Compiled code copies, where a model moved since it was patched and its hooks are compiled too.
    """
    if torch.compiler.is_compiling():
        return
    patch = model._bigain
    device = getattr(argument(patch.family.signature, args, kwargs, patch.family.sample), "device", None)
    for module in (*(layer.attn for layer in patch.layers), *patch.told_modules):
        index = vars(module).get(_NAME)
        if index is not None and device is not None and index.device != device:
            setattr(module, _NAME, index.to(device))
