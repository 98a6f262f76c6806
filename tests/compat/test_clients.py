"""Programs that call tomesd, with compat.tomesd in its place."""

from __future__ import annotations

import importlib
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionImg2ImgPipeline

from bigain_kernels.compat import tomesd
from tests.tiny_pipeline import tiny_pipeline

FASTSDCPU = os.environ.get("FASTSDCPU_PATH")
# Modules of the source, src/backend, and of the package fastsdcpu-pip: what makes pictures, its settings, what asks for
# the device, and what needs OpenVINO or GGUF.
SOURCE = (
    "backend.lcm_text_to_image",
    "backend.models.lcmdiffusion_setting",
    "backend.device",
    (
        "backend.openvino.pipelines",
        "backend.openvino.ov_hc_stablediffusion_pipeline",
        "openvino",
        "backend.gguf.gguf_diffusion",
    ),
)
PACKAGE = (
    "fastsdcpu.pipelines.lcm.text_to_image",
    "fastsdcpu.models.lcmdiffusion_setting",
    "fastsdcpu.utils.device",
    (
        "fastsdcpu.pipelines.openvino",
        "fastsdcpu.pipelines.openvino.ov_hc_stablediffusion_pipeline",
        "openvino",
        "fastsdcpu.gguf_diffusion",
    ),
)


def test_two_pipelines_around_one_model():
    """What fastsdcpu does: both pipelines are patched, then moved, given another scheduler and FreeU, and called."""
    pipe = tiny_pipeline()
    image_pipe = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    image_pipe.set_progress_bar_config(disable=True)
    text = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(5))
    arguments = {"prompt_embeds": text, "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}

    def generate():
        seed = [torch.Generator().manual_seed(3)]
        image = pipe(**arguments, width=32, height=32, generator=seed).images
        again = image_pipe(**arguments, image=torch.zeros(1, 3, 32, 32), strength=0.9, generator=seed).images
        return torch.stack([image, again])

    tomesd.apply_patch(pipe, ratio=0.4)
    tomesd.apply_patch(image_pipe, ratio=0.4)
    pipe.to("cpu", torch.float32)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, beta_start=0.001, beta_end=0.01)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    merged = generate()
    assert torch.equal(generate(), merged)
    tomesd.remove_patch(image_pipe)
    plain = generate()
    assert merged.isfinite().all()
    assert not torch.equal(merged[0], plain[0])
    assert not torch.equal(merged[1], plain[1])


def folder_of_a_pipeline(folder):
    """A pipeline on disk with a text encoder and a tokenizer of the letters."""
    transformers = pytest.importorskip("transformers")
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = transformers.CLIPTokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)}, merges=[], model_max_length=16
    )
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    tiny_pipeline(tokenizer=tokenizer, text_encoder=transformers.CLIPTextModel(config)).save_pretrained(folder)


@pytest.fixture
def fastsdcpu(monkeypatch):
    """The modules of fastsdcpu that make pictures and hold settings, with compat.tomesd as tomesd, and without OpenVINO
    and GGUF."""
    if not FASTSDCPU:
        pytest.skip(
            "FASTSDCPU_PATH is not set to the folder src of fastsdcpu, or to that where fastsdcpu-pip is installed"
        )
    program, settings, asks, absent = PACKAGE if (Path(FASTSDCPU) / "fastsdcpu").is_dir() else SOURCE
    before = set(sys.modules)
    monkeypatch.syspath_prepend(FASTSDCPU)
    monkeypatch.setitem(sys.modules, "tomesd", tomesd)

    class Absent(types.ModuleType):
        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    for name in absent:
        monkeypatch.setitem(sys.modules, name, Absent(name))
    device = types.ModuleType(asks)
    device.is_openvino_device = lambda: False
    monkeypatch.setitem(sys.modules, asks, device)
    yield importlib.import_module(program), importlib.import_module(settings)
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(FASTSDCPU):
            del sys.modules[name]


def test_fastsdcpu(fastsdcpu, tmp_path):
    pytest.importorskip("peft")  # it asks the pipeline for its adapters
    folder_of_a_pipeline(tmp_path)
    module, settings = fastsdcpu
    made = {}
    program = module.LCMTextToImage()
    program.torch_data_type = torch.float32
    for merging in (0.0, 0.5):
        wanted = settings.LCMDiffusionSetting(
            lcm_model_id=str(tmp_path),
            use_offline_model=True,
            token_merging=merging,
            prompt="a cat",
            image_width=32,
            image_height=32,
            inference_steps=2,
            use_seed=True,
            seed=3,
        )
        program.init("cpu", wanted)
        made[merging] = program.generate(wanted)[0]
        assert hasattr(program.pipeline.unet, "_bigain") == (merging > 0)
    assert made[0.5].size == made[0.0].size == (32, 32)
    assert made[0.5].tobytes() != made[0.0].tobytes()
