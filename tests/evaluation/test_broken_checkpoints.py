"""Checkpoints of strangers that are broken: one line that names what, exit code 2, and none of their code runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiTPipeline
from safetensors.torch import load_file, save_file

from bigain_kernels.cli.main import main
from bigain_kernels.evaluation.checkpoints import TINY_DIT, load_checkpoint, load_classifier
from bigain_kernels.evaluation.strict_loading import BadCheckpoint

from .toys import save_latent_dit

WEIGHTS, CONFIG = "transformer/diffusion_pytorch_model.safetensors", "transformer/config.json"
SCHEDULER, INDEX = "scheduler/scheduler_config.json", "model_index.json"
KEY = "transformer_blocks.0.attn1.to_q.weight"
Break = Callable[[Path], Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    save_latent_dit(folder, layers=2)
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def tensors(change: Callable[[dict[str, torch.Tensor]], Any], file: str = WEIGHTS) -> Break:
    def apply(folder: Path) -> None:
        state = load_file(folder / file)
        change(state)
        save_file(state, folder / file)

    return apply


def setting(file: str, key: str, value: Any) -> Break:
    def apply(folder: Path) -> None:
        config = json.loads((folder / file).read_text())
        config[key] = value
        (folder / file).write_text(json.dumps(config))

    return apply


def content(file: str, data: bytes | str) -> Break:
    def apply(folder: Path) -> None:
        path = folder / file
        path.unlink(missing_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())

    return apply


def gone(file: str) -> Break:
    return lambda folder: (folder / file).unlink()


def directory(file: str) -> Break:
    def apply(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).mkdir()

    return apply


def loop(file: str) -> Break:
    def apply(folder: Path) -> None:
        (folder / file).unlink()
        os.symlink(folder / file, folder / file)

    return apply


def pipe(file: str) -> Break:
    def apply(folder: Path) -> None:
        (folder / file).unlink()
        os.mkfifo(folder / file)

    return apply


def vast(file: str) -> Break:
    return lambda folder: os.truncate(folder / file, 2**32)


def cut(file: str, share: float) -> Break:
    def apply(folder: Path) -> None:
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[: int(len(data) * share)])

    return apply


def sharded(change: Callable[[dict[str, str]], Any]) -> Break:
    """As large models come: an index beside the files."""

    def apply(folder: Path) -> None:
        path = folder / WEIGHTS
        shard = "diffusion_pytorch_model-00001-of-00001.safetensors"
        weight_map = dict.fromkeys(load_file(path), shard)
        path.rename(path.with_name(shard))
        change(weight_map)
        index = path.with_name("diffusion_pytorch_model.safetensors.index.json")
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return apply


class _Bomb:
    """Pickles to code that leaves a file behind when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def other_vae(folder: Path) -> None:
    """A VAE that is whole in itself, of latents that the denoiser does not take."""
    config = AutoencoderKL.load_config(folder / "vae")
    AutoencoderKL.from_config(config, latent_channels=3).save_pretrained(folder / "vae")


def pickled(folder: Path) -> None:
    path = folder / WEIGHTS
    path.unlink()
    path.with_suffix(".bin").write_bytes(pickle.dumps(_Bomb(folder / "exploded")))


def custom_code(folder: Path) -> None:
    (folder / "pipeline.py").write_text(f"open({str(folder / 'exploded')!r}, 'w')\n")
    setting(INDEX, "_class_name", ["pipeline", "Mine"])(folder)


def custom_part(folder: Path) -> None:
    (folder / "transformer" / "mine.py").write_text(f"open({str(folder / 'exploded')!r}, 'w')\n")
    setting(INDEX, "transformer", ["mine", "Mine"])(folder)


