"""What `import bigain_kernels` does beyond importing torch: little, and nothing that waits for a first use."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import inspect, json, sys
import torch

def refuse(*arguments):
    raise AssertionError("inspect.getmodule walks through all modules of the process")

inspect.getmodule = refuse
before = set(sys.modules)
import bigain_kernels
print(json.dumps({"modules": sorted(set(sys.modules) - before), "ops": dir(torch.ops.bigain)}))
"""
# Derivatives, the reference, methods and warming up: each is imported by the first that asks for it.
LATER = ("reference", "methods", "warming", "ops._autograd", "ops._merge_gradients", "ops._pool_gradients")


def test_the_import_is_small():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert run.stderr == ""
    found = json.loads(run.stdout)
    foreign = [name for name in found["modules"] if name.split(".")[0] != "bigain_kernels"]
    assert foreign == []
    later = tuple(f"bigain_kernels.{name}" for name in LATER)
    early = [name for name in found["modules"] if name in later or name.startswith(tuple(f"{each}." for each in later))]
    assert early == []
    # Each costs about 0.2 ms. Raise the limit for a new op, not for what could be imported later.
    assert len(found["modules"]) <= 32, found["modules"]
    from bigain_kernels.declaration import OPS

    assert set(OPS) <= set(found["ops"])
