"""What CUDA graphs and ahead-of-time compilation ask of a compressed model."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from bigain_kernels.diffusers import IEKVDConfig, LGTMConfig, SiToConfig, ToMeConfig, apply_token_compression

from .family_models import build, case_of, outputs
from .models import dit_inputs, flux_inputs, run, tiny_dit, tiny_flux, tiny_unet, unet_inputs

CONFIGS = [
    LGTMConfig(modules=("attn1", "ff"), proportional=True),
    ToMeConfig(cached_assignment=True, share_plan=2),
    SiToConfig(),
    IEKVDConfig(alpha=(0.8, 1.2)),
]
GIVES_GRID = ("flux", "flux_controlnet")


def fake_pass(name, config):
    """A forward pass on tensors that have no values, so that whoever reads one raises; tensors that are made without
    a device come to lie elsewhere, where they do not meet the others."""
    model = tiny_unet() if name == "unet" else build(name)
    inputs = unet_inputs() if name == "unet" else case_of(name).inputs(2, (case_of(name).frames, 6, 6))
    apply_token_compression(model, config)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.device("meta"):
        inputs = {key: mode.from_tensor(value) if torch.is_tensor(value) else value for key, value in inputs.items()}
        if name == "unet":
            inputs["timestep"] = torch.full((), 500, device="cpu")
        if name in GIVES_GRID:
            inputs["joint_attention_kwargs"] = {"bigain_grid": (6, 6)}
        return outputs(model, inputs)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method)
@pytest.mark.parametrize("name", ["unet", "dit", "flux", "wan", "flux_controlnet"])
def test_a_pass_waits_for_no_device_and_copies_nothing_to_it(name, config):
    """So a CUDA graph can hold it, with mode="reduce-overhead" too: all shapes and sizes are known on the host."""
    assert fake_pass(name, config).device.type == "cpu"


def test_what_does_wait_is_found():
    with pytest.raises(DataDependentOutputException):
        fake_pass("dit", replace(CONFIGS[0], end=0.5))  # whether a timestep is compressed decides on shapes


# Minutes of a C++ compiler.
@pytest.mark.skipif("BIGAIN_TEST_AOTI" not in os.environ, reason="BIGAIN_TEST_AOTI is not set")
@pytest.mark.parametrize("name", ["dit", "flux"])
def test_ahead_of_time_compilation(name, tmp_path):
    if name == "dit":
        model, inputs = tiny_dit(num_layers=1), dit_inputs()
    else:
        model, inputs = tiny_flux(num_layers=1, num_single_layers=1), flux_inputs(size=(6, 6))
        inputs["joint_attention_kwargs"] = {"bigain_grid": (6, 6)}
    apply_token_compression(model, CONFIGS[0])
    wanted, arguments = run(model, inputs), {**inputs, "return_dict": False}
    with torch.no_grad():
        program = torch.export.export(model, (), arguments, strict=False)
        options = {"aot_inductor.compile_wrapper_opt_level": "O0"}
        path = str(tmp_path / "model.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=options)
    found = torch._inductor.aoti_load_package(path)(**arguments)
    found = found[0] if isinstance(found, (tuple, list)) else found
    torch.testing.assert_close(found, wanted, atol=3e-5, rtol=3e-5)
