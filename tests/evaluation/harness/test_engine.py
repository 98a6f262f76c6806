"""What goes through the model: batches, plans made once for all classes, and compression applied once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bigain_kernels.compat import published
from bigain_kernels.diffusers import ABMConfig, LGTMConfig, ToMeConfig
from bigain_kernels.evaluation.classify import Classifier, ClassifierConfig, classify
from bigain_kernels.evaluation.harness import engine as engine_module
from bigain_kernels.evaluation.harness.engine import Asking, Engine, default_batch
from bigain_kernels.evaluation.harness.rules import Stages
from bigain_kernels.evaluation.noise import seeded_noise
from bigain_kernels.methods import lgtm

from ..toys import SHAPE, PrototypeDenoiser

RULE = Stages(((1, 4), (2, 1)))


def ask(denoiser: Any, clean: torch.Tensor, compression: Any = None, **options: Any) -> np.ndarray:
    with Engine(denoiser, Asking(RULE, (350, 150), **options), compression) as engine:
        return np.stack([found.values for found in engine.ask(clean, range(len(clean)))])


def test_all_three_errors_are_those_of_torch() -> None:
    denoiser = PrototypeDenoiser(4)
    clean = 3 * torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    with Engine(denoiser, Asking(Stages(((1, 1),)), (600,))) as engine:
        found = engine.ask(clean, [0, 1])
    alpha = denoiser.scheduler.alphas_cumprod[600]
    off = (clean[:, None] - denoiser.prototypes[None, :4]) * (alpha / (1 - alpha)).sqrt()
    for i in range(2):
        for c in range(4):
            zero = torch.zeros_like(off[i, c])
            expected = [
                f(off[i, c], zero).item()
                for f in (torch.nn.functional.mse_loss, torch.nn.functional.l1_loss, torch.nn.functional.huber_loss)
            ]
            np.testing.assert_allclose(found[i].values[:, 0, c], expected, rtol=1e-4)


def test_classes_are_labels_of_the_model_in_any_order() -> None:
    denoiser = PrototypeDenoiser(6)
    clean = denoiser.prototypes[[4, 1]]
    with Engine(denoiser, Asking(Stages(((2, 1),)), (300,), classes=(4, 1, 5))) as engine:
        found = engine.ask(clean, [0, 1])
    assert [int(e.values[0, 0].argmin()) for e in found] == [0, 1]
    assert set(torch.cat([call[2] for call in denoiser.calls]).tolist()) == {1, 4, 5}


def test_null_plans_are_made_once_and_do_not_depend_on_how_classes_are_cut(monkeypatch, tiny, digits) -> None:
    original, rows = lgtm.lgtm_plan, []

    def counting(*args: Any, **kwargs: Any) -> Any:
        plan = original(*args, **kwargs)
        rows.append(plan.num_rows)
        return plan

    monkeypatch.setattr(lgtm, "lgtm_plan", counting)
    clean, blocks = digits.images[:3], len(tiny.denoiser.model.transformer_blocks)
    whole = ask(tiny.denoiser, clean, LGTMConfig(ratio=0.7), plans="null", batch_size=30)
    assert sum(rows) == blocks * 3 * 2
    rows.clear()
    cut = ask(tiny.denoiser, clean, LGTMConfig(ratio=0.7), plans="null", batch_size=4)
    assert sum(rows) == blocks * 3 * 2
    np.testing.assert_allclose(cut, whole, rtol=1e-4)
    # The classes of an image differ from plans of their own.
    assert not np.allclose(whole, ask(tiny.denoiser, clean, LGTMConfig(ratio=0.7)), rtol=1e-3, equal_nan=True)


def test_null_plans_serve_random_methods_and_uncompressed_layers(tiny, digits) -> None:
    compression = ToMeConfig(ratio=0.5, blocks=(1, 2))
    whole = ask(tiny.denoiser, digits.images[:2], compression, plans="null")
    cut = ask(tiny.denoiser, digits.images[:2], compression, plans="null", batch_size=3)
    np.testing.assert_allclose(cut, whole, rtol=1e-4)


def test_null_plans_classify_about_as_well_as_those_of_the_mean(tiny, digits) -> None:
    config = ClassifierConfig(stages=((1, 1),), timesteps=(150,))
    images, labels = digits.images[:120], digits.labels[:120]

    def right(plans: str) -> int:
        found = classify(tiny.denoiser, images, labels, config, compression=LGTMConfig(ratio=0.7), share_plan=plans)
        return int(found.correct.sum())

    own, mean, null = (right(plans) for plans in ("own", "mean", "null"))
    assert null > own
    assert null >= mean - 6


def test_compression_is_applied_once_for_all_stages_and_parts(monkeypatch, tiny, digits) -> None:
    original, applied = engine_module.compressed, []

    def counting(*args: Any) -> Any:
        applied.append(args)
        return original(*args)

    monkeypatch.setattr(engine_module, "compressed", counting)
    config = ClassifierConfig(batch_size=10)
    with Classifier(tiny.denoiser, config, compression=LGTMConfig(ratio=0.7), share_plan=True) as classifier:
        for first in (0, 3):
            classifier.classify(digits.images[first : first + 3], digits.labels[first : first + 3])
    assert len(applied) == 1


def test_the_default_batch_fits_the_size_of_samples() -> None:
    assert default_batch((1, 16, 16)) == 320
    assert default_batch((4, 64, 64)) == 20
    assert default_batch((4, 128, 128)) == 5
    assert default_batch((4, 1024, 1024)) == 1


def test_published_plans_are_one_pattern_for_a_batch_and_begin_anew(monkeypatch, tiny, digits) -> None:
    original, patterns = published.pattern_destinations, []

    def looking(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        found = original(x, *rest)
        assert torch.equal(found, found[:1].expand_as(found))
        patterns.append(found[0].tolist())
        return found

    monkeypatch.setattr(published, "pattern_destinations", looking)
    config, clean = ToMeConfig(ratio=0.5), digits.images[:2]
    first = ask(tiny.denoiser, clean, config, plans="published")
    assert len({tuple(pattern) for pattern in patterns}) > len(patterns) / 2
    once = list(patterns)
    patterns.clear()
    with Engine(tiny.denoiser, Asking(RULE, (350, 150), plans="published"), config) as engine:
        for _ in range(2):
            again = np.stack([found.values for found in engine.ask(clean, range(2))])
            np.testing.assert_array_equal(again, first)
    assert patterns == 2 * once
    assert not np.array_equal(first, ask(tiny.denoiser, clean, config), equal_nan=True)


def test_published_lgtm_has_the_destinations_of_its_code(tiny, digits) -> None:
    config, clean = LGTMConfig(ratio=0.5), digits.images[:2]
    assert not np.array_equal(
        ask(tiny.denoiser, clean, config, plans="published"), ask(tiny.denoiser, clean, config), equal_nan=True
    )
    for wrong in (LGTMConfig(ratio=0.5, window=1), ABMConfig(ratio=0.5)):
        with pytest.raises(ValueError, match=r"^plans: got 'published'"):
            ask(tiny.denoiser, clean, wrong, plans="published")


def test_half_schedule_has_eleven_bits() -> None:
    denoiser = PrototypeDenoiser(4)
    clean = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    exact = denoiser.scheduler.alphas_cumprod.clone()
    ask(denoiser, clean, half_schedule=True)
    noisy, t, _ = denoiser.calls[0]
    alpha = exact[t[0]].half().float()
    assert alpha != exact[t[0]]
    noise = seeded_noise([(0, 0, 0)], SHAPE)
    assert torch.equal(noisy[:1], alpha.sqrt() * clean + (1 - alpha).sqrt() * noise)
    # The model keeps the schedule that it has.
    assert torch.equal(denoiser.scheduler.alphas_cumprod, exact)


def test_half_errors_have_eleven_bits() -> None:
    denoiser = PrototypeDenoiser(5)
    clean = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    exact, rounded = ask(denoiser, clean), ask(denoiser, clean, half_errors=True)
    assert np.array_equal(rounded, exact.astype(np.float16).astype(np.float32), equal_nan=True)
    assert not np.array_equal(rounded, exact, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("classes", {"classes": (1, 9)}),
        ("classes", {"classes": (1, 1, 2, 3)}),
        ("classes", {"classes": ()}),
        ("stages", {"classes": (1, 2)}),
        ("plans", {"plans": "best"}),
        ("plans", {"plans": "null"}),
    ],
)
def test_bad_settings_are_named(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got"):
        Engine(PrototypeDenoiser(5), Asking(RULE, (350,), **options))
