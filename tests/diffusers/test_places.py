"""Where the tokens of the image stand, in calls that say it in other ways than most."""

from __future__ import annotations

import pytest
import torch

from bigain_kernels.diffusers import IEKVDConfig, LGTMConfig, MixedConfig, apply_token_compression

from .family_models import build, case_of, outputs

# Of pictures that cannot be compressed: prompts of two lengths, pictures of two sizes, positions that are no grid.
UNPLACED = {"lumina2": "encoder_attention_mask: got", "z_image": "x: got", "flux": "img_ids: got"}
# The timesteps of the cases are half way through the noise.
LATER = LGTMConfig(start=0.9)


def unplaced(name):
    inputs = case_of(name).inputs(2, (1, 4, 4))
    if name == "lumina2":
        inputs["encoder_attention_mask"][0, 3:] = False
    elif name == "z_image":
        inputs["x"][1] = inputs["x"][1][:, :, :4]
    else:
        inputs["img_ids"] = inputs["img_ids"].flip(0)
    return inputs


@pytest.mark.parametrize(
    "config",
    [
        LATER,
        IEKVDConfig(start=0.9),
        MixedConfig([LGTMConfig(start=0.9, blocks=(0,)), IEKVDConfig(end=0.1, blocks=(1,))]),
    ],
    ids=["merge", "pool", "mixed"],
)
@pytest.mark.parametrize("name", UNPLACED)
def test_tokens_may_stand_anywhere_where_nothing_is_compressed(name, config):
    model, inputs = build(name), unplaced(name)
    with torch.no_grad():
        plain = model(**inputs, return_dict=False)[0]
        apply_token_compression(model, config)
        found = model(**inputs, return_dict=False)[0]
    assert all(map(torch.equal, found, plain))


@pytest.mark.parametrize("name", UNPLACED)
def test_and_are_refused_where_something_is(name):
    mixed = MixedConfig([LGTMConfig(start=0.9, blocks=(0,)), IEKVDConfig(blocks=(1,))])
    for config in (LGTMConfig(end=0.9), mixed):
        model = build(name)
        apply_token_compression(model, config)
        with pytest.raises(ValueError, match=UNPLACED[name]):
            outputs(model, unplaced(name))
