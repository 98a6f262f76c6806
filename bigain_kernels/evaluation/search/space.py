"""What a search chooses from: groups of blocks, and what each may be given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...methods import CompressionConfig, MergeConfig, MixedConfig, config_class
from ...methods.mixed import Compression
from ...methods.options import LEVELS
from ...methods.registry import load_entry_points, make_config, names, options_of

# Merging that weighs keys by size, and pooling: the methods of BiGain.
METHODS = ("lgtm", "iekvd")
RATIOS, ALPHAS = (0.3, 0.5, 0.7), (0.0, 0.5, 0.9, 1.0)
# Half of the keys, a quarter, a sixteenth: what each block bears differs by more than the step from one to the next.
FACTORS: tuple[int | tuple[int, ...], ...] = ((1, 2), 2, 4)
PER = ("block", "level")


@dataclass(frozen=True)
class Group:
    """Blocks that are compressed alike.

    Attributes:
        name: "block 3" or "level 2".
        blocks: their indices.
        level: the deepest of their resolution levels.
        shape: groups of equal shapes do the same arithmetic, and take the same time.
    """

    name: str
    blocks: tuple[int, ...]
    level: int
    shape: tuple[Any, ...]

    def config(self, candidate: CompressionConfig) -> CompressionConfig:
        """`candidate` in these blocks alone."""
        return replace(candidate, blocks=self.blocks, max_downsample=self.level)


def groups_of(model: torch.nn.Module, per: str = "block") -> list[Group]:
    """The groups of the blocks of a model whose self-attention can be compressed.

    Args:
        model: of a family that is known.
        per: "block", each by itself, or "level", all blocks of a resolution level of a U-Net together.

    Raises:
        TypeError: the model is of no such family.
        ValueError: no block of it can be compressed, or `per` is neither.
    """
    from ...diffusers import LGTMConfig, token_compression
    from ...diffusers.finding import find_model

    if per not in PER:
        raise ValueError(f"per: got {per!r}, expected one of {list(PER)}")
    with token_compression(model, LGTMConfig(max_downsample=max(LEVELS))) as report:
        patched = {row.name for row in report.patched}
    found, family = find_model(model)
    by_block: dict[int, list[Any]] = {}
    for layer in family.layers(found):
        if layer.name in patched:
            by_block.setdefault(layer.index, []).append(layer)
    groups: dict[Any, Group] = {}
    for index, layers in by_block.items():
        level = layers[0].level
        shape = tuple(
            (level, name, tuple(parameter.shape))
            for layer in layers
            for name, parameter in layer.attn.named_parameters()
        )
        key = index if per == "block" else level
        before = groups.get(key, Group(f"{per} {key}", (), level, ()))
        groups[key] = replace(before, blocks=(*before.blocks, index), shape=before.shape + shape)
    return [groups[key] for key in sorted(groups)]


def candidates_of(
    methods: Sequence[str] = METHODS,
    ratios: Sequence[float] = RATIOS,
    factors: Sequence[int | tuple[int, ...]] = FACTORS,
    alphas: Sequence[float] = ALPHAS,
    seed: int = 0,
) -> list[CompressionConfig]:
    """What a group may be given besides nothing.

    Args:
        methods: by name, those of other packages too.
        ratios: of methods that merge, which weigh keys by size (`proportional`).
        factors: of methods that pool; one for all axes of the grid, or one for each.
        alphas: of those that have one.
        seed: of those that choose at random.

    Raises:
        ValueError: there is no such method, a value is out of range, or nothing is left to choose from.
    """
    load_entry_points()
    unknown = [method for method in methods if method not in names()]
    if unknown:
        raise ValueError(f"methods: got {unknown[0]!r}, expected some of {list(names())}")
    found: list[CompressionConfig] = []
    for method in dict.fromkeys(methods):
        options = options_of(method)
        rows: list[dict[str, Any]]
        if issubclass(config_class(method), MergeConfig):
            rows = [{"ratio": ratio, "proportional": True} for ratio in ratios]
        elif "alpha" in options:
            rows = [{"factor": factor, "alpha": alpha} for factor in factors for alpha in alphas]
        else:
            rows = [{"factor": factor} for factor in factors]
        for row in rows:
            config = make_config(method, {**row, "seed": seed} if "seed" in options else row)
            assert config is not None
            found.append(config)
    if not found:
        raise ValueError(f"methods: got {list(methods)}, expected at least one with a ratio or factor")
    return list(dict.fromkeys(found))


def put_together(chosen: Sequence[tuple[Group, CompressionConfig]]) -> Compression:
    """One config of what groups are given, at least one; groups that are given the same share a part of it."""
    by_candidate: dict[CompressionConfig, list[Group]] = {}
    for group, candidate in chosen:
        by_candidate.setdefault(candidate, []).append(group)
    parts = [
        replace(
            candidate,
            blocks=tuple(sorted(block for group in groups for block in group.blocks)),
            max_downsample=max(group.level for group in groups),
        )
        for candidate, groups in by_candidate.items()
    ]
    return parts[0] if len(parts) == 1 else MixedConfig(tuple(parts))


def everywhere(groups: Sequence[Group], candidate: CompressionConfig) -> CompressionConfig:
    """The same in all groups."""
    config = put_together([(group, candidate) for group in groups])
    assert isinstance(config, CompressionConfig)
    return config
