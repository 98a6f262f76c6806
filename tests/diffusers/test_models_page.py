"""docs/models.md names every family, and what its table says was shown by tests that there are."""

from __future__ import annotations

import importlib

from bigain_kernels.diffusers.families import REFUSED, registered

from . import matrix


def test_the_page_has_every_family_and_every_refusal():
    page = matrix.PAGE.read_text()
    rows = [line for line in page.split("## What to begin")[0].splitlines() if line.startswith("| `")]
    assert [line.split("`")[3] for line in rows] == [family.model.__name__ for family in registered()]
    assert all(f"`{model}`: {reason}." in page for model, reason in REFUSED.items())
    columns = len(matrix.row("wan")) + 3
    assert all(line.count("|") == columns + 1 for line in rows)


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
