"""Loading checkpoints and image folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from bigain_kernels.evaluation import checkpoints
from bigain_kernels.evaluation.checkpoints import TINY_DIT, load_checkpoint, load_classifier
from bigain_kernels.evaluation.classify import ClassifierConfig, classify
from bigain_kernels.evaluation.generate import GenerateConfig, generate

from .toys import save_latent_dit


@pytest.fixture(scope="module")
def latent_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dit")
    save_latent_dit(folder)
    # save_pretrained leaves the names of the classes out; published pipelines carry them in their index.
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {"0": "tench, fish", "1": "hen", "2": "crane"}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_latent_pipeline_classifies_and_generates(latent_pipeline: Path) -> None:
    checkpoint = load_checkpoint(str(latent_pipeline))
    assert checkpoint.image_shape == (3, 16, 16)
    assert checkpoint.denoiser.sample_shape == (4, 8, 8)
    assert checkpoint.label_of("hen") == 1
    assert checkpoint.label_of("tench") == checkpoint.label_of("fish") == checkpoint.label_of("0") == 0
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    latents = checkpoint.encode(images, batch_size=2)
    assert latents.shape == (3, 4, 8, 8)
    config = ClassifierConfig(stages=((1, 2), (2, 1)))
    result = classify(checkpoint.denoiser, latents, torch.tensor([0, 1, 2]), config)
    assert result.errors.isfinite().all()
    made = generate(checkpoint.denoiser, torch.tensor([0, 2]), GenerateConfig(steps=2))
    assert checkpoint.decode(made, batch_size=1).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("force", [True, False])
def test_vae_that_asks_for_it_is_upcast(latent_pipeline: Path, dtype: torch.dtype, force: bool) -> None:
    checkpoint, whole = load_checkpoint(str(latent_pipeline), dtype=dtype), load_checkpoint(str(latent_pipeline))
    checkpoint.vae.register_to_config(force_upcast=force)
    seen: list[torch.dtype] = []
    for part in (checkpoint.vae.encoder, checkpoint.vae.decoder):
        part.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].dtype))
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    latents = checkpoint.encode(images, batch_size=2)
    assert checkpoint.decode(latents, batch_size=2).shape == images.shape
    assert seen == [torch.float32 if force else dtype] * 4
    assert checkpoint.vae.dtype == dtype
    torch.testing.assert_close(latents, whole.encode(images), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("zeros", [True, False])
def test_sdxl_has_zeros_for_no_prompt_where_its_config_says_so(zeros: bool) -> None:
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 5,
    )

    def encode_prompt(prompts: list[str], **_: object) -> tuple[torch.Tensor | None, ...]:
        assert prompts == ["a cat", "a dog", ""]
        return torch.ones(3, 7, 12), None, torch.ones(3, 5), None

    vae = SimpleNamespace(config=SimpleNamespace(block_out_channels=(8, 8)))
    pipe = SimpleNamespace(
        unet=unet, vae=vae, config={"force_zeros_for_empty_prompt": zeros}, encode_prompt=encode_prompt
    )
    denoiser = checkpoints._prompt_denoiser(pipe, DDIMScheduler(), ["a cat", "a dog"])
    assert denoiser.pooled is not None
    for embeddings in (denoiser.embeddings, denoiser.pooled):
        assert (embeddings[:2] == 1).all()
        assert (embeddings[2] == (0 if zeros else 1)).all()
    result = classify(denoiser, torch.rand(1, 4, 8, 8), torch.tensor([0]), ClassifierConfig(stages=((1, 1),)))
    assert result.errors.isfinite().all()


def test_pixel_checkpoint_has_no_latents(tiny) -> None:
    images = torch.rand(2, 1, 16, 16)
    assert tiny.vae is None
    assert torch.equal(tiny.encode(images), images)
    assert torch.equal(tiny.decode(images), images)
    assert tiny.class_names == tuple("0123456789")
    with pytest.raises(ValueError, match=r"^class: got class 'cat'"):
        tiny.label_of("cat")
    assert tiny.label_of("03") == 3
    for name in ("10", "²", "٣", "1" * 5000):
        with pytest.raises(ValueError, match=rf"^label: got class '{name}'"):
            tiny.label_of(name, "label")


@pytest.mark.parametrize("source", ["missing", "./missing/folder", "a/b/c"])
def test_missing_checkpoint_is_named(source: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"^checkpoint: got"):
        load_checkpoint(source)


def test_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^checkpoint: got"):
        load_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^classifier: got"):
        load_classifier(tmp_path)
    (tmp_path / "classifier.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"^classifier: got"):
        load_classifier(tmp_path)


def test_bare_unet_is_refused(tmp_path: Path) -> None:
    shutil.copytree(TINY_DIT / "scheduler", tmp_path / "scheduler")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(ValueError, match=r"^checkpoint: got UNet2DConditionModel without a pipeline"):
        load_checkpoint(tmp_path)


def test_missing_text_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = {"_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "CLIPTextModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    monkeypatch.setattr(checkpoints.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"^checkpoint: got .* pip install transformers$"):
        load_checkpoint(tmp_path)
