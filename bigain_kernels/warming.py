"""Having everything compiled and loaded before it is needed: before a server's first request, and before a CUDA graph
is captured, in which nothing can be loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from . import backends


class WarmedUp(NamedTuple):
    """What `warm_up` has done.

    Attributes:
        calls: how many calls it made.
        kernels: how often each Triton kernel was launched, by name; empty where other backends did all.
    """

    calls: int
    kernels: dict[str, int]


def warm_up(call: Callable[..., Any], samples: Iterable[tuple[Any, ...] | dict[str, Any]]) -> WarmedUp:
    """Compile and load all kernels that a patched model, or an op, launches on inputs like the samples.

    Runs `call` on each sample, without gradients and waiting for the end. Which kernels run hangs on the shapes,
    strides and dtypes of the inputs, never on their values. Give samples of each resolution, of the smallest and of the
    largest batch that will come. A model under torch.compile is compiled here too; on a CPU the C++ library is loaded.

    Args:
        call: what will be called later: a model, a method of it, or a function such as `token_merge`.
        samples: the arguments of one call each, a tuple of positional or a dictionary of named ones.

    Returns:
        WarmedUp, what was launched.

    Raises:
        TypeError: `call` cannot be called, or a sample is neither a tuple nor a dictionary.
        ValueError: no samples.
        RuntimeError: a CUDA graph is being captured.
    """
    if not callable(call):
        raise TypeError(f"call: got {type(call).__name__}, expected a model or a function")
    each = list(samples)
    if not each:
        raise ValueError("samples: got none, expected at least one")
    for sample in each:
        if not isinstance(sample, (tuple, dict)):
            raise TypeError(f"samples: got a {type(sample).__name__}, expected tuples or dictionaries of arguments")
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("warm_up: a CUDA graph is being captured, expected a call before")
    if backends.get("triton").missing:
        for sample in each:
            _run(call, sample)
        return WarmedUp(len(each), {})
    from .triton_kernels.launching import observe_launches

    with observe_launches() as launches:
        for sample in each:
            _run(call, sample)
    return WarmedUp(len(each), dict(Counter(launch.name for launch in launches)))


def _run(call: Callable[..., Any], sample: tuple[Any, ...] | dict[str, Any]) -> None:
    with torch.no_grad():
        result = call(**sample) if isinstance(sample, dict) else call(*sample)
    for device in {leaf.device for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_cuda}:
        torch.cuda.synchronize(device)
