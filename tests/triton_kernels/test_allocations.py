"""How often the launchers ask for memory, counted without a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from bigain_kernels.triton_kernels.launching import record_launches
from bigain_kernels.triton_kernels.registration import IMPLEMENTATIONS

from .test_launches import GRID, R, x_and_tables


@pytest.fixture
def allocations(monkeypatch):
    empty, shapes = torch.empty, []

    def count(shape, **options):
        shapes.append(shape)
        return empty(shape, **options)

    monkeypatch.setattr(torch, "empty", count)
    return shapes


def test_allocations_of_a_layer(allocations):
    """The four tables, which as results of an op may not share memory, one workspace, and a result of each op."""
    x, _ = x_and_tables()
    allocations.clear()
    with record_launches() as launches:
        tables = IMPLEMENTATIONS["lgtm_plan"](x, *GRID, 2, 2, R, -1, 1)
        y = IMPLEMENTATIONS["token_merge"](x, *tables, "mean", None)
        IMPLEMENTATIONS["token_unmerge"](y, *tables, x, None)
    assert len(allocations) == 7
    work = {name: launches[1].arguments[f"p_{name}"] for name in ("inverse_norm", "sources", "words", "packed")}
    assert len({tensor.untyped_storage()._cdata for tensor in work.values()}) == 1
    assert all(tensor.storage_offset() * tensor.element_size() % 16 == 0 for tensor in work.values())
    assert len({table.untyped_storage()._cdata for table in tables}) == 4
