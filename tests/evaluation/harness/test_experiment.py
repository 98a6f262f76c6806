"""Experiments from YAML: all that come with the package, and what is refused."""

from __future__ import annotations

import pytest

from bigain_kernels.evaluation.harness.experiment import load_experiment, presets
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


def test_values_can_be_changed_by_name(tmp_path) -> None:
    found = load_experiment("sd2-pets", {"data.root": "/pets", "generate.steps": 2, "dtype": "float32"})
    assert (str(found.data.root), found.generate.steps, found.dtype) == ("/pets", 2, "float32")
    with pytest.raises(FileNotFoundError, match=r"^config: got sd3"):
        load_experiment("sd3")
