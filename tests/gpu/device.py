"""The GPU that the tests of this folder run on; without one, importing this skips the file that does.

`python -m tests.gpu.run` runs them in many processes, and the checks of the Triton kernels with them.

BIGAIN_GPU_TESTS_ON=cpu runs the bodies of these tests on CPU tensors, to find mistakes in the tests themselves. What
needs CUDA is skipped then, and nothing is said about a kernel.
"""

from __future__ import annotations

import os

import pytest
import torch

from bigain_kernels import backends

DEVICE = torch.device(os.environ.get("BIGAIN_GPU_TESTS_ON", "cuda"))
ON_GPU = DEVICE.type == "cuda"
if ON_GPU and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

needs_cuda = pytest.mark.skipif(not ON_GPU, reason="needs CUDA itself")
# Backends whose kernels run on the device, the reference aside.
BACKENDS = [name for name in backends.order(DEVICE.type) if name != "reference"]
assert BACKENDS, f"no backend has kernels for {DEVICE.type}: is the package installed (python -m bigain_kernels.env)?"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# (batch, grid, channels): the shapes of DESIGN.md, section 8, and the ones that benchmarks add.
MODEL_SHAPES = {
    "SD 1.5 at 512": (2, (64, 64), 320),
    "SD 2 at 768": (2, (96, 96), 320),
    "SDXL at 1024": (2, (64, 64), 640),
    "SDXL at 1024, low": (2, (32, 32), 1280),
    "DiT-XL/2 at 256": (2, (16, 16), 1152),
    "DiT-XL/2 at 512": (2, (32, 32), 1152),
    "DiT-XL/2 at 512, B32": (32, (32, 32), 1152),
    "Flux-class": (1, (64, 64), 3072),
    "video": (1, (180, 182), 128),
}


def free_bytes() -> int:
    """Free memory of the device."""
    return torch.cuda.mem_get_info(DEVICE)[0] if ON_GPU else 2 << 30


def random_tokens(batch: int, n: int, channels: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normal (batch, n, channels) tokens, drawn on the device."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(batch, n, channels, generator=generator, device=DEVICE).to(dtype)
