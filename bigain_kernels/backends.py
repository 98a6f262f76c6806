"""Which backend runs an op, and why.

An op has one implementation per backend; all of them take the op's tensors and return the same result within the
tolerances of `bigain_kernels.testing`. The choice falls on the first backend of the op's device that is registered, in
the order of `PREFERENCE`, unless `use_backend` or the environment variable BIGAIN_BACKEND names one. A backend that was
named and cannot run a call raises `BackendUnavailable`; nothing else is tried in its place.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

ENVIRONMENT_VARIABLE = "BIGAIN_BACKEND"
PREFERENCE = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}
_ANY_DEVICE = "*"
_log = logging.getLogger(__name__)

_implementations: dict[str, dict[tuple[str, str], Callable[..., Any]]] = {}
_requested: ContextVar[str | None] = ContextVar("bigain_backend", default=None)


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and has no implementation for the op on this device."""


class Choice(NamedTuple):
    """One row of `report`: the backend that an op runs on for a device type, and the reason."""

    op: str
    device: str
    backend: str
    reason: str


def register(op: str, backend: str, device: str = _ANY_DEVICE) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function is the implementation of `op` by `backend` on `device` ("cpu", "cuda", or any)."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        _implementations.setdefault(op, {})[backend, device] = function
        return function

    return add


def known_backends() -> list[str]:
    """Names of the backends that implement at least one op in this installation."""
    return sorted({backend for table in _implementations.values() for backend, _ in table})


def _check_name(name: str, source: str) -> None:
    if name not in known_backends():
        raise ValueError(f"{source}: got {name!r}, expected one of {known_backends()}")


def _find(op: str, backend: str, device: str) -> Callable[..., Any] | None:
    table = _implementations[op]
    return table.get((backend, device)) or table.get((backend, _ANY_DEVICE))


def choose(op: str, device: str) -> Choice:
    """The backend that runs `op` on tensors of device type `device` now.

    Raises:
        BackendUnavailable: a backend was asked for by name and does not implement the op on this device.
        ValueError: BIGAIN_BACKEND names no backend of this installation.
    """
    name, source = _requested.get(), "use_backend"
    if name is None:
        name, source = os.environ.get(ENVIRONMENT_VARIABLE) or None, ENVIRONMENT_VARIABLE
        if name is not None:
            _check_name(name, source)
    if name is not None:
        if _find(op, name, device) is None:
            raise BackendUnavailable(f"{source}={name!r}: has no implementation of {op} for {device} tensors")
        return Choice(op, device, name, f"asked for by {source}")
    for candidate in PREFERENCE.get(device, ("reference",)):
        if _find(op, candidate, device) is not None:
            return Choice(
                op, device, candidate, f"first of {PREFERENCE.get(device, ('reference',))} that implements it"
            )
    raise BackendUnavailable(f"{op}: no backend implements it for {device} tensors")


def implementation(op: str, device: str) -> Callable[..., Any]:
    """The function that `choose` settles on."""
    function = _find(op, choose(op, device).backend, device)
    assert function is not None
    return function


def next_after(backend: str, op: str, device: str, reason: str) -> Callable[..., Any]:
    """What runs a call that `backend` refuses for `reason`: the next implementation in the order of `PREFERENCE`.

    Raises:
        BackendUnavailable: the backend was asked for by name.
    """
    asked = _requested.get() or os.environ.get(ENVIRONMENT_VARIABLE)
    if asked == backend:
        raise BackendUnavailable(f"{backend}: {op} {reason}")
    order = PREFERENCE[device]
    for candidate in order[order.index(backend) + 1 :]:
        function = _find(op, candidate, device)
        if function is not None:
            _log.debug("%s runs on %s: %s %s", op, candidate, backend, reason)
            return function
    raise BackendUnavailable(f"{op}: {backend} {reason}, and no other backend implements it for {device} tensors")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op of the block (in this thread or task) on the backend `name`.

    Raises:
        ValueError: no backend of that name is in this installation.
    """
    _check_name(name, "name")
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def report(devices: tuple[str, ...] = ("cpu", "cuda")) -> list[Choice]:
    """What `choose` answers for every op on every device type; where it raises, backend "none" and what it says."""
    rows = []
    for op in sorted(_implementations):
        for device in devices:
            try:
                rows.append(choose(op, device))
            except (BackendUnavailable, ValueError) as error:
                rows.append(Choice(op, device, "none", str(error)))
    return rows
