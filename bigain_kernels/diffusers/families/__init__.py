"""The families of models whose attention can be compressed. To add one, here or in another package, see `Family`.

A family is an object: `register_family(MyFamily())` makes a kind of model known to `apply_token_compression` and to all
that stands on it. `PlainFamily` and `JointFamily` are bases for models with diffusers' usual layers,
`ReboundFamily` for all others whose processors attend by one of diffusers' two functions. An installed
package can name its families in the entry points of the group `ENTRY_POINTS`.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from torch import nn

from .allegro import Allegro
from .aura_flow import AuraFlow
from .chroma import Chroma
from .cogvideox import CogVideoX
from .cogview4 import CogView4
from .controlnet import FluxControlNet, QwenControlNet, SD3ControlNet, UNetControlNet
from .dit import DiT
from .family import Family, Layer, Place
from .flux import Flux
from .flux2 import Flux2
from .hidream import HiDream
from .hunyuan_dit import HunyuanDiT
from .hunyuan_video import HunyuanVideo
from .joint import JointFamily
from .latte import Latte
from .ltx import LTX
from .ltx2 import LTX2
from .lumina2 import Lumina2
from .pixart import PixArt
from .plain import PlainFamily
from .qwen import Qwen
from .rebound import ReboundFamily
from .sd3 import SD3
from .unet import UNet
from .wan import Wan
from .z_image import ZImage

# Where an installed package names its families: `name = "package.module:Family"`, the class.
ENTRY_POINTS = "bigain_kernels.families"

_LINEAR = "its attention is linear: every token costs the same, and there are no pairs to save"
# Models of diffusers that people ask for and that have no attention to compress, with the reason.
REFUSED = {
    "AnyFlowFARTransformer3DModel": "its attention runs under the block mask of flex attention, which is of all tokens",
    "DreamLiteUNetModel": "its attentions, in blocks of its own, have fewer key heads than query heads",
    "MochiTransformer3DModel": "its attentions let nobody replace their processors",
    "SanaTransformer2DModel": _LINEAR,
    "SanaVideoTransformer3DModel": _LINEAR,
}

_families: dict[type[nn.Module], Family] = {}


def register_family(family: Family) -> Family:
    """Make a family known by the class of its models; returns it.

    Raises:
        TypeError: it is no `Family`, or its model no class of modules.
        ValueError: its model has a family.
    """
    if not isinstance(family, Family):
        raise TypeError(f"family: got {family!r}, expected an instance of a class derived from Family")
    model = getattr(family, "model", None)
    if not (isinstance(model, type) and issubclass(model, nn.Module)):
        raise TypeError(f"family: got {type(family).__name__} with model {model!r}, expected a class of modules")
    if _families.get(model, family) is not family:
        raise ValueError(f"family: got {type(family).__name__}, {model.__name__} has {type(_families[model]).__name__}")
    _families[model] = family
    return family


def unregister_family(model: type[nn.Module]) -> None:
    """Forget the family of a class of models; ValueError if it has none."""
    if model not in _families:
        raise ValueError(f"model: got {model.__name__}, expected one of {[cls.__name__ for cls in _families]}")
    del _families[model]


def load_entry_points() -> None:
    """Register the families that installed packages name in the group `ENTRY_POINTS` of their entry points.

    Raises:
        ImportError: one of them cannot be imported.
        TypeError, ValueError: one of them is no family.
    """
    for point in entry_points(group=ENTRY_POINTS):
        try:
            found = point.load()
        except (ImportError, AttributeError) as error:
            raise ImportError(
                f"family: got the entry point {point.name} = {point.value!r}, expected a class derived from Family "
                f"({error})"
            ) from error
        if getattr(found, "model", None) not in _families or type(_families[found.model]) is not found:
            register_family(found())


def registered() -> tuple[Family, ...]:
    """All families, in the order in which they were registered."""
    return tuple(_families.values())


def family_of(model: Any) -> Family | None:
    """The family of a model, that of the nearest class it derives from, or None.

    One that is refused has none of a class behind it: it may derive from a class whose layers it replaced.
    """
    nearest = next((cls for cls in type(model).__mro__ if cls in _families or cls.__name__ in REFUSED), None)
    return _families.get(nearest) if nearest is not None else None


for _family in (
    UNet,
    DiT,
    PixArt,
    HunyuanDiT,
    Flux,
    Flux2,
    Chroma,
    SD3,
    Qwen,
    ZImage,
    Lumina2,
    AuraFlow,
    CogView4,
    HiDream,
    Wan,
    LTX,
    LTX2,
    HunyuanVideo,
    CogVideoX,
    Allegro,
    Latte,
    UNetControlNet,
    FluxControlNet,
    SD3ControlNet,
    QwenControlNet,
):
    register_family(_family())

__all__ = [
    "REFUSED",
    "Family",
    "JointFamily",
    "Layer",
    "Place",
    "PlainFamily",
    "ReboundFamily",
    "family_of",
    "load_entry_points",
    "register_family",
    "registered",
    "unregister_family",
]
