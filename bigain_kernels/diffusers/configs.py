"""What to compress, where and when: one frozen dataclass per method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..checks import check_choice, check_count, check_number, check_pair
from ..methods.schedule import check_schedule

Schedule = float | tuple[float, float]

MODULES = ("attn1", "attn2")
REDUCTIONS = ("max", "sum", "mean", "min", "std")
MERGE_MODES = ("mean", "mlerp", "prune")
POOLED = ("keys", "hidden")
DOWNSAMPLE_LEVELS = (1, 2, 4, 8)
DEFAULT_TRAIN_TIMESTEPS = 1000


def _number(name: str, value: object, low: float = float("-inf"), high: float = float("inf"), why: str = "") -> float:
    check_number(name, value)
    if not low <= value <= high:  # type: ignore[operator]
        raise ValueError(f"{name}: got {value}, expected {low:g} <= {name} <= {high:g}{why}")
    return float(value)  # type: ignore[arg-type]


def _schedule(
    name: str, value: object, low: float = float("-inf"), high: float = float("inf"), why: str = ""
) -> Schedule:
    check_schedule(name, value)
    if isinstance(value, (tuple, list)):
        return _number(name, value[0], low, high, why), _number(name, value[1], low, high, why)
    return _number(name, value, low, high, why)


def _pair(name: str, value: object) -> tuple[int, int]:
    return check_pair(name, (value, value) if isinstance(value, int) else value)


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, expected True or False")


@dataclass(frozen=True, kw_only=True)
class CompressionConfig:
    """Where and when to compress; the base of every method's config, not one itself.

    Args:
        max_downsample: deepest resolution level of a U-Net to compress, counted from its latent grid: 1 is the full
            resolution alone, 2 half resolution too, then 4 and 8. Transformers have one level and ignore it.
        blocks: indices of the transformer blocks to compress, counted in module order (the report of
            `apply_token_compression` lists them); None is all of them. A U-Net block must also pass `max_downsample`.
        start: where in the noise schedule compression begins, a fraction: 0 is the noisiest timestep. For flow-matching
            models (Flux, Qwen-Image, Stable Diffusion 3) it is a fraction of sigma, which a shifted schedule does not
            pass evenly.
        end: where it ends, a fraction of at least `start`: 1 is the cleanest timestep. Both ends are included.
        modules: which attentions of a block: "attn1", the self-attention (joint attention counts as such), and, for
            merge methods, "attn2", the cross-attention.
        num_train_timesteps: length T of the noise schedule that `start`, `end` and schedules refer to. None is that of
            the pipeline's scheduler, and 1000 for a bare model.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of its range.
    """

    method: ClassVar[str] = ""

    max_downsample: int = 1
    blocks: tuple[int, ...] | None = None
    start: float = 0.0
    end: float = 1.0
    modules: tuple[str, ...] = ("attn1",)
    num_train_timesteps: int | None = None

    def __post_init__(self) -> None:
        if not self.method:
            raise TypeError(f"config: got {type(self).__name__}, expected the config of a method, such as LGTMConfig")
        if self.max_downsample not in DOWNSAMPLE_LEVELS:
            raise ValueError(f"max_downsample: got {self.max_downsample!r}, expected one of {list(DOWNSAMPLE_LEVELS)}")
        if self.blocks is not None:
            if not isinstance(self.blocks, (tuple, list, range)):
                raise TypeError(f"blocks: got {self.blocks!r}, expected a sequence of block indices or None")
            for index in self.blocks:
                check_count("blocks", index, 0)
            if len(set(self.blocks)) != len(self.blocks):
                raise ValueError(f"blocks: got {tuple(self.blocks)}, expected each index once")
            object.__setattr__(self, "blocks", tuple(self.blocks))
        _number("start", self.start, 0.0, 1.0)
        _number("end", self.end, 0.0, 1.0)
        if self.start > self.end:
            raise ValueError(f"start: got {self.start}, expected at most end, {self.end}")
        if isinstance(self.modules, str) or not isinstance(self.modules, (tuple, list)):
            raise TypeError(f"modules: got {self.modules!r}, expected a tuple of names out of {list(MODULES)}")
        for name in self.modules:
            check_choice("modules", name, MODULES)
        if not self.modules or len(set(self.modules)) != len(self.modules):
            raise ValueError(f"modules: got {tuple(self.modules)}, expected at least one name, each once")
        object.__setattr__(self, "modules", tuple(self.modules))
        if self.num_train_timesteps is not None:
            check_count("num_train_timesteps", self.num_train_timesteps, 2)

    @property
    def has_window(self) -> bool:
        """Whether some timesteps are left uncompressed."""
        return self.start > 0.0 or self.end < 1.0

    @property
    def train_timesteps(self) -> int:
        """T, the length of the noise schedule."""
        return self.num_train_timesteps or DEFAULT_TRAIN_TIMESTEPS


@dataclass(frozen=True, kw_only=True)
class MergeConfig(CompressionConfig):
    """What the merge methods share, besides the arguments of `CompressionConfig`.

    Args:
        ratio: fraction of the tokens to remove, at most 1 - 1 / (sy * sx); or a pair (first, last) that moves linearly
            over the timestep from the first denoising step (t = T - 1) to the last (t = 0). A pair needs the timestep
            on the host (one read per forward pass) and one timestep for the whole batch, because it changes shapes.
        stride: (sy, sx), the tile with one destination, in tokens (rows, columns).
        mode: how tokens become one: "mean", "mlerp" or "prune"; see `bigain_kernels.token_merge`.
        proportional: weigh every merged key of self-attention by the number of tokens it stands for (proportional
            attention, Bolya et al. 2022, arXiv 2210.09461): the result is that of attention over all N tokens of which
            each merged one is a copy. Cross-attention has no merged keys and no weights.
        cached_assignment: the first compressed block of a resolution plans, and the later ones of the same forward pass
            use its plan. Nothing is kept between forward passes.
        share_plan: k plans once for every k rows of the batch, from their mean hidden state: row b uses plan row
            b mod (B / k), the order of `torch.cat([uncond, cond])` (k = 2) and of class-major classifier batches
            (k = classes). None plans for every row.
    """

    ratio: Schedule = 0.5
    stride: tuple[int, int] = (2, 2)
    mode: str = "mean"
    proportional: bool = False
    cached_assignment: bool = False
    share_plan: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "stride", _pair("stride", self.stride))
        sy, sx = self.stride
        why = f", one token of every {sy} x {sx} tile stays"
        object.__setattr__(self, "ratio", _schedule("ratio", self.ratio, 0.0, 1.0 - 1.0 / (sy * sx), why))
        check_choice("mode", self.mode, MERGE_MODES)
        _flag("proportional", self.proportional)
        _flag("cached_assignment", self.cached_assignment)
        if self.share_plan is not None:
            check_count("share_plan", self.share_plan, 1)


@dataclass(frozen=True, kw_only=True)
class LGTMConfig(MergeConfig):
    """Laplacian-gated token merging (BiGain, arXiv 2603.12240); see `bigain_kernels.lgtm_plan`.

    Args:
        window: compare a source only with destinations of tiles at most this many tiles away; None compares with all.
        others: see `MergeConfig` and `CompressionConfig`.
    """

    method: ClassVar[str] = "lgtm"

    window: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None:
            check_count("window", self.window, 0)


@dataclass(frozen=True, kw_only=True)
class ABMConfig(MergeConfig):
    """Adaptive block merging (BiGain, arXiv 2603.12240): whole smooth tiles merge; see `bigain_kernels.abm_plan`.

    Args:
        reduce: how the scores of a tile become one: "max", "sum", "mean", "min" or "std".
        others: see `MergeConfig` and `CompressionConfig`.
    """

    method: ClassVar[str] = "abm"

    reduce: str = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("reduce", self.reduce, REDUCTIONS)


@dataclass(frozen=True, kw_only=True)
class ToMeConfig(MergeConfig):
    """Token merging for Stable Diffusion (Bolya and Hoffman 2023, arXiv 2303.17604); see `bigain_kernels.tome_plan`.

    Args:
        destinations: "random", one token of each tile drawn anew in every block and at every timestep, the same for all
            rows of a timestep; or "first", the top-left token.
        seed: of the random destinations.
        window: as for `LGTMConfig`.
        others: see `MergeConfig` and `CompressionConfig`.
    """

    method: ClassVar[str] = "tome"

    destinations: str = "random"
    seed: int = 0
    window: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("destinations", self.destinations, ("random", "first"))
        check_count("seed", self.seed, 0)
        if self.window is not None:
            check_count("window", self.window, 0)


@dataclass(frozen=True, kw_only=True)
class SiToConfig(MergeConfig):
    """Similarity-based token pruning (SiTo, Zhang et al., AAAI 2025); see `bigain_kernels.sito_plan`.

    Args:
        mode: "prune", the method's own; the modes of `MergeConfig` are open too.
        noise: scale of the random perturbation of the selection scores, at least 0.
        seed: of the perturbation.
        others: see `MergeConfig` and `CompressionConfig`.
    """

    method: ClassVar[str] = "sito"

    mode: str = "prune"
    noise: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _number("noise", self.noise, 0.0)
        check_count("seed", self.seed, 0)


@dataclass(frozen=True, kw_only=True)
class PoolConfig(CompressionConfig):
    """What the methods that pool keys and values share, besides the arguments of `CompressionConfig`.

    Args:
        factor: s or (sy, sx), the pooling window in tokens (rows, columns).
        pool: what is pooled in layers that normalise or rotate their keys (Flux, Qwen-Image, Stable Diffusion 3.5).
            "keys": keys and values as attention gets them, after norm and rotation, exactly as the method is defined;
            all tokens are projected. "hidden": the hidden states before the projections, s * s times less to project,
            and each pooled key is then rotated by the position of its window's nearest token; an approximation, because
            neither norm nor rotation commutes with the average. In all other layers, and everywhere for alpha = 1, the
            two are equal and the cheaper one runs.
    """

    factor: int | tuple[int, int] = 2
    pool: str = "keys"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.modules != ("attn1",):
            raise ValueError(
                f"modules: got {self.modules}, expected ('attn1',): the keys and values of cross-attention are text, "
                "which has no grid to pool on"
            )
        object.__setattr__(self, "factor", _pair("factor", self.factor))
        check_choice("pool", self.pool, POOLED)


@dataclass(frozen=True, kw_only=True)
class IEKVDConfig(PoolConfig):
    """Interpolate-extrapolate downsampling of keys and values (BiGain, arXiv 2603.12240).

    Args:
        alpha: weight of nearest against average pooling: 1 is nearest, 0 is average pooling, outside [0, 1] it
            extrapolates. A pair (first, last) moves linearly over the timestep from the first denoising step
            (t = T - 1) to the last (t = 0), computed on the device for every row of the batch.
        others: see `PoolConfig` and `CompressionConfig`.
    """

    method: ClassVar[str] = "iekvd"

    alpha: Schedule = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "alpha", _schedule("alpha", self.alpha))


@dataclass(frozen=True, kw_only=True)
class ToDoConfig(PoolConfig):
    """Nearest downsampling of keys and values (ToDo, Smith et al. 2024, arXiv 2402.13573): IE-KVD with alpha = 1."""

    method: ClassVar[str] = "todo"

    alpha: ClassVar[float] = 1.0
