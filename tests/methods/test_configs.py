"""The configs refuse what cannot work, by name."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch

from bigain_kernels import diffusers, methods
from bigain_kernels.methods import (
    ABMConfig,
    AvgPoolConfig,
    CompressionConfig,
    IEKVDConfig,
    LGTMConfig,
    SiToConfig,
    ToDoConfig,
    ToMeConfig,
)

ALL = [methods.config_class(name) for name in methods.names()]

WRONG = [
    (LGTMConfig, {"ratio": 0.9}, ValueError, r"ratio: got 0.9, expected 0 <= ratio <= 0.75"),
    (LGTMConfig, {"ratio": -0.1}, ValueError, "ratio: got -0.1"),
    (LGTMConfig, {"ratio": float("nan")}, ValueError, "ratio: got nan"),
    (
        LGTMConfig,
        {"ratio": (0.1, 0.2, 0.3)},
        ValueError,
        r"ratio: got \(0.1, 0.2, 0.3\), expected a number or a pair",
    ),
    (LGTMConfig, {"ratio": (0.1, 0.8)}, ValueError, "ratio: got 0.8"),
    (LGTMConfig, {"ratio": "half"}, TypeError, "ratio: got 'half', expected a number"),
    (LGTMConfig, {"ratio": True}, TypeError, "ratio: got True"),
    (LGTMConfig, {"ratio": {1: 0.5, 2: 0.9}}, ValueError, "ratio: got 0.9, expected 0 <= ratio <= 0.75"),
    (LGTMConfig, {"ratio": {1: 0.5, 2: (0.1, 0.8)}}, ValueError, "ratio: got 0.8"),
    (LGTMConfig, {"ratio": {3: 0.5}}, ValueError, "ratio, level: got 3, expected one of"),
    (LGTMConfig, {"ratio": {"1": 0.5}}, TypeError, "ratio, level: got '1'"),
    (LGTMConfig, {"ratio": {1: "half"}}, TypeError, r"ratio\[1\]: got 'half'"),
    (LGTMConfig, {"ratio": {}}, ValueError, r"ratio: got \{\}, expected a value for at least one"),
    (LGTMConfig, {"ratio": {1: 0.5}, "max_downsample": 2}, ValueError, "max_downsample: got 2 with values for the lev"),
    (IEKVDConfig, {"factor": {1: 0}}, ValueError, r"factor\[1\]: got \(0, 0\)"),
    (IEKVDConfig, {"factor": {2: 2}, "max_downsample": 4}, ValueError, "max_downsample: got 4"),
    (LGTMConfig, {"stride": (2, 0)}, ValueError, r"stride: got \(2, 0\)"),
    (LGTMConfig, {"stride": (2, 2, 2)}, TypeError, "stride: got"),
    (LGTMConfig, {"mode": "sum"}, ValueError, "mode: got 'sum', expected one of"),
    (LGTMConfig, {"window": -1}, ValueError, "window: got -1"),
    (LGTMConfig, {"cached_assignment": 1}, TypeError, "cached_assignment: got 1"),
    (ToMeConfig, {"proportional": 1}, TypeError, "proportional: got 1, expected True or False"),
    (LGTMConfig, {"share_plan": 0}, ValueError, "share_plan: got 0"),
    (LGTMConfig, {"share_plan": 1.5}, TypeError, "share_plan: got 1.5"),
    (LGTMConfig, {"modules": ("attn3",)}, ValueError, "modules: got 'attn3'"),
    (LGTMConfig, {"modules": "attn1"}, TypeError, "modules: got 'attn1'"),
    (LGTMConfig, {"modules": ()}, ValueError, r"modules: got \(\)"),
    (LGTMConfig, {"max_downsample": 3}, ValueError, "max_downsample: got 3, expected one of"),
    (LGTMConfig, {"blocks": 3}, TypeError, "blocks: got 3"),
    (LGTMConfig, {"blocks": np.array(3)}, TypeError, r"blocks: got array\(3\)"),
    (LGTMConfig, {"blocks": np.array([[0, 1]])}, TypeError, r"blocks: got array\(\[\[0, 1\]\]\)"),
    (LGTMConfig, {"blocks": np.array([0.0, 1.0])}, TypeError, "blocks: got np.float64"),
    (LGTMConfig, {"blocks": np.array([True, False])}, TypeError, "blocks: got np.True_"),
    (LGTMConfig, {"blocks": torch.arange(2)}, TypeError, "blocks: got tensor"),
    (LGTMConfig, {"blocks": {0, 1}}, TypeError, "blocks: got {0, 1}"),
    (LGTMConfig, {"blocks": (0, -1)}, ValueError, "blocks: got -1"),
    (LGTMConfig, {"blocks": (1, 1)}, ValueError, r"blocks: got \(1, 1\)"),
    (LGTMConfig, {"start": 1.5}, ValueError, "start: got 1.5"),
    (LGTMConfig, {"end": -1}, ValueError, "end: got -1"),
    (LGTMConfig, {"start": 0.6, "end": 0.4}, ValueError, "start: got 0.6, expected at most end, 0.4"),
    (LGTMConfig, {"num_train_timesteps": 1}, ValueError, "num_train_timesteps: got 1"),
    (ABMConfig, {"reduce": "median"}, ValueError, "reduce: got 'median'"),
    (ToMeConfig, {"destinations": "last"}, ValueError, "destinations: got 'last'"),
    (ToMeConfig, {"seed": -1}, ValueError, "seed: got -1"),
    (ToMeConfig, {"window": 1.0}, TypeError, "window: got 1.0"),
    (SiToConfig, {"noise": -1.0}, ValueError, "noise: got -1.0"),
    (IEKVDConfig, {"factor": 0}, ValueError, r"factor: got \(0, 0\)"),
    (IEKVDConfig, {"factor": 1.5}, TypeError, "factor: got 1.5"),
    (IEKVDConfig, {"alpha": float("inf")}, ValueError, "alpha: got inf, expected a finite number"),
    (IEKVDConfig, {"alpha": (0.8,)}, ValueError, r"alpha: got \(0.8,\)"),
    (IEKVDConfig, {"modules": ("attn1", "attn2")}, ValueError, "modules: got .* text"),
    (IEKVDConfig, {"pool": "values"}, ValueError, "pool: got 'values', expected one of"),
    (ToDoConfig, {"factor": (2, 2, 2)}, TypeError, "factor: got"),
    (CompressionConfig, {}, TypeError, "config: got CompressionConfig, expected the config of a method"),
]


@pytest.mark.parametrize(("cls", "arguments", "error", "message"), WRONG)
def test_wrong_argument_is_named(cls, arguments, error, message):
    with pytest.raises(error, match=message):
        cls(**arguments)


@pytest.mark.parametrize("cls", ALL)
def test_configs_are_frozen_hashable_and_replaceable(cls):
    config = cls(blocks=[0, 2])
    assert config.blocks == (0, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.start = 0.5
    assert len({config, dataclasses.replace(config), dataclasses.replace(config, start=0.5)}) == 2


def test_numbers_of_numpy_become_numbers_of_python():
    """Equal configs, whatever their numbers came from: they are dictionary keys and are written into files."""
    config = LGTMConfig(
        ratio=np.float32(0.5), stride=np.int64(2), window=np.int32(1), blocks=np.arange(2), share_plan=np.uint8(2)
    )
    assert config == LGTMConfig(ratio=0.5, stride=2, window=1, blocks=(0, 1), share_plan=2)
    values = [config.ratio, *config.stride, config.window, *config.blocks, config.share_plan]
    assert {type(value) for value in values} == {int, float}
    assert ToMeConfig(seed=np.int64(3), ratio=np.linspace(0, 0.5, 2).tolist()) == ToMeConfig(seed=3, ratio=(0.0, 0.5))
    assert IEKVDConfig(factor=np.int64(3), alpha=np.float64(0.75)) == IEKVDConfig(factor=3, alpha=0.75)


def test_numbers_become_pairs():
    assert LGTMConfig(stride=2).stride == (2, 2)
    assert IEKVDConfig(factor=3).factor == (3, 3)
    assert LGTMConfig(ratio=[0, 0.5]).ratio == (0.0, 0.5)
    assert LGTMConfig(stride=(1, 2), ratio=0.5).ratio == 0.5
    assert (ToDoConfig().alpha, AvgPoolConfig().alpha) == (1.0, 0.0)


@pytest.mark.parametrize("cls", ALL)
def test_configs_are_offered_beside_the_models(cls):
    assert getattr(diffusers, cls.__name__) is cls


def test_values_by_level_are_kept_in_order_and_do_not_change():
    config, same = LGTMConfig(ratio={2: (0.5, 0), 1: 0.7}), LGTMConfig(ratio={1: 0.7, 2: [0.5, 0.0]})
    assert list(config.ratio.items()) == [(1, 0.7), (2, (0.5, 0.0))]
    assert config == same
    assert hash(config) == hash(same)
    assert config.levels == (1, 2)
    assert config.is_scheduled
    assert (config.tokens_kept((10, 10), 1), config.tokens_kept((10, 10), 2), config.tokens_kept((10, 10), 4)) == (
        30,
        50,
        100,
    )
    for copied in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert copied == config
        assert type(copied.ratio) is type(config.ratio)
    for change in (lambda each: each.update({1: 0.0}), lambda each: each.pop(1), lambda each: each.__setitem__(4, 0.1)):
        with pytest.raises(TypeError, match="by level: got a change"):
            change(config.ratio)
    pooled = IEKVDConfig(factor={1: 4, 4: (1, 2)})
    assert json.loads(json.dumps(pooled.settings()))["factor"] == {"1": [4, 4], "4": [1, 2]}
    assert (pooled.compresses(1), pooled.compresses(2), pooled.compresses(4)) == (True, False, True)


@pytest.mark.parametrize(
    ("method", "option", "text", "value"),
    [
        ("lgtm", "ratio", "1:0.7,2:0.5", {1: 0.7, 2: 0.5}),
        ("lgtm", "ratio", "2:0.5,0.1,1:0.7", {1: 0.7, 2: (0.5, 0.1)}),
        ("iekvd", "factor", "1:4x2,2:2", {1: (4, 2), 2: (2, 2)}),
    ],
)
def test_values_by_level_are_read_and_shown(method, option, text, value):
    config = methods.registry.make_config(method, methods.registry.read_options(method, {option: text}))
    assert getattr(config, option) == value
    kind = methods.registry.options_of(method)[option]
    assert kind.check(option, kind.read(option, kind.show(getattr(config, option)))) == value


@pytest.mark.parametrize("text", ["0.5,1:0.7", "1:0.7,1:0.5", "one:0.5", "1:half", "1:", "1:0.5,0.4,0.3"])
def test_text_by_level_that_cannot_be_read_is_named(text):
    with pytest.raises(ValueError, match=r"^ratio.*: got"):
        methods.registry.read_options("lgtm", {"ratio": text})
