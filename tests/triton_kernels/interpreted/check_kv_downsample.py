from __future__ import annotations

import pytest
import torch

from bigain_kernels.triton_kernels.kv_downsample import launch_kv_downsample
from tests.contract.inputs import odd_tokens

from .inputs import DTYPES, candidates, on_device

launch_kv_downsample = on_device(launch_kv_downsample)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_config_gives_the_same_bits(dtype):
    x = odd_tokens(2, 63, 72, dtype)
    for alpha in (0.9, 1.0):
        results = [launch_kv_downsample([x], (7, 9), (2, 2), alpha, c)[0] for c in candidates("kv_downsample")]
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=0, atol=0, equal_nan=True)
