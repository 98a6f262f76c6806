"""Every block of code of README.md and the documentation is run, or says above itself why not.

Python runs, with a tiny pipeline as `pipe` and as what is loaded from the hub. Commands are looked up, not run: that
the target, the module, the file and each option exist. What they do is tested elsewhere.
"""

from __future__ import annotations

import importlib.util
import re
import shlex

import pytest
import torch
import typer

from bigain_kernels.cli.main import make_app
from tests.tiny_pipeline import tiny_pipeline

from .blocks import BLOCKS, PAGES, ROOT

# What may stand in front of a command, and commands that are not ours.
_ASSIGNMENT = re.compile(r"[A-Z_]+=\S*$")
_FOREIGN = ("pip", "torchrun", "git", "time", "cd", "cp", "ln", "export", "jupyter")


def of(*kinds):
    chosen = [block for block in BLOCKS if block.kind in kinds and block.why is None]
    return pytest.mark.parametrize("block", chosen, ids=lambda block: block.name)


def test_blocks_are_found():
    assert len(PAGES) > 15
    assert {"python", "shell"} <= {block.kind for block in BLOCKS}
    for block in BLOCKS:
        assert block.kind in ("python", "shell", "json", "text") or block.why, f"{block.name}: a {block.kind!r} block"


def test_no_block_is_missed():
    """Fences of another kind or inside lists, and indented lines that no block has, would never be looked at."""
    for path in PAGES:
        text, page = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
        of_page = [block for block in BLOCKS if block.page == page]
        inside = {line for block in of_page for line in range(block.line, block.line + block.code.count("\n"))}
        for number, line in enumerate(text.splitlines(), 1):
            if re.match(r"\s*(```|~~~)", line):
                assert {number - 1, number + 1} & inside, f"{page}:{number}: a fence of no block"
            elif re.match(r"(    |\t)\S", line):
                assert number in inside, f"{page}:{number}: code of no block"


@pytest.fixture
def pipe(monkeypatch):
    """A tiny pipeline that takes a prompt, and is what every pipeline loads."""
    pipe = tiny_pipeline()
    text = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))
    call = type(pipe).__call__
    words = {"num_inference_steps": 2, "prompt_embeds": text, "negative_prompt_embeds": text, "height": 32, "width": 32}
    monkeypatch.setattr(type(pipe), "__call__", lambda self, *prompt, **given: call(self, **{**given, **words}))
    monkeypatch.setattr(type(pipe), "from_pretrained", lambda *args, **given: pipe)
    monkeypatch.setattr(type(pipe), "to", lambda self, *args: self)
    return pipe


@of("python")
def test_python(block, pipe, capsys, monkeypatch, tmp_path):
    # Where a block writes files.
    monkeypatch.chdir(tmp_path)
    exec(compile(block.code, block.name, "exec"), {"pipe": pipe, "__name__": "block"})


def commands(block):
    """The commands of a block, as words, without comments, assignments, pipes and what follows them."""
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and _ASSIGNMENT.match(words[0]):
            words = words[1:]
        for stop in ("|", "&&", ";", ">"):
            words = words[: words.index(stop)] if stop in words else words
        if words:
            yield words


@pytest.fixture(scope="module")
def command_line():
    return typer.main.get_command(make_app())


def check_options(command, words):
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    unknown = [word for word in words if word.startswith("--") and word not in known | {"--help"}]
    assert not unknown, f"{command.name} has no {unknown}"


@of("shell")
def test_commands(block, command_line):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in commands(block):
        if words[0] == "make":
            for target in (word for word in words[1:] if "=" not in word):
                assert re.search(rf"^[\w -]*\b{target}\b[\w -]*:", makefile, re.M), f"make has no {target}"
        elif words[0] == "bigain":
            name = next((word for word in words[1:] if not word.startswith("-")), None)
            command = command_line.commands[name] if name else command_line
            check_options(command, words[1:])
        elif words[0] in ("python", "python3"):
            module = words[2] if words[1] == "-m" else None
            if module in (None, "pytest"):
                named = words[1:2] if module is None else [word for word in words[3:] if word.startswith("tests")]
                assert all((ROOT / word.split("::")[0]).exists() for word in named), words
            else:
                assert importlib.util.find_spec(module), f"no module {module}"
        else:
            assert words[0] in _FOREIGN, f"{words[0]}: a command that is not known here"
