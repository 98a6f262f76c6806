"""Argument checks of the public functions. Every message reads `argument: what came, what was expected`."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from .plan import MergePlan

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _integer(value: object) -> int | None:
    """`value` as an int, NumPy's integers too; None when it is no integer. Booleans, arrays and tensors are none."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if isinstance(value, Integral) and not isinstance(value, bool):
        return operator.index(value)
    return None


def check_tensor(name: str, value: object, rank: int, dtypes: Sequence[torch.dtype] = FLOAT_DTYPES) -> None:
    """`value` is a tensor of the given rank and one of the dtypes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
    if value.dtype not in dtypes:
        expected = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: got dtype {str(value.dtype).removeprefix('torch.')}, expected one of {expected}")
    if value.dim() != rank:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {rank} dimensions")


def check_same_device(**tensors: Tensor) -> None:
    """All named tensors are on one device."""
    (first_name, first), *rest = tensors.items()
    for name, tensor in rest:
        if tensor.device != first.device:
            raise ValueError(f"{name}: is on {tensor.device}, expected {first.device}, where {first_name} is")


def check_pair(name: str, value: object) -> tuple[int, int]:
    """`value` is a pair (row, column) of integers of at least 1."""
    if isinstance(value, (tuple, list)) and len(value) == 2:
        row, column = _integer(value[0]), _integer(value[1])
        if row is not None and column is not None:
            if row < 1 or column < 1:
                raise ValueError(f"{name}: got {(row, column)}, expected both to be at least 1")
            return row, column
    raise TypeError(f"{name}: got {value!r}, expected two integers, (row, column)")


def check_grid(grid: object, num_tokens: int, tokens_of: str) -> tuple[int, int]:
    """`grid` is (H, W) and H * W is the number of tokens of the argument named `tokens_of`."""
    height, width = check_pair("grid", grid)
    if height * width != num_tokens:
        raise ValueError(
            f"grid: got {(height, width)}, that is {height * width} tokens, expected {num_tokens}, "
            f"the number of tokens of {tokens_of}"
        )
    return height, width


def check_frames(grid: object, num_tokens: int, tokens_of: str) -> tuple[int | None, tuple[int, int]]:
    """`grid` is (H, W), or (T, H, W) of a video, and as many tokens; returns T, None of a picture, and (H, W)."""
    if not isinstance(grid, (tuple, list)) or len(grid) != 3:
        return None, check_grid(grid, num_tokens, tokens_of)
    frames = check_count("grid, frames", grid[0], 1)
    height, width = check_pair("grid, frame", tuple(grid[1:]))
    if frames * height * width != num_tokens:
        raise ValueError(
            f"grid: got {(frames, height, width)}, that is {frames * height * width} tokens, expected {num_tokens}, "
            f"the number of tokens of {tokens_of}"
        )
    return frames, (height, width)


def check_window(window: object) -> tuple[int | None, int]:
    """`window` is a number of tiles, or (tiles, frames), or None; returns tiles, None for all, and frames."""
    tiles, frames = window if isinstance(window, (tuple, list)) and len(window) == 2 else (window, 0)
    return None if tiles is None else check_count("window", tiles), check_count("window, frames", frames)


def check_factor(factor: object, grid: tuple[int, int]) -> tuple[int, int]:
    """`factor` is an int or (sy, sx), at least 1 and at most the grid."""
    one = _integer(factor)
    sy, sx = check_pair("factor", factor if one is None else (one, one))
    if sy > grid[0] or sx > grid[1]:
        raise ValueError(f"factor: got {(sy, sx)}, expected at most the grid, {grid}")
    return sy, sx


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """`value` is one of the named choices."""
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {list(choices)}")


def check_integer(name: str, value: object) -> int:
    """`value` as an int."""
    integer = _integer(value)
    if integer is None:
        raise TypeError(f"{name}: got {value!r}, expected an integer")
    return integer


def check_count(name: str, value: object, minimum: int = 0) -> int:
    """`value` as an int of at least `minimum`."""
    integer = check_integer(name, value)
    if integer < minimum:
        raise ValueError(f"{name}: got {integer}, expected at least {minimum}")
    return integer


def check_number(name: str, value: object) -> float:
    """`value` as a float: a finite number, NumPy's too."""
    if (not isinstance(value, (float, int)) and not isinstance(value, Real)) or isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, expected a number")
    try:
        number = float(value)
    except OverflowError as error:
        raise ValueError(f"{name}: got an integer of {len(str(value))} digits, expected a finite number") from error
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError(f"{name}: got {value}, expected a finite number")
    return number


def check_alpha(alpha: object, like: Tensor, like_name: str) -> tuple[float, Tensor | None]:
    """`alpha` as the op takes it: a number, and the (B,) float32 tensor that replaces it when one was given."""
    if not isinstance(alpha, Tensor):
        return check_number("alpha", alpha), None
    check_tensor("alpha", alpha, 1, (torch.float32,))
    if alpha.shape[0] != like.shape[0]:
        raise ValueError(f"alpha: got {alpha.shape[0]} values, expected {like.shape[0]}, the batch of {like_name}")
    check_same_device(**{like_name: like, "alpha": alpha})
    return 0.0, alpha


def check_plan(plan: object, name: str, tensor: Tensor, length: str) -> None:
    """`plan` is a MergePlan whose rows divide the batch of `tensor` and whose `length` is its number of tokens."""
    if not isinstance(plan, MergePlan):
        raise TypeError(f"plan: got {type(plan).__name__}, expected a MergePlan")
    (batch, tokens, _), (rows, num_tokens) = tensor.shape, plan.slot.shape
    expected = num_tokens if length == "num_tokens" else plan.num_slots
    if tokens != expected:
        raise ValueError(f"{name}: got {tokens} tokens, expected {expected}, the plan's {length}")
    if (rows == 0 and batch != 0) or (rows != 0 and batch % rows != 0):
        raise ValueError(f"{name}: got batch {batch}, expected a multiple of the plan's {rows} rows")
    if plan.slot.device != tensor.device:
        raise ValueError(f"plan: is on {plan.slot.device}, expected {tensor.device}, where {name} is")


def max_ratio(grid: tuple[int, int], stride: tuple[int, int]) -> float:
    """The largest ratio that a merge into one token per sy x sx tile allows on an (H, W) grid.

    This is 1 - 1 / (sy * sx) on grids that divide; leftover strips hold only sources and raise it a little.
    """
    height, width = check_pair("grid", grid)
    sy, sx = check_pair("stride", stride)
    n, d = height * width, (height // sy) * (width // sx)
    return (n - d) / n if d else 0.0


def merged_count(ratio: float, grid: tuple[int, int], stride: tuple[int, int], frames: int = 1) -> int:
    """r = int(N * ratio), refused when the grid, or as many as there are frames, has not that many sources."""
    ratio = check_number("ratio", ratio)
    limit = max_ratio(grid, stride)
    n = frames * grid[0] * grid[1]
    r = int(n * ratio)
    if ratio < 0 or r > n - frames * (grid[0] // stride[0]) * (grid[1] // stride[1]) or (r > 0 and limit == 0.0):
        raise ValueError(
            f"ratio: got {ratio}, expected 0 <= ratio <= {limit:.6g}, the largest possible "
            f"on grid {tuple(grid)} with stride {tuple(stride)}"
        )
    return r
