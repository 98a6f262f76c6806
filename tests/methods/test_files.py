"""Configs as files, and several of them as one."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from bigain_kernels.methods import (
    IEKVDConfig,
    LGTMConfig,
    MixedConfig,
    ToMeConfig,
    config_class,
    load_config,
    names,
    save_config,
)
from bigain_kernels.methods.files import config_text

MIXED = MixedConfig((LGTMConfig(blocks=(0, 3), ratio=0.7), IEKVDConfig(blocks=(1,), alpha=(0.8, 1.2))))
SAVED = [
    *(config_class(name)() for name in names()),
    LGTMConfig(ratio={1: (0.7, 0.2), 2: 0.5}, window=(None, 1), modules=("attn1", "ff"), num_train_timesteps=100),
    IEKVDConfig(factor={2: (1, 2)}, blocks=(4,), start=0.25),
    MIXED,
    MixedConfig((ToMeConfig(blocks=(2,), seed=5), *MIXED.configs)),
]


@pytest.mark.parametrize("config", SAVED, ids=str)
def test_a_file_gives_back_the_config(config, tmp_path):
    path = tmp_path / "config.json"
    save_config(path, config)
    assert load_config(path) == config
    path.write_text(config_text(config, {"found": [1, None], "ratio": {"1": "x"}}))
    assert load_config(str(path)) == config
    assert hash(load_config(path)) == hash(config)


def test_a_file_of_one_names_no_blocks_and_leaves_defaults_out(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"configs": [{"method": "lgtm", "ratio": 0.25}]}')
    assert load_config(path) == LGTMConfig(ratio=0.25)


WRONG_FILES = {
    "": "expected JSON",
    "[" * 100000: "expected JSON",
    "[1]": r"with list, expected 'configs'",
    '{"method": "lgtm"}': r"with \['method'\], expected 'configs', a list, and perhaps 'about'",
    '{"configs": [], "other": 1}': r"with \['configs', 'other'\]",
    '{"configs": []}': "expected a list of at least one",
    '{"configs": {"method": "lgtm"}}': "expected a list of at least one",
    '{"configs": ["lgtm"]}': r"got 'lgtm', expected an object with 'method'",
    '{"configs": [{"ratio": 0.5}]}': r"expected an object with 'method'",
    '{"configs": [{"method": "none"}]}': r"method: got 'none', expected a method",
    '{"configs": [{"method": "lgmt"}]}': r"method: got 'lgmt', expected one of",
    '{"configs": [{"method": "lgtm", "factor": 2}]}': r"factor: got 2 with method lgtm",
    '{"configs": [{"method": "lgtm", "ratio": NaN}]}': r"ratio: got nan",
    '{"configs": [{"method": "lgtm", "ratio": {"x": 0.5}}]}': r"ratio: got .*, expected the numbers of levels",
    '{"configs": [{"method": "lgtm"}, {"method": "todo"}]}': r"configs\[0\]: got blocks=None",
    '{"configs": [{"method": "lgtm", "blocks": [1]}, {"method": "todo", "blocks": [0, 1]}]}': r"none of \[1\] again",
}


@pytest.mark.parametrize("text", WRONG_FILES, ids=lambda text: text[:60])
def test_wrong_files_are_refused(text, tmp_path):
    path = tmp_path / "wrong.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"config: got .*wrong\.json") as caught:
        load_config(path)
    caught.match(WRONG_FILES[text])


def test_no_file_is_an_error_of_the_system(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"^config: got .*none\.json, expected a file of save_config or bigain search"
    ):
        load_config(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match=r"^path: got .*none\.json, expected a file in a folder that is there"):
        save_config(tmp_path / "nowhere" / "none.json", LGTMConfig())


@pytest.mark.parametrize(
    ("configs", "error", "message"),
    [
        ((), ValueError, r"configs: got \(\), expected at least one"),
        (LGTMConfig(), TypeError, "configs: got LGTMConfig.*, expected a tuple of configs"),
        ((LGTMConfig(blocks=(0,)), None), TypeError, r"configs\[1\]: got NoneType, expected a config"),
        ((LGTMConfig(blocks=()),), ValueError, r"configs\[0\]: got blocks=\(\), expected the indices"),
        ((MIXED, LGTMConfig(blocks=(5,))), TypeError, r"configs\[0\]: got MixedConfig, expected a config"),
        (
            (LGTMConfig(blocks=(0,), num_train_timesteps=10), LGTMConfig(blocks=(1,))),
            ValueError,
            r"num_train_timesteps: got \['10', 'None'\], expected the same",
        ),
    ],
)
def test_wrong_mixtures_are_refused(configs, error, message):
    with pytest.raises(error, match=message):
        MixedConfig(configs)


def test_a_mixture_says_what_it_is_of():
    assert MIXED.blocks == (0, 1, 3)
    assert MIXED.modules == ("attn1",)
    assert MIXED.train_timesteps == 1000
    assert replace(MIXED, configs=[LGTMConfig(blocks=[4], num_train_timesteps=50)]).train_timesteps == 50
    assert json.loads(config_text(MIXED))["configs"] == json.loads(json.dumps(MIXED.settings()))["configs"]


def test_in_brief():
    assert LGTMConfig(blocks=(3,), max_downsample=2).brief() == "lgtm ratio=0.5"
    assert LGTMConfig(ratio={1: 0.7, 2: 0.5}, proportional=True).brief() == "lgtm ratio=1:0.7,2:0.5 proportional"
    assert IEKVDConfig(alpha=(0.8, 1.2), start=0.5).brief() == "iekvd start=0.5 factor=2x2 alpha=0.8,1.2"
