"""Launches that begin before the one in front of them in the stream has ended (programmatic dependent launch).

On NVIDIA GPUs from sm_90 on, a kernel that is launched so may be put on the multiprocessors while the one before it
runs its last programs; it then waits, in the kernel, until all of that one is done and its writes are seen. The time
between two launches passes while the first still works. Source: CUDA C++ Programming Guide, "Programmatic Dependent
Launch and Synchronization".

Every kernel waits before it touches memory, inputs and outputs alike: what it reads may be written by the kernel
before, what it writes may still be read there. As no kernel ends before it has waited, what is two launches back is
done too. What follows is let onto the multiprocessors at once, as it finds room only when all programs of this launch
have begun.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs

from . import configs


@triton.jit
def wait_for_predecessor(EARLY: tl.constexpr):
    """The first statement of a kernel that `early` launches."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def can_be_early(architecture: str) -> bool:
    """Whether the GPUs of an architecture (sm_90, gfx942, ...) have such launches."""
    return architecture.startswith("sm_") and int(architecture.removeprefix("sm_")) >= 90


@functools.cache
def early(device: torch.device) -> dict[str, Any]:
    """What a launch on a device is given: the constant EARLY of the kernel, and the option that goes with it."""
    if device.type == "cpu" or knobs.runtime.interpret or not can_be_early(configs.architecture(device)):
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}


def as_on(architecture: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a launch as they would be on an architecture."""
    if "EARLY" not in arguments or can_be_early(architecture):
        return arguments
    return {key: value for key, value in arguments.items() if key != "launch_pdl"} | {"EARLY": False}
