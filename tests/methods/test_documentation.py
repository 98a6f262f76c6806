"""docs/methods.md has the options of every method as the configs declare them."""

from __future__ import annotations

from pathlib import Path

from bigain_kernels.methods import MergeConfig, config_class, names
from bigain_kernels.methods.table import method_table

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def shown_methods(having: list[str]) -> str:
    merging = [name for name in names() if issubclass(config_class(name), MergeConfig)]
    for kind, members in {
        "all": list(names()),
        "merging": merging,
        "pooling": [name for name in names() if name not in merging],
    }.items():
        if having == members:
            return kind
    return ", ".join(having)


def shown_default(defaults: dict[str, str]) -> str:
    by_value: dict[str, list[str]] = {}
    for method, value in defaults.items():
        by_value.setdefault(f"`{value}`" if value else "none", []).append(method)
    if len(by_value) == 1:
        return next(iter(by_value))
    most, *others = sorted(by_value, key=lambda value: -len(by_value[value]))
    return ", ".join([most, *(f"{value} in {', '.join(by_value[value])}" for value in others)])


def test_the_table_of_options_is_that_of_the_configs():
    lines = ["| option | methods | default | what it is |", "|---|---|---|---|"]
    for name, row in method_table()["options"].items():
        what = row["help"].replace("|", "\\|")
        lines.append(
            f"| `{name}` | {shown_methods(list(row['defaults']))} | {shown_default(row['defaults'])} | {what} |"
        )
    text = PAGE.read_text()
    begin = text.index(lines[0])
    assert text[begin : text.index("\n\n", begin)] == "\n".join(lines)