DEEP = "[" * 100_000 + "]" * 100_000
HUGE_HEADER = struct.pack("<Q", 2**60) + b"{}"
# What is done, and what the line must name.
BROKEN: dict[str, tuple[Break, str]] = {
    "missing weight": (tensors(lambda s: s.pop(KEY)), KEY),
    "missing bias": (tensors(lambda s: s.pop("proj_out_2.bias")), "proj_out_2.bias"),
    "missing embedding": (
        tensors(lambda s: s.pop("transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight")),
        "class_embedder",
    ),
    "missing block": (
        tensors(lambda s: [s.pop(k) for k in list(s) if k.startswith("transformer_blocks.1.")]),
        "transformer_blocks.1.",
    ),
    "all missing": (tensors(lambda s: [s.pop(k) for k in list(s)[1:]]), "num_layers"),
    "unexpected weight": (tensors(lambda s: s.update(extra=torch.zeros(2))), "extra"),
    "unexpected block": (
        tensors(lambda s: s.update({"transformer_blocks.7.ff.net.2.bias": torch.zeros(16)})),
        "transformer_blocks.7",
    ),
    "renamed weight": (tensors(lambda s: s.update(q=s.pop(KEY))), "q"),
    "wrong shape": (tensors(lambda s: s.update({KEY: torch.zeros(16, 8)})), KEY),
    "transposed": (
        tensors(lambda s: s.update({k: s[k].T.contiguous() for k in ("proj_out_2.weight",)})),
        "proj_out_2.weight",
    ),
    "scalar": (tensors(lambda s: s.update({"proj_out_2.bias": torch.tensor(1.0)})), "proj_out_2.bias"),
    "no values": (tensors(lambda s: s.update({"proj_out_2.bias": torch.zeros(0)})), "proj_out_2.bias"),
    "NaN": (tensors(lambda s: s[KEY].fill_(torch.nan)), KEY),
    "one NaN": (tensors(lambda s: s["proj_out_2.bias"][:1].fill_(torch.nan)), "proj_out_2.bias"),
    "infinity": (tensors(lambda s: s[KEY][:1].fill_(torch.inf)), KEY),
    "minus infinity": (tensors(lambda s: s[KEY][:1].fill_(-torch.inf)), KEY),
    "NaN in the VAE": (
        tensors(lambda s: s["decoder.conv_out.bias"].fill_(torch.nan), "vae/diffusion_pytorch_model.safetensors"),
        "decoder.conv_out.bias",
    ),
    "missing in the VAE": (
        tensors(lambda s: s.pop("decoder.conv_out.bias"), "vae/diffusion_pytorch_model.safetensors"),
        "decoder.conv_out.bias",
    ),
    "shape in the VAE": (
        tensors(
            lambda s: s.update({"decoder.conv_out.bias": torch.zeros(9)}), "vae/diffusion_pytorch_model.safetensors"
        ),
        "decoder.conv_out.bias",
    ),
    "weights gone": (gone(WEIGHTS), "transformer"),
    "weights of the VAE gone": (gone("vae/diffusion_pytorch_model.safetensors"), "vae"),
    "weights empty": (content(WEIGHTS, b""), "diffusion_pytorch_model.safetensors"),
    "weights of zeros": (content(WEIGHTS, bytes(1000)), "diffusion_pytorch_model.safetensors"),
    "weights are text": (content(WEIGHTS, "version https://git-lfs"), "diffusion_pytorch_model.safetensors"),
    "weights half": (cut(WEIGHTS, 0.5), "diffusion_pytorch_model.safetensors"),
    "weights short of a byte": (cut(WEIGHTS, 0.99999), "diffusion_pytorch_model.safetensors"),
    "header half": (cut(WEIGHTS, 0.01), "diffusion_pytorch_model.safetensors"),
    "header of 2^60 bytes": (content(WEIGHTS, HUGE_HEADER), "diffusion_pytorch_model.safetensors"),
    "header no JSON": (content(WEIGHTS, struct.pack("<Q", 8) + b"{{{{{{{{"), "diffusion_pytorch_model.safetensors"),
    "weights a directory": (directory(WEIGHTS), "diffusion_pytorch_model.safetensors"),
    "weights a loop": (loop(WEIGHTS), "transformer"),
    "pickled weights": (pickled, "pickled weights are not read"),
    "shard gone": (sharded(lambda m: m.update({KEY: "other.safetensors"})), "other.safetensors"),
    "shard elsewhere": (sharded(lambda m: m.update({KEY: "../../etc/passwd"})), "../../etc/passwd"),
    "shard absolute": (sharded(lambda m: m.update({KEY: "/etc/passwd"})), "/etc/passwd"),
    "shard a number": (sharded(lambda m: m.update({KEY: 7})), "weight_map"),
    "config gone": (gone(CONFIG), "config.json"),
    "config empty": (content(CONFIG, ""), "config.json"),
    "config cut": (cut(CONFIG, 0.5), "config.json"),
    "config a list": (content(CONFIG, "[]"), "config.json"),
    "config a number": (content(CONFIG, "3"), "config.json"),
    "config nested": (content(CONFIG, DEEP), "config.json"),
    "config no UTF-8": (content(CONFIG, b'{"a": "\xff\xfe"}'), "config.json"),
    "config a directory": (directory(CONFIG), "config.json"),
    "config a loop": (loop(CONFIG), "config.json"),
    "no layers": (setting(CONFIG, "num_layers", 0), "transformer_blocks.0."),
    "fewer layers": (setting(CONFIG, "num_layers", 1), "transformer_blocks.1."),
    "more layers": (setting(CONFIG, "num_layers", 3), "transformer_blocks.2."),
    "a billion layers": (setting(CONFIG, "num_layers", 10**9), "num_layers"),
    "a million layers": (setting(CONFIG, "num_layers", 10**6), "num_layers"),
    "layers in words": (setting(CONFIG, "num_layers", "two"), "config.json"),
    "layers missing": (setting(CONFIG, "num_layers", None), "config.json"),
    "negative heads": (setting(CONFIG, "num_attention_heads", -4), "num_attention_heads"),
    "no heads": (setting(CONFIG, "num_attention_heads", 0), "as its config says"),
    "wide heads": (setting(CONFIG, "attention_head_dim", 10**8), "attention_head_dim"),
    "other heads": (setting(CONFIG, "attention_head_dim", 16), "of shape"),
    "no patches": (setting(CONFIG, "patch_size", 0), "config.json"),
    "large sample": (setting(CONFIG, "sample_size", 10**6), "sample_size"),
    "sample NaN": (setting(CONFIG, "sample_size", float("nan")), "sample_size"),
    "channels in a list": (setting(CONFIG, "in_channels", [4]), "config.json"),
    "other channels": (setting(CONFIG, "in_channels", 3), "of shape"),
    "other norm": (setting(CONFIG, "norm_type", "layer_norm"), "config.json"),
    "unknown activation": (setting(CONFIG, "activation_fn", "magic"), "config.json"),
    "scheduler gone": (gone(SCHEDULER), "scheduler"),
    "scheduler a list": (content(SCHEDULER, "[1]"), "scheduler_config.json"),
    "scheduler of flow matching": (
        setting(SCHEDULER, "_class_name", "FlowMatchEulerDiscreteScheduler"),
        "FlowMatchEulerDiscreteScheduler",
    ),
    "scheduler of EDM": (setting(SCHEDULER, "_class_name", "EDMEulerScheduler"), "EDMEulerScheduler"),
    "scheduler unknown": (setting(SCHEDULER, "_class_name", "MagicScheduler"), "MagicScheduler"),
    "scheduler a model": (setting(SCHEDULER, "_class_name", "AutoencoderKL"), "AutoencoderKL"),
    "no timesteps": (setting(SCHEDULER, "num_train_timesteps", 0), "scheduler_config.json"),
    "timesteps in words": (setting(SCHEDULER, "num_train_timesteps", "many"), "scheduler_config.json"),
    "timesteps beyond": (setting(SCHEDULER, "num_train_timesteps", 10**12), "num_train_timesteps"),
    "betas beyond": (setting(SCHEDULER, "beta_end", 7.0), "scheduler_config.json"),
    "betas NaN": (setting(SCHEDULER, "beta_end", float("nan")), "beta_end"),
    "unknown betas": (setting(SCHEDULER, "beta_schedule", "magic"), "scheduler_config.json"),
    "unknown prediction": (setting(SCHEDULER, "prediction_type", "magic"), "prediction_type"),
    "scheduler without a class": (setting(SCHEDULER, "_class_name", None), "scheduler_config.json"),
    "scheduler of flow sigmas": (
        content(SCHEDULER, '{"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": true}'),
        "flow matching",
    ),
    "scheduler of other defaults": (content(SCHEDULER, '{"_class_name": "LCMScheduler"}'), "beta_schedule"),
    "scheduler empty": (content(SCHEDULER, "{}"), "scheduler_config.json"),
    "config a pipe": (pipe(CONFIG), "config.json"),
    "config of gigabytes": (vast(CONFIG), "config.json"),
    "key twice": (content(CONFIG, '{"num_layers": 2, "num_layers": 3}'), "'num_layers' stands there twice"),
    "weights a pipe": (pipe(WEIGHTS), "diffusion_pytorch_model.safetensors"),
    "a million layers in a list": (setting("vae/config.json", "layers_per_block", [[10**6]]), "layers_per_block"),
    "a million layers of the VAE": (setting("vae/config.json", "layers_per_block", 10**6), "layers_per_block"),
    "part another model": (setting(INDEX, "vae", ["diffusers", "AutoencoderTiny"]), "AutoencoderTiny"),
    "part a pipeline": (setting(INDEX, "transformer", ["diffusers", "DiTPipeline"]), "DiTPipeline"),
    "part left out": (setting(INDEX, "vae", [None, None]), "vae"),
    "library of the machine": (setting(INDEX, "extra", ["os", "system"]), "extra"),
    "index a list": (content(INDEX, "[]"), "model_index.json"),
    "index cut": (cut(INDEX, 0.6), "model_index.json"),
    "index nested": (content(INDEX, DEEP), "model_index.json"),
    "index of another pipeline": (setting(INDEX, "_class_name", "FluxPipeline"), "FluxPipeline"),
    "index without a class": (setting(INDEX, "_class_name", None), "model_index.json"),
    "index with code": (custom_code, "model_index.json"),
    "part with code": (custom_part, "transformer"),
    "part a number": (setting(INDEX, "vae", [1, 2]), "vae"),
    "part of one": (setting(INDEX, "vae", ["diffusers"]), "vae"),
    "part unknown": (setting(INDEX, "vae", ["diffusers", "MagicVAE"]), "MagicVAE"),
    "labels no table": (setting(INDEX, "id2label", "cat"), "copy"),
    "VAE config a list": (content("vae/config.json", "[]"), "vae/config.json"),
    "VAE scale of zero": (setting("vae/config.json", "scaling_factor", 0.0), "scaling_factor"),
    "VAE scale below zero": (setting("vae/config.json", "scaling_factor", -0.5), "scaling_factor"),
    "VAE scale null": (setting("vae/config.json", "scaling_factor", None), "scaling_factor"),
    "VAE scale a text": (setting("vae/config.json", "scaling_factor", "1"), "scaling_factor"),
    "VAE scale true": (setting("vae/config.json", "scaling_factor", True), "scaling_factor"),
    "VAE with a shift": (setting("vae/config.json", "shift_factor", 0.1), "shift_factor"),
    "VAE with means": (setting("vae/config.json", "latents_mean", [0.1, 0.2, 0.3, 0.4]), "latents_mean"),
    "VAE with deviations": (setting("vae/config.json", "latents_std", [1.0, 2.0, 3.0, 4.0]), "latents_std"),
    "VAE of another model": (other_vae, "latent_channels"),
    "VAE other channels": (setting("vae/config.json", "latent_channels", 3), "of shape"),
}


