"""What another package adds by public means alone; docs/architecture.md has the recipes in words.

A merge method from elsewhere is in tests/cli/test_method_options.py, where it runs on the command line.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from diffusers import DiTTransformer2DModel

import bigain_kernels as bk
from bigain_kernels.cli.main import main
from bigain_kernels.diffusers import (
    IEKVDConfig,
    LGTMConfig,
    SiToConfig,
    apply_token_compression,
    register_family,
    token_compression,
    unregister_family,
)
from bigain_kernels.evaluation.denoisers import LabelDenoiser, register_denoiser, unregister_denoiser
from bigain_kernels.evaluation.tiny_models import build_scheduler
from bigain_kernels.methods import MergeConfig, register, unregister
from bigain_kernels.methods.options import Count, option
from bigain_kernels.testing import assert_is_partition

from .toy_family import Toy, ToyTransformer

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = '''
"""A backend from elsewhere: token_unmerge by advanced indexing, and nothing else."""
import torch
from bigain_kernels import backends

def token_unmerge(y, slot, offsets, members, anchor, residual, gate):
    rows = slot.long().repeat(y.shape[0] // max(slot.shape[0], 1), 1)
    wide = torch.promote_types(y.dtype, torch.float32)
    out = y.to(wide)[torch.arange(y.shape[0])[:, None], rows]
    out = out if gate is None else out * gate.to(wide)[:, None]
    out = out if residual is None else out + residual.to(wide)
    return out.to(y.dtype)

backends.register(backends.Backend("toy", {"token_unmerge": token_unmerge}.get, devices=("cpu",), priority=-1))
'''


def test_a_backend_from_elsewhere_runs_the_contract(tmp_path):
    (tmp_path / "toy_plugin.py").write_text(PLUGIN)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT)])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-p", "toy_plugin"]
    done = subprocess.run(
        [*command, "tests/contract/test_token_unmerge.py", "tests/contract/test_token_merge.py", "--backend", "toy"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 50
    assert "toy" in done.stdout


@dataclass(frozen=True, kw_only=True)
class Rows(MergeConfig):
    """Tokens merge into every k-th row of the grid.

    Args:
        every: distance of rows that hold destinations.
    """

    method: ClassVar[str] = "rows"

    every: int = option(2, Count(1))

    def plan(self, x, grid, ratio, timestep=None):
        height, width = grid
        tokens = torch.arange(height * width, dtype=torch.int32, device=x.device).view(height, width)
        destinations = tokens[:: self.every].flatten().repeat(x.shape[0], 1)
        similarity, match = bk.bipartite_match(x, destinations)
        return bk.merge_plan(similarity, match, destinations, int(x.shape[1] * ratio), grid)


@pytest.fixture
def rows():
    register(Rows)
    yield Rows
    unregister("rows")


def test_a_method_from_elsewhere_in_a_model(rows):
    config = rows(ratio=0.5, every=2, proportional=True)
    plan = config.plan(torch.randn(2, 64, 16), (8, 8), 0.5)
    assert_is_partition(plan)
    assert plan.num_slots == 32
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=10,
    ).eval()
    torch.nn.init.normal_(model.proj_out_2.weight)
    for block in model.transformer_blocks:
        torch.nn.init.normal_(block.norm1.linear.weight, std=0.1)
    call = {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "timestep": torch.tensor([5, 5]),
        "class_labels": torch.ones(2).long(),
    }
    plain = model(**call).sample
    with token_compression(model, config) as report:
        assert len(report.patched) == 2
        compressed = model(**call).sample
    assert not torch.equal(compressed, plain)
    assert torch.equal(model(**call).sample, plain)


@pytest.fixture
def toy():
    register_family(Toy())
    register_denoiser(ToyTransformer, LabelDenoiser)
    yield
    unregister_denoiser(ToyTransformer)
    unregister_family(ToyTransformer)


def toy_call(size=16):
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 1, size, size, generator=generator),
        "timestep": torch.tensor([5, 500]),
        "class_labels": torch.tensor([1, 2]),
    }


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("config", [LGTMConfig(proportional=True), SiToConfig(), IEKVDConfig(alpha=(0.8, 1.2))])
def test_a_model_family_from_elsewhere(config):
    torch.manual_seed(0)
    model = ToyTransformer().eval()
    plain = model(**toy_call()).sample
    nothing = LGTMConfig(ratio=0.0) if isinstance(config, MergeConfig) else IEKVDConfig(factor=1)
    with token_compression(model, nothing):
        assert torch.equal(model(**toy_call()).sample, plain)
    with token_compression(model, config) as report:
        assert [row.name for row in report.patched] == ["blocks.0.attn", "blocks.1.attn"]
        compressed = model(**toy_call()).sample
        assert not torch.equal(compressed, plain)
        assert model(**toy_call(24)).sample.shape == (2, 1, 24, 24)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**toy_call()).sample, compressed, atol=1e-6, rtol=1e-6)
    torch._dynamo.reset()
    assert torch.equal(model(**toy_call()).sample, plain)
    with token_compression(model, replace(config, blocks=(1,))):
        assert not torch.equal(model(**toy_call()).sample, plain)


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("method", ["lgtm", "iekvd"])
def test_a_model_family_from_elsewhere_on_the_command_line(method, tmp_path):
    torch.manual_seed(0)
    checkpoint = tmp_path / "toy"
    ToyTransformer().save_pretrained(checkpoint / "transformer")
    build_scheduler().save_pretrained(checkpoint / "scheduler")
    given = ["--checkpoint", str(checkpoint), "--method", method]
    out = tmp_path / "classified"
    assert main(["classify", *given, "--limit", "1", "--stages", "1:1", "--out", str(out)]) == 0
    assert json.loads((out / "summary.json").read_text())["settings"]["compression"]["method"] == method
    out = tmp_path / "generated"
    assert main(["generate", *given, "--images", "2", "--steps", "2", "--out", str(out)]) == 0
    assert len(list(out.rglob("*.png"))) >= 2


def test_families_are_checked_and_forgotten():
    with pytest.raises(TypeError, match=r"family: got .*, expected an instance"):
        register_family(Toy)
    with pytest.raises(ValueError, match=r"family: got .*, DiTTransformer2DModel has DiT"):
        register_family(type("Other", (Toy,), {"model": DiTTransformer2DModel})())
    with pytest.raises(ValueError, match="model: got ToyTransformer, expected one of"):
        unregister_family(ToyTransformer)
    with pytest.raises(TypeError, match="model_or_pipe: got ToyTransformer"):
        apply_token_compression(ToyTransformer(), LGTMConfig())
    with pytest.raises(TypeError, match=r"model: got .*, expected a class derived from diffusers\.ModelMixin"):
        register_denoiser(torch.nn.Linear, LabelDenoiser)
