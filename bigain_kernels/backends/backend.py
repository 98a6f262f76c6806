"""What a backend is."""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

Implementation = Callable[..., Any]


class Backend(NamedTuple):
    """One way to run the ops.

    An implementation takes the arguments of an op in `torch.ops.bigain`, checked, and returns its results within the
    tolerances of `bigain_kernels.testing`.

    Attributes:
        name: what `use_backend` and BIGAIN_BACKEND call it.
        implement: gives the implementation of an op, or None; the `get` of a dictionary will do.
        devices: types of the devices whose tensors it takes; None for any.
        priority: among the backends of a device the highest that runs a call is chosen. Below 0 stands what runs only
            when it is asked for by name.
        missing: why nothing of it can run in this installation; empty when it can.
        refuses: called with an op and the arguments of a call, says why the implementation cannot run that call; empty
            when it can. None refuses nothing.
        compositions: for ops that it has no implementation of, functions that make one from those that it has; the
            names of their parameters are the ops that they need.
    """

    name: str
    implement: Callable[[str], Implementation | None]
    devices: tuple[str, ...] | None = None
    priority: int = 0
    missing: str = ""
    refuses: Callable[[str, tuple[Any, ...]], str] | None = None
    compositions: Mapping[str, Callable[..., Implementation]] = MappingProxyType({})

    def serves(self, device: str) -> bool:
        """Whether it takes tensors on devices of this type."""
        return self.devices is None or device in self.devices

    def find(self, op: str) -> Implementation | None:
        """The implementation of an op, its own or composed; None when it has none or is missing."""
        if self.missing:
            return None
        own = self.implement(op)
        if own is not None or op not in self.compositions:
            return own
        compose = self.compositions[op]
        parts = {name: self.implement(name) for name in inspect.signature(compose).parameters}
        return None if None in parts.values() else compose(**parts)
