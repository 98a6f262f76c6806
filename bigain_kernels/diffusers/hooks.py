"""The hooks that carry the context through a model.

A forward pre-hook of the model puts the context under the key `KEY` into the dict that the model passes on to its
attention processors ("cross_attention_kwargs" or whatever its family calls it); further hooks add what a family knows
only deeper inside, and take the key away where nobody expects it. All hooks are plain functions, which one compiled
graph can serve for all blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from ..checks import check_pair
from .context import Context, Forward, Grid, PlanSlot, at_grid
from .current import begin, begin_block, current, end, end_block, resume_checkpoints

if TYPE_CHECKING:
    from .attention import LayerPatch
    from .families.family import Place

KEY = "bigain"
# In the same dict: the grid of the image's tokens, from a caller who does not want it read from the arguments.
GRID_KEY = "bigain_grid"

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Signature:
    """What is read of the arguments of a forward method, each at its position, as in `Signature(x=0, timestep=2)`.

    Written down, not asked of the class: other software replaces those methods by wrappers that take whatever comes.

    Args:
        carrier: the one among them with a dict for the attention processors; by itself the one whose name ends as
            diffusers ends it, `attention_kwargs`, or none.
        positions: of the arguments, by their names.
    """

    def __init__(self, carrier: str | None = None, **positions: int) -> None:
        if carrier is None:
            carrier = next((name for name in positions if name.endswith("attention_kwargs")), None)
        self.carrier, self.positions = carrier, positions


def argument(signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """The argument `name` of a call, given by position or by keyword; None where it was not given."""
    position = signature.positions[name]
    return args[position] if position < len(args) else kwargs.get(name)


def carried(signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any], key: str) -> Any:
    """What the dict for the processors holds under `key`, or None."""
    if signature.carrier is None:
        return None
    return (argument(signature, args, kwargs, signature.carrier) or {}).get(key)


def with_context(
    signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any], context: Forward | Context | None
) -> Call:
    """The call with `context` (or none) in the dict for its processors; the caller's own dict stays as it is."""
    if signature.carrier is None:
        return args, kwargs
    given = dict(argument(signature, args, kwargs, signature.carrier) or {})
    given.pop(KEY, None)
    given.pop(GRID_KEY, None)
    if context is not None:
        given[KEY] = context
    # None, not {}: what diffusers passes by itself, so layers that were compiled without us keep their graphs.
    return with_argument(signature, args, kwargs, signature.carrier, given or None)


def with_argument(signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, value: Any) -> Call:
    """The call with another value for the argument `name`."""
    position = signature.positions[name]
    if position < len(args):
        return (*args[:position], value, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: value}


def _context(model: Any, forward: Forward, values: dict[str, Any], given: Grid | None) -> Context | Forward:
    """What the layers of a forward pass are told; `forward` alone where hooks tell each its place."""
    family = model._bigain.family
    place: Place | None
    if forward.active or any(part.active for part in forward.parts):
        place = family.place(model, values, given)
    else:
        try:
            place = family.place(model, values, given)
        except ValueError:
            # What cannot be compressed runs as it is, and where its tokens stand is asked by nobody.
            return at_grid(forward, (1, 1))
    if given is not None and (place is None or place.grid != given):
        found = "none, this model has several" if place is None else f"{place.grid}, that of its arguments"
        raise ValueError(f"{GRID_KEY}: got {given}, expected {found}")
    return forward if place is None else at_grid(forward, place.grid, place.start, place.frames)


def enter_model(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Forward pre-hook of a patched model: verifies the patch and starts the context of this forward pass.

    Raises:
        ValueError: the grid that the caller gave is none, or is not that of the image's tokens, or this pass is
            compressed and these stand in no one place.
    """
    patch = model._bigain
    patch.verify(model)
    family = patch.family
    values = {name: argument(family.signature, args, kwargs, name) for name in family.signature.positions}
    forward = patch.start(values[family.sample], values[family.timestep])
    given = carried(family.signature, args, kwargs, GRID_KEY)
    given = None if given is None else check_pair(GRID_KEY, given)
    context = _context(model, forward, values, given)
    if family.passes_on:
        return with_context(family.signature, args, kwargs, context)
    assert isinstance(context, Context)
    resume_checkpoints(model)
    begin(patch, context)
    return with_context(family.signature, args, kwargs, None)


def leave_model(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of a patched model, called after an exception too, then without an output."""
    patch = model._bigain
    if patch.family.passes_on:
        told = carried(patch.family.signature, args, kwargs, KEY)
    else:
        told = current()
        end(patch)
    # A pass that failed before it began was told nothing, or what another one was.
    if output is not None:
        patch.look_back(model, told.forward if isinstance(told, Context) else told)


class WholeForm(NamedTuple):
    """How a block that can be merged as a whole is called.

    Attributes:
        has_text: its hidden states hold text, as they do in attention.
        returned: place of the hidden states in the tuple that it returns; None where it returns them alone.
    """

    has_text: bool
    returned: int | None


Wholes = dict[type, WholeForm]


@dataclass(eq=False)
class BlockPatch:
    """What hangs on a block whose layers share a plan.

    Attributes:
        signature: of its forward method.
        needs_source: tokens are matched on its `hidden_states`.
        has_mlp: its MLP is compressed.
        whole: it is merged as a whole, and how.
        form: of such a block.
    """

    signature: Signature
    needs_source: bool
    has_mlp: bool
    whole: LayerPatch | None = None
    form: WholeForm | None = None


def context_of(signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Context | None:
    """The context that a block is told, by its arguments or by the pass in progress; None of an unpatched model."""
    context = current() if signature.carrier is None else carried(signature, args, kwargs, KEY)
    return context if isinstance(context, Context) else None


def enter_block(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Forward pre-hook of a block whose layers share a plan, and may match tokens on its residual stream."""
    patch: BlockPatch = block._bigain
    if patch.has_mlp and getattr(block, "_chunk_size", None) is not None:
        raise ValueError(
            "modules: got 'ff' for a model whose MLPs run in chunks, expected one after disable_forward_chunking"
        )
    signature = patch.signature
    context = context_of(signature, args, kwargs)
    if context is None:
        return args, kwargs
    source = argument(signature, args, kwargs, "hidden_states") if patch.needs_source else None
    context = context._replace(source=source, block=PlanSlot())
    if patch.has_mlp:
        begin_block(patch, context)
    return with_context(signature, args, kwargs, context)


def leave_block(block: Any, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of a block whose MLP is compressed, called after an exception too."""
    end_block(block._bigain)


def skip_attention(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Forward pre-hook of an attention that is not compressed: diffusers would warn that it does not know the key."""
    return args, {name: value for name, value in kwargs.items() if name != KEY}


def show_hooks(module: nn.Module) -> None:
    """Have torch.compile see that a module got hooks; it looks for none where it found none.

    Nothing else may have changed of what compiled code saw: where the attention of a block is not compressed and the
    context is no argument of what was compiled, its MLP would stay as it was. What compiled code does look at is
    whether a module has a forward method of its own, so it is given the one of its class. Where other software gave it
    one, it stays.
    """
    if "forward" not in vars(module):
        module.forward = module.forward


def hide_hooks(module: nn.Module) -> None:
    """The inverse."""
    own = vars(module).get("forward")
    if own is not None and getattr(own, "__func__", None) is type(module).forward:
        del module.forward
