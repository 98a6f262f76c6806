"""A processor of any family with another attention in its middle.

Between projections, norms and rotations, which every family has its own of, and the output, all processors of diffusers
call one of two functions: `dispatch_attention_fn` or PyTorch's attention. A rebound processor is a subclass whose call
is the code of the parent, in a namespace where these two names are ours; for a call that is compressed they attend by
the step in progress, and nothing of what the family does before and after is repeated here. Where hidden states are
merged, the parent is called with fewer of them, and with the rotations of those that are left.
"""

from __future__ import annotations

import builtins
import copyreg
import functools
import inspect
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import PAGCFGHunyuanAttnProcessor2_0, PAGHunyuanAttnProcessor2_0
from torch import Tensor, nn

from .attention import CompressedAttention, active_backend
from .context import Context
from .current import current
from .steps import MergeStep, States, Step, turn_pairs

_NAMES = ("dispatch_attention_fn", "scaled_dot_product_attention")
# The argument by which a processor is told the rotation of its first tokens: tables that may differ by row, or those
# that diffusers' `apply_rotary_emb` takes, which may not.
_ROTATION_BY_ROW, _ROTATION = "rotary_emb", "image_rotary_emb"
# They attend for some rows of the batch alone; a plan and an alpha are of them all.
_PERTURBED = (PAGHunyuanAttnProcessor2_0, PAGCFGHunyuanAttnProcessor2_0)


# Holds, while a processor runs, `step`, `stop`, where the image's tokens end, and `rotation`, of queries and keys that
# the processor did not turn, or None; see `current.py`.
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
    query, key = _turn(query), _turn(key)
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
    query, key = _turn(query), _turn(key)
    return step.attend(_Attending(attend, native), query, key, value, mask).transpose(1, 2)


def _turn(x: Tensor) -> Tensor:
    """Queries or keys (B, tokens, heads, d), the first turned by the tables in progress, (T, d) or (B, T, d)."""
    rotation: tuple[Tensor, Tensor] | None = _in_progress.rotation
    if rotation is None:
        return x
    cos, sin = (table if table.dim() == 3 else table[None] for table in rotation)
    count = cos.shape[1]
    turned = turn_pairs(x[:, :count], cos, sin)
    return turned if count == x.shape[1] else torch.cat([turned, x[:, count:]], dim=1)


def _at_anchors(rotation: tuple[Tensor, Tensor], step: MergeStep, rows: int) -> tuple[Tensor, ...]:
    """Tables (1, T, 1, d) of the tokens that are left, in the same form, a row of the batch each where they differ."""
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
    """Whether processors of a class are plain objects and attend, they or a helper of theirs, by one of the two.

    And for the whole batch, which those of perturbed attention do not.
    """
    if issubclass(processor, (nn.Module, *_PERTURBED)):
        return False
    call = vars(processor).get("__call__")
    return isinstance(call, types.FunctionType) and (_attends(call) or bool(_helpers(call)))


class _Rebound(type):
    """The class of classes that `rebound` makes: pickled as the call that makes them again, for no module has them."""

    parent: Any


class ReboundProcessor(CompressedAttention, metaclass=_Rebound):
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
        stop, turned = context.image_tokens[1], None
        if isinstance(step, MergeStep):
            stop = context.image_tokens[0] + step.frames * step.plan.num_slots
            args, kwargs = put(args, kwargs, "hidden_states", step.enter(x))
            rotation = given(args, kwargs, _ROTATION_BY_ROW)
            if rotation is not None:
                args, kwargs = put(args, kwargs, _ROTATION_BY_ROW, _at_anchors(rotation, step, x.shape[0]))
            rotation = given(args, kwargs, _ROTATION)
            if rotation is not None:
                turned = step.turned(rotation, x.shape[0])
                args, kwargs = put(args, kwargs, _ROTATION, None)
        _in_progress.step, _in_progress.stop, _in_progress.rotation = step, stop, turned
        try:
            result = inner(self, attn, *args, **kwargs)
        finally:
            _in_progress.step = _in_progress.rotation = None
        if not isinstance(step, MergeStep):
            return result
        return (step.leave(result[0]), *result[1:]) if isinstance(result, tuple) else step.leave(result)

    # diffusers asks for the names of the arguments and leaves out those that are not there.
    __call__.__signature__ = signature  # type: ignore[attr-defined]
    contents = {"__call__": __call__, "parent": parent}
    made: Any = _Rebound(f"Compressed{parent.__name__}", (ReboundProcessor, parent), contents)
    return made


def _made_again(cls: Any) -> Any:
    return (rebound, (cls.parent,)) if "parent" in vars(cls) else cls.__qualname__


copyreg.pickle(_Rebound, _made_again)
