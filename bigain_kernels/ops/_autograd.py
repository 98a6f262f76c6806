"""What differentiates through an op is told that there is no derivative, where torch would return zeros or nothing.

The ops are for inference. Their results may be computed where gradients are recorded, and results that are indices
(plans, matches, destinations) may be used there. Whoever asks for a derivative of the others gets a RuntimeError: the
backward pass when it reaches the op, forward mode and the transforms of torch.func when the op is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad

from ..declaration import Op

# Sets of dispatch keys as bits, which compare fast. Of a call with nothing special about it, no other key than that of
# its device is below autograd and the bookkeeping of views.
_BELOW = _C._after_ADInplaceOrView_keyset.raw_repr()
_DEVICES = {_C.DispatchKeySet(key).raw_repr() for key in (_C.DispatchKey.CPU, _C.DispatchKey.CUDA)}


def no_derivative(op: str) -> RuntimeError:
    """The error of whoever differentiates through an op."""
    return RuntimeError(
        f"bigain_kernels.{op}: has no derivative, the ops are for inference; "
        "run under torch.no_grad() or detach the input"
    )


def _raise(gradient: Tensor, shape: list[int], dtype: torch.dtype, op: str) -> Tensor:
    raise no_derivative(op)


def define_refusal(library: torch.library.Library) -> None:
    """Define the op that stands for the gradients in the backward pass, and raises when it runs.

    It is an op so that compiled code, whose backward pass is traced with its forward pass, raises no sooner.
    """
    library.define("no_derivative(Tensor gradient, SymInt[] shape, ScalarType dtype, str op) -> Tensor")
    library.impl("no_derivative", _raise, "CompositeExplicitAutograd")
    torch.library.register_fake(
        "bigain::no_derivative",
        lambda gradient, shape, dtype, op: gradient.new_empty(shape, dtype=dtype),
        lib=library,
    )


class _Refuse(torch.autograd.Function):
    """The results of a call, with a backward that says why there is none."""

    @staticmethod
    def forward(ctx: Any, op: str, call: Callable[[], Any], *inputs: Tensor) -> Any:
        ctx.op, ctx.inputs = op, [(x.shape, x.dtype) for x in inputs]
        results = call()
        return tuple(results) if isinstance(results, list) else results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gradient = next(each for each in gradients if each is not None and each.is_floating_point())
        return (
            None,
            None,
            *(
                torch.ops.bigain.no_derivative(gradient, shape, dtype, ctx.op) if needed else None
                for (shape, dtype), needed in zip(ctx.inputs, ctx.needs_input_grad[2:], strict=True)
            ),
        )


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors among arguments or results, also in lists."""
    for value in (values,) if isinstance(values, Tensor) else values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None


def refuse_derivatives(op: Op, run: Callable[..., Any]) -> Callable[..., Any]:
    """The autograd kernel of an op that `run` computes.

    A call with nothing between it and the device, which is the usual call, goes straight to `run`: handing it down to
    the next kernel takes longer than a whole dispatch.
    """
    overload = getattr(torch.ops.bigain, op.name).default
    returns_list = op.returns == "Tensor[]"

    def below(keyset: Any, args: tuple[Any, ...]) -> Any:
        with _C._AutoDispatchBelowAutograd():
            if keyset.raw_repr() & _BELOW in _DEVICES:
                return run(*args)
            return overload.redispatch(keyset & _C._after_autograd_keyset, *args)

    def kernel(keyset: Any, *args: Any) -> Any:
        recorded = _C.is_grad_enabled() and _C._any_requires_grad(*args)
        tangent = forward_ad._current_level >= 0 and any(map(_has_tangent, _tensors(args)))
        if not recorded and not tangent and keyset.raw_repr() & _BELOW in _DEVICES:
            return run(*args)
        if op.selects or not (recorded or tangent):
            return below(keyset, args)
        if tangent or _C._are_functorch_transforms_active():
            raise no_derivative(op.name)
        results = _Refuse.apply(op.name, lambda: below(keyset, args), *_tensors(args))
        return list(results) if returns_list else results

    return kernel
