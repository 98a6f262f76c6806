"""Loading what the command line is pointed at: a model that we ship, a local diffusers folder, or a hub id."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any

import torch

from .denoisers import Denoiser, LabelDenoiser, PromptDenoiser, class_conditional, prediction_type
from .prompts import encode_prompts
from .strict_loading import (
    BadCheckpoint,
    check_finite,
    check_numbers,
    check_scheduler,
    check_vae,
    load_model,
    load_text_encoder,
    naming,
    read_config,
)
from .tiny_models import ASSETS, DigitClassifier

TINY_DIT = ASSETS / "tiny_dit"
# The models that come with the package, by the names that a checkpoint may be given by.
SHIPPED = {"tiny-dit": TINY_DIT, "mnist-unet": ASSETS / "mnist_unet", "mnist-dit": ASSETS / "mnist_dit"}
# Beside a U-Net, what stands for the prompts of its classes.
EMBEDDINGS = "embeddings.safetensors"
_PROMPTED = "UNet2DConditionModel"
MODEL_FOLDERS = ("transformer", "unet")
PIPELINES = ("DiTPipeline", "StableDiffusionPipeline", "StableDiffusionXLPipeline")
# What the parts of a pipeline may come from; "stable_diffusion" is diffusers' own name for its safety checker's.
LIBRARIES = ("diffusers", "transformers", "stable_diffusion")


@contextmanager
def _upcast(vae: Any) -> Iterator[None]:
    """A context in which a 16-bit VAE that overflows there (its config says `force_upcast`) computes in float32."""
    dtype = vae.dtype
    if dtype not in (torch.float16, torch.bfloat16) or not getattr(vae.config, "force_upcast", False):
        yield
        return
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(dtype)


@dataclass(frozen=True)
class Checkpoint:
    """A model that can classify and generate.

    Attributes:
        denoiser: see `Denoiser`.
        class_names: name of each class, in the order of the labels.
        image_shape: (channels, height, width) of its images.
        vae: decodes latents to images; None for models of pixels.
        aliases: further names of classes (ImageNet's have several), with their labels.
        prompted: of a text-to-image model, the same with other prompts for classes. Holds its text encoder.
    """

    denoiser: Denoiser
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    vae: Any = None
    aliases: dict[str, int] = field(default_factory=dict)
    prompted: Callable[[Sequence[str]], Checkpoint] | None = None

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.model.parameters()).device

    def fingerprint(self) -> str:
        """A hash of all that decides the numbers: weights of the denoiser and the VAE, prompts, and the schedule."""
        digest = hashlib.sha256()
        prompts = {name: value for name, value in vars(self.denoiser).items() if isinstance(value, torch.Tensor)}
        for part in (self.denoiser.model.state_dict(), {} if self.vae is None else self.vae.state_dict(), prompts):
            for name, value in part.items():
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
                content: Any = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                digest.update(content)
        digest.update(self.denoiser.scheduler.to_json_string().encode())
        return digest.hexdigest()[:16]

    def label_of(self, name: str, argument: str = "class") -> int:
        """The label of a class name, or of a number written out; `argument` is what the error is to name.

        Raises:
            ValueError: there is no such class.
        """
        if name in self.class_names:
            return self.class_names.index(name)
        if name in self.aliases:
            return self.aliases[name]
        # Ten digits are more than any model has classes; `int` itself refuses thousands of them in words of its own.
        if name.isascii() and name.isdigit() and len(name) <= 10 and int(name) < self.denoiser.num_classes:
            return int(name)
        some = ", ".join(self.class_names[:10]) + (", ..." if len(self.class_names) > 10 else "")
        raise ValueError(
            f"{argument}: got class {name!r}, expected one of {some} or a number below {self.denoiser.num_classes}"
        )

    @torch.no_grad()
    def encode(self, images: torch.Tensor, batch_size: int = 8) -> torch.Tensor:
        """Images (n, C, H, W) in [-1, 1] to what the model denoises, on its device. Latents are the mode: no noise."""
        if self.vae is None:
            return images.to(self.device)
        with _upcast(self.vae):
            latents = [
                self.vae.encode(part.to(self.device, self.vae.dtype)).latent_dist.mode().float()
                for part in images.split(batch_size)
            ]
        return torch.cat(latents) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, samples: torch.Tensor, batch_size: int = 8) -> torch.Tensor:
        """The inverse of `encode`: (n, C, H, W) images in about [-1, 1], float32 on the CPU."""
        if self.vae is None:
            return samples.float().cpu()
        with _upcast(self.vae):
            latents = (samples / self.vae.config.scaling_factor).to(self.vae.dtype)
            return torch.cat([self.vae.decode(part).sample.float().cpu() for part in latents.split(batch_size)])


def load_checkpoint(
    source: str | Path = TINY_DIT,
    *,
    class_names: Sequence[str] = (),
    template: str = "a photo of a {}",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    prompt_cache: Path | None = None,
) -> Checkpoint:
    """Load a checkpoint for classifying and generating.

    Args:
        source: a name of `SHIPPED`, a folder with `transformer/` or `unet/` and `scheduler/` (as `bigain train-tiny`
            writes), a pipeline folder with `model_index.json`, or the hub id of a pipeline. DiT, Stable Diffusion 1.x
            and 2.x, and SDXL; of model and scheduler alone, DiT, what `denoisers.register_denoiser` was told of, and a
            U-Net that has the embeddings of its classes in `embeddings.safetensors` beside it.
        class_names: the classes of a text-to-image model; a class-conditional model has its own and ignores them.
        template: prompt of a class of a text-to-image model; `{}` stands for the class name.
        device, dtype: where and in what the model runs.
        prompt_cache: folder for the embeddings of prompts, see `prompts.encode_prompts`.

    Raises:
        FileNotFoundError: `source` looks like a folder and holds no checkpoint, or is no hub id.
        ValueError: a model of another kind, or a text-to-image model without class names.
        ImportError: an optional package is missing; the message names it.
    """
    folder = SHIPPED.get(str(source), Path(source))
    if not folder.is_dir():
        if isinstance(source, Path) or str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
            raise FileNotFoundError(
                f"checkpoint: got {source}, expected {', '.join(SHIPPED)}, a folder or a hub id such as owner/name"
            )
        return _from_pipeline(str(source), class_names, template, device, dtype, prompt_cache)
    if (folder / "model_index.json").exists():
        return _from_pipeline(str(folder), class_names, template, device, dtype, prompt_cache)
    return _from_parts(folder, device, dtype)


def _from_parts(folder: Path, device: torch.device | str, dtype: torch.dtype) -> Checkpoint:
    from ..diffusers import families

    parts = [name for name in MODEL_FOLDERS if (folder / name / "config.json").exists()]
    if not parts or not (folder / "scheduler" / "scheduler_config.json").exists():
        raise FileNotFoundError(
            f"checkpoint: got {folder}, expected model_index.json, or a folder transformer/ or unet/ beside scheduler/"
        )
    path = folder / parts[0] / "config.json"
    kind = read_config(path).get("_class_name")
    families.load_entry_points()
    known = class_conditional()
    if kind == _PROMPTED and (folder / EMBEDDINGS).exists():
        known[kind] = _model_classes()[kind], partial(_class_denoiser, folder / EMBEDDINGS)
    if kind not in known:
        raise ValueError(
            f"checkpoint: got {kind} without a pipeline in {path}, expected {' or '.join(known)} (any other needs its "
            "text encoder or VAE, hence a whole pipeline with model_index.json)"
        )
    cls, make = known[kind]
    scheduler = _scheduler(folder / "scheduler")
    model = load_model(cls, folder / parts[0], dtype)
    with naming(path, f"a {kind} that takes class labels"):
        denoiser = make(model.to(device).eval(), scheduler)
    return Checkpoint(denoiser, tuple(map(str, range(denoiser.num_classes))), denoiser.sample_shape)


def _class_denoiser(path: Path, model: Any, scheduler: Any) -> PromptDenoiser:
    """A U-Net whose classes have embeddings in a file, which hold the place of those of prompts."""
    from safetensors.torch import load_file

    with naming(path, "a file of one tensor `embeddings` (classes + 1, tokens, width) as wide as the U-Net asks for"):
        embeddings = load_file(path)["embeddings"]
        if embeddings.ndim != 3 or len(embeddings) < 2 or embeddings.shape[2] != model.config.cross_attention_dim:
            raise ValueError(f"shape {tuple(embeddings.shape)}")
        if not (embeddings.is_floating_point() and bool(embeddings.isfinite().all())):
            raise ValueError("values that are not finite numbers")
    return PromptDenoiser(model, scheduler, embeddings.to(model.device))


def _scheduler(folder: Path) -> Any:
    """The schedule of a scheduler folder as a DDPMScheduler."""
    import diffusers

    path = folder / "scheduler_config.json"
    config = read_config(path)
    check_numbers(path, config)
    cls: Any = getattr(diffusers, str(config.get("_class_name")), None)
    if diffusers.SchedulerMixin not in getattr(cls, "__mro__", ()):
        raise BadCheckpoint(
            f"checkpoint: got {config.get('_class_name')!r} in {path}, expected a scheduler of diffusers"
        )
    with naming(path, f"the config of a {cls.__name__}"):
        named = cls.from_config(config)
        check_scheduler(named, path)
        scheduler = diffusers.DDPMScheduler.from_config(config)
        check_scheduler(scheduler, path)
        prediction_type(scheduler)
    # What the file leaves out has another default in another class. With zero terminal SNR some keep 2^-24 of it.
    if not torch.allclose(named.alphas_cumprod, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6):
        raise BadCheckpoint(
            f"checkpoint: got the noise schedule of {cls.__name__} in {path}, expected one that DDPMScheduler has too: "
            "beta_start, beta_end and beta_schedule written out"
        )
    return scheduler


def _model_classes() -> dict[str, Any]:
    """The models that are loaded, by the names that indices have for them."""
    import diffusers

    classes = (diffusers.DiTTransformer2DModel, diffusers.UNet2DConditionModel, diffusers.AutoencoderKL)
    # The name under which DiT was published.
    return {cls.__name__: cls for cls in classes} | {"Transformer2DModel": diffusers.DiTTransformer2DModel}


def _check_index(folder: Path) -> None:
    """A pipeline of a kind that we load, made of parts of diffusers and transformers alone: no code of its own."""
    path = folder / "model_index.json"
    index = read_config(path)
    if index.get("_class_name") not in PIPELINES:
        raise BadCheckpoint(
            f"checkpoint: got {index.get('_class_name')!r} in {path}, expected a DiT or Stable Diffusion pipeline, one "
            f"of {list(PIPELINES)}"
        )
    known_models = _model_classes()
    for name, part in index.items():
        if not isinstance(part, list):
            continue
        if name in ("transformer", "unet", "vae") and part[1:] not in [[kind] for kind in known_models]:
            raise BadCheckpoint(f"checkpoint: got {name}={part!r} in {path}, expected one of {list(known_models)}")
        known = len(part) == 2 and (part == [None, None] or part[0] in LIBRARIES)
        if not known or not isinstance(part[1], (str, type(None))):
            raise BadCheckpoint(f"checkpoint: got {name}={part!r} in {path}, expected a class of {list(LIBRARIES)}")


def _loaded_parts(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The models of a local pipeline that diffusers would load without a word on what their files lack."""
    known = _model_classes()
    index = read_config(folder / "model_index.json")
    found = {name: part[1] for name, part in index.items() if isinstance(part, list) and part[1] in known}
    parts = {name: load_model(known[kind], folder / name, dtype) for name, kind in found.items()}
    for name, part in index.items():
        if isinstance(part, list) and part[0] == "transformers" and str(part[1]).startswith("CLIPTextModel"):
            parts[name] = load_text_encoder(part[1], folder / name, dtype)
    return parts


def _from_pipeline(
    source: str,
    class_names: Sequence[str],
    template: str,
    device: torch.device | str,
    dtype: torch.dtype,
    prompt_cache: Path | None,
) -> Checkpoint:
    import diffusers

    folder = Path(source)
    if not folder.is_dir():
        # What comes from the hub is a stranger's as well: it is looked at on disk before it is loaded.
        with naming(source, "the hub id of a pipeline that can be downloaded"):
            folder = Path(diffusers.DiffusionPipeline.download(source, use_safetensors=True))
    _check_index(folder)
    # Without transformers diffusers fails on an attribute that has nothing to do with it.
    listed = read_config(folder / "model_index.json").values()
    if any(isinstance(part, list) and part[0] == "transformers" for part in listed) and not util.find_spec(
        "transformers"
    ):
        raise ImportError(f"checkpoint: got {source}, whose text encoder needs: pip install transformers")
    if (folder / "scheduler" / "scheduler_config.json").exists():
        _scheduler(folder / "scheduler")
    parts = _loaded_parts(folder, dtype)
    with naming(source, "a whole pipeline of diffusers"):
        pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder), dtype=dtype, use_safetensors=True, **parts)
        pipe = pipe.to(device)
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            check_finite(part, f"{name} of {source}")
    check_scheduler(pipe.scheduler, source)
    with naming(source, "a pipeline whose parts belong together"):
        return _of_pipeline(pipe, source, class_names, template, prompt_cache)


