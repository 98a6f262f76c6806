"""Gradients of an op on a backend against those of the float64 reference, which PyTorch differentiates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import bigain_kernels as bk
from bigain_kernels import reference
from bigain_kernels.testing import assert_close

from ..shapes import tokens
from .providers import Provider


def gradients(
    function: Callable[..., Any], inputs: dict[str, Tensor], dtype: torch.dtype, device: str = "cpu"
) -> dict[str, Tensor]:
    """By every input, of the results weighed by random numbers of a dtype, which lie in memory with real strides."""
    leaves = {name: x.detach().to(device).requires_grad_() for name, x in inputs.items()}
    with torch.enable_grad():
        results = function(**leaves)
    results = (results,) if isinstance(results, Tensor) else tuple(results)
    weights = [
        tokens(1, y.shape[-1], y[..., 0].numel(), dtype, seed=20 + i)[0].T.unflatten(0, y.shape[:-1]).to(y)
        for i, y in enumerate(results)
    ]
    found = torch.autograd.grad(results, tuple(leaves.values()), weights)
    return {name: x.cpu() for name, x in zip(leaves, found, strict=True)}


def assert_gradients(
    backend: Provider,
    op: str,
    call: Callable[..., Any],
    inputs: dict[str, Tensor],
    products: bool = False,
) -> None:
    """The gradients agree within the tolerance of the dtype, and have it.

    Args:
        backend: in use.
        op: its name.
        call: from a function, that op, and inputs by name: the results.
        inputs: differentiated by, in the dtypes of the case.
        products: sums of products in 16 bits: not worse than twice what PyTorch errs on the reference in that dtype.
    """
    function, plain = getattr(bk, op), getattr(reference, op)
    dtype = next(iter(inputs.values())).dtype
    found = gradients(lambda **x: call(function, **x), inputs, dtype, backend.device)
    expected = gradients(lambda **x: call(plain, **x), {name: x.double() for name, x in inputs.items()}, dtype)
    usual = gradients(lambda **x: call(plain, **x), inputs, dtype) if products else {}
    for name, x in inputs.items():
        assert found[name].dtype == x.dtype, name
        assert found[name].shape == x.shape, name
        if products and x.dtype in (torch.float16, torch.bfloat16):
            errors = [(each[name].double() - expected[name]).abs().max() for each in (found, usual)]
            assert errors[0] <= 2 * errors[1], name
        else:
            assert_close(found[name], expected[name])
