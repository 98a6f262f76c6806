"""The diffusion classifier on a model with known errors, and its independence of how the work is cut up."""

from __future__ import annotations

import math

import pytest
import torch

from bigain_kernels.diffusers import LGTMConfig
from bigain_kernels.evaluation.classify import Classifier, ClassifierConfig, ImageResult, classify, default_stages
from bigain_kernels.evaluation.metrics import fraction_true

from .toys import SHAPE, PrototypeDenoiser

CONFIG = ClassifierConfig(stages=((2, 3), (4, 1)), timesteps=(100, 400, 700), batch_size=64)


def _images(denoiser: PrototypeDenoiser, n: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(n) % denoiser.num_classes
    noise = torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(5))
    return denoiser.prototypes[labels] + 0.3 * noise, labels


def test_errors_are_the_closed_form_of_the_model() -> None:
    denoiser = PrototypeDenoiser(5)
    images, labels = _images(denoiser)
    config = ClassifierConfig(stages=((1, 1),), timesteps=(300,))
    result = classify(denoiser, images, labels, config)
    alpha = denoiser.scheduler.alphas_cumprod[300]
    distance = (images[:, None] - denoiser.prototypes[None, :5]).square().mean(dim=(2, 3, 4))
    torch.testing.assert_close(result.errors, distance * alpha / (1 - alpha), rtol=1e-4, atol=1e-6)
    assert result.accuracy == 1.0
    assert result.evaluations == 5 * len(images)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("score", ["standardised", "mean"])
def test_every_kind_of_prediction_and_score_finds_the_prototype(kind: str, score: str) -> None:
    denoiser = PrototypeDenoiser(5, kind)
    images, labels = _images(denoiser)
    config = ClassifierConfig(stages=((2, 3), (4, 1)), timesteps=(100, 400), score=score)
    assert torch.equal(classify(denoiser, images, labels, config).predictions, labels)


def test_all_classes_of_an_image_see_the_same_noise_in_class_major_order() -> None:
    denoiser = PrototypeDenoiser(5)
    images, labels = _images(denoiser)
    classify(denoiser, images, labels, CONFIG)
    assert len(denoiser.calls) == 4
    for sample, (noisy, timestep, classes) in enumerate(denoiser.calls):
        k = 5 if sample < 2 else 3
        assert noisy.shape[0] == k * len(images)
        assert timestep.tolist() == [CONFIG.timesteps[sample % 3]] * (k * len(images))
        by_class = noisy.view(k, len(images), *SHAPE)
        assert torch.equal(by_class, by_class[:1].expand_as(by_class))
        assert not torch.equal(by_class[0, 0], by_class[0, 1])
        if k == 5:
            assert torch.equal(classes, torch.arange(5).repeat_interleave(len(images)))
    assert not torch.equal(denoiser.calls[0][0], denoiser.calls[1][0])


def test_dropped_classes_are_asked_no_more() -> None:
    denoiser = PrototypeDenoiser(5)
    images, labels = _images(denoiser)
    result = classify(denoiser, images, labels, CONFIG)
    assert result.evaluations == len(images) * (2 * 5 + 2 * 3)
    distance = (images[:, None] - denoiser.prototypes[None, :5]).square().mean(dim=(2, 3, 4))
    third = denoiser.calls[2][2].view(3, len(images)).T
    assert torch.equal(third, distance.argsort(dim=1)[:, :3].sort(dim=1).values)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 25, 1000])
def test_result_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    denoiser = PrototypeDenoiser(5)
    images, labels = _images(denoiser, 11)
    whole = classify(denoiser, images, labels, CONFIG)
    config = ClassifierConfig(CONFIG.stages, CONFIG.timesteps, batch_size=batch_size)
    cut = classify(denoiser, images, labels, config)
    assert torch.equal(whole.predictions, cut.predictions)
    torch.testing.assert_close(whole.errors, cut.errors, rtol=1e-5, atol=1e-6)
    assert max(call[0].shape[0] for call in denoiser.calls[4:]) <= max(batch_size, 1)


