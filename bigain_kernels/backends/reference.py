"""The backend "reference": plain PyTorch, on any device.

The reference is not imported before the first choice of a backend.
"""

from __future__ import annotations

from typing import Any

from ..declaration import OPS, tables_of
from ..plan import MergePlan
from .backend import Backend, Implementation


def _implement(op: str) -> Implementation | None:
    from .. import reference

    if op not in reference.__all__:
        return None
    function, is_list = OPS[op].of_public(getattr(reference, op)), OPS[op].returns == "Tensor[]"

    def run(*args: Any) -> Any:
        results = function(*args)
        if isinstance(results, MergePlan):
            return tables_of(results)
        return list(results) if is_list else results

    return run


REFERENCE = Backend("reference", _implement)
