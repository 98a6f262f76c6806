"""The index of a block, by which random methods draw: it survives offloading and goes where the model goes."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from diffusers.hooks import group_offloading

from bigain_kernels.diffusers import LGTMConfig, SiToConfig, ToMeConfig, apply_token_compression
from bigain_kernels.diffusers.numbering import follow_model

from .family_models import build, case_of, outputs

INPUTS = case_of("wan").inputs(1, (3, 4, 4))


class _Stream:
    """A stream of a device of which only the copies are not there; which tensor goes where is kept by diffusers."""

    def __init__(self, *args, **kwargs):
        pass

    def synchronize(self):
        pass

    def wait_stream(self, stream):
        pass


class _Device:
    Stream = _Stream

    def __init__(self, *args):
        pass

    def stream(self, stream):
        return contextlib.nullcontext()

    def current_stream(self):
        return _Stream()

    def synchronize(self):
        pass


@pytest.fixture
def _streams(monkeypatch):
    def transfer(self, tensor, source, default_stream):
        tensor.data = source

    monkeypatch.setattr(group_offloading, "TorchDeviceBackend", _Device)
    monkeypatch.setattr(group_offloading, "send_to_device", lambda value, *args, **kwargs: value)
    monkeypatch.setattr(group_offloading.ModuleGroup, "_transfer_tensor_to_device", transfer)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *args: self)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self, *args: True)


@pytest.mark.usefixtures("_streams")
@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
@pytest.mark.parametrize("config", [LGTMConfig(ratio=0.5), ToMeConfig(ratio=0.5), SiToConfig(ratio=0.5)])
def test_applied_after_group_offloading_with_streams(config, level):
    stays, model = build("wan"), build("wan")
    apply_token_compression(stays, config)
    model.enable_group_offload(
        onload_device=torch.device("cuda"),
        offload_device=torch.device("cpu"),
        offload_type=level,
        num_blocks_per_group=1,
        use_stream=True,
    )
    apply_token_compression(model, config)
    for _ in range(2):
        assert torch.equal(outputs(model, INPUTS), outputs(stays, INPUTS))


def test_numbers_lie_where_the_model_runs():
    """Moved in front of the pass, so that compiled blocks and CUDA graphs find them there."""
    model = build("wan")
    apply_token_compression(model, ToMeConfig(ratio=0.5))
    copied = copy.deepcopy(model)
    assert torch.equal(outputs(copied, INPUTS), outputs(model, INPUTS))
    assert [int(block.attn1.bigain_block) for block in copied.blocks] == [0, 1]
    assert not any("bigain" in name for name, _ in copied.named_buffers())
    follow_model(copied, (), {"hidden_states": torch.empty(1, device="meta")})
    assert [block.attn1.bigain_block.device.type for block in copied.blocks] == ["meta", "meta"]
    assert [block.attn1.bigain_block.device.type for block in model.blocks] == ["cpu", "cpu"]
