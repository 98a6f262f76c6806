"""The base of families whose attention is compressed in the middle, whatever stands around it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from torch import nn

from ..attention import CompressedAttention
from ..rebinding import can_rebind, rebound
from .family import Family, Layer
from .recommended import POOL


class ReboundFamily(Family):
    """A family that says only where its image tokens stand; see `rebinding.py`.

    Attributes:
        layer_names: pattern of the names of the attentions that the image's tokens go through with `Place.start` in
            front of them: joint attention and self-attention.
    """

    layer_names: ClassVar[str] = r"transformer_blocks\.\d+\.attn1"
    merges: ClassVar[tuple[str, ...]] = ("attention",)
    pools: ClassVar[tuple[str, ...]] = ("keys",)
    passes_on = False
    recommended = POOL

    def layers(self, model: Any) -> list[Layer]:
        found = [(name, module) for name, module in model.named_modules() if re.fullmatch(self.layer_names, name)]
        return [
            Layer(name, "attn1", index, module, model.get_submodule(name.rpartition(".")[0]))
            for index, (name, module) in enumerate(found)
        ]

    def stands_in(self, processor: type) -> bool:
        return processor in self.replaceable if self.replaceable else can_rebind(processor)

    def stand_in(self, previous: Any) -> CompressedAttention:
        # All that it holds, such as the attention backend that was chosen, stays with it.
        ours = copy.copy(previous)
        parent: Any = type(previous)
        ours.__class__ = rebound(parent)
        return ours

    def hooks(
        self, model: Any, compressed: list[Layer], merges: bool
    ) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        return self.block_hooks(compressed) if merges else iter(())
