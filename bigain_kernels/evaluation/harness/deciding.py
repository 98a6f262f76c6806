"""What decides a number: two runs may be put together where all of it is the same."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from typing import Any

import torch

from ... import backends
from ...env import versions


def machine(device: torch.device) -> dict[str, Any]:
    """Versions of what computes, the kind of device, and the backend of every op on it."""
    found = versions()
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "versions": {name: found[name] for name in ("bigain_kernels", "torch", "triton", "diffusers")},
        "device": f"{device.type} {kind}",
        "backends": {choice.op: choice.backend for choice in backends.report((device.type,))},
    }


def digest(settings: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that stand for settings of JSON values, whatever the order of their names."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def changes(there: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two settings, one line each, nested ones by their dotted name."""
    found = []
    for name in sorted({*there, *now}):
        old, new = there.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += changes(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name} {old!r} there and {new!r} now")
    return found
