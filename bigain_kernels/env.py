"""What this installation consists of, and which backend runs each op: `python -m bigain_kernels.env`."""

from __future__ import annotations

import argparse
import json
import platform
from importlib import metadata, util
from typing import Any

import torch

from . import __version__, backends, native
from .backends import sizes

PACKAGES = ("torch", "triton", "diffusers", "numpy")


def versions() -> dict[str, str]:
    """Version of Python, of this package and of each package it can use; "not installed" where one is missing."""
    found = {"python": platform.python_version(), "bigain_kernels": __version__}
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


def backend_sizes() -> str:
    """What decides between the backends of GPUs: measurements by size, of which architectures, or their priorities."""
    found = [f"{name}: {table.measured}" for name, table in sizes.TABLES.items()]
    return "measured on " + "; ".join(found) if found else "priorities: nothing measured by size"


def facts() -> dict[str, Any]:
    """Everything, of types that JSON has."""
    return {
        "versions": versions(),
        "devices": devices(),
        "native_library": native.report(),
        "cuda_library": native.cuda_report(),
        "triton_launches": triton_launches(),
        "backend_sizes": backend_sizes(),
        "backends": [
            {"name": each.name, "devices": list(each.devices or ()), "missing": each.missing or None}
            for each in backends.all_backends()
        ],
        "ops": [choice._asdict() for choice in backends.report(usable_device_types())],
    }


def report() -> str:
    """Everything as text, one fact a line."""
    found = facts()
    lines = [f"{name:16} {version}" for name, version in found["versions"].items()]
    lines += [f"{'device':16} {device}" for device in found["devices"]]
    lines.append(f"{'native library':16} {found['native_library']}")
    lines.append(f"{'CUDA library':16} {found['cuda_library']}")
    lines.append(f"{'Triton launches':16} {found['triton_launches']}")
    lines.append(f"{'backends of GPUs':16} {found['backend_sizes']}")
    for backend in found["backends"]:
        where = "on " + (", ".join(backend["devices"]) or "any device")
        state = f"not here: {backend['missing']}" if backend["missing"] else where
        lines.append(f"{'backend ' + backend['name']:16} {state}")
    for choice in found["ops"]:
        lines.append(f"{choice['op']:24} {choice['device']:5} {choice['backend']:10} {choice['reason']}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(prog="python -m bigain_kernels.env", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    print(json.dumps(facts(), indent=2) if parser.parse_args(arguments).json else report())


if __name__ == "__main__":
    main()
