"""The backends that are registered, and the choice among them.

A call runs on the backend of its device that has the highest priority and does not refuse it, unless `use_backend` or
the environment variable BIGAIN_BACKEND names one. A backend that was named and cannot run a call raises
`BackendUnavailable`; nothing else is tried in its place. On GPUs where backends were measured side by side, the faster
one at the size of a row goes first in the place of the highest priority: sizes.py.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NamedTuple

from .. import native
from ..declaration import OPS
from .backend import Backend, Implementation

ENVIRONMENT_VARIABLE = "BIGAIN_BACKEND"
_log = logging.getLogger(__name__)

_backends: dict[str, Backend] = {}
_found: dict[tuple[str, ...], list[tuple[Backend, Implementation]]] = {}
_requested: ContextVar[str | None] = ContextVar("bigain_backend", default=None)


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run the op, or no backend can."""


class Choice(NamedTuple):
    """One row of `report`: the backend that an op runs on for a device type, and the reason."""

    op: str
    device: str
    backend: str
    reason: str


def register(backend: Backend) -> None:
    """Add a backend.

    Raises:
        ValueError: one of that name is registered.
    """
    if backend.name in _backends:
        raise ValueError(f"name: got {backend.name!r}, expected none of the registered backends, {sorted(_backends)}")
    replace(backend)


def unregister(name: str) -> Backend:
    """Take a backend out, and return it.

    Raises:
        ValueError: none of that name is registered.
    """
    backend = get(name)
    _backends.pop(name)
    _forget()
    return backend


