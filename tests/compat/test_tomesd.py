"""The tomesd-shaped API patches what the same arguments of our own configs patch."""

from __future__ import annotations

import pytest
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"merge_mlp": True}, "merge_mlp: got True"),
        ({"merge_attn": False}, "merge_attn: got False"),
        ({"ratio": 0.9}, "ratio: got 0.9"),
        ({"max_downsample": 3}, "max_downsample: got 3"),
    ],
)
def test_bad_arguments(unet, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        tomesd.apply_patch(unet, **arguments)
