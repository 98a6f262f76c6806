"""laplacian_score against its definition and the float64 reference."""

from __future__ import annotations

import pytest
import torch

from bigain_kernels import reference
from bigain_kernels.testing import assert_close

from ..shapes import GRIDS, tokens
from .inputs import CASES, IDS, assert_same_bits, layouts, odd_tokens

OP = "laplacian_score"


def definition(x, grid, norm):
    height, width = grid
    out = torch.zeros(x.shape[:2], dtype=torch.float64)
    for b in range(x.shape[0]):
        for row in range(height):
            for column in range(width):
                response = 4 * x[b, row * width + column].double()
                for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                    if 0 <= r < height and 0 <= c < width:
                        response = response - x[b, r * width + c].double()
                out[b, row * width + column] = response.norm(p=1 if norm == "l1" else 2)
    return out


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("grid", sorted({grid for grid, _ in GRIDS}))
def test_definition(backend, dtype, grid, norm):
    x = tokens(1, grid[0] * grid[1], 5, dtype, strided=True)
    score = backend.laplacian_score(x, grid, norm)
    assert score.dtype == torch.float32
    assert_close(score, definition(x, grid, norm), torch.float32)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize(("batch", "grid", "stride", "channels", "strided"), CASES, ids=IDS)
def test_shapes(backend, dtype, batch, grid, stride, channels, strided, norm):
    """Zero, NaN and infinite tokens are among them."""
    x = odd_tokens(batch, grid[0] * grid[1], channels, dtype, strided)
    assert_close(
        backend.laplacian_score(x, grid, norm), reference.laplacian_score(x.double(), grid, norm), torch.float32
    )


@pytest.mark.parametrize("channels", [72, 600, 601])
def test_same_bits_in_any_layout_batch_and_order(backend, dtype, channels):
    """A row of 601 channels is aligned nowhere."""
    grid = (6, 7)
    x = tokens(3, 42, channels, dtype)
    expected = backend.laplacian_score(x, grid)
    assert_close(expected, reference.laplacian_score(x.double(), grid), torch.float32)
    for _ in backend.orders():
        assert_same_bits(backend.laplacian_score(x, grid), expected)
    assert_same_bits(backend.laplacian_score(x[1:2], grid), expected[1:2])
    transposed = x.transpose(1, 2).contiguous().transpose(1, 2)
    if backend.name != "reference":  # PyTorch sums channels in another order when they lie apart
        for view in (*layouts(x), transposed):
            assert_same_bits(backend.laplacian_score(view, grid), expected)


def definition_of_a_video(x, grid, norm):
    """The 7-point response: that of each frame, and the differences from the same place before and after."""
    frames, height, width = grid
    video = x.double().view(-1, *grid, x.shape[2])
    out = torch.zeros(video.shape[:-1], dtype=torch.float64)
    for b in range(video.shape[0]):
        for t in range(frames):
            for row in range(height):
                for column in range(width):
                    here = video[b, t, row, column]
                    response = 4 * here
                    for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                        if 0 <= r < height and 0 <= c < width:
                            response = response - video[b, t, r, c]
                    for other in (t - 1, t + 1):
                        if 0 <= other < frames:
                            response = response + here - video[b, other, row, column]
                    out[b, t, row, column] = response.norm(p=1 if norm == "l1" else 2)
    return out.flatten(1)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("grid", [(1, 3, 4), (2, 5, 3), (3, 2, 5)])
def test_definition_of_a_video(backend, dtype, grid, norm):
    x = tokens(2, grid[0] * grid[1] * grid[2], 12, dtype, strided=True)
    score = backend.laplacian_score(x, grid, norm)
    assert_close(score, definition_of_a_video(x, grid, norm), torch.float32)
    if grid[0] == 1:
        assert_same_bits(score, backend.laplacian_score(x, grid[1:], norm))


def test_frames_of_a_video_in_any_layout_and_order(backend, dtype):
    x = odd_tokens(2, 3 * 35, 72, dtype, False)
    expected = backend.laplacian_score(x, (3, 5, 7))
    wanted = reference.laplacian_score(x.double(), (5, 7), "l1", 3)
    assert_close(expected, wanted, torch.float32)
    for _ in backend.orders():
        assert_same_bits(backend.laplacian_score(x, (3, 5, 7)), expected)
    for view in layouts(x):
        assert_same_bits(backend.laplacian_score(view, (3, 5, 7)), expected)


def test_a_still_video_is_scored_as_its_frames_are(backend):
    x = tokens(1, 20, 8)
    still = backend.laplacian_score(x.repeat(1, 3, 1), (3, 4, 5))
    assert torch.equal(still, backend.laplacian_score(x, (4, 5)).repeat(1, 3))


@pytest.mark.parametrize("shape", [(0, 48, 10), (4, 48, 0)])
def test_nothing_to_sum(backend, shape):
    assert torch.equal(backend.laplacian_score(torch.zeros(shape), (6, 8), "l2"), torch.zeros(shape[:2]))
