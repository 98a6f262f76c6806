"""Networks that look at drawings: found, refused or left out by name, and what they see."""

from __future__ import annotations

import hashlib
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from bigain_kernels.evaluation.harness import judges
from bigain_kernels.evaluation.harness.judges import ClipJudge, DigitJudge, InceptionJudge, find_inception, find_judges

from .tiny_clip import save_clip


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that counts as the weights of Inception, and a torch-fidelity that takes it."""

    class Network(torch.nn.Module):
        def __init__(self, name: str, features: list[str], feature_extractor_weights_path: str) -> None:
            super().__init__()
            assert features == ["2048", "logits_unbiased"]
            self.head = torch.nn.Linear(3, 4)
            self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            assert images.dtype == torch.uint8
            assert images.shape[1] == 3
            features = images.float().mean(dim=(2, 3))
            return features, self.head(features)

    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Network
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    path = tmp_path / "weights.pth"
    torch.save({f"head.{name}": value for name, value in torch.nn.Linear(3, 4).state_dict().items()}, path)
    monkeypatch.setattr(judges, "INCEPTION_HASH", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    return path


def test_inception_is_found_by_path_and_in_the_cache_of_torch(cache: Path, weights: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^inception: got none in .*checkpoints, expected weights-inception"):
        find_inception()
    assert find_inception(weights) == weights
    for name in judges.INCEPTION_FILES:
        (cache / name).write_bytes(weights.read_bytes())
        assert find_inception() == cache / name
        (cache / name).unlink()


def test_other_weights_are_refused(cache: Path, weights: Path, tmp_path: Path) -> None:
    other = cache / judges.INCEPTION_FILES[0]
    other.write_bytes(b"inception of somebody else")
    for given in (None, other):
        with pytest.raises(ValueError, match=r"^inception: got .* with SHA-256 [0-9a-f]{8}\.\.\., expected"):
            find_inception(given)
    with pytest.raises(FileNotFoundError, match=r"^inception: got .*missing.pth"):
        find_inception(tmp_path / "missing.pth")


def test_inception_sees_bytes_in_three_channels(weights: Path) -> None:
    seen = InceptionJudge(weights).look(torch.tensor([-1.0, 0.0, 1.0, 9.0]).view(4, 1, 1, 1).expand(-1, 1, 5, 5))
    assert seen.features.tolist() == [[0] * 3, [128] * 3, [255] * 3, [255] * 3]
    assert seen.logits.shape == (4, 4)


def test_a_file_with_a_program_in_it_is_not_run(weights: Path) -> None:
    class Program:
        def __reduce__(self):
            return pytest.fail, ("it ran",)

    torch.save({"head.weight": Program()}, weights)
    with pytest.raises(ValueError, match=r"^inception: got .*weights.pth"):
        InceptionJudge(weights)


def test_what_is_not_there_is_left_out_in_a_line(cache: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (3, 32, 32)
    nobody = find_judges(shape, False, None, None, "cpu")
    assert (nobody.features, nobody.clip) == (None, None)
    assert [line.split(":")[0] for line in nobody.missing] == ["KID, FID, IS, precision and recall", "CLIP score"]
    assert all("\n" not in line for line in nobody.missing)
    assert isinstance(find_judges(shape, False, weights, None, "cpu").features, InceptionJudge)
    assert isinstance(find_judges((1, 16, 16), True, None, None, "cpu").features, DigitJudge)
    # Without torch-fidelity: a line where it was found by chance, the end where it was asked for.
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    (cache / judges.INCEPTION_FILES[0]).write_bytes(weights.read_bytes())
    assert "needs pip install torch-fidelity" in find_judges(shape, False, None, None, "cpu").missing[0]
    with pytest.raises(ImportError, match=r"^inception: needs pip install torch-fidelity"):
        find_judges(shape, False, weights, None, "cpu")


def test_clip_score_is_the_cosine_of_the_embeddings(tmp_path: Path) -> None:
    folder = save_clip(tmp_path)
    random = torch.Generator().manual_seed(0)
    images, texts = torch.rand(3, 3, 40, 36, generator=random) * 2 - 1, ["a dog", "a cat " * 30, "tree"]
    found = ClipJudge(folder).score(images, texts)
    model = CLIPModel.from_pretrained(folder)
    tokens, pixels = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder, use_fast=False)
    for image, text, score in zip(images, texts, found.tolist(), strict=True):
        array = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        seen = pixels(images=[Image.fromarray(array)], return_tensors="pt")["pixel_values"]
        read = tokens([text], truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            a = model.visual_projection(model.vision_model(seen).pooler_output)
            b = model.text_projection(model.text_model(**read).pooler_output)
        assert score == pytest.approx(max(0.0, 100 * float(torch.cosine_similarity(a, b))), abs=1e-3)
    assert found.max() > 0


def test_a_folder_without_a_clip_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^clip: got .*config\.json"):
        ClipJudge(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^clip: got "):
        ClipJudge(tmp_path)


def test_the_published_view_squashes_without_smoothing_and_stores_jpegs() -> None:
    stripes = torch.ones(1, 3, 598, 897)
    stripes[..., ::2] = -1
    seen = judges.as_published(stripes, jpeg=False)
    assert seen.shape == (1, 3, 299, 299)
    # A third of the columns, each by its nearest two: of smoothing over three, the stripes would be faint.
    assert float(seen.std()) > 0.3
    smooth = torch.linspace(-1, 1, 299).expand(1, 3, 299, 299)
    stored = judges.as_published(smooth, jpeg=True)
    assert 0 < float((stored - smooth).abs().max()) < 0.03
