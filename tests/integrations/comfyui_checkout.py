# ruff: noqa: T201, E402
"""The nodes in ComfyUI itself: `python comfyui_checkout.py CHECKOUT` loads them as it does and samples with tiny ones.

A process of its own: ComfyUI's modules have names like `nodes` and `utils`. Prints a line for each thing shown.
"""

from __future__ import annotations

import asyncio
import copy
import importlib.machinery
import json
import sys
import tempfile
import types
from pathlib import Path

CHECKOUT, NODES = sys.argv[1], Path(__file__).parents[2] / "integrations" / "comfyui"
sys.argv = ["main.py", "--cpu", "--use-pytorch-cross-attention"]
sys.path.insert(0, CHECKOUT)


class Anything(types.ModuleType):
    """A package of which nothing is used here."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self, *args, **kwargs: None})


try:
    import torchvision  # noqa: F401
except (ImportError, RuntimeError):  # none, or one of another build than torch
    import transformers.utils.import_utils as asks

    asks.is_torchvision_available()  # keeps its answer, no
    for name in ("", ".transforms", ".transforms.functional", ".ops", ".models"):
        module = sys.modules[f"torchvision{name}"] = Anything(f"torchvision{name}")
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)

import comfy.options

comfy.options.enable_args_parsing()

import comfy.ldm.flux.model
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import execution
import folder_paths
import nodes
import torch

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "use_spatial_transformer": True,
    "context_dim": 16,
    "num_heads": 2,
    "use_linear_in_transformer": False,
    "legacy": False,
    "use_temporal_attention": False,
    "adm_in_channels": None,
    "dtype": torch.float32,
}
FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 12,
    "context_in_dim": 16,
    "hidden_size": 64,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [8, 12, 12],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": False,
    "dtype": torch.float32,
}
if "txt_ids_dims" in comfy.ldm.flux.model.FluxParams.__dataclass_fields__:  # newer ones ask for it
    FLUX["txt_ids_dims"] = []


def tiny(config):
    model = config.get_model({}, "", device="cpu")
    torch.manual_seed(0)
    for parameter in model.diffusion_model.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def sample(model, latent, width, pooled=0, steps=3):
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randn(1, 7, width, generator=generator) for _ in range(2)]
    extra = {"pooled_output": torch.randn(1, pooled, generator=generator)} if pooled else {}
    conditions = [[[text, extra]] for text in texts]
    made = nodes.common_ksampler(model, 3, steps, 4.0, "euler", "normal", *conditions, {"samples": latent})
    return made[0]["samples"]


def show(name, model, *given):
    """What the nodes do to a model of this kind."""
    merge, pool, remove = (nodes.NODE_CLASS_MAPPINGS[f"BiGain{kind}"].execute for kind in ("LGTM", "IEKVD", "Remove"))

    def run(model):
        return sample(model, *given)

    plain = run(model)
    scale = float(plain.abs().max())
    for label, node in (
        ("ratio 0", merge(model, 0.0, 0.0, 1.0, 1)),
        ("factor 1", pool(model, 1, 0.9, 0.0, 1.0, 1)),
        ("too few tokens", merge(model, 0.5, 0.0, 1.0, 1 << 20)),
        ("removed", remove(merge(model, 0.5, 0.0, 1.0, 1).args[0])),
    ):
        error = float((run(node.args[0]) - plain).abs().max())
        assert error <= 1e-5 * scale, (name, label, error, scale)
        print(f"{name}, {label}: as without the node ({error:.1e} of {scale:.1e})")
    merged, pooled = (run(node.args[0]) for node in (merge(model, 0.5, 0.0, 1.0, 1), pool(model, 2, 0.9, 0.0, 1.0, 1)))
    late = run(merge(model, 0.5, 0.5, 1.0, 1).args[0])
    for label, result in (("merged", merged), ("pooled", pooled), ("merged in the second half", late)):
        assert result.isfinite().all()
        assert not torch.equal(result, plain), (name, label)
        print(f"{name}, {label}: differs by {float((result - plain).abs().max()):.1e}")
    assert not torch.equal(late, merged)
    assert torch.equal(run(merge(pool(model, 2, 0.9, 0.0, 1.0, 1).args[0], 0.5, 0.0, 1.0, 1).args[0]), merged)
    print(f"{name}: a second node takes the place of the first")
    assert torch.equal(run(model), plain)
    print(f"{name}: the model itself is as it was")


def validated(workflow):
    """What ComfyUI says of a prompt before it runs it: whether it is valid, and errors by node."""
    valid, _, _, errors = asyncio.run(execution.validate_prompt("1", copy.deepcopy(workflow), None))
    return valid, errors


def show_the_workflow():
    """The shipped one is valid as it stands, and stays so with the other nodes; what is wrong in it is found."""
    workflow = json.loads((NODES / "workflow.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / workflow["1"]["inputs"]["ckpt_name"]).touch()
        folder_paths.add_model_folder_path("checkpoints", folder)
        assert validated(workflow) == (True, {}), validated(workflow)
        ours = workflow["5"]["inputs"]
        others = {name: ours[name] for name in ("model", "start_percent", "end_percent", "min_tokens")}
        for name, inputs in (
            ("BiGainIEKVD", {**others, "factor": 2, "alpha": 0.9}),
            ("BiGainRemove", {"model": ours["model"]}),
        ):
            assert validated({**workflow, "5": {"class_type": name, "inputs": inputs}}) == (True, {}), name
        for name, value in (("ratio", 0.9), ("ratio", None), ("min_tokens", "many"), ("model", ["4", 0])):
            wrong = {key: each for key, each in {**ours, name: value}.items() if each is not None}
            _, errors = validated({**workflow, "5": {"class_type": "BiGainLGTM", "inputs": wrong}})
            assert [each["extra_info"]["input_name"] for each in errors["5"]["errors"]] == [name], (name, errors)
    print("the workflow is valid")


asyncio.run(nodes.load_custom_node(str(NODES)))
assert {"BiGainLGTM", "BiGainIEKVD", "BiGainRemove"} <= set(nodes.NODE_CLASS_MAPPINGS)
for node in ("BiGainLGTM", "BiGainIEKVD", "BiGainRemove"):
    nodes.NODE_CLASS_MAPPINGS[node].INPUT_TYPES()
print("three nodes loaded")
show_the_workflow()
with torch.no_grad():
    show("SD1", tiny(comfy.supported_models.SD15(UNET)), torch.zeros(1, 4, 16, 24), 16)
    xl = UNET | {
        "transformer_depth": [0, 2],
        "transformer_depth_middle": 2,
        "num_classes": "sequential",
        "adm_in_channels": 2816,
    }
    xl |= {"transformer_depth_output": [0, 0, 2, 2], "use_linear_in_transformer": True}
    show("SDXL", tiny(comfy.supported_models.SDXL(xl)), torch.zeros(1, 4, 16, 24), 16, 1280)
    show("Flux", tiny(comfy.supported_models.FluxSchnell(FLUX)), torch.zeros(1, 16, 15, 20), 16, 12)
