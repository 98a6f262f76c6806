"""The tables of docs/models.md, written from what a test run showed: `python -m tests.diffusers.matrix`.

A cell of the first is the number of tests that passed for a family, of the others the test, or the reason why there is
none. A test that failed ends the program. What a file of tests showed is kept in build/matrix until the next commit, so
that a run that was stopped goes on, and files can be run one by one before the page is written,
`python -m tests.diffusers.matrix mlp joint`. `test_models_page.py` holds the page to the registry and to the tests.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import pytest

from bigain_kernels.diffusers.families import REFUSED, registered
from bigain_kernels.diffusers.families.recommended import Recommendation

from .family_models import CASES, CONTROLNETS, WRITTEN_OUT

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "models.md"
KEPT = HERE.parents[1] / "build" / "matrix"
MARK = "<!-- written by `python -m tests.diffusers.matrix` -->"
NAMES = {case.model: name for name, case in (*CASES.items(), *WRITTEN_OUT.items(), *CONTROLNETS.items())}
NAMES |= {"UNet2DConditionModel": "unet", "ControlNetModel": "unet_controlnet"}
RECOMMENDED = """## What to begin with

`recommended_config(model)` gives these. They are starting points, not results: the last column says what stands behind
them in this repository."""
AROUND_HEAD = """## Around it

The tests of `tests/diffusers/test_matrix.py` by family and way of compressing it; a cell has the parameter of the test
at the head of its column, or the reason why there is none. *fullgraph*, the whole model under
`torch.compile(fullgraph=True)`; *export*, `torch.export`; *gradients*, of all parameters; *mask*, what a mask hides of
the text is seen nowhere; *lora*, peft in all compressed attentions, put in before and after; *offload*, accelerate's
and by leaves."""
MODELS = {
    "unet": "Stable Diffusion 1.5, 2.x, SDXL",
    "dit": "DiT",
    "pixart": "PixArt alpha, sigma",
    "hunyuan_dit": "HunyuanDiT",
    "flux": "Flux.1 dev, schnell, Fill, Kontext",
    "flux2": "Flux.2",
    "chroma": "Chroma",
    "sd3": "Stable Diffusion 3, 3.5",
    "qwen": "Qwen-Image, Qwen-Image-Edit, Qwen-Image-Layered",
    "z_image": "Z-Image",
    "lumina2": "Lumina Image 2",
    "aura_flow": "AuraFlow",
    "cogview4": "CogView4",
    "hidream": "HiDream-I1",
    "wan": "Wan 2.1, 2.2 (video)",
    "ltx": "LTX-Video",
    "ltx2": "LTX-2 (video)",
    "hunyuan_video": "HunyuanVideo",
    "cogvideox": "CogVideoX (video)",
    "allegro": "Allegro (video)",
    "latte": "Latte (video)",
    "unet_controlnet": "ControlNet of the U-Nets",
    "flux_controlnet": "ControlNet of Flux.1",
    "sd3_controlnet": "ControlNet of Stable Diffusion 3",
    "qwen_controlnet": "ControlNet of Qwen-Image",
}
FILES = (
    "families",
    "joint",
    "behaviour",
    "goldens",
    "compile",
    "proportional",
    "mlp",
    "rebound_hidden",
    "controlnet",
    "training",
    "matrix",
)
# The tests of test_matrix.py, which all families have in all ways of compressing them.
AROUND = ("fullgraph", "export", "gradients", "mask", "lora", "offload")
WAYS = {
    "attention": """### merge="attention"

Queries, keys and values, after norm and rotation.""",
    "hidden": """### merge="hidden"

Hidden states, before the projections. All other families merge by "attention" alone: their processors project and
rotate by themselves, and each would have to be told the rotations of merged tokens in its own way.""",
    "pool": """### Pooling

