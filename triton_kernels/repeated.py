"""Calls of an op on tensors like those of an earlier call: its allocations and launches again, and nothing else.

What a launcher does besides (configs, grids, strides, views of scratch) follows from shapes, strides, dtypes, alignment
and numbers alone, and takes longer on the host than the launches. The first call of a kind is watched: which memory it
asks for, which kernels it launches, and where in the inputs and in that memory each of their pointers lies. Later calls
of that kind repeat it at the addresses of their own tensors.

Only what can be repeated so is kept: calls that run nothing of PyTorch but allocations and views, whose inputs are
different tensors, whose pointers and results are all accounted for, and whose launches are direct (see `direct`). All
others, and all calls while launches are recorded or configs are chosen by others, run their launcher.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.driver import driver

from . import configs, direct, launching

# Kinds of calls that are kept for each op, before all are forgotten.
MOST = 256
_MISALIGNED = 15
_NEW: Any = object()
_PLAIN = {int, str, bool, type(None)}
_aten = torch.ops.aten
_EMPTY = {_aten.empty.memory_format, _aten.new_empty.default, _aten.empty_like.default}
_VIEWS = {
    _aten.alias.default,
    _aten.as_strided.default,
    _aten.detach.default,
    _aten.select.int,
    _aten.slice.Tensor,
    _aten.unsqueeze.default,
    _aten.view.default,
    _aten.view.dtype,
}


class _Launch(NamedTuple):
    """A launch: the grid, the compiled kernel, and its arguments, those that are pointers at (place, source, bytes)."""

    grid: tuple[int, ...]
    kernel: direct.Kept
    arguments: list[Any]
    pointers: list[tuple[int, int, int]]


class _Call(NamedTuple):
    """What a call does; sources of pointers are its inputs, then its allocations."""

    empties: list[tuple[torch.Size, torch.dtype]]
    launches: list[_Launch]
    results: list[int]
    kind: type


class _Watch(TorchDispatchMode):
    """What PyTorch is asked for in a call, and where the tensors that come of it lie."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.empties: list[tuple[torch.Size, torch.dtype]] = []
        self.launches: list[_Launch] = []
        self.repeatable = True
        self._inputs = len(inputs)
        self._places = {id(each): (i, 0) for i, each in enumerate(inputs)}
        self._alive = list(inputs)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in _EMPTY and result.is_contiguous():
            self._put(result, self._inputs + len(self.empties), 0)
            self.empties.append((result.shape, result.dtype))
        elif function in _VIEWS and id(args[0]) in self._places:
            source, offset = self._places[id(args[0])]
            self._put(result, source, offset + result.data_ptr() - args[0].data_ptr())
        else:
            self.repeatable = False
        return result

    def _put(self, tensor: Tensor, source: int, offset: int) -> None:
        # Tensors are known by their identity: two inputs may lie in the same memory.
        self._places[id(tensor)] = source, offset
        self._alive.append(tensor)  # so that no other tensor gets its id

    def launched(self, kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        """In the place of `kernel[grid]`."""

        def launch(**arguments: Any) -> None:
            kept = launching.launching(kernel, grid)(**arguments)
            pointers = []
            for place, name in enumerate(kernel.arg_names):
                if isinstance(arguments[name], Tensor):
                    found = self._places.get(id(arguments[name]))
                    self.repeatable &= found is not None
                    pointers.append((place, *(found or (0, 0))))
            if kept is None:
                self.repeatable = False
                return
            full = (*grid, *(1,) * (3 - len(grid)))
            self.launches.append(_Launch(full, kept, [arguments[name] for name in kernel.arg_names], pointers))

        return launch

    def call(self, results: Any) -> _Call | None:
        """The call that was watched, as it can be repeated; None when it cannot."""
        found = [results] if isinstance(results, Tensor) else list(results)
        places = [self._places.get(id(each), (-1, 0)) for each in found]
        for each, (source, offset) in zip(found, places, strict=True):
            made = source - self._inputs
            self.repeatable &= made >= 0 and offset == 0 and (each.shape, each.dtype) == self.empties[made]
        if not self.repeatable:
            return None
        for launch in self.launches:
            for place, *_ in launch.pointers:
                launch.arguments[place] = None  # which would keep the tensor
        return _Call(self.empties, self.launches, [source - self._inputs for source, _ in places], type(results))


def _repeat(call: _Call, inputs: list[Tensor], device: int) -> Any:
    """The results of a call; None when memory is not aligned as it always was."""
    where = inputs[0].device
    made = [torch.empty(shape, dtype=dtype, device=where) for shape, dtype in call.empties]
    at = [each.data_ptr() for each in made]
    for address in at:
        if address & _MISALIGNED:
            return None
    at = [*(each.data_ptr() for each in inputs), *at]
    stream = driver.active.get_current_stream(device)
    for (x, y, z), (_, run, function, metadata), known, pointers in call.launches:
        arguments = known.copy()
        for place, source, offset in pointers:
            arguments[place] = at[source] + offset
        run(x, y, z, stream, function, metadata, None, None, None, *arguments)
    results = [made[i] for i in call.results]
    return results[0] if call.kind is Tensor else call.kind(results)


def repeated(launch: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the flat arguments of an op, tensors, integers and words, with calls repeated where they can be."""
    kept: dict[tuple[Any, ...], _Call | None] = {}

    def run(*args: Any) -> Any:
        if direct.reason() or not direct.untouched() or launching.is_watched() or not configs.is_by_tables():
            return launch(*args)
        active = driver.active
        device = active.get_current_device()
        inputs: list[Tensor] = []
        key: list[Any] = [active, device]
        for arg in args:
            if arg.__class__ is Tensor or arg.__class__ is Parameter:
                inputs.append(arg)
                key += (arg.dtype, arg.shape, arg.stride(), arg.data_ptr() & _MISALIGNED == 0)
            elif arg.__class__ in _PLAIN:
                key.append(arg)
            else:
                return launch(*args)
        kind = tuple(key)
        call = kept.get(kind, _NEW)
        if call is _NEW:
            return watched(kind, inputs, args)
        results = None if call is None else _repeat(call, inputs, device)
        return launch(*args) if results is None else results

    def watched(kind: tuple[Any, ...], inputs: list[Tensor], args: tuple[Any, ...]) -> Any:
        # Of a tensor that comes twice, nobody could say which of the two a pointer is.
        if len({id(each) for each in inputs}) < len(inputs):
            return launch(*args)
        watch = _Watch(inputs)
        with launching.instead(watch.launched), watch:
            results = launch(*args)
        if len(kept) >= MOST:
            kept.clear()
        kept[kind] = watch.call(results)
        return results

    return run
