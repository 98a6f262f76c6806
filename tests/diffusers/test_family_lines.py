"""What a family of models takes to be added: 30 lines of code at most, beyond its tests.

Counted are the lines of its file that hold code, imports among them and docstrings not, and one for its place in the
registry. Counted apart are processors of its own, which save projections that rebound ones cannot, and what stands in
`APART`. `python -m tests.diffusers.test_family_lines` prints both
numbers of each.
"""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from bigain_kernels.diffusers.attention import CompressedAttention
from bigain_kernels.diffusers.families import Family, registered

MOST = 30
# Not added to the mechanism but part of it: what no other model has.
APART = {"UNet": "it has a grid for every level, and hooks that tell it there"}


class Lines(NamedTuple):
    """Of the file of a family: what adds it, and what is apart, its processors and other families."""

    family: int
    apart: int


def code_lines(node: ast.AST) -> set[int]:
    """Numbers of the lines that hold code of a node, or of a whole module, without docstrings."""
    docstrings = {
        line
        for each in ast.walk(node)
        if isinstance(each, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(each) is not None
        for line in range(each.body[0].lineno, (each.body[0].end_lineno or 0) + 1)
    }
    found = {
        line
        for each in ast.walk(node)
        if isinstance(each, ast.stmt | ast.expr | ast.arg | ast.alias | ast.keyword)
        for line in (each.lineno, each.end_lineno or each.lineno)
    }
    # Brackets that close a statement on a line of their own are in it too.
    found |= {
        line
        for each in ast.walk(node)
        if isinstance(each, ast.stmt) and not hasattr(each, "body")
        for line in range(each.lineno, (each.end_lineno or each.lineno) + 1)
    }
    return found - docstrings


def names_in(nodes: list[ast.stmt]) -> set[str]:
    return {each.id for node in nodes for each in ast.walk(node) if isinstance(each, ast.Name)}


def lines_of(family: Family) -> Lines:
    """Those of the file of a family, or of its class where several share a file."""
    cls = type(family)
    module = inspect.getmodule(cls)
    tree = ast.parse(Path(inspect.getfile(cls)).read_text())
    classes = {node: getattr(module, node.name) for node in tree.body if isinstance(node, ast.ClassDef)}
    processors: list[ast.stmt] = [node for node, own in classes.items() if issubclass(own, CompressedAttention)]
    others: list[ast.stmt] = [node for node, own in classes.items() if own is not cls and node not in processors]
    counted = [node for node in tree.body if node not in processors and node not in others]
    imports = [node for node in counted if isinstance(node, ast.Import | ast.ImportFrom)]
    own = names_in([node for node in counted if node not in imports])
    elsewhere = names_in(processors + others) - own
    for node in imports:
        if all((name.asname or name.name) in elsewhere for name in node.names):
            counted.remove(node)
            processors.append(node)

    def count(nodes: list[ast.stmt]) -> int:
        return sum(len(code_lines(node)) for node in nodes)

    return Lines(count(counted) + 1, count(processors) if processors else 0)


@pytest.mark.parametrize("family", registered(), ids=lambda family: type(family).__name__)
def test_a_family_is_added_by_few_lines(family):
    assert type(family).__name__ in APART or lines_of(family).family <= MOST


def test_lines_are_counted():
    source = '"""A."""\n\nimport a\n\n\nclass B:\n    """C."""\n\n    d = (\n        1,\n    )\n\n    # e\n    f = 1\n'
    assert code_lines(ast.parse(source)) == {3, 6, 9, 10, 11, 14}


if __name__ == "__main__":
    for each in registered():
        name, (own, apart) = type(each).__name__, lines_of(each)
        sys.stdout.write(f"{name:16} {own:3} {apart:3}  {APART.get(name, '')}\n")
