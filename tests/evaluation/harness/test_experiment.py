"""Experiments from YAML: all that come with the package, and what is refused."""

from __future__ import annotations

import pytest

from bigain_kernels.evaluation.harness.experiment import load_experiment, presets
from bigain_kernels.evaluation.harness.rules import Groups, Racing, SequentialHalving, Stages
from bigain_kernels.methods import IEKVDConfig, LGTMConfig

PAPER = {
    "sd2-pets": {"none": (81.03, None), "ToMe 70 %": (65.76, 38.35), "L-GTM 70 %": (74.63, 37.73)},
    "sd2-imagenet1k": {"ToMe 70 %": (37.35, 18.42), "L-GTM 70 %": (44.50, 18.08)},
    "sd2-coco": {"ToMe 70 %": (57.32, 29.00), "L-GTM 70 %": (61.44, 28.57)},
    "dit-xl2-imagenet100": {"ToDo 2x": (69.34, None), "IE-KVD 2x": (78.42, None)},
}


def test_presets_are_those_that_are_promised() -> None:
    assert presets() == ["dit-xl2-imagenet100", "sd2-coco", "sd2-imagenet100", "sd2-imagenet1k", "sd2-pets", "tiny"]
    for name in presets():
        found = load_experiment(name)
        assert found.methods[0].title == "none"
        assert name == "tiny" or found.classify.protocol == "paper"


@pytest.mark.parametrize("name", sorted(PAPER))
def test_the_numbers_of_the_paper_stand_beside(name: str) -> None:
    methods = {method.title: method.paper for method in load_experiment(name).methods}
    for title, (accuracy, fid) in PAPER[name].items():
        assert (methods[title]["top-1"], methods[title].get("FID")) == (accuracy, fid)


def test_methods_make_configs() -> None:
    found = {method.title: method.compression(3) for method in load_experiment("dit-xl2-imagenet100").methods}
    assert found["none"] is None
    assert found["L-GTM 70 %"] == LGTMConfig(ratio=0.7, blocks=(1, 2, 3, 4, 5, 7, 8, 9, 10, 11))
    assert isinstance(found["IE-KVD 2x"], IEKVDConfig)
    assert found["ToMe 70 %"].seed == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing: 1", "expected|required|Field"),
        (
            "name: x\ncheckpoint: tiny-dit\ndata: {kind: digits}\nmethods: [{title: a}]\nseeds: [1]",
            "seeds: Extra inputs",
        ),
        (
            "name: x\ncheckpoint: t\ndata: {kind: digits}\nmethods: [{title: a, method: lgtm, options: {ratios: 1}}]",
            "ratio",
        ),
        (
            "name: x\ncheckpoint: t\ndata: {kind: digits}\nmethods: [{title: a, method: lgtm, options: {ratio: 1}}]",
            "ratio",
        ),
        ("name: x\ncheckpoint: t\ndata: {kind: digits, root: /x}\nmethods: [{title: a}]", "data: .*no root"),
        ("name: x\ncheckpoint: t\ndata: {kind: digits}\nmethods: [{title: a}, {title: a}]", "different"),
        ("name: x\ncheckpoint: t\ndata: {kind: cifar}\nmethods: [{title: a}]", "data.kind"),
        ("name: [", "expected YAML"),
        ("- 1", "with list"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^config: got .*{message}") as caught:
        load_experiment(str(path))
    assert "\n" not in str(caught.value)


RULES = {
    "{kind: stages, stages: [[2, 2], [4, 1]], metric: l1}": Stages(((2, 2), (4, 1)), "mean", "l1"),
    "{kind: halving, budget: 200}": SequentialHalving(200, 4),
    "{kind: racing, most: 9, error: 0.01, unit: 2}": Racing(9, 0.01, 2),
    "{kind: groups, groups: [[a, n2], [c]], samples: 1, keep: 1, stages: [[4, 1]]}": Groups(
        (0, 0, 1), 1, 1, 1, Stages(((4, 1),))
    ),
}


def _with_rule(text: str) -> str:
    return f"name: x\ncheckpoint: t\ndata: {{kind: digits}}\nmethods: [{{title: a}}]\nclassify: {{rule: {text}}}"


@pytest.mark.parametrize("text", RULES)
def test_rules_are_written_by_name(tmp_path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(_with_rule(text))
    options = load_experiment(str(tmp_path / "x.yaml")).classify.rule
    assert options.make([("a", "n1"), ("b", "n2"), ("c", "n3")], 4) == RULES[text]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{kind: guessing}", "rule.*kind"),
        ("{kind: racing, most: 9, budget: 3}", "rule.racing.budget: Extra inputs"),
        ("{kind: halving}", "rule.halving.budget: Field required"),
        ("{kind: stages, stages: [[1, 1]], metric: l3}", "rule.stages.metric"),
        ("{kind: racing, most: 9}, stages: [[1, 1]]", "stages and rule are both given"),
    ],
)
def test_rules_that_are_none_are_refused(tmp_path, text: str, message: str) -> None:
    (tmp_path / "x.yaml").write_text(_with_rule(text))
    with pytest.raises(ValueError, match=f"^config: got .*classify.*{message}"):
        load_experiment(str(tmp_path / "x.yaml"))


@pytest.mark.parametrize("groups", ["[[a]]", "[[a, b], [a]]", "[[a, b, x]]"])
def test_groups_hold_each_class_once(tmp_path, groups: str) -> None:
    text = f"{{kind: groups, groups: {groups}, samples: 1, keep: 1, stages: [[4, 1]]}}"
    (tmp_path / "x.yaml").write_text(_with_rule(text))
    options = load_experiment(str(tmp_path / "x.yaml")).classify.rule
    with pytest.raises(ValueError, match=r"^groups: got .*(once|one of the data set)"):
        options.make([("a",), ("b",)], 4)


def test_values_can_be_changed_by_name(tmp_path) -> None:
    found = load_experiment("sd2-pets", {"data.root": "/pets", "generate.steps": 2, "dtype": "float32"})
    assert (str(found.data.root), found.generate.steps, found.dtype) == ("/pets", 2, "float32")
    with pytest.raises(FileNotFoundError, match=r"^config: got sd3"):
        load_experiment("sd3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{title: L-GTM}, {title: L-GTM*}]", "methods have the titles 'L-GTM' and 'L-GTM\\*'"),
        ("[{title: a}]\nclassify: {seeds: [0, 0]}", "classify.seeds: .*one is there twice"),
        ("[{title: a}]\nclassify: {seeds: [-1]}", "classify.seeds.0: .*greater than or equal to 0"),
        ("[{title: a}]\ngenerate: {seeds: [1, 1]}", "generate.seeds: .*one is there twice"),
    ],
)
def test_what_would_share_a_folder_is_refused(tmp_path, text: str, message: str) -> None:
    (tmp_path / "x.yaml").write_text(f"name: x\ncheckpoint: t\ndata: {{kind: digits}}\nmethods: {text}")
    with pytest.raises(ValueError, match=f"^config: got .*{message}"):
        load_experiment(str(tmp_path / "x.yaml"))