Keys and values, by `IEKVDConfig(alpha=0.8)`.""",
}
NO_HIDDEN = "attention only"
NO_MLP = "refused"
AS_DIT = "one code with DiT"


class Shown(NamedTuple):
    """The tests whose ids begin with `test` and whose parameters hold one of the words."""

    test: str
    words: tuple[str, ...]

    def holds(self, test_id: str) -> bool:
        name, _, parameters = test_id.partition("[")
        return name.endswith("::" + self.test) and any(word in parameters for word in self.words)


def row(name: str) -> dict[str, Shown | str]:
    """What shows each column for a family."""
    tiny = "tiny_" + name
    own = (name + "-",)
    cells: dict[str, Shown | str] = {
        "exact": Shown("test_nothing_to_do_is_the_unpatched_model", own),
        "pool": Shown("test_the_model_equals_the_oracle", (name + "-iekvd", name + "-todo")),
        "merge hidden": NO_HIDDEN,
        "merge attention": Shown("test_the_model_equals_the_oracle", (name + "-lgtm", name + "-tome")),
        "around the MLP": Shown("test_mlps_alone_equal_mlps_written_out", (f"mlp-{name}]",)),
        "one graph": Shown("test_the_whole_model_compiles_as_one_graph", own),
        "16 bits": Shown("test_bfloat16_is_close_to_float32", own),
        "gradients": Shown("test_gradients_are_those_of_the_reference", (f"of_{name}-",)),
    }
    if name.endswith("controlnet"):
        written_out, as_model = "test_a_controlnet_equals_attention_written_out", "one code with its model"
        cells = {
            "exact": Shown("test_a_controlnet_with_nothing_to_do_is_the_unpatched_one", (name,)),
            "pool": Shown(written_out, (name + "-pool",)),
            "merge hidden": as_model,
            "merge attention": Shown(written_out, (name + "-merge",)),
            "around the MLP": Shown("test_hidden_states_and_mlps_of_controlnets", (name,)),
            "one graph": Shown("test_fullgraph", (name + "-",)),
            "16 bits": Shown("test_bfloat16_of_controlnets", (name,)),
            "gradients": as_model,
        }
        beside = Shown("test_a_unet_and_its_controlnet", ("",))
        if name == "unet_controlnet":
            cells |= dict.fromkeys(("exact", "pool", "merge attention", "around the MLP"), as_model)
            cells |= {"exact": beside}
        if name == "sd3_controlnet":
            cells |= {"merge hidden": Shown("test_merged_hidden_states_of_a_stable_diffusion_3_controlnet", ("",))}
    if name == "pixart":
        cells |= {"pool": AS_DIT, "merge hidden": AS_DIT}
    if name in ("unet", "dit"):
        golden = "test_model_reproduces_published_outputs_and_decisions"
        cells |= {
            "exact": Shown("test_nothing_to_remove_is_the_unpatched_model", (tiny,)),
            "pool": Shown(golden, (name + "_tiny-iekvd", name + "_tiny-todo")),
            "merge hidden": Shown(golden, (name + "_tiny-lgtm", name + "_tiny-tome", name + "_tiny-abm")),
            "one graph": Shown("test_fullgraph", own) if name == "unet" else Shown("test_whole_model_compiles", ("",)),
            "16 bits": Shown("test_half_precision", (tiny,)),
        }
    if name == "unet":
        blocks = Shown("test_layers_of_a_unets_block_share_the_plan_of_its_input", ("",))
        cells |= {"merge attention": AS_DIT, "around the MLP": blocks}
    if name in ("cogview4", "hidream"):
        cells |= {"around the MLP": NO_MLP}
    if name in ("flux", "sd3", "qwen"):
        cells |= {
            "exact": Shown("test_nothing_to_pool_is_the_unpatched_model", (tiny,)),
            "pool": Shown("test_every_layer_equals_attention_written_out", (name,)),
            "merge hidden": Shown("test_merged_hidden_states_equal_attention_written_out", (name,)),
            "one graph": Shown("test_whole_joint_models_compile", ("",)),
            "16 bits": Shown("test_half_precision", (tiny,)),
        }
    if name in ("wan", "flux2", "flux_controlnet", "chroma", "hunyuan_video"):
        written_out = "test_merged_hidden_states_of_rebound_families_equal_attention_written_out"
        cells |= {"merge hidden": Shown(written_out, (name,))}
    if name in ("hidream", "lumina2"):
        cells |= {"one graph": "reads numbers on the host, unpatched too"}
    return cells


class Outcomes:
    """A plugin that keeps which tests passed, which did not, and why some were skipped."""

    def __init__(self) -> None:
        self.passed: list[str] = []
        self.failed: list[str] = []
        self.skipped: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.skipped and isinstance(report.longrepr, tuple):
            self.skipped[report.nodeid] = report.longrepr[2].removeprefix("Skipped: ")
        elif report.when == "call" and report.passed:
            self.passed.append(report.nodeid)


def table(passed: list[str]) -> str:
    """The table of all registered families."""
    names = [NAMES[family.model.__name__] for family in registered()]
    columns = list(row(names[0]))
    lines = [
        "| family | models | class | " + " | ".join(columns) + " |",
        "|" + " --- |" * (len(columns) + 3),
    ]
    for family, name in zip(registered(), names, strict=True):
        shown = []
        for column, cell in row(name).items():
            count = cell if isinstance(cell, str) else sum(map(cell.holds, passed))
            if count == 0:
                raise SystemExit(f"{name}, {column}: no test of it passed")
            shown.append(str(count))
        lines.append(f"| `{name}` | {MODELS[name]} | `{family.model.__name__}` | " + " | ".join(shown) + " |")
    refused = "".join(f"* `{model}`: {reason}.\n" for model, reason in REFUSED.items())
    return "\n".join(lines) + f"\n\nRefused by name, with the reason:\n\n{refused}"


def around(column: str, parameter: str, passed: list[str], skipped: dict[str, str]) -> str:
    """A cell of `AROUND`: the parameter of the test that passed, or why it was skipped."""
    end = f"test_matrix.py::test_{column}[{parameter}]"
    if any(each.endswith(end) for each in passed):
        return f"`[{parameter}]`"
    reasons = [reason for each, reason in skipped.items() if each.endswith(end)]
    if not reasons or reasons[0].startswith("could not import"):
        raise SystemExit(f"{end}: did not run")
    return reasons[0]


def ways_table(passed: list[str], skipped: dict[str, str]) -> str:
    """What stands around each family, in every way of compressing it that it offers."""
    lines = []
    for mode, title in WAYS.items():
        head = " | ".join(f"`test_{column}`" for column in AROUND)
        lines += [title, "", f"| family | {head} |", "|" + " --- |" * (len(AROUND) + 1)]
        for family in registered():
            name = NAMES[family.model.__name__]
            if mode == "pool" or mode in family.merges:
                shown = " | ".join(around(column, f"{name}-{mode}", passed, skipped) for column in AROUND)
                lines.append(f"| `{name}` | {shown} |")
        lines.append("")
    return "\n".join(lines)


def recommended_table() -> str:
    """What is recommended for each family, as the families say it."""
    lines = ["| families | config | why | measured here |", "| --- | --- | --- | --- |"]
    names: dict[Recommendation | None, list[str]] = {}
    for family in registered():
        names.setdefault(family.recommended, []).append(f"`{NAMES[family.model.__name__]}`")
    for recommended, families in names.items():
        assert recommended is not None
        default = type(recommended.config)()
        values = {field.name: getattr(recommended.config, field.name) for field in fields(recommended.config)}
        shown = ("ratio", "factor", "alpha")
        changed = ", ".join(
            f"{name}={value}" for name, value in values.items() if name in shown or value != getattr(default, name)
        )
        config = f"`{type(recommended.config).__name__}({changed})`"
        measured = recommended.measured or "not measured"
        lines.append(f"| {', '.join(families)} | {config} | {recommended.reason} | {measured} |")
    return "\n".join(lines) + "\n"


def outcomes_of(name: str, commit: str) -> Outcomes:
    """What the tests of a file showed, at this commit."""
    kept, outcomes = KEPT / f"{name}.json", Outcomes()
    if kept.exists() and (found := json.loads(kept.read_text()))["commit"] == commit:
        outcomes.passed, outcomes.failed, outcomes.skipped = found["passed"], found["failed"], found["skipped"]
        return outcomes
    pytest.main(["-q", "-n0", "-p", "no:cacheprovider", str(HERE / f"test_{name}.py")], [outcomes])
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({"commit": commit, **vars(outcomes)}, indent=1))
    return outcomes


def main() -> None:
    git = ["git", "-C", str(HERE), "rev-parse", "HEAD"]
    commit = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    unknown = sorted({*sys.argv[1:]} - {*FILES})
    if unknown:
        raise SystemExit(f"files: got {', '.join(unknown)}, expected some of {', '.join(FILES)}")
    every = [outcomes_of(name, commit) for name in sys.argv[1:] or FILES]
    failed = [each for outcomes in every for each in outcomes.failed]
    if failed:
        raise SystemExit("\n".join([f"{len(failed)} tests failed", *failed]))
    if sys.argv[1:]:
        return
    passed = [each for outcomes in every for each in outcomes.passed]
    skipped = {each: reason for outcomes in every for each, reason in outcomes.skipped.items()}
    before, _, _ = PAGE.read_text().partition(MARK)
    shown = f"{table(passed)}\n{AROUND_HEAD}\n\n{ways_table(passed, skipped)}"
    PAGE.write_text(f"{before}{MARK}\n\n{shown}\n{RECOMMENDED}\n\n{recommended_table()}")


if __name__ == "__main__":
    sys.exit(main())
