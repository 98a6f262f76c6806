"""kv_downsample against its definition and the float64 reference."""

from __future__ import annotations

import pytest
import torch

from bigain_kernels import reference
from bigain_kernels.testing import assert_close

from ..shapes import tokens
from .gradients import assert_gradients
from .inputs import assert_same_bits, layouts, odd_tokens

OP = "kv_downsample"
ALPHAS = [-0.5, 0.0, 0.9, 1.0, 1.3, "rows"]
# (batch, grid, factor, channels, strided)
SHAPES = [
    (3, (8, 8), (2, 2), 64, False),
    (2, (7, 9), (2, 2), 72, True),
    (1, (9, 10), (4, 3), 320, True),
    (2, (10, 13), (2, 1), 7, False),
    (1, (11, 11), (5, 5), 64, True),
    (3, (1, 9), (1, 2), 1, True),
    (1, (1, 9), (1, 2), 1152, False),
    (1, (1, 1), (1, 1), 64, False),
]
IDS = [f"{b}x{g[0]}x{g[1]}-{f[0]}x{f[1]}-C{c}{'-strided' * s}" for b, g, f, c, s in SHAPES]


def weight_of(alpha, batch):
    return torch.tensor([0.9, -0.2, 1.0])[:batch] if alpha == "rows" else alpha


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(
    ("grid", "factor"), [((4, 6), (2, 2)), ((5, 7), (2, 2)), ((6, 5), (2, 1)), ((9, 10), (4, 4)), ((1, 8), (1, 2))]
)
def test_definition(backend, dtype, grid, factor, alpha):
    """Window by window, written out."""
    (height, width), (sy, sx) = grid, factor
    x, weight = tokens(2, height * width, 3, dtype, strided=True), weight_of(alpha, 2)
    pooled = backend.kv_downsample(x, grid, factor, weight)
    out_y, out_x = height // sy, width // sx
    expected = torch.zeros(2, out_y * out_x, 3, dtype=torch.float64)
    for b in range(2):
        a = float(weight[b]) if alpha == "rows" else alpha
        for i in range(out_y):
            for j in range(out_x):
                row, column = int((i + 0.5) * height / out_y), int((j + 0.5) * width / out_x)
                window = [(i * sy + p) * width + j * sx + q for p in range(sy) for q in range(sx)]
                nearest, average = x[b, row * width + column].double(), x[b, window].double().mean(0)
                expected[b, i * out_x + j] = a * nearest + (1 - a) * average
    assert_close(pooled, expected)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(("batch", "grid", "factor", "channels", "strided"), SHAPES, ids=IDS)
def test_shapes(backend, dtype, batch, grid, factor, channels, strided, alpha):
    x, weight = odd_tokens(batch, grid[0] * grid[1], channels, dtype, strided), weight_of(alpha, batch)
    wide = weight.double() if alpha == "rows" else weight
    expected = reference.kv_downsample(x.double(), grid, factor, wide)
    assert_close(backend.kv_downsample(x, grid, factor, weight), expected)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(("grid", "factor"), [((4, 6), (2, 2)), ((7, 9), (2, 2)), ((9, 14), (4, 3)), ((3, 5), (1, 1))])
def test_what_has_weight_zero_does_not_show(backend, dtype, grid, factor, rows):
    """alpha 1 copies the nearest token whatever stands beside it; alpha 0 averages whatever the nearest token is."""
    (height, width), (sy, sx) = grid, factor
    out_y, out_x = height // sy, width // sx
    x = tokens(3, height * width, 5, dtype, strided=True)
    row = (2 * torch.arange(out_y) + 1) * height // (2 * out_y)
    column = (2 * torch.arange(out_x) + 1) * width // (2 * out_x)
    nearest = (row[:, None] * width + column).flatten()
    inside = torch.zeros(height, width, dtype=torch.bool)
    inside[: out_y * sy, : out_x * sx] = True
    seen = (0, 2) if rows else (0, 1, 2)

    alone = torch.full_like(x, torch.inf).index_copy(1, nearest, x[:, nearest])
    picked = backend.kv_downsample(alone, grid, factor, torch.tensor([1.0, 0.3, 1.0]) if rows else 1.0)
    for b in seen:
        assert torch.equal(picked[b], x[b, nearest])

    windows = x.masked_fill(~inside.flatten()[:, None], torch.nan)
    averaged = backend.kv_downsample(windows, grid, factor, torch.tensor([0.0, 0.3, 0.0]) if rows else 0.0)
    image = x.double().unflatten(1, grid)[:, : out_y * sy, : out_x * sx]
    expected = image.reshape(3, out_y, sy, out_x, sx, 5).mean((2, 4)).flatten(1, 2)
    for b in seen:
        assert_close(averaged[b], expected[b])