def test_a_part_of_the_images_has_the_results_it_has_among_all(tiny, digits) -> None:
    images, labels = digits.images[:12], digits.labels[:12]
    whole = classify(tiny.denoiser, images, labels)
    order = [7, 2, 11]
    part = classify(tiny.denoiser, images[order], labels[order], indices=order)
    torch.testing.assert_close(part.errors, whole.errors[order], rtol=1e-4, atol=1e-5)
    assert [image.index for image in part.images] == order


def test_seed_decides_the_noise_and_the_global_state_is_untouched(tiny, digits) -> None:
    images, labels = digits.images[:2], digits.labels[:2]
    before = torch.get_rng_state()
    first = classify(tiny.denoiser, images, labels).errors
    assert torch.equal(first, classify(tiny.denoiser, images, labels).errors)
    assert not torch.equal(first, classify(tiny.denoiser, images, labels, ClassifierConfig(seed=1)).errors)
    assert torch.equal(torch.get_rng_state(), before)


def test_results_are_recorded_as_they_come() -> None:
    denoiser = PrototypeDenoiser(5)
    images, labels = _images(denoiser, 6)
    seen: list[ImageResult] = []
    config = ClassifierConfig(CONFIG.stages, CONFIG.timesteps, batch_size=6)
    result = classify(denoiser, images, labels, config, record=seen.append)
    assert seen == result.images
    assert result.interval == fraction_true(result.correct)
    assert result.interval.value == result.accuracy


def test_default_stages_hold_for_any_number_of_classes() -> None:
    for classes in (1, 2, 3, 10, 1000):
        config = ClassifierConfig(stages=default_stages(classes))
        assert config.stages[0][1] <= classes


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("stages", {"stages": ()}),
        ("stages", {"stages": ((2, 4), (2, 1))}),
        ("stages", {"stages": ((2, 4), (6, 4))}),
        ("stages", {"stages": ((2, 4),)}),
        ("timesteps", {"timesteps": ()}),
        ("timesteps", {"timesteps": (-1,)}),
        ("score", {"score": "median"}),
        ("seed", {"seed": -1}),
        ("batch_size", {"batch_size": 0}),
    ],
)
def test_bad_settings_are_named(name: str, arguments: dict) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got"):
        ClassifierConfig(**arguments)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_error_that_is_not_finite_is_named(value: float) -> None:
    denoiser = PrototypeDenoiser(5)
    images, labels = _images(denoiser)
    denoiser.prototypes[3, 0, 0, 0] = value
    with pytest.raises(
        ValueError, match=r"^denoising error: got (nan|inf) for class 3 at timestep 100 of image 0, .*float32"
    ):
        classify(denoiser, images, labels, CONFIG)


def test_bad_calls_are_named() -> None:
    denoiser = PrototypeDenoiser(5)
    images, labels = _images(denoiser)
    wrong = [
        ("images", (images[0], labels), {}),
        ("labels", (images, labels[:2]), {}),
        ("indices", (images, labels), {"indices": [1]}),
        ("timesteps", (images, labels, ClassifierConfig(timesteps=(1000,))), {}),
        ("stages", (images, labels, ClassifierConfig(stages=((1, 9), (2, 1)))), {}),
        (
            "batch_size",
            (images, labels, ClassifierConfig(CONFIG.stages, batch_size=4)),
            {"share_plan": True, "compression": LGTMConfig()},
        ),
        ("share_plan", (images, labels), {"share_plan": True}),
    ]
    for name, arguments, options in wrong:
        with pytest.raises(ValueError, match=f"^{name}: got"):
            classify(denoiser, *arguments, **options)


def test_plans_that_depend_on_the_batch_are_refused(tiny) -> None:
    with pytest.raises(ValueError, match=r"^share_plan: got 'published', expected own, mean or null"):
        Classifier(tiny, compression=LGTMConfig(ratio=0.5), share_plan="published")