def get(name: str) -> Backend:
    """The registered backend of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in _backends:
        raise ValueError(f"name: got {name!r}, expected one of {sorted(_backends)}")
    return _backends[name]


@contextmanager
def registered(backend: Backend) -> Iterator[Backend]:
    """Have a backend for the time of the block, in the place of one of the same name, if there is one."""
    before = _backends.get(backend.name)
    replace(backend)
    try:
        yield backend
    finally:
        if before is None:
            unregister(backend.name)
        else:
            replace(before)


def replace(backend: Backend) -> None:
    """Put a backend in the place of the one of its name."""
    _backends[backend.name] = backend
    _forget()


def refuse_outdated_libraries() -> None:
    """Have the backends missing whose libraries define the ops otherwise than this package, which is said once."""
    for name, reason in native.refuse_outdated().items():
        replace(get(name)._replace(missing=reason))


def all_backends() -> list[Backend]:
    """The registered backends, those that are missing too, by priority."""
    return sorted(_backends.values(), key=lambda each: -each.priority)


def order(device: str) -> tuple[str, ...]:
    """Names of the backends that serve a device type and are in this installation, the preferred one first."""
    return tuple(each.name for each in all_backends() if each.serves(device) and not each.missing)


def known_backends() -> list[str]:
    """Names of the backends that implement at least one op in this installation."""
    return list(_known())


@functools.cache
def _known() -> tuple[str, ...]:
    """`known_backends`; the same until a backend comes or goes. `use_backend` asks at every call."""
    return tuple(sorted(name for name, backend in _backends.items() if any(backend.find(op) for op in OPS)))


def _forget() -> None:
    """A backend has come or gone: what was found before may not hold any more."""
    _found.clear()
    _known.cache_clear()


def _candidates(op: str, device: str) -> list[tuple[Backend, Implementation]]:
    """What implements an op for a device type, the preferred first; the same list until a backend comes or goes."""
    candidates = _found.get((op, device))
    if candidates is None:
        found = ((_backends[name], _backends[name].find(op)) for name in order(device))
        candidates = [(backend, function) for backend, function in found if function is not None]
        _found[op, device] = candidates
    return candidates


@functools.cache
def _sizes() -> ModuleType:
    """The tables of what was measured, which calls on a CPU do not need."""
    from . import sizes

    return sizes


def _in_order(op: str, device: str, arguments: tuple[Any, ...]) -> list[tuple[Backend, Implementation]]:
    """The candidates for a call, the one that was measured to be the fastest at its size before the others."""
    candidates = _candidates(op, device)
    if device != "cuda" or not _sizes().TABLES:
        return candidates
    first = _sizes().first(op, arguments)
    ordered = _found.get((op, device, first))
    if ordered is None:
        ordered = _found[op, device, first] = sorted(candidates, key=lambda each: each[0].name != first)
    return ordered


def _check_name(name: str, source: str) -> None:
    if name in _known():
        return
    reason = _backends[name].missing if name in _backends else ""
    cannot = f", which cannot run here ({reason})" if reason else ""
    raise ValueError(f"{source}: got {name!r}{cannot}, expected one of {known_backends()}")


def _asked(op: str, device: str, name: str, source: str) -> tuple[Backend, Implementation]:
    """The backend that was asked for by name, and its implementation."""
    for backend, function in _candidates(op, device):
        if backend.name == name:
            return backend, function
    if source == ENVIRONMENT_VARIABLE:
        _check_name(name, source)
    raise BackendUnavailable(f"{source}={name!r}: has no implementation of {op} for {device} tensors")


def _request() -> tuple[str | None, str]:
    """The backend that is asked for by name, and by what."""
    name = _requested.get()
    if name is not None:
        return name, "use_backend"
    return os.environ.get(ENVIRONMENT_VARIABLE) or None, ENVIRONMENT_VARIABLE


def implementation(op: str, device: str, arguments: tuple[Any, ...]) -> Implementation:
    """What runs a call of `op` on tensors of device type `device`.

    Raises:
        BackendUnavailable: a backend was asked for by name and does not implement the op on this device or refuses the
            call; or none is left.
        ValueError: BIGAIN_BACKEND names no backend of this installation.
    """
    name, source = _request()
    if name is not None:
        backend, function = _asked(op, device, name, source)
        reason = backend.refuses(op, arguments) if backend.refuses else ""
        if reason:
            raise BackendUnavailable(f"{name}: {op} {reason}")
        return function
    refusals = []
    for backend, function in _in_order(op, device, arguments):
        if backend.priority < 0:
            continue
        reason = backend.refuses(op, arguments) if backend.refuses else ""
        if not reason:
            return function
        refusals.append(f"{backend.name} {reason}")
        _log.debug("%s does not run on %s, which %s", op, backend.name, reason)
    others = f"{'; '.join(refusals)}, and no other" if refusals else "no"
    raise BackendUnavailable(f"{op}: {others} backend implements it for {device} tensors")


def choose(op: str, device: str) -> Choice:
    """The backend that runs `op` on tensors of device type `device` now, unless it refuses the call.

    Raises:
        BackendUnavailable: a backend was asked for by name and does not implement the op on this device.
        ValueError: BIGAIN_BACKEND names no backend of this installation.
    """
    name, source = _request()
    if name is not None:
        _asked(op, device, name, source)
        return Choice(op, device, name, f"asked for by {source}")
    preferred = [backend for backend, _ in _candidates(op, device) if backend.priority >= 0]
    if not preferred:
        raise BackendUnavailable(f"{op}: no backend implements it for {device} tensors")
    reason = f"first of {tuple(backend.name for backend in preferred)}, which implement it"
    measured = _sizes().reason(op) if device == "cuda" else ""
    if measured:
        reason = f"{measured}; else {reason}"
    absent = [each for each in _backends.values() if each.missing and each.serves(device)]
    for backend in absent:
        if backend.priority > preferred[0].priority:
            reason += f"; no {backend.name}: {backend.missing}"
    return Choice(op, device, preferred[0].name, reason)


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
    for op in sorted(OPS):
        for device in devices:
            try:
                rows.append(choose(op, device))
            except (BackendUnavailable, ValueError) as error:
                rows.append(Choice(op, device, "none", str(error)))
    return rows
