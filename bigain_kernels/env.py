"""What this installation consists of, and which backend runs each op: `python -m bigain_kernels.env`."""

from __future__ import annotations

import platform
from importlib import metadata, util

import torch

import bigain_kernels

from . import backends, native

PACKAGES = ("torch", "triton", "diffusers", "numpy")


def versions() -> dict[str, str]:
    """Version of Python, of this package and of each package it can use; "not installed" where one is missing."""
    found = {"python": platform.python_version(), "bigain_kernels": bigain_kernels.__version__}
    for name in PACKAGES:
        found[name] = metadata.version(name) if util.find_spec(name) is not None else "not installed"
    return found


def devices() -> list[str]:
    """The devices torch can use here, the CPU first."""
    found = [f"cpu: {platform.machine()}, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(f"cuda:{index}: {properties.name}, sm_{properties.major}{properties.minor}")
    return found


def usable_device_types() -> tuple[str, ...]:
    """The device types torch can use here."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def triton_launches() -> str:
    """How Triton's kernels are launched: by this package, or why by Triton, which takes longer."""
    if backends.get("triton").missing:
        return "none"
    from .triton_kernels import direct

    return f"by Triton: {direct.reason()}" if direct.reason() else "direct"


def report() -> str:
    """Everything as text, one fact a line."""
    lines = [f"{name:16} {version}" for name, version in versions().items()]
    lines += [f"{'device':16} {device}" for device in devices()]
    lines.append(f"{'native library':16} {native.report()}")
    lines.append(f"{'CUDA library':16} {native.cuda_report()}")
    lines.append(f"{'Triton launches':16} {triton_launches()}")
    for backend in backends.all_backends():
        where = "on " + (", ".join(backend.devices) if backend.devices else "any device")
        state = f"not here: {backend.missing}" if backend.missing else where
        lines.append(f"{f'backend {backend.name}':16} {state}")
    for choice in backends.report(usable_device_types()):
        lines.append(f"{choice.op:24} {choice.device:5} {choice.backend:10} {choice.reason}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
