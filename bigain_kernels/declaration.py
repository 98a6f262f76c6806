"""What an op is: everything about it that is more than one function or one backend.

A file `ops/<op>.py` declares its op once. From the declaration come the schema in `torch.ops.bigain`, the
registrations, and how the arguments of a public function become those of the op and back:

* *public* arguments are those of the reference and of a user: a grid (H, W), a MergePlan, alpha as a number or tensor;
* *flat* arguments are those that a schema can have, and every implementation of a backend takes: height and width, the
  four tables of a plan, a number and a tensor that replaces it;
* launchers of kernels take the public arguments, but the tables in the place of a plan.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .plan import MergePlan

# Of the public ops, and of those in the compiled libraries. A process can define ops of a name once: where several
# versions of the package live in one, as kernels of a hub do, each is built with another name here (release/hub.py).
NAMESPACE = "bigain"
PUBLIC, CPP, CUDA = (getattr(torch.ops, NAMESPACE + library) for library in ("", "_cpp", "_cuda"))

Tables = tuple[Tensor, Tensor, Tensor, Tensor]


class Argument(NamedTuple):
    """One public argument.

    Attributes:
        names: what it is called, one name or for a launcher's tables several.
        parameters: the flat arguments that it becomes, as a schema has them.
        value: the public argument, as an expression of the flat ones.
        flatten: the flat arguments of a public one.
        tables: the launcher's arguments, where they are not the public one.
    """

    names: tuple[str, ...]
    parameters: tuple[str, ...]
    value: str
    flatten: Callable[[Any], tuple[Any, ...]]
    tables: str = ""


def _alone(value: Any) -> tuple[Any]:
    return (value,)


def _as_it_is(name: str, kind: str, *default: float | None) -> Argument:
    """One flat argument. An option that an op gets later has a default, for programs that were exported before."""
    parameter = f"{kind} {name}" + "".join(f"={value}" for value in default)
    return Argument((name,), (parameter,), name, _alone)


def tensor(name: str) -> Argument:
    return _as_it_is(name, "Tensor")


def optional_tensor(name: str, *default: None) -> Argument:
    return _as_it_is(name, "Tensor?", *default)


def tensors(name: str) -> Argument:
    return _as_it_is(name, "Tensor[]")


def count(name: str, *default: int) -> Argument:
    return _as_it_is(name, "SymInt", *default)


def number(name: str, *default: float) -> Argument:
    return _as_it_is(name, "float", *default)


def optional_number(name: str, *default: float | None) -> Argument:
    return _as_it_is(name, "float?", *default)


def choice(name: str) -> Argument:
    return _as_it_is(name, "str")


def pair(name: str, first: str, second: str) -> Argument:
    """Two integers."""
    return Argument((name,), (f"SymInt {first}", f"SymInt {second}"), f"({first}, {second})", tuple)


def grid() -> Argument:
    return pair("grid", "height", "width")


def window() -> Argument:
    """How many tiles away matching looks, or None: a schema has no optional integer that may be symbolic."""
    value = "None if window < 0 else window"
    return Argument(("window",), ("SymInt window",), value, lambda value: (-1 if value is None else value,))


def alpha() -> Argument:
    """A number, or a tensor with a value per row."""

    def flatten(value: float | Tensor) -> tuple[float, Tensor | None]:
        return (0.0, value) if isinstance(value, Tensor) else (float(value), None)

    value = "alpha if row_alpha is None else row_alpha"
    return Argument(("alpha",), ("float alpha", "Tensor? row_alpha"), value, flatten)


def plan() -> Argument:
    """A MergePlan; its grid is not handed on, as no op needs it."""
    names = ("slot", "offsets", "members", "anchor")
    value = "MergePlan(slot, offsets, members, anchor, (1, slot.shape[1]), anchor.shape[1])"
    return Argument(names, tuple(f"Tensor {name}" for name in names), value, tables_of, ", ".join(names))


def tables_of(plan: MergePlan) -> Tables:
    """The tensors of a plan."""
    return plan.slot, plan.offsets, plan.members, plan.anchor


class Gradient(NamedTuple):
    """How an op is differentiated in reverse mode.

    Tensors have the names of the flat arguments, those of a list with their place: "xs[0]".

    Attributes:
        backward: from the gradients of the results (None where nothing follows from one), the names of the tensors
            whose gradient is needed, and the public arguments: gradients by name. They are cast to the dtype of what
            they belong to. Made of differentiable steps alone, it has derivatives itself.
        unused: from the needed names and the public arguments, the names of the arguments that `backward` does not look
            at. Their tensors are not kept, and arrive as None.
    """

    backward: Callable[..., dict[str, Tensor]]
    unused: Callable[..., set[str]]


class Op(NamedTuple):
    """One op.

    Attributes:
        name: what it is called in `torch.ops.bigain` and in every folder.
        arguments: the public arguments, in order.
        returns: the results, as a schema has them.
        fake: shapes and dtypes of the results, from the public arguments.
        flops: operations of a call, from the public arguments; `flops.py` says what counts.
        samples: calls that tests make, by a name each: public arguments made of `testing.Inputs`.
        selects: whether all results are indices, which have no derivative by nature.
        gradient: the `Gradient` that says how it is differentiated, as "module.NAME" in `ops`, imported with the first
            derivative; empty refuses, unless it selects.
    """

    name: str
    arguments: tuple[Argument, ...]
    returns: str
    fake: Callable[..., Any]
    flops: Callable[..., int]
    samples: Callable[[Any], dict[str, tuple[Any, ...]]]
    selects: bool = False
    gradient: str = ""

    @property
    def schema(self) -> str:
        """The schema in the language of torch.library."""
        return f"{self.name}({', '.join(p for each in self.arguments for p in each.parameters)}) -> {self.returns}"

    @property
    def flat_names(self) -> list[str]:
        """Names of the flat arguments."""
        return [re.split("[ =]", parameter)[1] for each in self.arguments for parameter in each.parameters]

    @property
    def launcher_names(self) -> list[str]:
        """Names of the arguments of launchers."""
        return [name for each in self.arguments for name in each.names]

    def flatten(self, *public: Any) -> tuple[Any, ...]:
        """The flat arguments of a call with public ones."""
        pairs = zip(self.arguments, public, strict=True)
        return tuple(value for argument, each in pairs for value in argument.flatten(each))

    def of_public(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of the flat arguments from one of the public arguments."""
        return self._adapter(", ".join(each.value for each in self.arguments))(function)

    def of_launcher(self, launch: Callable[..., Any]) -> Callable[..., Any]:
        """A function of the flat arguments from one that takes the tables of a plan, and else public arguments."""
        return self._adapter(", ".join(each.tables or each.value for each in self.arguments))(launch)

    def _adapter(self, values: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        # Written out and compiled, as dataclasses do with their methods: a loop would cost more than a dispatch.
        parameters = (parameter.split(" ")[1] for each in self.arguments for parameter in each.parameters)
        source = f"lambda function: lambda {', '.join(parameters)}: function({values})"
        return eval(source, {"MergePlan": MergePlan})

    def device_of(self) -> Callable[[tuple[Any, ...]], str]:
        """What tells the device type of a call from its flat arguments: that of the first tensor."""
        return _of_list if self.arguments[0].parameters[0].startswith("Tensor[]") else _of_first


def _of_list(args: tuple[Any, ...]) -> str:
    return args[0][0].device.type


def _of_first(args: tuple[Any, ...]) -> str:
    return args[0].device.type


# The ops of this package by name, in the order of their declaration.
OPS: dict[str, Op] = {}
