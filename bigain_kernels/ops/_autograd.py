"""The ops under autograd: derivatives of those that have them, and a refusal where torch would return zeros.

Merging and pooling are differentiated in reverse mode, as often as asked; what selects tokens is a constant there.
Results that are indices (plans, matches, destinations) may be used where gradients are recorded. Whoever asks for
another derivative gets a RuntimeError: the backward pass when it reaches the op, forward mode when the op is called.

torch.library's `register_autograd` would give the same first derivatives. It returns zeros in forward mode, stops the
transforms of torch.func, and takes as long as a whole dispatch where nothing is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import _C, Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from ..declaration import OPS, PUBLIC, Gradient, Op
from ._library import BELOW, DEVICES, no_derivative


def _results(call: Callable[[], Any]) -> Any:
    """What a call returns, as autograd has it. Recording is off here, and would be for torch.func's outer levels."""
    outer = _C._are_functorch_transforms_active()
    with torch.set_grad_enabled(outer), forward_ad._set_fwd_grad_enabled(outer):
        results = call()
    return tuple(results) if isinstance(results, list) else results


# Both classes stand for one level of autograd, as the functions of torch do: the levels of torch.func are apart when
# the dispatcher comes here, and `Function.apply`, which is for calls from outside, would look for them once more.
class _Refuse(_SingleLevelFunction):
    """The results of a call, with a backward that says why there is none."""

    @staticmethod
    def forward(ctx: Any, op: str, call: Callable[[], Any], *inputs: Tensor) -> Any:
        ctx.op, ctx.inputs = op, [(x.shape, x.dtype) for x in inputs]
        return _results(call)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gradient = next(each for each in gradients if each is not None and each.is_floating_point())
        return (
            None,
            None,
            *(
                PUBLIC.no_derivative(gradient, shape, dtype, ctx.op) if needed else None
                for (shape, dtype), needed in zip(ctx.inputs, ctx.needs_input_grad[2:], strict=True)
            ),
        )


class _Differentiate(_SingleLevelFunction):
    """The results of a call, with the backward that its op declares."""

    @staticmethod
    def forward(ctx: Any, op: Op, args: tuple[Any, ...], call: Callable[[], Any], *inputs: Tensor) -> Any:
        ctx.op, ctx.needs_all = op, [name for name, _ in _named(op, args)]
        ctx.needs = frozenset(
            name for name, needed in zip(ctx.needs_all, ctx.needs_input_grad[3:], strict=True) if needed
        )
        unused = _gradient(op.name).unused(ctx.needs, *_to_public(op.name)(*args))
        kept = [None if name in unused else arg for name, arg in zip(op.flat_names, args, strict=True)]
        ctx.dtypes = [x.dtype for x in inputs]
        ctx.args = [arg if not isinstance(arg, (Tensor, list, tuple)) else None for arg in kept]
        ctx.lengths = [len(arg) if isinstance(arg, (list, tuple)) else None for arg in args]
        ctx.kept = [name for name, _ in _named(op, kept)]
        ctx.save_for_backward(*(x for _, x in _named(op, kept)))
        ctx.set_materialize_grads(False)
        return _results(call)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        saved = dict(zip(ctx.kept, ctx.saved_tensors, strict=True))
        args = [
            saved.get(name, arg) if length is None else [saved.get(f"{name}[{i}]") for i in range(length)]
            for name, arg, length in zip(ctx.op.flat_names, ctx.args, ctx.lengths, strict=True)
        ]
        found: dict[str, Tensor] = {}
        if any(each is not None for each in gradients):
            found = _gradient(ctx.op.name).backward(gradients, ctx.needs, *_to_public(ctx.op.name)(*args))
        return (
            None,
            None,
            None,
            *(
                found[name].to(dtype) if name in ctx.needs and name in found else None
                for name, dtype in zip(ctx.needs_all, ctx.dtypes, strict=True)
            ),
        )


# The base class has it from C.
_refuse: Callable[..., Any] = _Refuse.apply  # type: ignore[attr-defined]
_differentiate: Callable[..., Any] = _Differentiate.apply  # type: ignore[attr-defined]


@cache
def _gradient(op: str) -> Gradient:
    """How an op is differentiated."""
    module, name = OPS[op].gradient.split(".")
    return getattr(import_module(f"{__package__}.{module}"), name)


@cache
def _to_public(op: str) -> Callable[..., tuple[Any, ...]]:
    """The public arguments of an op from the flat ones."""
    return OPS[op].of_public(lambda *public: public)


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors among arguments or results, also in lists."""
    for value in (values,) if isinstance(values, Tensor) else values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _named(op: Op, args: Iterable[Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors among flat arguments, with the names that `Gradient` has for them."""
    for name, arg in zip(op.flat_names, args, strict=True):
        if isinstance(arg, Tensor):
            yield name, arg
        elif isinstance(arg, (list, tuple)):
            yield from ((f"{name}[{i}]", each) for i, each in enumerate(arg))


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None


def autograd_kernel(op: Op, run: Callable[..., Any]) -> Callable[..., Any]:
    """The autograd kernel of an op that `run` computes, for the calls that `_library` does not hand to `run` itself."""
    overload = getattr(PUBLIC, op.name).default
    returns_list = op.returns == "Tensor[]"

    def below(keyset: Any, args: tuple[Any, ...]) -> Any:
        with _C._AutoDispatchBelowAutograd():
            if keyset.raw_repr() & BELOW in DEVICES:
                return run(*args)
            return overload.redispatch(keyset & _C._after_autograd_keyset, *args)

    def kernel(keyset: Any, *args: Any) -> Any:
        recorded = _C.is_grad_enabled() and _C._any_requires_grad(*args)
        tangent = forward_ad._current_level >= 0 and any(map(_has_tangent, _tensors(args)))
        if op.selects or not (recorded or tangent):
            return below(keyset, args)
        if not op.gradient and (tangent or _C._are_functorch_transforms_active()):
            raise no_derivative(op.name)
        if tangent:
            raise no_derivative(op.name, "forward-mode ")
        with enable_single_level_autograd_function():
            if not op.gradient:
                results = _refuse(op.name, lambda: below(keyset, args), *_tensors(args))
            else:
                results = _differentiate(op, args, lambda: below(keyset, args), *_tensors(args))
        return list(results) if returns_list else results

    return kernel
