"""Pipelines in which two models denoise: Wan 2.2, one at much noise and one at little."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LucyEditPipeline, WanImageToVideoPipeline, WanPipeline
from torch import nn

from bigain_kernels.diffusers import (
    IEKVDConfig,
    LGTMConfig,
    ToDoConfig,
    apply_token_compression,
    recommended_config,
    remove_token_compression,
    token_compression,
)

from .family_models import build, case_of, outputs

PARTS = ("transformer", "transformer_2")


def _pipeline(cls=WanPipeline, first=True, second=True):
    """A pipeline without the parts that neither compression nor its schedule asks."""
    other = dict.fromkeys({"tokenizer", "text_encoder", "vae", "image_encoder", "image_processor"} & _arguments(cls))
    models = {name: build("wan") if there else None for name, there in zip(PARTS, (first, second), strict=True)}
    return cls(scheduler=FlowMatchEulerDiscreteScheduler(), boundary_ratio=0.875, **models, **other)


def _arguments(cls):
    return set(cls._get_signature_keys(cls)[0]) | set(cls._get_signature_keys(cls)[1])


def _is_compressed(model):
    call = case_of("wan").inputs(1, (3, 4, 4))
    return not torch.equal(outputs(model, call), outputs(build("wan"), call))


@pytest.mark.parametrize("cls", [WanPipeline, WanImageToVideoPipeline, LucyEditPipeline])
def test_both_are_compressed_and_reported(cls):
    pipe = _pipeline(cls)
    report = apply_token_compression(pipe, IEKVDConfig(factor=2))
    assert all(_is_compressed(getattr(pipe, name)) for name in PARTS)
    assert [row.name for row in report.patched] == [f"{name}.blocks.{i}.attn1" for name in PARTS for i in (0, 1)]
    assert str(report).startswith(
        "IEKVDConfig on WanTransformer3DModel (transformer) and WanTransformer3DModel (transformer_2): 4 of 4 layers"
    )
    remove_token_compression(pipe)
    assert not any(_is_compressed(getattr(pipe, name)) for name in PARTS)


@pytest.mark.parametrize("there", PARTS)
def test_one_may_be_missing(there):
    pipe = _pipeline(first=there == PARTS[0], second=there == PARTS[1])
    assert recommended_config(pipe) == IEKVDConfig(factor=2, alpha=0.9)
    report = apply_token_compression(pipe, IEKVDConfig(factor=2))
    assert report.model == "WanTransformer3DModel"
    assert report.patched[0].name == "blocks.0.attn1"
    assert _is_compressed(getattr(pipe, there))
    remove_token_compression(pipe)
    assert not _is_compressed(getattr(pipe, there))


def test_one_that_stands_in_both_places_is_one():
    pipe = _pipeline()
    pipe.transformer_2 = pipe.transformer
    assert len(apply_token_compression(pipe, IEKVDConfig(factor=2)).patched) == 2
    remove_token_compression(pipe)
    assert not _is_compressed(pipe.transformer)


def test_the_context_manager_puts_back_what_each_had():
    pipe = _pipeline()
    apply_token_compression(pipe.transformer_2, ToDoConfig())
    with token_compression(pipe, LGTMConfig(ratio=0.5)) as report:
        assert len(report.patched) == 4
        assert all(getattr(pipe, name)._bigain.config.ratio == 0.5 for name in PARTS)
    assert not _is_compressed(pipe.transformer)
    assert isinstance(pipe.transformer_2._bigain.config, ToDoConfig)
    assert _is_compressed(pipe.transformer_2)


def test_what_is_refused_for_one_leaves_both_alone():
    pipe = _pipeline()
    pipe.transformer_2.blocks = pipe.transformer_2.blocks[:1]
    with pytest.raises(ValueError, match=r"^blocks: got \[1\]"):
        apply_token_compression(pipe, IEKVDConfig(factor=2, blocks=(1,)))
    assert not any(hasattr(getattr(pipe, name), "_bigain") for name in PARTS)
    pipe.transformer_2 = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"^model_or_pipe: got WanPipeline with Linear"):
        apply_token_compression(pipe, IEKVDConfig(factor=2))
    assert not hasattr(pipe.transformer, "_bigain")
