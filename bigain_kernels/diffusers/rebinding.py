"""A processor of any family with another attention in its middle.

Between projections, norms and rotations, which every family has its own of, and the output, all processors of diffusers
call one of two functions: `dispatch_attention_fn` or PyTorch's attention. A rebound processor is a subclass whose call
is the code of the parent, in a namespace where these two names are ours; for a call that is compressed they attend by
the step in progress, and nothing of what the family does before and after is repeated here. Where hidden states are
merged, the parent is called with fewer of them, and with the rotations of those that are left.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from .attention import CompressedAttention, active_backend
from .context import Context
from .current import current
from .steps import MergeStep, Rotation, States, Step, turn_pairs

_NAMES = ("dispatch_attention_fn", "scaled_dot_product_attention")
# The argument by which a processor is told the rotation of its tokens.
_ROTATIONS = ("rotary_emb", "image_rotary_emb")


# Holds `step` and `stop`, where the image's tokens end, while a processor runs; see `current.py`.
_in_progress = threading.local()


class _Attending:
    """The attention call of a processor, as a step sees it: tensors (B, tokens, heads, d)."""

    def __init__(self, attend: Callable[..., Tensor], native: bool) -> None:
        self._attend, self._native = attend, native

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        return self._attend(query, key, value, mask)

    def attends_natively(self) -> bool:
        return self._native

    def uses_fused(self, attn: Any) -> bool:
        raise NotImplementedError("a rebound processor projects by itself")

    def project(self, attn: Any, x: Tensor, keys: Tensor | None) -> States:
        raise NotImplementedError("a rebound processor projects by itself")


def _step_of(query: Tensor, key: Tensor, tokens: int) -> Step | None:
    """The step in progress, where this is the attention of the image's tokens to themselves and to text."""
    same = query.shape[tokens] == key.shape[tokens]
    step = getattr(_in_progress, "step", None)
    return step if step is not None and same and key.shape[tokens] >= _in_progress.stop else None


def _dispatch(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """In the place of `diffusers.models.attention_dispatch.dispatch_attention_fn`."""
    step = _step_of(query, key, 1)
    if step is None:
        return dispatch_attention_fn(query, key, value, attn_mask, *args, **kwargs)
    backend = kwargs.get("backend")
    chosen = active_backend() if backend is None else backend
    # Arguments by position are dropout, causality and scale, which our op has not.
    plain = not args and not kwargs.get("is_causal") and kwargs.get("scale") is None
    native = plain and chosen == AttentionBackendName.NATIVE and query.shape[2] == key.shape[2]

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return dispatch_attention_fn(query, key, value, mask, *args, **kwargs)

    mask = None if attn_mask is None else step.reduce_mask(attn_mask)
    return step.attend(_Attending(attend, native), query, key, value, mask)


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """In the place of `torch.nn.functional.scaled_dot_product_attention`: (B, heads, tokens, d)."""
    step = _step_of(query, key, 2)
    if step is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *args, **kwargs)
    native = not args and not kwargs.get("is_causal") and kwargs.get("scale") is None and query.shape[1] == key.shape[1]

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, mask, *args, **kwargs).transpose(1, 2)

    mask = None if attn_mask is None else step.reduce_mask(attn_mask)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return step.attend(_Attending(attend, native), query, key, value, mask).transpose(1, 2)


def _rotate(x: Tensor, tables: Rotation, *args: Any, **kwargs: Any) -> Tensor:
    """In the place of `diffusers.models.embeddings.apply_rotary_emb`, which takes no tables that differ by row."""
    if isinstance(tables, tuple) and tables[0].dim() == 3:
        return turn_pairs(x, *tables)
    return apply_rotary_emb(x, tables, *args, **kwargs)


def _at_anchors(rotation: tuple[Tensor, Tensor], step: MergeStep, rows: int) -> tuple[Tensor, ...]:
    """Tables (T, d), or (1, T, 1, d) as Wan has them, of the tokens that are left, in the same form."""
    if rotation[0].dim() == 2:
        return step.turned(rotation, rows)  # type: ignore[return-value]
    left = step.turned((rotation[0][0, :, 0], rotation[1][0, :, 0]), rows)
    return tuple(table[None, :, None] if table.dim() == 2 else table[:, :, None] for table in left)


