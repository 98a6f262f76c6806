"""The options of the methods as options of commands: made from the configs, which alone say what there is."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..methods.mixed import Compression

# Options that a command sets itself: --seed is that of the run, --share-plan knows how many rows belong together and in
# which order they stand, and the checkpoint tells its timesteps.
SET_BY_COMMANDS = ("seed", "share_plan", "share_order", "num_train_timesteps")
PANEL = "Compression"

# The options of the method as they stand on the command line.
GivenOptions = Mapping[str, str | bool]
NOTHING_GIVEN: GivenOptions = MappingProxyType({})
# Both are filled in by `with_method_options`.
MethodName = str


def option_table() -> dict[str, dict[str, Any]]:
    """`methods.table.method_table` of all methods there are, without what the commands set themselves."""
    from ..methods import registry
    from ..methods.table import method_table

    registry.load_entry_points()
    return method_table(without=SET_BY_COMMANDS)


def _method_parameter(methods: Mapping[str, str]) -> Any:
    listed = "; ".join(f"{name}: {what}" if what else name for name, what in methods.items())
    names = "|".join(["none", *methods])
    option = typer.Option(help=f"none: no compression; {listed}.", metavar=names, rich_help_panel=PANEL)
    return Annotated[str, option]


def _help(row: Mapping[str, Any], methods: Sequence[str]) -> str:
    """What an option means, which of the methods have it, and its defaults."""
    by_default: dict[str, list[str]] = {}
    for method, default in row["defaults"].items():
        by_default.setdefault(default, []).append(method)
    parts = [row["help"][:1].upper() + row["help"][1:]]
    if len(row["defaults"]) < len(methods):
        parts.append(f"For {', '.join(row['defaults'])}.")
    # A flag is off unless it is given; the text of an option without a default says what happens then.
    if len(by_default) > 1:
        shown = (f"{default} ({', '.join(having)})" for default, having in by_default.items())
        parts.append(f"Default: {'; '.join(shown)}.")
    elif not row["flag"] and "" not in by_default:
        parts.append(f"Default: {next(iter(by_default))}.")
    return " ".join(part for part in parts if part)


def _parameter(name: str, row: Mapping[str, Any], methods: Sequence[str]) -> inspect.Parameter:
    from rich.markup import escape

    text = escape(_help(row, methods))
    dashed = f"--{name.replace('_', '-')}"
    annotation: Any
    if row["flag"]:
        negated = f"/--no-{dashed[2:]}" if "True" in row["defaults"].values() else ""
        annotation = Annotated[
            bool | None, typer.Option(dashed + negated, help=text, rich_help_panel=PANEL, show_default=False)
        ]
    else:
        annotation = Annotated[
            str | None,
            typer.Option(dashed, help=text, metavar=row["values"], rich_help_panel=PANEL, show_default=False),
        ]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def with_method_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command` as typer sees it: its parameter `method` with all names, and for `given` one option for each there is.

    Raises:
        ValueError: a method has an option that the command has for itself.
    """
    table = option_table()
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        parameter = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        if parameter.name == "given":
            parameters += [_parameter(name, row, list(table["methods"])) for name, row in table["options"].items()]
        elif parameter.name == "method":
            parameters.append(parameter.replace(annotation=_method_parameter(table["methods"])))
        elif parameter.name in table["options"]:
            methods = list(table["options"][parameter.name]["defaults"])
            raise ValueError(
                f"{parameter.name}: is an option of `bigain {command.__name__}` and of {methods}, expected another "
                "name in the method"
            )
        else:
            parameters.append(parameter)

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        values = {name: arguments.pop(name) for name in table["options"]}
        command(**arguments, given={name: value for name, value in values.items() if value is not None})

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="A file of `bigain search` or `save_config`, in the place of --method and its options.",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]


def read_compression(method: str, given: GivenOptions, seed: int, file: Path | None = None) -> Compression | None:
    """The config of a method with the options given on the command line, and with the seed of the run if it has one.

    Args:
        method, given: as they stand on the command line.
        seed: of the run.
        file: what `--config` names; its configs have seeds of their own.

    Raises:
        OSError: the file cannot be read.
        ValueError: there is no such method, it has no such option, the text of an option cannot be read, the file is of
            another kind, or both it and a method are given.
    """
    from ..methods import load_config, registry

    registry.load_entry_points()
    if file is not None:
        if method != registry.NONE or given:
            both = [f"--method {method}"] if method != registry.NONE else [f"--{name}" for name in given]
            raise ValueError(f"config: got {file} with {both[0].replace('_', '-')}, expected one of the two")
        return load_config(file)
    options = registry.read_options(method, given)
    if "seed" in registry.options_of(method):
        options["seed"] = seed
    return registry.make_config(method, options)
