"""Every option against every method: taken and written down, or refused by name. The registry says what there is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest

import bigain_kernels as bk
from bigain_kernels.cli.main import main
from bigain_kernels.cli.method_options import SET_BY_COMMANDS, option_table, read_compression
from bigain_kernels.evaluation.compression import settings_of
from bigain_kernels.methods import MergeConfig, names, register, unregister
from bigain_kernels.methods.options import Count, Flag, option
from bigain_kernels.methods.registry import NONE, make_config, options_of

# A text for each option that no config has as its default, and what the config then holds.
VALUES = {
    "alpha": ("0.5,1.5", (0.5, 1.5)),
    "blocks": ("0,1", (0, 1)),
    "cached_assignment": (True, True),
    "destinations": ("first", "first"),
    "end": ("0.5", 0.5),
    "factor": ("2x1", (2, 1)),
    "max_downsample": ("2", 2),
    "merge": ("hidden", "hidden"),
    "min_tokens": ("40", 40),
    "mode": ("mlerp", "mlerp"),
    "modules": ("attn1,attn2", ("attn1", "attn2")),
    "noise": ("0.3", 0.3),
    "over_time": (True, True),
    "pool": ("hidden", "hidden"),
    "proportional": (True, True),
    "ratio": ("0.25", 0.25),
    "reduce": ("min", "min"),
    "start": ("0.1", 0.1),
    "stride": ("2x4", (2, 4)),
    "window": ("3", 3),
}
TABLE = [(method, name) for method in (NONE, *names()) for name in VALUES]
POOL_METHODS = ("iekvd", "todo", "avgpool")


def flag(name, value):
    dashed = "--" + name.replace("_", "-")
    return [dashed] if value is True else [dashed, value]


def test_the_table_has_every_option():
    declared = {name for method in names() for name in options_of(method)}
    assert declared == set(VALUES) | set(SET_BY_COMMANDS)


@pytest.mark.parametrize(("method", "name"), TABLE)
def test_every_option_with_every_method(method, name, capsys):
    text, value = VALUES[name]
    if name not in options_of(method):
        with pytest.raises(ValueError, match=rf"^{name}: got .* with method {method}, expected one of the methods"):
            read_compression(method, {name: text}, seed=7)
        for command in ("classify", "generate"):
            assert main([command, "--method", method, *flag(name, text)]) == 2
            assert f"bigain: {name}: got" in capsys.readouterr().err
    elif name == "modules" and method in POOL_METHODS:
        with pytest.raises(ValueError, match=r"^modules: got"):
            read_compression(method, {name: text}, seed=7)
    else:
        written = settings_of(read_compression(method, {name: text}, seed=7))
        assert written["method"] == method
        assert written[name] == value or tuple(written[name]) == value
        assert written.get("seed", 7) == 7


@pytest.mark.parametrize("method", names())
def test_defaults_stand_in_the_configs_alone(method):
    config = make_config(method)
    assert read_compression(method, {}, seed=0) == config
    for name, row in option_table()["options"].items():
        shown = row["defaults"].get(method)
        assert (shown is None) == (name not in options_of(method)), name


def test_what_was_given_and_what_was_used_are_written_down(tmp_path):
    given = ["--method", "lgtm", "--ratio", "0.5", "--window", "2", "--seed", "3"]
    assert main(["classify", *given, "--limit", "1", "--stages", "1:1", "--out", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["given"] == {"ratio": "0.5", "window": "2"}
    assert summary["settings"]["checkpoint"] == "tiny-dit"
    used = summary["settings"]["compression"]
    assert used["ratio"] == 0.5
    assert used["window"] == 2
    assert used["mode"] == "mean"


@dataclass(frozen=True, kw_only=True)
class EveryOther(MergeConfig):
    """Merging into every k-th token: a toy, and what a method from elsewhere looks like.

    Args:
        every: distance of destinations, in tokens.
        backwards: count from the last token.
    """

    method: ClassVar[str] = "everyother"

    every: int = option(2, Count(1))
    backwards: bool = option(False, Flag())

    def plan(self, x, grid, ratio, timestep=None):
        import torch

        n = x.shape[1]
        tokens = torch.arange(n, device=x.device, dtype=torch.int32)
        chosen = tokens[(n - 1) % self.every :: self.every] if self.backwards else tokens[:: self.every]
        destinations = chosen.repeat(x.shape[0], 1)
        similarity, match = bk.bipartite_match(x, destinations)
        return bk.merge_plan(similarity, match, destinations, int(n * ratio), grid)


@pytest.fixture
def everyother():
    register(EveryOther)
    yield
    unregister("everyother")


@pytest.mark.usefixtures("everyother")
def test_a_method_from_elsewhere_is_on_the_command_line(tmp_path, capsys):
    assert main(["classify", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "everyother" in shown
    assert "--every" in shown
    options = ["--method", "everyother", "--every", "4", "--backwards", "--ratio", "0.5"]
    assert main(["classify", *options, "--limit", "1", "--stages", "1:1", "--out", str(tmp_path)]) == 0
    used = json.loads((tmp_path / "summary.json").read_text())["settings"]["compression"]
    assert used["method"] == "everyother"
    assert used["every"] == 4
    assert used["backwards"] is True
    assert main(["classify", "--method", "lgtm", "--every", "4"]) == 2
    assert "every: got '4' with method lgtm, expected one of the methods with this option, ['everyother']" in (
        capsys.readouterr().err
    )
