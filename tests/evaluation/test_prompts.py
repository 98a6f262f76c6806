"""Prompts from files, and their embeddings kept on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bigain_kernels.evaluation import prompts
from bigain_kernels.evaluation.checkpoints import load_checkpoint
from bigain_kernels.evaluation.harness.drawing import check_files, image_file
from bigain_kernels.evaluation.prompts import read_prompts

from ..compat.test_clients import folder_of_a_pipeline


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "sd"
    folder_of_a_pipeline(folder)
    return folder


def test_embeddings_are_made_in_parts_and_kept(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a dog", "a cat", "the tree"]
    plain = load_checkpoint(pipeline, class_names=names, template="{}").denoiser.embeddings
    monkeypatch.setattr(prompts, "_BATCH", 2)
    kept = load_checkpoint(pipeline, class_names=names, template="{}", prompt_cache=tmp_path)
    torch.testing.assert_close(kept.denoiser.embeddings, plain, atol=1e-5, rtol=0)
    assert len(list(tmp_path.iterdir())) == 1
    # What lies there is taken as it is; other prompts have a file of their own.
    monkeypatch.setattr("diffusers.StableDiffusionPipeline.encode_prompt", None)
    again = load_checkpoint(pipeline, class_names=names, template="{}", prompt_cache=tmp_path)
    assert torch.equal(again.denoiser.embeddings, kept.denoiser.embeddings)
    with pytest.raises(ValueError, match="belong together"):
        load_checkpoint(pipeline, class_names=names[:2], template="{}", prompt_cache=tmp_path)
    next(tmp_path.iterdir()).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"prompts: got .*safetensors"):
        load_checkpoint(pipeline, class_names=names, template="{}", prompt_cache=tmp_path)


def test_a_model_takes_other_prompts(pipeline: Path) -> None:
    loaded = load_checkpoint(pipeline, class_names=["a dog"], template="{}")
    assert loaded.prompted is not None
    other = loaded.prompted(["a cat", "a dog"])
    assert other.class_names == ("a cat", "a dog")
    torch.testing.assert_close(other.denoiser.embeddings[1], loaded.denoiser.embeddings[0], atol=1e-5, rtol=0)
    assert other.denoiser.model is loaded.denoiser.model
    assert other.fingerprint() != loaded.fingerprint()


def test_lines_have_names(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text('prompt,classidx\n"a dog, running",3\na cat,1\n')
    assert read_prompts(file) == [("000000", "a dog, running"), ("000001", "a cat")]
    file.write_text("\ufeffpath,prompt\nval/1.jpg,a dog\nval/2.jpg,a dog\n", encoding="utf-8")
    assert read_prompts(file) == [("val/1.jpg", "a dog"), ("val/2.jpg", "a dog")]


@pytest.mark.parametrize(
    "text",
    ["", "prompt\n", "text\na dog\n", 'prompt\n" "\n', *(f"path,prompt\n{p},x\n" for p in ("a,x\na", "../a", "/a"))],
)
def test_files_that_say_nothing_to_draw_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ValueError, match=r"^prompts: got "):
        read_prompts(tmp_path / "x.csv")


def test_drawings_have_files_of_their_own() -> None:
    names = ["cat_v1.1", "cat_v1.2", "val/1.jpg", "val/2.JPEG", "a.b/c", ".png", "x/.jpg"]
    files = [image_file(Path("out"), name).relative_to("out/images").as_posix() for name in names]
    assert files == ["cat_v1.1.png", "cat_v1.2.png", "val/1.png", "val/2.png", "a.b/c.png", ".png.png", "x/.jpg.png"]
    check_files(names)
    with pytest.raises(ValueError, match=r"^path: got c/1.jpg and c/1.png, expected different files"):
        check_files(["c/1.jpg", "c/2.jpg", "c/1.png"])