def _module(name: str, contents: dict[str, Any]) -> types.ModuleType:
    """A module of ours under a name of its own: torch.compile finds globals again by the name of their module."""
    module = types.ModuleType(name)
    module.__dict__.update(contents)
    sys.modules[name] = module
    return module


_functional = _module(
    f"{__name__}.functional",
    {name: value for name, value in vars(F).items() if not name.startswith("__")}
    | {"scaled_dot_product_attention": _sdpa},
)


def _attends(function: types.FunctionType) -> bool:
    return any(name in function.__code__.co_names for name in _NAMES)


def _helpers(function: types.FunctionType) -> dict[str, types.FunctionType]:
    """The functions of its own module that a processor calls and that attend for it."""
    return {
        name: value
        for name, value in function.__globals__.items()
        if isinstance(value, types.FunctionType)
        and value.__module__ == function.__module__
        and name in function.__code__.co_names
        and _attends(value)
    }


def can_rebind(processor: type) -> bool:
    """Whether processors of a class are plain objects and attend, they or a helper of theirs, by one of the two."""
    if issubclass(processor, nn.Module):
        return False
    call = vars(processor).get("__call__")
    return isinstance(call, types.FunctionType) and (_attends(call) or bool(_helpers(call)))


class ReboundProcessor(CompressedAttention):
    """What a rebound processor does around the code of its parent; see `rebound`."""

    def pools_early(self, attn: Any, config: Any) -> bool:
        return False


def _in_namespace(function: types.FunctionType, namespace: dict[str, Any]) -> types.FunctionType:
    moved = types.FunctionType(
        function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__
    )
    moved.__kwdefaults__ = function.__kwdefaults__
    return moved


@functools.cache
def rebound(parent: Any) -> type[ReboundProcessor]:
    """The subclass of a processor's class that compresses; one for each class, so compiled code is shared.

    Args:
        parent: class of a processor that `can_rebind`.
    """
    call: Any = parent.__call__
    name = f"{__name__}.{parent.__module__}.{parent.__qualname__}"
    ours = {"__builtins__": builtins.__dict__, "__name__": name, "F": _functional, "dispatch_attention_fn": _dispatch}
    namespace = _module(name, {**call.__globals__, **ours}).__dict__
    namespace.update({name: _in_namespace(helper, namespace) for name, helper in _helpers(call).items()})
    if namespace.get("apply_rotary_emb") is apply_rotary_emb:
        namespace["apply_rotary_emb"] = _rotate
    inner = _in_namespace(call, namespace)
    signature = inspect.signature(call)
    names = tuple(signature.parameters)[2:]

    def given(args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
        if name not in names:
            return None
        position = names.index(name)
        return args[position] if position < len(args) else kwargs.get(name)

    def put(
        args: tuple[Any, ...], kwargs: dict[str, Any], name: str, value: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        position = names.index(name)
        if position < len(args):
            return (*args[:position], value, *args[position + 1 :]), kwargs
        return args, {**kwargs, name: value}

    def __call__(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        context: Context | None = current()
        text = given(args, kwargs, "encoder_hidden_states")
        x = given(args, kwargs, "hidden_states")
        # Text in front of the image that is not among the hidden states; behind the image it moves nothing.
        apart = 0 if context is None or text is None or text is x else text.shape[1]
        if context is not None and context.image_tokens[0] < apart:
            apart = 0
        step = self.step(attn, context, x, apart)
        if step is None or context is None:
            return call(self, attn, *args, **kwargs)
        stop = context.image_tokens[1]
        if isinstance(step, MergeStep):
            few = step.enter(x)
            stop -= x.shape[1] - few.shape[1]
            for name in _ROTATIONS:
                rotation = given(args, kwargs, name)
                if rotation is not None:
                    args, kwargs = put(args, kwargs, name, _at_anchors(rotation, step, x.shape[0]))
            args, kwargs = put(args, kwargs, "hidden_states", few)
        _in_progress.step, _in_progress.stop = step, stop
        try:
            result = inner(self, attn, *args, **kwargs)
        finally:
            _in_progress.step = None
        if not isinstance(step, MergeStep):
            return result
        return (step.leave(result[0]), *result[1:]) if isinstance(result, tuple) else step.leave(result)

    # diffusers asks for the names of the arguments and leaves out those that are not there.
    __call__.__signature__ = signature  # type: ignore[attr-defined]
    return type(f"Compressed{parent.__name__}", (ReboundProcessor, parent), {"__call__": __call__})
