"""Compressed models that are sent to another process."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch

from bigain_kernels.diffusers import LGTMConfig, ToMeConfig, apply_token_compression, remove_token_compression

from .family_models import build, case_of, outputs

NAMES = ["dit", "flux", "flux2", "wan"]


def _inputs(name):
    return case_of(name).inputs(1, (case_of(name).frames, 4, 4))


@pytest.mark.parametrize("config", [LGTMConfig(ratio=0.5), ToMeConfig(ratio=0.5)], ids=["lgtm", "tome"])
@pytest.mark.parametrize("name", NAMES)
def test_it_comes_back_compressed_and_can_be_removed(name, config):
    model, plain = build(name), build(name)
    apply_token_compression(model, config)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(outputs(again, _inputs(name)), outputs(model, _inputs(name)))
    remove_token_compression(again)
    assert torch.equal(outputs(again, _inputs(name)), outputs(plain, _inputs(name)))
    assert outputs(model, _inputs(name)).isfinite().all()


def test_a_process_that_made_no_such_class_can_read_it(tmp_path):
    model = build("wan")
    apply_token_compression(model, LGTMConfig(ratio=0.5))
    torch.save((model, _inputs("wan"), outputs(model, _inputs("wan"))), tmp_path / "model.pt")
    code = f"""
import torch
model, inputs, wanted = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
with torch.no_grad():
    (output,) = model(**inputs, return_dict=False)
assert torch.allclose(output.flatten(), wanted.flatten(), atol=1e-6)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