def _of_pipeline(
    pipe: Any, source: str, class_names: Sequence[str], template: str, prompt_cache: Path | None
) -> Checkpoint:
    import diffusers

    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    if isinstance(getattr(pipe, "transformer", None), diffusers.DiTTransformer2DModel):
        denoiser: Denoiser = LabelDenoiser(pipe.transformer.eval(), scheduler)
        aliases = dict(pipe.labels)
        first = {label: name for name, label in reversed(aliases.items())}
        names = tuple(first.get(label, str(label)) for label in range(denoiser.num_classes))
    elif isinstance(getattr(pipe, "unet", None), diffusers.UNet2DConditionModel):
        if not class_names:
            raise BadCheckpoint("class_names: got none, expected the classes a text-to-image model is to tell apart")
        prompts = [template.replace("{}", name) for name in class_names]
        denoiser = _prompt_denoiser(pipe, scheduler, prompts, prompt_cache)
        names, aliases = tuple(class_names), {}
    else:
        raise BadCheckpoint(f"checkpoint: got a {type(pipe).__name__}, expected a DiT or Stable Diffusion pipeline")
    channels, height, width = denoiser.sample_shape
    check_vae(pipe.vae, channels, source)
    scale = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    shape = (pipe.vae.config.in_channels, height * scale, width * scale)
    loaded = Checkpoint(denoiser, names, shape, pipe.vae, aliases)
    if not isinstance(denoiser, PromptDenoiser):
        return loaded

    def prompted(prompts: Sequence[str]) -> Checkpoint:
        other = _prompt_denoiser(pipe, scheduler, list(prompts), prompt_cache)
        return replace(loaded, denoiser=other, class_names=tuple(prompts))

    return replace(loaded, prompted=prompted)


