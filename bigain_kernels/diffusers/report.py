"""What `apply_token_compression` did."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..methods import CompressionConfig, MixedConfig
from ..methods.mixed import Compression


@dataclass(frozen=True)
class Decision:
    """One attention layer and what was decided on it.

    Attributes:
        name: path of the layer in the model.
        kind: "attn1" or "attn2".
        block: index of its transformer block in module order, as the configs' `blocks` counts.
        patched: whether it is compressed.
        reason: why, or why not.
        path: how it is computed, "" where it is not compressed. "merge tokens" (hidden states) or "merge queries, keys
            and values" (after norm and rotation), both perhaps with ", weigh keys by size". "pooled projection"
            (pooling and both projections in one op), "pool, then project" (its projections are more than plain linear
            layers, or its hidden states hold text too), "project, then pool" (before norm and rotation, behind fused
            projections), "pool keys and values" (after projection, norm and rotation). This is the state when
            compression was applied: a layer that LoRA wraps later takes the path that is right for it.
        config: what compresses it, None where it is not compressed.
    """

    name: str
    kind: str
    block: int
    patched: bool
    reason: str
    path: str = ""
    config: CompressionConfig | None = None


@dataclass(frozen=True)
class CompressionReport:
    """The attention layers of a model and what was decided on each; `str()` is a table for people.

    Attributes:
        model: class name of the patched model; where a pipeline has two, with the attribute that holds it.
        config: the config that was applied, with the `num_train_timesteps` of the pipeline's scheduler.
        rows: one `Decision` per attention layer, in module order.
    """

    model: str
    config: Compression
    rows: tuple[Decision, ...]

    @property
    def patched(self) -> tuple[Decision, ...]:
        """The layers that are compressed."""
        return tuple(row for row in self.rows if row.patched)

    def within(self, name: str) -> CompressionReport:
        """The same with the attribute of the pipeline that holds the model, in front of the names of its layers."""
        if not name:
            return self
        rows = (replace(row, name=f"{name}.{row.name}") for row in self.rows)
        return replace(self, model=f"{self.model} ({name})", rows=tuple(rows))

    def __str__(self) -> str:
        shown = [row for row in self.rows if row.kind in self.config.modules]
        lines = [f"{type(self.config).__name__} on {self.model}: {len(self.patched)} of {len(shown)} layers patched"]
        mixed = isinstance(self.config, MixedConfig)
        width = max((len(row.name) for row in shown), default=0)
        lines += [
            f"  {row.block:3d}  {row.name:<{width}}  {'patched' if row.patched else '-':<7}  {row.reason}"
            + (f"; {row.path}" if row.path else "")
            + (f"; {row.config.brief()}" if row.config and mixed else "")
            for row in shown
        ]
        if len(shown) < len(self.rows):
            lines.append(f"  and {len(self.rows) - len(shown)} layers left alone by modules={self.config.modules}")
        return "\n".join(lines)


def joined(reports: list[CompressionReport]) -> CompressionReport:
    """One report of the models of a pipeline, which share the config."""
    rows = tuple(row for report in reports for row in report.rows)
    return replace(reports[0], model=" and ".join(report.model for report in reports), rows=rows)
