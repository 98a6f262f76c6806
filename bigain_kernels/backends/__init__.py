"""Backends: which implementation of an op runs, and why.

A `Backend` says what it is called, which devices it serves, what it implements, what it cannot run here and why.
`registry` chooses among those that are registered; the four of this package stand in a file each.
"""

from .backend import Backend, Implementation
from .cpp import CPP
from .cuda import CUDA
from .reference import REFERENCE
from .registry import (
    ENVIRONMENT_VARIABLE,
    BackendUnavailable,
    Choice,
    all_backends,
    choose,
    get,
    implementation,
    known_backends,
    order,
    register,
    registered,
    report,
    unregister,
    use_backend,
)
from .triton import TRITON

for _backend in (CPP, CUDA, TRITON, REFERENCE):
    register(_backend)

__all__ = [
    "ENVIRONMENT_VARIABLE",
    "Backend",
    "BackendUnavailable",
    "Choice",
    "Implementation",
    "all_backends",
    "choose",
    "get",
    "implementation",
    "known_backends",
    "order",
    "register",
    "registered",
    "report",
    "unregister",
    "use_backend",
]
