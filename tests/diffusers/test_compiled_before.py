"""Models that ran compiled before compression came, or went: compiled code must notice."""

from __future__ import annotations

import copy

import pytest
import torch

from bigain_kernels.diffusers import (
    IEKVDConfig,
    LGTMConfig,
    MixedConfig,
    apply_token_compression,
    remove_token_compression,
)

from .family_models import build, case_of, outputs

MLP = LGTMConfig(ratio=0.5, modules=("ff",))
BOTH = LGTMConfig(ratio=0.5, modules=("attn1", "ff"))
# What is compressed of the first block is no sign for the second, with which it shares its code.
MIXED = MixedConfig((IEKVDConfig(factor=2, blocks=(0,)), LGTMConfig(ratio=0.5, modules=("ff",), blocks=(1,))))


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _whole(model):
    return torch.compile(model, backend="eager")


def _in_place(model):
    model.compile(backend="eager")
    return model


def _blocks(model):
    model.compile_repeated_blocks(backend="eager")
    return model


def _in_a_function(model):
    return torch.compile(lambda *args, **kwargs: model(*args, **kwargs), backend="eager")


def _run(call, inputs):
    with torch.no_grad():
        found = call(**inputs, return_dict=False)
    return torch.cat([part.flatten() for part in found])


CASES = [
    ("wan", MLP, _whole),
    ("wan", MLP, _in_place),
    ("wan", MLP, _blocks),
    ("wan", MIXED, _blocks),
    ("cogvideox", MLP, _whole),
    ("flux", MLP, _in_a_function),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "config", "compiled"), CASES)
def test_compression_comes_and_goes(name, config, compiled):
    case = case_of(name)
    inputs, model, compressed = case.inputs(1, (case.frames, 4, 4)), build(name), build(name)
    apply_token_compression(compressed, config)
    plain, wanted = _run(model, inputs), _run(compressed, inputs)
    assert not torch.allclose(plain, wanted, atol=1e-3)
    call = compiled(model)
    torch.testing.assert_close(_run(call, inputs), plain, atol=1e-5, rtol=1e-5)
    apply_token_compression(model, config)
    torch.testing.assert_close(_run(call, inputs), wanted, atol=1e-5, rtol=1e-5)
    remove_token_compression(model)
    torch.testing.assert_close(_run(call, inputs), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_one_config_takes_the_place_of_another():
    case = case_of("wan")
    inputs, model = case.inputs(1, (case.frames, 4, 4)), build("wan")
    call = _blocks(model)
    for config in (LGTMConfig(ratio=0.5), BOTH, MLP):
        fresh = build("wan")
        apply_token_compression(fresh, config)
        apply_token_compression(model, config)
        torch.testing.assert_close(_run(call, inputs), _run(fresh, inputs), atol=1e-5, rtol=1e-5)


def test_nothing_of_it_is_left_behind():
    model = build("wan")
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    apply_token_compression(model, MLP)
    copied = copy.deepcopy(model)
    case = case_of("wan")
    inputs = case.inputs(1, (case.frames, 4, 4))
    assert torch.equal(outputs(copied, inputs), outputs(model, inputs))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not torch.equal(outputs(copied, inputs), outputs(model, inputs))  # its MLPs are its own
    for each in (model, copied):
        remove_token_compression(each)
        assert {name: set(vars(module)) for name, module in each.named_modules()} == before


def test_forward_methods_of_other_software_stay():
    model = build("wan")
    first, second = (block.ffn for block in model.blocks)
    calls = []

    def counted(inner):
        def forward(x):
            calls.append(inner)
            return inner(x)

        return forward

    first.forward = mine = counted(first.forward)
    apply_token_compression(model, MLP)
    second.forward = other = counted(second.forward)
    case = case_of("wan")
    inputs = case.inputs(1, (case.frames, 4, 4))
    outputs(model, inputs)
    remove_token_compression(model)
    assert first.forward is mine
    assert second.forward is other
    plain = outputs(build("wan"), inputs)
    assert torch.equal(outputs(model, inputs), plain)
    assert len(calls) == 4
