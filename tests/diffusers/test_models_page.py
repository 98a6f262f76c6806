"""docs/models.md names every family, and what its tables say was shown by tests that there are."""

from __future__ import annotations

import importlib
import re

from bigain_kernels.diffusers.families import REFUSED, registered

from . import matrix, test_matrix


def tables() -> list[list[list[str]]]:
    """The rows of each table that the tests wrote, in front of the recommendations, without heads."""
    text = matrix.PAGE.read_text().partition(matrix.MARK)[2].partition("## What to begin")[0]
    found = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [[line.strip("| ").split(" | ") for line in lines.splitlines()][2:] for lines in found]


def test_the_page_has_every_family_and_every_refusal():
    page, (first, *_) = matrix.PAGE.read_text(), tables()
    assert [row[2].strip("`") for row in first] == [family.model.__name__ for family in registered()]
    assert all(f"`{model}`: {reason}." in page for model, reason in REFUSED.items())
    assert all(len(row) == len(matrix.row("wan")) + 3 for row in first)


def test_the_page_has_every_way_of_compressing_a_family():
    page, (_, *ways) = matrix.PAGE.read_text(), tables()
    assert matrix.AROUND_HEAD in page
    for (mode, title), rows in zip(matrix.WAYS.items(), ways, strict=True):
        assert title in page
        assert sorted(row[0].strip("`") for row in rows) == sorted(n for n, each in test_matrix.OFFERED if each == mode)
        for name, *cells in rows:
            assert len(cells) == len(matrix.AROUND)
            own = f"`[{name.strip('`')}-{mode}]`"
            assert all(cell == own or not cell.startswith("`") for cell in cells)


def test_what_is_recommended_is_on_the_page():
    assert matrix.PAGE.read_text().endswith(f"{matrix.RECOMMENDED}\n\n{matrix.recommended_table()}")
    for family in registered():
        source = family.recommended.measured.rpartition(": ")[2]
        if source:
            path, _, heading = source.partition(", ")
            assert f"## {heading}\n" in (matrix.PAGE.parents[1] / path).read_text()


def test_its_cells_are_shown_by_tests_that_there_are():
    modules = [importlib.import_module(f"tests.diffusers.test_{name}") for name in matrix.FILES]
    for family in registered():
        for cell in matrix.row(matrix.NAMES[family.model.__name__]).values():
            assert isinstance(cell, str) or any(hasattr(module, cell.test) for module in modules), cell
    assert all(hasattr(test_matrix, f"test_{column}") for column in matrix.AROUND)