def test_windows_of_one_token_are_blended_like_all_others(backend, dtype):
    """inf - inf is no number, a row whose alpha is none has none, and what has weight zero does not show."""
    x = tokens(4, 6, 5, dtype)
    x[:, 2, 3] = torch.inf
    rows = torch.tensor([torch.nan, 1.2, 1.0, 0.0])
    for alpha in (1.2, 1.0, 0.0, -0.5, rows):
        wide = alpha.double() if isinstance(alpha, torch.Tensor) else alpha
        pooled = backend.kv_downsample(x, (2, 3), 1, alpha)
        assert_close(pooled, reference.kv_downsample(x.double(), (2, 3), (1, 1), wide))
    assert pooled[0].isnan().all()
    assert pooled[1, 2, 3].isnan()
    assert torch.equal(pooled[2:], x[2:])


@pytest.mark.parametrize("count", [2, 3, 4, 5, 7])
def test_several_tensors_of_different_kinds(backend, count):
    kinds = [
        (64, torch.float32, False),
        (72, torch.bfloat16, True),
        (320, torch.float16, False),
        (8, torch.float32, True),
        (72, torch.float32, False),
        (0, torch.float32, False),
        (7, torch.bfloat16, False),
    ]
    xs = [odd_tokens(2, 63, c, dtype, strided, seed=c) for c, dtype, strided in kinds[:count]]
    alpha = torch.tensor([0.8, 1.2])
    together = backend.kv_downsample(xs, (7, 9), (2, 2), alpha)
    for x, y in zip(xs, together, strict=True):
        assert_close(y, reference.kv_downsample(x.double(), (7, 9), (2, 2), alpha.double()))
        assert_same_bits(y, backend.kv_downsample(x, (7, 9), (2, 2), alpha))


def test_same_bits_in_any_layout_batch_and_order(backend, dtype):
    x = tokens(3, 64, 40, dtype)
    for factor in (2, 3):
        expected = backend.kv_downsample(x, (8, 8), factor, 0.7)
        for _ in backend.orders():
            assert_same_bits(backend.kv_downsample(x, (8, 8), factor, 0.7), expected)
        for view in layouts(x):
            assert_same_bits(backend.kv_downsample(view, (8, 8), factor, 0.7), expected)
        assert_same_bits(backend.kv_downsample(x[2:], (8, 8), factor, 0.7), expected[2:])


def test_a_long_row_of_tokens(backend):
    """Past 2^15 tokens along an axis the nearest-exact rule needs 64 bits."""
    x = torch.arange(70_001, dtype=torch.float32)[None, :, None]
    expected = reference.kv_downsample(x, (1, 70_001), (1, 3), 1.0)
    assert torch.equal(backend.kv_downsample(x, (1, 70_001), (1, 3), 1.0), expected)


def test_pooling_commutes_with_a_linear_layer(backend):
    layer, x = torch.nn.Linear(6, 4), tokens(2, 24, 6)
    before, after = backend.kv_downsample(layer(x), (4, 6), 2, 1.3), layer(backend.kv_downsample(x, (4, 6), 2, 1.3))
    assert_close(before, after)


@pytest.mark.parametrize(("batch", "channels"), [(0, 8), (2, 0)])
def test_empty(backend, batch, channels):
    assert backend.kv_downsample(torch.zeros(batch, 24, channels), (4, 6), 2, 0.9).shape == (batch, 6, channels)


@pytest.mark.parametrize(
    ("grid", "factor"),
    [((4, 6), (2, 2)), ((5, 7), (2, 3)), ((5, 3), (1, 1)), ((1, 7), (1, 4)), ((3, 4), (3, 4)), ((1, 5), (1, 5))],
)
def test_gradients(backend, dtype, grid, factor):
    """By several tensors at once, and by alpha, also where it blends nothing."""
    n = grid[0] * grid[1]
    inputs = {"x": tokens(3, n, 7, dtype, strided=True), "y": tokens(3, n, 4, dtype, seed=1)}
    for alpha in (0.0, 0.8, 1.0, 1.3):
        assert_gradients(backend, OP, lambda op, x, y, alpha=alpha: op((x, y), grid, factor, alpha), inputs)
    rows = {"alpha": torch.tensor([0.3, 0.8, 1.2])}
    if dtype == torch.float32:
        assert_gradients(backend, OP, lambda op, x, y, alpha: op((x, y), grid, factor, alpha.float()), inputs | rows)
