"""DDIM generation, noise, and the grid picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bigain_kernels.evaluation.generate import GenerateConfig, generate, save_grid, to_pixels
from bigain_kernels.evaluation.noise import seeded_noise

from .toys import SHAPE, PrototypeDenoiser


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_exact_denoiser_generates_its_prototype(kind: str) -> None:
    denoiser = PrototypeDenoiser(3, kind)
    labels = torch.tensor([2, 0, 1, 2])
    # The toy's scheduler clips samples to [-1, 1], as its config says.
    made = generate(denoiser, labels, GenerateConfig(steps=10, guidance=1.0))
    torch.testing.assert_close(made, denoiser.prototypes[labels].clamp(-1, 1), atol=0.05, rtol=0.0)


def test_guidance_moves_from_the_null_label_to_the_class_and_beyond() -> None:
    denoiser = PrototypeDenoiser(3)
    denoiser.scheduler.register_to_config(clip_sample=False)
    labels, (null, wanted) = torch.tensor([1]), denoiser.prototypes[[3, 1]]
    made = generate(denoiser, labels, GenerateConfig(steps=20, guidance=3.0))[0]
    torch.testing.assert_close(made, null + 3.0 * (wanted - null), atol=0.2, rtol=0.05)
    noisy, _, classes = denoiser.calls[0]
    assert classes.tolist() == [3, 1]
    assert torch.equal(noisy[0], noisy[1])


def test_samples_do_not_depend_on_the_batch(tiny) -> None:
    labels = torch.arange(7)
    whole = generate(tiny.denoiser, labels, GenerateConfig(steps=3))
    cut = generate(tiny.denoiser, labels, GenerateConfig(steps=3, batch_size=2))
    part = generate(tiny.denoiser, labels[4:], GenerateConfig(steps=3), indices=range(4, 7))
    torch.testing.assert_close(whole, cut, atol=1e-4, rtol=0.0)
    torch.testing.assert_close(whole[4:], part, atol=1e-4, rtol=0.0)


def test_batches_are_recorded_as_they_come() -> None:
    denoiser, seen = PrototypeDenoiser(3), []
    made = generate(denoiser, torch.arange(3), GenerateConfig(steps=2, batch_size=2), record=seen.append)
    assert [len(batch) for batch in seen] == [2, 1]
    assert torch.equal(torch.cat(seen), made)


@pytest.mark.parametrize("name", ["steps", "guidance", "seed", "batch_size"])
def test_bad_settings_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got"):
        GenerateConfig(**{name: -1})
    with pytest.raises(ValueError, match=r"^guidance: got nan"):
        GenerateConfig(guidance=float("nan"))


@pytest.mark.parametrize("labels", [[], [3, 4], [-1]])
def test_bad_labels_are_named(labels: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^labels: got"):
        generate(PrototypeDenoiser(3), torch.tensor(labels, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^indices: got"):
        generate(PrototypeDenoiser(3), torch.tensor([1, 2]), indices=[0])


def test_more_steps_than_timesteps_are_named() -> None:
    with pytest.raises(ValueError, match=r"^steps: got 1001, expected at most 1000"):
        generate(PrototypeDenoiser(3), torch.tensor([1]), GenerateConfig(steps=1001))
    with pytest.raises(ValueError, match=r"^share_plan: got method none"):
        generate(PrototypeDenoiser(3), torch.tensor([1]), share_plan=True)


def test_noise_depends_on_its_key_alone() -> None:
    first = seeded_noise([(0, 1, 2), (0, 1, 3)], SHAPE)
    assert torch.equal(seeded_noise([(0, 1, 3)], SHAPE)[0], first[1])
    assert not torch.equal(first[0], first[1])
    many = seeded_noise([(0, i) for i in range(500)], (16,))
    assert abs(many.mean().item()) < 0.05
    assert abs(many.std().item() - 1) < 0.05


def test_grid_has_a_row_for_each_class(tmp_path: Path) -> None:
    images = torch.linspace(-1, 1, 6).view(6, 1, 1, 1).expand(6, *SHAPE)
    pixels = to_pixels(images)
    assert pixels.dtype == np.uint8
    assert pixels[0].max() == 0
    assert pixels[-1].min() == 255
    path = tmp_path / "new" / "grid.png"
    save_grid(images, torch.tensor([0, 1, 1, 2, 2, 2]), ["a", "b", "c"], path, "a title")
    with Image.open(path) as picture:
        assert picture.width > 200


@pytest.mark.parametrize("name", ["$", "$x^$", "$\\frac{$", "a\nb", "\udce9", "[red]x", "\\", "%s{0}", ""], ids=ascii)
def test_odd_names_of_classes_stand_beside_a_grid(name: str, tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    save_grid(torch.zeros(1, 1, 4, 4), torch.tensor([0]), [name], path, "title")
    assert path.exists()


@pytest.mark.parametrize(
    "name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler"]
)
def test_any_scheduler_draws_for_the_sample_whatever_the_batch(name: str) -> None:
    denoiser = PrototypeDenoiser(3)
    labels = torch.tensor([2, 0, 1])
    made = generate(denoiser, labels, GenerateConfig(steps=10, guidance=1.0, scheduler=name))
    cut = generate(denoiser, labels, GenerateConfig(steps=10, guidance=1.0, scheduler=name, batch_size=2))
    assert torch.equal(made, cut)
    nearest = torch.cdist(made.flatten(1), denoiser.prototypes[:3].flatten(1)).argmin(dim=1)
    assert torch.equal(nearest, labels)


@pytest.mark.parametrize("name", ["AutoencoderKL", "NoScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_another_scheduler_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=r"^scheduler: got"):
        generate(PrototypeDenoiser(3), torch.tensor([0]), GenerateConfig(steps=2, scheduler=name))


def test_grid_of_wide_images(tmp_path: Path) -> None:
    save_grid(torch.zeros(4, 1, 8, 16), torch.tensor([0, 1, 0, 1]), ["a", "b"], tmp_path / "grid.png", "wide")
    assert Image.open(tmp_path / "grid.png").width > 0
