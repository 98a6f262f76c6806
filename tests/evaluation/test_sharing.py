"""Compression in the classifier and in generation: what the issue permits to hold, on the shipped model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bigain_kernels.diffusers import LGTMConfig, ToMeConfig
from bigain_kernels.evaluation.classify import ClassificationResult, ClassifierConfig, classify
from bigain_kernels.evaluation.compression import with_shared_plan
from bigain_kernels.evaluation.data import load_digits
from bigain_kernels.evaluation.generate import GenerateConfig, generate
from bigain_kernels.evaluation.metrics import paired_difference
from bigain_kernels.methods import lgtm
from bigain_kernels.methods.registry import make_config

IMAGES = 120
# One sample at a low timestep, where the errors of the classes hang on detail: compression costs most there, so few
# images are enough to tell methods apart.
CONFIG = ClassifierConfig(stages=((1, 1),), timesteps=(150,))


@pytest.fixture(scope="module")
def results(tiny, digits) -> dict[str, ClassificationResult]:
    """Each method on the same images."""

    def run(method: str, shared: bool = False) -> ClassificationResult:
        images, labels = digits.images[:IMAGES], digits.labels[:IMAGES]
        compression = make_config(method, {} if method == "none" else {"ratio": 0.7})
        return classify(tiny.denoiser, images, labels, CONFIG, compression=compression, share_plan=shared)

    found = {name: run(name) for name in ("none", "tome", "lgtm")}
    return found | {f"{name}, shared": run(name, True) for name in ("tome", "lgtm")}


def test_uncompressed_accuracy(results) -> None:
    assert results["none"].accuracy >= 0.85


def test_shared_plan_is_above_unshared(results) -> None:
    shared = torch.cat([results["tome, shared"].correct, results["lgtm, shared"].correct])
    unshared = torch.cat([results["tome"].correct, results["lgtm"].correct])
    assert paired_difference(shared.double(), unshared.double()).value > 0


@pytest.mark.slow
def test_alpha_below_one_is_at_least_nearest(tiny) -> None:
    validation = load_digits("validation")

    def correct(method: str) -> torch.Tensor:
        compression = make_config(method)
        runs = [
            classify(
                tiny.denoiser, validation.images, validation.labels, replace(CONFIG, seed=seed), compression=compression
            )
            for seed in (0, 1)
        ]
        return torch.cat([run.correct for run in runs]).double()

    assert paired_difference(correct("iekvd"), correct("todo")).value >= 0


def _count_rows(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[int]:
    """The rows of every plan that the function `name` of `owner` makes from now on."""
    original, rows = getattr(owner, name), []

    def counting(*args, **kwargs):
        plan = original(*args, **kwargs)
        rows.append(plan.num_rows)
        return plan

    monkeypatch.setattr(owner, name, counting)
    return rows


@pytest.mark.parametrize(("shared", "per_pair"), [(True, 1), (False, None)])
def test_one_plan_for_each_image_and_sample(monkeypatch, tiny, digits, shared: bool, per_pair: int | None) -> None:
    rows = _count_rows(monkeypatch, lgtm, "lgtm_plan")
    config = ClassifierConfig(stages=((2, 4), (3, 1)), batch_size=25)
    n, blocks = 7, len(tiny.denoiser.model.transformer_blocks)
    classify(
        tiny.denoiser,
        digits.images[:n],
        digits.labels[:n],
        config,
        compression=LGTMConfig(ratio=0.7),
        share_plan=shared,
    )
    samples = n * 3
    evaluations = n * (2 * 10 + 1 * 4)
    assert sum(rows) == blocks * (samples if per_pair else evaluations)


def test_shared_plan_does_not_depend_on_the_batch_size(tiny, digits) -> None:
    images, labels = digits.images[:9], digits.labels[:9]
    compression = ToMeConfig(ratio=0.7)
    found = [
        classify(
            tiny.denoiser, images, labels, ClassifierConfig(batch_size=size), compression=compression, share_plan=True
        )
        for size in (10, 90)
    ]
    # Different batch shapes round differently, which can flip a merge between two tokens that tie.
    agree = (found[0].predictions == found[1].predictions).float().mean()
    assert agree >= 8 / 9


def test_guidance_pairs_share_a_plan(monkeypatch, tiny) -> None:
    rows = _count_rows(monkeypatch, lgtm, "lgtm_plan")
    labels, blocks = torch.arange(6), len(tiny.denoiser.model.transformer_blocks)
    config, compression = GenerateConfig(steps=2, guidance=3.0), LGTMConfig(ratio=0.7)
    generate(tiny.denoiser, labels, config, compression=compression, share_plan=True)
    assert rows == [6] * (2 * blocks)
    rows.clear()
    generate(tiny.denoiser, labels, GenerateConfig(steps=2, guidance=1.0), compression=compression, share_plan=True)
    assert rows == [6] * (2 * blocks)


def test_model_is_left_as_it_was(tiny, digits) -> None:
    processors = [type(block.attn1.processor) for block in tiny.denoiser.model.transformer_blocks]
    plain = classify(tiny.denoiser, digits.images[:2], digits.labels[:2]).errors
    classify(tiny.denoiser, digits.images[:2], digits.labels[:2], compression=LGTMConfig(ratio=0.7))
    assert [type(block.attn1.processor) for block in tiny.denoiser.model.transformer_blocks] == processors
    assert torch.equal(classify(tiny.denoiser, digits.images[:2], digits.labels[:2]).errors, plain)


def test_only_merge_methods_share_plans() -> None:
    assert with_shared_plan(make_config("lgtm"), 10).share_plan == 10
    with pytest.raises(ValueError, match=r"^share_plan: got method none"):
        with_shared_plan(None, 10)
    with pytest.raises(ValueError, match=r"^share_plan: got method iekvd"):
        with_shared_plan(make_config("iekvd"), 10)
