"""diffusers' own tests of models, attentions and caches, run over compressed models.

They are not in its package: DIFFUSERS_TESTS_PATH names a checkout of its repository. Without it these tests are
skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Needs the network.
LEFT_OUT = "not test_correct_class_remapping_from_pretrained_config"
SUITES = {
    "test_models_dit_transformer2d.py": ("TestDiTTransformer2D", "TestDiTTransformer2DAttention"),
    "test_models_transformer_flux.py": (
        "TestFluxTransformer",
        "TestFluxTransformerAttention",
        "TestFluxTransformerMemory",
        "TestFluxTransformerFBCCache",
    ),
    "test_models_transformer_sd3.py": ("TestSD3Transformer",),
    "test_models_transformer_wan.py": ("TestWanTransformer3D", "TestWanTransformer3DAttention"),
}


@pytest.mark.skipif("DIFFUSERS_TESTS_PATH" not in os.environ, reason="DIFFUSERS_TESTS_PATH is not set")
@pytest.mark.parametrize("file", SUITES)
def test_the_peers_own_tests_pass_over_compressed_models(file):
    checkout = Path(os.environ["DIFFUSERS_TESTS_PATH"])
    folder = "tests/models/transformers"
    cases = [f"{folder}/{file}::{case}" for case in SUITES[file]]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    # Its tests are a package of the same name as ours, so the plugin comes by its folder.
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "peer", "-k", LEFT_OUT, *cases]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
