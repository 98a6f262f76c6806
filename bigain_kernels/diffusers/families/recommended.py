"""What to begin with, by kind of model: a config, the reason for it, and where it was measured, if it was."""

from __future__ import annotations

from typing import NamedTuple

from ...methods import CompressionConfig, IEKVDConfig, LGTMConfig


class Recommendation(NamedTuple):
    """What to begin with.

    Attributes:
        config: to apply.
        reason: for it, in one sentence or two.
        measured: what of it was measured in this repository, and where it stands; "" where nothing was.
    """

    config: CompressionConfig
    reason: str
    measured: str = ""


MERGE_UNET = Recommendation(
    LGTMConfig(ratio=0.5, proportional=True),
    "Half of the tokens, as tomesd does by default, at the first level that has attention (SDXL: `max_downsample=2`); "
    "merged keys count as often as the tokens they stand for.",
    "costs next to nothing in the demo's small U-Net: docs/demo.md, What it says",
)
MERGE_DIT = Recommendation(
    LGTMConfig(ratio=0.5, proportional=True),
    "All layers have one resolution and no rotation: projections see half of the tokens as well.",
    "costs much in all blocks of the demo's small DiT, little in its first and last alone: docs/demo.md, What it says",
)
MERGE_PIXART = Recommendation(MERGE_DIT.config, MERGE_DIT.reason + " Text is in cross-attention, which stays as it is.")
POOL = Recommendation(
    IEKVDConfig(factor=2, alpha=0.9),
    "Every token keeps its own query and its own result, text stays whole, nothing is matched, and a quarter of the "
    "image's keys is left; 0.9 is the alpha of the method's authors.",
)
POOL_VIDEO = Recommendation(
    POOL.config,
    "With tens of thousands of tokens attention is most of the arithmetic, and a quarter of the keys is a quarter of "
    "it; planning would cost with every frame, pooling costs one pass.",
)