def test_the_table_is_long_enough() -> None:
    assert len(BROKEN) >= 60


def test_what_is_broken_works_whole(copy: Path) -> None:
    assert load_checkpoint(copy).denoiser.num_classes == 3
    (copy / INDEX).unlink()
    assert load_checkpoint(copy).denoiser.num_classes == 3


def test_shards_are_read(copy: Path) -> None:
    sharded(lambda weight_map: None)(copy)
    assert load_checkpoint(copy).denoiser.num_classes == 3


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoint(name: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, named = BROKEN[name]
    damage(copy)
    with pytest.raises((BadCheckpoint, ValueError, FileNotFoundError), match=r"^checkpoint: got") as caught:
        load_checkpoint(copy)
    assert named in str(caught.value)
    assert not (copy / "exploded").exists()
    # The command line's line is that message; its other rows are in tests/cli.
    if name in ("missing weight", "index nested", "pickled weights"):
        capsys.readouterr()
        assert main(["classify", "--checkpoint", str(copy), "--images", str(copy), "--out", str(copy / "out")]) == 2


@pytest.mark.parametrize("name", ["missing weight", "NaN", "no layers", "config nested", "scheduler of flow matching"])
def test_broken_model_without_an_index(name: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The layout of `bigain train-tiny`: a model and its scheduler."""
    damage, named = BROKEN[name]
    damage(copy)
    (copy / INDEX).unlink()
    with pytest.raises(BadCheckpoint, match=r"^checkpoint: got") as caught:
        load_checkpoint(copy)
    assert named in str(caught.value)


def test_dit_is_known_under_the_name_of_its_publication(copy: Path) -> None:
    setting(INDEX, "transformer", ["diffusers", "Transformer2DModel"])(copy)
    assert load_checkpoint(copy).denoiser.num_classes == 3
    tensors(lambda state: state.pop(KEY))(copy)
    with pytest.raises(BadCheckpoint, match=KEY):
        load_checkpoint(copy)


def test_what_the_hub_gives_is_looked_at_as_any_folder(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiTPipeline.__mro__[1], "download", lambda source, **_: str(copy))
    assert load_checkpoint("owner/name").denoiser.num_classes == 3
    tensors(lambda state: state.pop(KEY))(copy)
    with pytest.raises(BadCheckpoint, match=KEY):
        load_checkpoint("owner/name")


def test_a_hub_that_cannot_be_reached_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(DiTPipeline.__mro__[1], "download", refuse)
    with pytest.raises(BadCheckpoint, match=r"^checkpoint: got owner/name, .*no network"):
        load_checkpoint("owner/name")


CLASSIFIER = "classifier.safetensors"
BROKEN_CLASSIFIERS: dict[str, tuple[Break, str]] = {
    "missing": (tensors(lambda s: s.pop("head.bias"), CLASSIFIER), "head.bias"),
    "unexpected": (tensors(lambda s: s.update(extra=torch.zeros(2)), CLASSIFIER), "extra"),
    "shape": (tensors(lambda s: s.update({"head.bias": torch.zeros(11)}), CLASSIFIER), "head.bias"),
    "NaN": (tensors(lambda s: s["head.bias"].fill_(torch.nan), CLASSIFIER), "head.bias"),
    "empty": (content(CLASSIFIER, b""), CLASSIFIER),
    "half": (cut(CLASSIFIER, 0.5), CLASSIFIER),
    "text": (content(CLASSIFIER, "no tensors at all"), CLASSIFIER),
    "directory": (directory(CLASSIFIER), CLASSIFIER),
    "loop": (loop(CLASSIFIER), CLASSIFIER),
    "pipe": (pipe(CLASSIFIER), CLASSIFIER),
    "gone": (gone(CLASSIFIER), CLASSIFIER),
}


@pytest.mark.parametrize("name", BROKEN_CLASSIFIERS)
def test_broken_classifier(name: str, tmp_path: Path) -> None:
    shutil.copy(TINY_DIT / CLASSIFIER, tmp_path / CLASSIFIER)
    damage, named = BROKEN_CLASSIFIERS[name]
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=r"^classifier: got") as caught:
        load_classifier(tmp_path)
    assert named in str(caught.value)