def _prompt_denoiser(pipe: Any, scheduler: Any, prompts: list[str], cache: Path | None = None) -> PromptDenoiser:
    encoded = encode_prompts(pipe, [*prompts, ""], cache)
    if "pooled" not in encoded:
        return PromptDenoiser(pipe.unet.eval(), scheduler, encoded["embeddings"])
    # SDXL: pooled embeddings, and the original size, crop corner and target size of an uncropped image.
    size, scale = pipe.unet.config.sample_size, 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    height, width = (float(side * scale) for side in ((size, size) if isinstance(size, int) else size))
    time_ids = torch.tensor([height, width, 0.0, 0.0, height, width])
    embeddings, pooled = encoded["embeddings"], encoded["pooled"]
    if pipe.config.get("force_zeros_for_empty_prompt", False):
        # Trained with zeros in the place of no prompt, not with the embedding of the empty one.
        embeddings, pooled = (torch.cat([e[:-1], torch.zeros_like(e[-1:])]) for e in (embeddings, pooled))
    return PromptDenoiser(pipe.unet.eval(), scheduler, embeddings, pooled=pooled, time_ids=time_ids)


def load_classifier(folder: Path = TINY_DIT) -> DigitClassifier:
    """The digit classifier kept as `folder/classifier.safetensors`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is damaged, or of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / "classifier.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"classifier: got {path}, expected the file that `bigain train-tiny` writes")
    model = DigitClassifier()
    try:
        model.load_state_dict(load_file(path))
        check_finite(model, path)
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        raise ValueError(
            f"classifier: got {path}, expected the file that `bigain train-tiny` writes ({error})"
        ) from error
    model.eval()
    return model
