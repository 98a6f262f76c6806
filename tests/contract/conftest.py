"""The contract suite: the same cases on every backend of this machine, each case a test of its own.

A file names its op in OP. A test that takes `backend` runs once on every backend that implements it; one that takes
`dtype` as well, once for every dtype that the backend does not refuse (or those of its marker `dtypes`). `--backend`
chooses; a backend from elsewhere is named there when a plugin (`-p`) has registered it.
"""

from __future__ import annotations

import pytest
import torch

from bigain_kernels import backends

from ..contract_table import BACKENDS, short
from ..interpreted import INTERPRETED, needs_child
from . import providers

_providers = pytest.StashKey[list[providers.Provider]]()


def pytest_generate_tests(metafunc):
    if "backend" not in metafunc.fixturenames:
        return
    config = metafunc.config
    if _providers not in config.stash:
        names = config.getoption("--backend") or BACKENDS
        found = [providers.of_backend(name) for name in names]
        config.stash[_providers] = [provider for provider in found if provider is not None]
    op = metafunc.module.OP
    marker = metafunc.definition.get_closest_marker("dtypes")
    has_dtype = "dtype" in metafunc.fixturenames
    cases = []
    for provider in config.stash[_providers]:
        if not provider.implements(op):
            continue
        wanted = [d for d in provider.dtypes() if marker is None or d in marker.args] if has_dtype else [None]
        for dtype in wanted:
            marks = [pytest.mark.interpreted] if provider.interpreted else []
            values = (provider, dtype) if has_dtype else (provider,)
            name = f"{provider.name}-{short(dtype)}" if has_dtype else provider.name
            cases.append(pytest.param(*values, id=name, marks=marks))
    metafunc.parametrize(("backend", "dtype") if has_dtype else ("backend",), cases, indirect=["backend"])


def pytest_collection_modifyitems(config, items):
    """Notes what a case is of; what no chosen backend implements is left out."""
    kept, left_out = [], []
    for item in items:
        call = getattr(item, "callspec", None)
        if call is None or not hasattr(item.module, "OP") or "backend" not in call.params:
            kept.append(item)
        elif isinstance(call.params["backend"], providers.Provider):
            dtype = call.params.get("dtype")
            row = [item.module.OP, call.params["backend"].name, short(dtype) if dtype else "float32"]
            item.user_properties.append(("contract", row))
            kept.append(item)
        else:
            left_out.append(item)
    if left_out:
        items[:] = kept
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture
def backend(request, monkeypatch):
    """The backend of the case, in use; what kernels and launchers allocate is full of NaN."""
    provider = request.param
    if needs_child(request.node):
        yield provider
        return
    if provider.interpreted and INTERPRETED:
        from ..triton_kernels.interpreted.interpreter import as_exact_as_a_gpu

        as_exact_as_a_gpu(monkeypatch)
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoning(getattr(torch, name)))
    with provider.in_use():
        yield provider


def poisoning(allocate):
    """An allocation whose every element shows when nothing writes it: NaN, or the lowest integer."""

    def poisoned(*args, **kwargs):
        x = allocate(*args, **kwargs)
        if x.dtype == torch.bool:
            return x
        return x.fill_(torch.nan if x.dtype.is_floating_point else torch.iinfo(x.dtype).min)

    return poisoned


def pytest_report_header(config):
    known = ", ".join(each.name for each in backends.all_backends() if not each.missing)
    return f"backends: {known}"
