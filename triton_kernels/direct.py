"""Launching compiled kernels without Triton's binding, which takes most of the time of a launch on the host.

The first call with arguments of a kind goes through Triton, which compiles the kernel and returns it. It is kept under
all that Triton specializes on: the device, dtypes of pointers and whether 16 divides them, types of numbers, whether
integers are 1 or multiples of 16, constants, and options such as num_warps. Later calls of that kind go straight to the
launcher of the compiled kernel, on the current stream of the current device as with Triton.

What is Triton's own affair stays there: the interpreter, AMD GPUs, releases whose launching is not known here (`reason`
says which of these holds for a process), and every launch while hooks are set or a setting of Triton was changed.
Triton also looks at each launch whether constants of the kernel's module have changed; a direct launch does not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

# The first and the last release of Triton whose launching is known.
KNOWN = ((3, 6), (3, 9))
# The compiled kernel, what launches it, and what that is given.
Kept = tuple[CompiledKernel, Any, Any, Any]
# The kind of what this module has no name for. A key that holds it is not kept.
UNKNOWN = object()


@functools.cache
def reason() -> str:
    """Why Triton itself makes all launches of this process; empty when they are direct."""
    if knobs.runtime.interpret:
        return "kernels run in Triton's interpreter"
    if not KNOWN[0] <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= KNOWN[1]:
        known = " to ".join(".".join(map(str, release)) for release in KNOWN)
        return f"how Triton {triton.__version__} launches is not known, only {known}"
    if torch.version.hip:
        return "on AMD GPUs Triton specializes on more than is known here"
    return ""


_runtime, _compilation = vars(knobs.runtime), vars(knobs.compilation)
_before, _after = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook


def untouched() -> bool:
    """Whether nothing asks Triton to do more at a launch than launching: no hook, no setting that was changed."""
    return not (_runtime or _compilation or _before.calls or _after.calls)


def kind_of(value: Any, specialize: bool) -> Any:
    """What Triton tells numbers apart by; those that launchers write out for integers from 0 to 2^31 - 1 too."""
    if value.__class__ is float or value.__class__ is bool:
        return value.__class__
    if value.__class__ is not int:
        return UNKNOWN
    divided = 3 if value % 16 == 0 else 2
    if -(2**31) <= value < 2**31:
        return divided if specialize else True
    return "i64" if value < 2**63 else "u64", specialize and divided


def _kind(parameter: Any) -> str:
    """The part of a key that a parameter makes, as an expression; a pointer's address is in the variable at_<name>."""
    name = parameter.name
    if parameter.is_constexpr:
        return name
    if name.startswith("p_"):
        return f"{name}.dtype, not at_{name} & 15"
    # Most integers are small, and a call takes longer than all of this.
    specialize = not parameter.do_not_specialize
    small = f"(1 if {name} == 1 else 2 if {name} & 15 else 3)" if specialize else "True"
    return f"{small} if {name}.__class__ is int and not {name} >> 31 else kind_of({name}, {specialize})"


class Launcher:
    """How one kernel is launched: `launch(grid_x, grid_y, grid_z, **arguments)`, with options among the arguments.

    It returns what is kept of the launch, None where that was Triton's own affair.
    Parameters of the kernel that are called p_... are pointers.
    """

    def __init__(self, kernel: JITFunction[Any]) -> None:
        self.kernel = kernel
        self.kept: dict[tuple[Any, ...], Kept] = {}
        self.launch = self._written()

    def _written(self) -> Callable[..., Kept | None]:
        # Written out and compiled, as dataclasses do with their methods: loops would take longer than the launch.
        names = [parameter.name for parameter in self.kernel.params]
        pointers = [name for name in names if name.startswith("p_")]
        passed = ", ".join(f"at_{name}" if name in pointers else name for name in names)
        source = f"""
def launch(grid_x, grid_y, grid_z, *, {", ".join(names)}, **options):
    {"; ".join(f"at_{name} = {name}.data_ptr()" for name in pointers)}
    active = driver.active
    device = active.get_current_device()
    key = (active, device, {", ".join(map(_kind, self.kernel.params))}, *options.items())
    found = get(key)
    if found is None or settings or more_settings or before.calls or after.calls or kernel.pre_run_hooks:
        arguments = dict({", ".join(f"{name}={name}" for name in names)}, **options)
        return through_triton((grid_x, grid_y, grid_z), arguments, key)
    _, run, function, metadata = found
    stream = active.get_current_stream(device)
    run(grid_x, grid_y, grid_z, stream, function, metadata, None, None, None, {passed})
    return found
"""
        scope: dict[str, Any] = {
            "driver": driver,
            "get": self.kept.get,
            "kind_of": kind_of,
            "settings": _runtime,
            "more_settings": _compilation,
            "before": _before,
            "after": _after,
            "kernel": self.kernel,
            "through_triton": self._through_triton,
        }
        exec(source, scope)
        return scope["launch"]

    def _through_triton(
        self, grid: tuple[int, int, int], arguments: dict[str, Any], key: tuple[Any, ...]
    ) -> Kept | None:
        compiled = self.kernel[grid](**arguments)
        # With hooks or while others compile, Triton may return something else, or nothing.
        if not untouched() or UNKNOWN in key or self.kernel.pre_run_hooks or type(compiled) is not CompiledKernel:
            return None
        self.kept[key] = compiled, compiled.run, compiled.function, compiled.packed_metadata
        return self.kept[key]


_launchers: dict[int, Launcher] = {}


def launcher(kernel: Any) -> Launcher | None:
    """The launcher of a kernel of a module; None where Triton makes all launches."""
    found = _launchers.get(id(kernel))
    if found is None and not reason():
        found = _launchers[id(kernel)] = Launcher(kernel)
    return found
