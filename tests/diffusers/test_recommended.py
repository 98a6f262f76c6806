"""What is recommended for a family is something that its models take."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bigain_kernels.diffusers import apply_token_compression, recommended_config
from bigain_kernels.diffusers.families import register_family, registered, unregister_family
from tests.toy_family import Toy, ToyTransformer

from .family_models import CASES, WRITTEN_OUT, build, case_of, outputs
from .models import tiny_unet, unet_inputs


@pytest.mark.parametrize("name", ["unet", *CASES, *WRITTEN_OUT])
def test_models_take_what_is_recommended(name):
    model = tiny_unet() if name == "unet" else build(name)
    inputs = unet_inputs() if name == "unet" else case_of(name).inputs(1, (case_of(name).frames, 6, 6))
    plain = outputs(model, inputs)
    config = recommended_config(model)
    assert recommended_config(SimpleNamespace(transformer=model)) == config
    apply_token_compression(model, config)
    found = outputs(model, inputs)
    assert found.isfinite().all()
    assert not torch.equal(found, plain)


def test_the_first_level_of_a_unet_that_has_attention():
    """As in SDXL, whose full resolution has none."""
    deeper = tiny_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")
    )
    assert recommended_config(tiny_unet()).max_downsample == 1
    assert recommended_config(deeper).max_downsample == 2
    assert apply_token_compression(deeper, recommended_config(deeper)).patched


def test_every_family_recommends_and_others_are_refused():
    assert all(family.recommended is not None for family in registered())
    with pytest.raises(TypeError, match="model_or_pipe: got Linear"):
        recommended_config(nn.Linear(2, 2))
    register_family(Toy())
    try:
        with pytest.raises(ValueError, match="got ToyTransformer, expected a model with a recommendation"):
            recommended_config(ToyTransformer())
    finally:
        unregister_family(ToyTransformer)
