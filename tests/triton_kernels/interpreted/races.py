"""What compute-sanitizer looks for on a GPU, looked for in the interpreter: races, missing barriers, stray addresses.

The interpreter runs one program after another, and each operation for a whole block at once, so a kernel that depends
on that order is right there and wrong on a GPU. `watch` takes down every address that a launch touches and fails when

* an address lies in none of the tensors that the launch was given,
* two programs of a launch touch one address and one of them writes it, other than both by atomics,
* two elements of the blocks of one program touch one address with no barrier between, and one of them writes it. Equal
  positions in blocks of one shape are taken for one thread: where their layouts differ, what is stored was loaded
  through shared memory, with a barrier of the compiler's.
"""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder

LOAD, STORE, ATOMIC = 0, 1, 2


def _addresses(tensor):
    """Byte addresses of the elements of a tensor."""
    offsets = np.zeros(1, np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = (offsets[:, None] + np.arange(size, dtype=np.int64) * stride).ravel()
    return tensor.data_ptr() + offsets * tensor.element_size()


def _first_conflict(address, actor, kind):
    """An address that two actors touch, one of them writing and not both by atomics; or None."""
    order = np.lexsort((actor, address))
    address, actor, kind = address[order], actor[order], kind[order]
    _, begin, inverse = np.unique(address, return_index=True, return_inverse=True)
    several = np.zeros(len(begin), bool)
    np.logical_or.at(several, inverse, actor != actor[begin][inverse])
    written = np.zeros(len(begin), bool)
    np.logical_or.at(written, inverse, kind != LOAD)
    atomic = np.ones(len(begin), bool)
    np.logical_and.at(atomic, inverse, kind == ATOMIC)
    found = several & written & ~atomic
    return int(address[begin][found][0]) if found.any() else None


class Watcher:
    """Addresses of the launch at hand, and of the program and the phase between two barriers at hand."""

    def __init__(self):
        self.tensors, self.launch, self.phase, self.errors, self.accesses = {}, [], [], [], 0

    def name_of(self, address):
        owners = [name for name, own in self.tensors.items() if address in own]
        return f"address {address} of {owners or 'nothing'}"

    def touch(self, pointers, mask, kind):
        mask = np.broadcast_to(np.asarray(mask, bool), np.shape(pointers.data)).ravel()
        address = np.asarray(pointers.data).astype(np.int64).ravel()[mask]
        # Who touches it: a position in a block of some shape. Equal positions in equal shapes are one thread.
        shape = hash(np.shape(pointers.data)) & 0xFFFFFFFF
        actor = (np.flatnonzero(mask).astype(np.int64) << 32) | shape
        self.phase.append((address, actor, np.full(len(address), kind)))
        self.accesses += len(address)

    def barrier(self):
        if self.phase:
            address, actor, kind = (np.concatenate(part) for part in zip(*self.phase, strict=True))
            conflict = _first_conflict(address, actor, kind)
            if conflict is not None:
                self.errors.append(f"no barrier between two accesses to {self.name_of(conflict)}")
            self.launch[-1].append((address, kind))
        self.phase = []

    def begin_program(self):
        if self.launch:
            self.barrier()
        self.launch.append([])

    def begin_launch(self, arguments):
        self.tensors = {name: _addresses(value) for name, value in arguments.items() if hasattr(value, "data_ptr")}
        self.launch, self.phase = [], []

    def end_launch(self):
        self.barrier()
        programs = [(i, *part) for i, parts in enumerate(self.launch) for part in parts]
        if programs:
            address = np.concatenate([a for _, a, _ in programs])
            actor = np.concatenate([np.full(len(a), i) for i, a, _ in programs])
            conflict = _first_conflict(address, actor, np.concatenate([k for _, _, k in programs]))
            if conflict is not None:
                self.errors.append(f"two programs race for {self.name_of(conflict)}")
            stray = np.setdiff1d(address, np.concatenate([*self.tensors.values(), np.zeros(0, np.int64)]))
            if len(stray):
                self.errors.append(f"{len(stray)} addresses outside of all tensors")


@contextmanager
def watch(monkeypatch, barriers=True):
    """Fails at the end of the block when a launch in it raced. With `barriers` False, they count for nothing."""
    watcher = Watcher()
    load, store, atomic = (
        getattr(InterpreterBuilder, name) for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw")
    )
    grid_index, run = InterpreterBuilder.set_grid_idx, interpreter.GridExecutor.__call__
    host_arguments = interpreter.GridExecutor._init_args_hst

    def watched_load(self, ptrs, mask, *rest):
        watcher.touch(ptrs, mask.data, LOAD)
        return load(self, ptrs, mask, *rest)

    def watched_store(self, ptrs, value, mask, *rest):
        watcher.touch(ptrs, mask.data, STORE)
        return store(self, ptrs, value, mask, *rest)

    def watched_atomic(self, operation, ptr, value, mask, *rest):
        watcher.touch(ptr, mask.data, ATOMIC)
        return atomic(self, operation, ptr, value, mask, *rest)

    def watched_index(self, x, y, z):
        watcher.begin_program()
        return grid_index(self, x, y, z)

    def watched_arguments(self, args_dev, kwargs):
        args, kwargs = host_arguments(self, args_dev, kwargs)
        watcher.begin_launch(dict(zip(self.arg_names, args, strict=False)) | kwargs)
        return args, kwargs

    def watched_run(self, *args, **kwargs):
        result = run(self, *args, **kwargs)
        watcher.end_launch()
        return result

    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", watched_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", watched_store)
        patch.setattr(InterpreterBuilder, "create_atomic_rmw", watched_atomic)
        patch.setattr(InterpreterBuilder, "create_barrier", lambda self: watcher.barrier() if barriers else None)
        patch.setattr(InterpreterBuilder, "set_grid_idx", watched_index)
        patch.setattr(interpreter.GridExecutor, "_init_args_hst", watched_arguments)
        patch.setattr(interpreter.GridExecutor, "__call__", watched_run)
        yield watcher
    assert watcher.accesses
    assert not watcher.errors, watcher.errors[:5]
