"""The tomesd-shaped API patches what the same arguments of our own configs patch."""

from __future__ import annotations

import copy
import inspect
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import tomesd as original
import torch
from diffusers import UNet2DConditionModel

from bigain_kernels.compat import tomesd
from bigain_kernels.diffusers import ToMeConfig, apply_token_compression


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()


def run(model):
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(1, 3, 16, generator=generator)
    return model(torch.randn(1, 4, 12, 8, generator=generator), 500, encoder_hidden_states=text).sample


def test_patches_like_the_config_and_unpatches(unet):
    plain = run(unet)
    assert tomesd.apply_patch(unet, ratio=0.6, sx=3, sy=2, max_downsample=2, merge_crossattn=True) is unet
    patched = run(unet)
    assert not torch.equal(patched, plain)
    config = ToMeConfig(ratio=0.6, stride=(2, 3), max_downsample=2, modules=("attn1", "attn2"))
    apply_token_compression(unet, config)
    assert torch.equal(run(unet), patched)
    tomesd.apply_patch(unet, use_rand=False)
    apply_token_compression(unet, ToMeConfig(destinations="first"))
    assert tomesd.remove_patch(unet) is unet
    assert torch.equal(run(unet), plain)


def test_the_calls_are_those_of_tomesd():
    """Same names, order and defaults."""
    for name in ("apply_patch", "remove_patch"):
        ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (tomesd, original))
        assert [(p.name, p.default, p.kind) for p in ours.values()] == [
            (p.name, p.default, p.kind) for p in theirs.values()
        ]


# Arguments that tomesd takes, what they are here, and what a warning says of them.
TAKEN = [
    ({"ratio": 0.9}, {"ratio": 0.75}, "ratio 0.9 merges as 0.75 does"),
    ({"ratio": 2}, {"ratio": 0.75}, "ratio 2 merges as 0.75 does"),
    ({"ratio": 0.9, "sx": 4}, {"ratio": 0.875, "stride": (2, 4)}, "merges as 0.875"),
    ({"ratio": 0.5, "sx": 1, "sy": 1}, {"ratio": 0.0, "stride": (1, 1)}, "merges as 0 does"),
    ({"ratio": 0.875, "sx": 4}, {"ratio": 0.875, "stride": (2, 4)}, None),
    ({"ratio": 0}, {"ratio": 0.0}, None),
    ({"ratio": -1.0}, {"ratio": 0.0}, None),
    ({"ratio": np.float32(0.5)}, {"ratio": 0.5}, None),
    ({"max_downsample": 2}, {"max_downsample": 2}, None),
    ({"max_downsample": 3}, {"max_downsample": 2}, None),
    ({"max_downsample": 100}, {"max_downsample": 8}, None),
    ({"max_downsample": float("inf")}, {"max_downsample": 8}, None),
    ({"use_rand": False}, {"destinations": "first"}, None),
    ({"use_rand": 1}, {"destinations": "random"}, None),
    ({"merge_crossattn": True}, {"modules": ("attn1", "attn2")}, None),
    ({"merge_attn": False, "merge_crossattn": True}, {"modules": ("attn2",)}, None),
    ({"merge_mlp": True}, {"modules": ("attn1", "ff")}, None),
    ({"merge_attn": False, "merge_mlp": True}, {"modules": ("ff",)}, None),
]


@pytest.mark.parametrize(("arguments", "config", "told"), TAKEN, ids=lambda value: str(value) if value else "")
def test_what_tomesd_takes_is_taken(unet, arguments, config, told):
    original.apply_patch(copy.deepcopy(unet), **arguments)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tomesd.apply_patch(unet, **arguments)
    messages = [str(warning.message) for warning in caught if "tomesd: " in str(warning.message)]
    assert len(messages) == (told is not None)
    assert told is None or told in messages[0]
    patched = run(unet)
    apply_token_compression(unet, ToMeConfig(**config))
    assert torch.equal(run(unet), patched)


@pytest.mark.parametrize("arguments", [{"merge_attn": False}, {"max_downsample": 0}])
def test_what_merges_nothing_says_so(unet, arguments):
    plain = run(unet)
    tomesd.apply_patch(unet)
    with pytest.warns(UserWarning, match="nothing merges"):
        assert tomesd.apply_patch(unet, **arguments) is unet
    assert torch.equal(run(unet), plain)


def test_pipelines(unet):
    """Of a pipeline tomesd gives the pipeline back, and takes the patch out of its U-Net, which it returns."""
    pipe = SimpleNamespace(unet=unet)
    plain = run(unet)
    assert tomesd.apply_patch(pipe) is pipe
    assert tomesd.apply_patch(pipe, ratio=0.6) is pipe  # again
    assert not torch.equal(run(unet), plain)
    assert tomesd.remove_patch(pipe) is unet
    assert tomesd.remove_patch(unet) is unet  # without a patch
    assert torch.equal(run(unet), plain)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ratio": "half"}, TypeError, "ratio: got 'half'"),
        ({"ratio": float("nan")}, ValueError, "ratio: got nan"),
        ({"sx": 0}, ValueError, "stride: got"),
    ],
)
def test_bad_arguments(unet, arguments, error, message):
    with pytest.raises(error, match=f"^{message}"):
        tomesd.apply_patch(unet, **arguments)


def test_a_model_without_layers_at_the_level():
    """SDXL has no attention at full resolution: tomesd's defaults do nothing there."""
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()
    plain = run(model)
    original.apply_patch(model)
    assert torch.equal(run(model), plain)
    original.remove_patch(model)
    with pytest.warns(UserWarning, match=r"no layer of \('attn1',\) at max_downsample=1"):
        assert tomesd.apply_patch(model) is model
    assert torch.equal(run(model), plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tomesd.apply_patch(model, max_downsample=2)
    assert not torch.equal(run(model), plain)
