"""The backend "reference": plain PyTorch, on any device."""

from __future__ import annotations

from .backend import Backend, Implementation

# Filled by the declarations of the ops.
IMPLEMENTATIONS: dict[str, Implementation] = {}

REFERENCE = Backend("reference", IMPLEMENTATIONS.get)
