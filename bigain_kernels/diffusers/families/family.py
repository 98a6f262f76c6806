"""What compression must know of one kind of model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from diffusers.models.attention_processor import Attention
from torch import nn

from ...methods import CompressionConfig
from ..attention import CompressedAttention
from ..context import Grid
from ..hooks import Signature, WholeForm, Wholes, enter_block, skip_attention
from ..schedulers import TimestepRange
from ..whole import enter_whole_block
from .recommended import Recommendation


@dataclass(frozen=True)
class Layer:
    """One attention of one transformer block, or its MLP.

    Attributes:
        name: path of the layer in the model.
        kind: "attn1", self-attention or joint attention, "attn2", cross-attention, or "ff", the MLP.
        index: of the block, in module order.
        attn: the attention module; the MLP; of a block in which it cannot be told from the rest, the
            block, or None.
        block: its transformer block.
        level: downsampling of its resolution from the latent grid, 1, 2, 4, ...
        transformer: the module between model and block that has a grid of its own, in U-Nets.
    """

    name: str
    kind: str
    index: int
    attn: Any
    block: nn.Module
    level: int = 1
    transformer: nn.Module | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the layer is the whole block, whose MLP cannot be told from the rest."""
        return self.attn is self.block


class Place(NamedTuple):
    """Where the tokens of the image stand.

    Attributes:
        grid: (H, W) that they form, in raster order.
        start: tokens in front of them, of all that attend to each other.
        frames: how many such grids follow each other, in a video.
    """

    grid: Grid
    start: int = 0
    frames: int = 1


class Family(ABC):
    """A kind of model whose attention can be compressed: a subclass declares it, an instance is registered.

    Attributes:
        model: class of the model.
        signature: the arguments of its forward method that are read, among them `sample` and `timestep`.
        sample, timestep: the arguments with one row for each sample of the batch, and with what it is told as timestep.
        processors: the compressing processors of its layers.
        replaceable: processors of other software and of diffusers which compute one and the same attention, so that
            a compressing one can stand in for them.
        attentions: classes of the modules that are given the context, those that are not compressed too.
        passes_on: what `signature.carrier` holds reaches the attention processors as arguments; otherwise
            `current.py` tells them.
        needs_source: tokens are matched on the residual stream, which `hooks` hands over.
        block: what is read of the arguments of a block's forward method, where `needs_source` or `mlp` is.
        wholes: the classes of blocks without such an MLP that are merged as a whole where attention and "ff" are
            asked for, and how these are called.
        no_mlp: why such blocks have none.
        recommended: what to begin with, or None.
        mlp: name in a block of the MLP of the image's tokens, which stand first among its own, or where they do in
            attention (`text_in_mlp`); None where there is no such one.
        merges: where it can merge tokens, the best first; see `MergeConfig.merge`.
        pools: what it can pool; see `PoolConfig.pool`.
    """

    model: ClassVar[type[nn.Module]]
    signature: ClassVar[Signature]
    sample: ClassVar[str] = "hidden_states"
    timestep: ClassVar[str] = "timestep"
    processors: ClassVar[tuple[type[CompressedAttention], ...]] = ()
    replaceable: ClassVar[tuple[type, ...]] = ()
    attentions: ClassVar[tuple[type, ...]] = (Attention,)
    passes_on: ClassVar[bool] = True
    needs_source: ClassVar[bool] = False
    block: ClassVar[Signature] = Signature(hidden_states=0)
    mlp: ClassVar[str | None] = None
    wholes: ClassVar[Wholes] = {}
    no_mlp: ClassVar[str] = "its MLP and its attention are one"
    recommended: ClassVar[Recommendation | None] = None
    merges: ClassVar[tuple[str, ...]] = ("hidden", "attention")
    pools: ClassVar[tuple[str, ...]] = ("keys", "hidden")

    @abstractmethod
    def layers(self, model: Any) -> list[Layer]:
        """All attentions of the model's transformer blocks, in module order."""

    def mlps(self, layers: list[Layer]) -> list[Layer]:
        """The MLPs of the blocks that `layers` are of."""
        if self.mlp is None:
            return []
        found = []
        for layer in {layer.index: layer for layer in reversed(layers)}.values():
            name, mlp = layer.name.rpartition(".")[0], getattr(layer.block, self.mlp, None)
            if mlp is not None or self.whole_form(layer.block) is None:
                name = f"{name}.{self.mlp}"
            else:
                mlp = layer.block
            found.append(replace(layer, name=name, kind="ff", attn=mlp))
        return found

    def whole_form(self, block: nn.Module) -> WholeForm | None:
        """How a block that can be merged as a whole is called, or None.

        Software such as FSDP2 gives a block another class, derived from its own; a class with a forward method of its
        own may be called otherwise.
        """
        found: Any = next((cls for cls in type(block).__mro__ if cls in self.wholes), None)
        return self.wholes[found] if found is not None and type(block).forward is found.forward else None

    @abstractmethod
    def place(self, model: Any, call: dict[str, Any], given: Grid | None) -> Place | None:
        """Where the image's tokens stand in this forward pass.

        Args:
            model: the model.
            call: the arguments of `signature` by name, None for those that were not given.
            given: the grid that the caller gave with the call, or None.

        Returns:
            The place, or None where `hooks` tell each layer its own.

        Raises:
            ValueError: the tokens do not form one grid.
        """

    def recommend(self, model: Any) -> CompressionConfig | None:
        """What to begin with for a model, or None."""
        return None if self.recommended is None else self.recommended.config

    def told(self, config: CompressionConfig) -> TimestepRange | None:
        """The timesteps that every pipeline tells this model; None where that depends on its scheduler."""
        return None

    def refuses(self, config: CompressionConfig, layer: Layer) -> str | None:
        """Why this attention cannot be compressed whatever its processor, or None."""
        return None

    def stands_in(self, processor: type) -> bool:
        """Whether a compressing processor can stand in for one of this class."""
        return processor in self.replaceable

    def stand_in(self, previous: Any) -> CompressedAttention:
        """A compressing processor that computes what `previous` does."""
        return self.processors[0]()

    def text_inside(self, layer: Layer) -> bool:
        """Whether the hidden states of this layer hold text too."""
        return False

    def text_in_mlp(self, layer: Layer) -> bool:
        """Whether the tokens of this MLP are all those of attention, with the text in front of the image."""
        return False

    def hooks(
        self, model: Any, compressed: list[Layer], merges: bool
    ) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        """Forward pre-hooks that hand on the context inside the model, and keep it from those who do not know it.

        Args:
            model: the model.
            compressed: the layers that are.
            merges: tokens are merged.
        """
        kept = {id(layer.attn) for layer in compressed}
        module: nn.Module
        for module in model.modules():
            if isinstance(module, self.attentions) and id(module) not in kept:
                yield module, skip_attention
        if merges:
            yield from self.block_hooks(compressed)

    def block_hooks(self, compressed: list[Layer]) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        """Those of the blocks whose layers share a plan, or that are merged as a whole."""
        for layer in {layer.index: layer for layer in compressed if self.needs_source or layer.kind == "ff"}.values():
            yield layer.block, enter_whole_block if layer.is_whole else enter_block
