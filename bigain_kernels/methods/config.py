"""What the configs of all methods share: where and when to compress, and what merging and pooling take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from ..ops.token_merge import MODES
from ..plan import MergePlan
from .options import (
    LEVELS,
    ByLevel,
    Choice,
    Count,
    Flag,
    Indices,
    Level,
    Names,
    Number,
    Pair,
    PerLevel,
    Scheduled,
    check_range,
    kind_of,
    option,
)

Schedule = float | tuple[float, float]
Window = int | tuple[int, int]

DEFAULT_TRAIN_TIMESTEPS = 1000
# Options of which `brief` speaks never, and always.
_WHERE = ("max_downsample", "blocks", "num_train_timesteps")
_HOW_MUCH = ("ratio", "factor", "alpha")


@dataclass(frozen=True, kw_only=True)
class CompressionConfig:
    """Where and when to compress; the base of every method's config, not one itself.

    A method's config names its method in `method`, declares its options as fields, and is made known by
    `bigain_kernels.methods.register`. It derives from `MergeConfig` or `PoolConfig`.

    Args:
        max_downsample: deepest resolution level of a U-Net to compress: 1 is that of its latents, 2 half of it too,
            then 4 and 8. Transformers have one level and ignore it. Where a ratio or factor names its levels, those
            are compressed and this is left out.
        min_tokens: image tokens, of all frames of a video, from which on a layer is compressed. Fewer run as they are:
            the first pass of a picture that is enlarged later can stay whole.
        blocks: indices of the transformer blocks to compress, counted in module order; by default all. The report of
            `apply_token_compression` lists them. A U-Net block must also pass `max_downsample`.
        start: fraction of the noise schedule at which compression begins: 0 is the noisiest timestep. For flow-matching
            models (Flux, Qwen-Image, Stable Diffusion 3) it is a fraction of sigma, which a shifted schedule does not
            pass evenly.
        end: fraction of the noise schedule at which it ends, at least `start`: 1 is the cleanest timestep. Both ends
            are included.
        modules: which layers of a block: "attn1", self-attention, and, for merge methods, "attn2", cross-attention, and
            "ff", the MLP. Joint attention counts as self-attention. With "ff" all of them share the plan of the first.
        num_train_timesteps: length T of the noise schedule that `start`, `end` and schedules refer to. None is that of
            the pipeline's scheduler, and 1000 for a bare model.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of its range.
    """

    method: ClassVar[str] = ""

    max_downsample: int = option(1, Level(LEVELS))
    min_tokens: int = option(1, Count(1))
    blocks: tuple[int, ...] | None = option(None, Indices())
    start: float = option(0.0, Number(0.0, 1.0))
    end: float = option(1.0, Number(0.0, 1.0))
    modules: tuple[str, ...] = option(("attn1",), Names(("attn1", "attn2", "ff")))
    num_train_timesteps: int | None = option(None, Count(2))

    def __post_init__(self) -> None:
        if not self.method:
            raise TypeError(f"config: got {type(self).__name__}, expected the config of a method, such as LGTMConfig")
        for declared in fields(self):
            kind, value = kind_of(declared), getattr(self, declared.name)
            if kind is not None and not (value is None and declared.default is None):
                object.__setattr__(self, declared.name, kind.check(declared.name, value))
        if self.start > self.end:
            raise ValueError(f"start: got {self.start}, expected at most end, {self.end}")
        if self.levels is not None and self.max_downsample != 1:
            raise ValueError(
                f"max_downsample: got {self.max_downsample} with values for the levels {list(self.levels)}, expected "
                "it left out: those levels are compressed"
            )

    @property
    def by_level(self) -> Any:
        """The option that may have a value for each resolution level: `ratio` or `factor`."""
        raise NotImplementedError(f"{type(self).__name__}.by_level")

    @property
    def levels(self) -> tuple[int, ...] | None:
        """The resolution levels that are compressed, where the config names them one by one."""
        return tuple(self.by_level) if isinstance(self.by_level, ByLevel) else None

    def compresses(self, level: int) -> bool:
        """Whether a resolution level is compressed."""
        return level <= self.max_downsample if self.levels is None else level in self.levels

    @property
    def has_window(self) -> bool:
        """Whether some timesteps are left uncompressed."""
        return self.start > 0.0 or self.end < 1.0

    @property
    def train_timesteps(self) -> int:
        """T, the length of the noise schedule."""
        return self.num_train_timesteps or DEFAULT_TRAIN_TIMESTEPS

    @property
    def is_random(self) -> bool:
        """Whether the method draws random numbers, which vary over blocks and timesteps."""
        return False

    def brief(self) -> str:
        """What it does to a layer, in words: the method, how much, and options that are not those of the method."""
        words = [self.method]
        for declared in fields(self):
            name, value = declared.name, getattr(self, declared.name)
            kind = kind_of(declared)
            if kind is None or name in _WHERE or (value == declared.default and name not in _HOW_MUCH):
                continue
            words.append(name if value is True else f"{name}={kind.show(value)}")
        return " ".join(words)

    def settings(self) -> dict[str, Any]:
        """The method and the value of every option, to be written down."""
        return {"method": self.method, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class MergeConfig(CompressionConfig):
    """What the merge methods share, besides the arguments of `CompressionConfig`.

    Args:
        ratio: fraction of the tokens to remove, at most 1 - 1 / (sy * sx); or (first, last), over the timesteps; or one
            of these by resolution level, {1: 0.7, 2: 0.5}. A pair moves linearly from the first denoising step
            (t = T - 1) to the last (t = 0). It needs the timestep on the host (one read per forward pass) and one
            timestep for the whole batch, because it changes shapes. Levels are those of `max_downsample`; those that
            are not named are not compressed.
        stride: tile with one destination, (sy, sx) tokens in (rows, columns).
        merge: where: "hidden" merges hidden states before the projections and copies results back behind the output, so
            that all between sees fewer tokens; "attention" merges queries, keys and values after norm and rotation,
            which every family offers and which saves attention alone. "auto" is "hidden" where the family of the model
            offers it.
        mode: how tokens become one: "mean", "mlerp" or "prune". See `bigain_kernels.token_merge`.
        proportional: weigh every merged key of self-attention by the number of tokens it stands for. This is
            proportional attention (Bolya et al. 2022, arXiv 2210.09461): the result is that of attention over all N
            tokens of which each merged one is a copy. Cross-attention has no merged keys and no weights.
        cached_assignment: the first compressed block of a resolution plans, and the later ones of the same forward pass
            use its plan. Nothing is kept between forward passes.
        share_plan: k plans once for every k rows of the batch that belong together, from their mean hidden state. None
            plans for every row. Sharing lapses, every row gets its own plan, where the batch is no multiple of k, and
            in a pipeline that says it runs another number of conditions than k at that step (guidance that is off or
            ends in mid-run, a guider that calls once for each condition), and in a copy of such a pipeline's model. A
            bare model cannot know.
        share_order: how rows that belong together stand in the batch: "cat", as `torch.cat([uncond, cond])` puts them,
            row b with b + B / k (also class-major classifier batches); or "interleave", as `repeat_interleave` does,
            k neighbours.
    """

    ratio: float | tuple[float, float] | Mapping[int, float | tuple[float, float]] = option(0.5, PerLevel(Scheduled()))
    stride: tuple[int, int] = option((2, 2), Pair())
    merge: str = option("auto", Choice(("auto", "hidden", "attention")))
    mode: str = option("mean", Choice(MODES))
    proportional: bool = option(False, Flag())
    cached_assignment: bool = option(False, Flag())
    share_plan: int | None = option(None, Count(1))
    share_order: str = option("cat", Choice(("cat", "interleave")))

    def __post_init__(self) -> None:
        super().__post_init__()
        sy, sx = self.stride
        for ratio in self.ratio.values() if isinstance(self.ratio, Mapping) else (self.ratio,):
            for value in ratio if isinstance(ratio, tuple) else (ratio,):
                why = f", one token of every {sy} x {sx} tile stays"
                check_range("ratio", value, 0.0, 1.0 - 1.0 / (sy * sx), why)

    @property
    def by_level(self) -> Schedule | Mapping[int, Schedule]:
        return self.ratio

    def ratio_at(self, level: int) -> Schedule:
        """The ratio of a resolution level, 0 of one that is not compressed."""
        return self.ratio.get(level, 0.0) if isinstance(self.ratio, Mapping) else self.ratio

    @property
    def is_scheduled(self) -> bool:
        """Whether a ratio depends on the timestep."""
        return any(isinstance(self.ratio_at(level), tuple) for level in self.levels or (1,))

    @property
    def spans_frames(self) -> bool:
        """Whether the frames of a video are planned together; otherwise each is planned as a picture."""
        return False

    def plan(self, x: Tensor, grid: Any, ratio: float, timestep: Tensor | None = None) -> MergePlan:
        """The plan that the method makes from hidden states.

        Args:
            x: (B, N, C) hidden states to match on, N = H * W in raster order; of a video that is planned as a whole
                T * H * W.
            grid: (H, W), or (T, H, W) where `spans_frames`.
            ratio: fraction of tokens to remove, of this timestep.
            timestep: (B,) what random methods vary with; the others do not read it.

        Returns:
            MergePlan with B rows, or B / share_plan.

        Raises:
            TypeError, ValueError: the method refuses an argument.
        """
        raise NotImplementedError(f"{type(self).__name__}.plan")

    def tokens_kept(self, grid: tuple[int, int], level: int = 1) -> int:
        """How many tokens are left of those of an (H, W) grid at a resolution level that is compressed; where the ratio
        is scheduled, at its largest."""
        tokens, ratio = grid[0] * grid[1], self.ratio_at(level)
        return tokens - int(tokens * (max(ratio) if isinstance(ratio, tuple) else ratio))


@dataclass(frozen=True, kw_only=True)
class PoolConfig(CompressionConfig):
    """What the methods that pool keys and values share, besides the arguments of `CompressionConfig`.

    Args:
        factor: pooling window, s or (sy, sx) tokens in (rows, columns); or one by resolution level, {1: 4, 2: 2}.
            Levels are those of `max_downsample`; those that are not named are not compressed.
        pool: what is pooled in layers that normalise or rotate keys: "keys" and values after that, or "hidden" states
            before. Such layers are those of Flux, Qwen-Image and Stable Diffusion 3.5. "keys" pools as the method is
            defined, and projects all tokens. "hidden" projects s * s times less, and rotates each pooled key by the
            position of its window's nearest token: an approximation, because neither norm nor rotation commutes with
            the average. In all other layers, and everywhere for alpha = 1, the two are equal and the cheaper one runs.
    """

    factor: int | tuple[int, int] | Mapping[int, int | tuple[int, int]] = option(2, PerLevel(Pair()))
    pool: str = option("keys", Choice(("keys", "hidden")))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.modules != ("attn1",):
            raise ValueError(
                f"modules: got {self.modules}, expected ('attn1',): the keys and values of cross-attention are text, "
                "which has no grid to pool on, and MLPs have none"
            )

    @property
    def alpha(self) -> Schedule:
        """Weight of nearest against average pooling, or a pair that moves over the timestep; of the method."""
        raise NotImplementedError(f"{type(self).__name__}.alpha")

    @property
    def by_level(self) -> Window | Mapping[int, Window]:
        return self.factor

    def factor_at(self, level: int) -> tuple[int, int]:
        """The window of a resolution level, (1, 1) of one that is not compressed."""
        return Pair().check("factor", self.factor.get(level, 1) if isinstance(self.factor, Mapping) else self.factor)

    def tokens_kept(self, grid: tuple[int, int], level: int = 1) -> int:
        """How many keys are left of those of an (H, W) grid at a resolution level that is compressed."""
        sy, sx = self.factor_at(level)
        return (grid[0] // sy) * (grid[1] // sx)
