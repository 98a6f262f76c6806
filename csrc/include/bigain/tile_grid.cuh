// A grid of tokens and its tiles.
#pragma once

#include "bigain/common.cuh"

namespace bigain {

// Whole sy x sx tiles cover the top-left of a grid; the strips to the right and below hold only sources.
struct TileGrid {
  int height, width, sy, sx;
  Divisor by_width, by_sy, by_sx, by_tiles_x;

  // A grid of fewer than 2^31 tokens. Tiles that do not fit are none: a size that is no divisor stands for theirs.
  TileGrid(int64_t height_, int64_t width_, int64_t sy_, int64_t sx_)
      : height(to_int(height_)),
        width(to_int(width_)),
        sy(to_int(sy_ > height_ ? height_ + 1 : sy_)),
        sx(to_int(sx_ > width_ ? width_ + 1 : sx_)),
        by_width(width),
        by_sy(sy),
        by_sx(sx),
        by_tiles_x(width / sx),
        tiles_y_(height / sy),
        tiles_x_(width / sx) {}
  TileGrid() = default;

  __host__ __device__ int tiles_y() const { return tiles_y_; }
  __host__ __device__ int tiles_x() const { return tiles_x_; }
  __host__ __device__ int tokens() const { return height * width; }
  __host__ __device__ int tiles() const { return tiles_y() * tiles_x(); }
  // Token number `inside`, in raster order, of a tile.
  __device__ int token(int tile_y, int tile_x, int inside) const {
    unsigned row = inside;
    const unsigned column = by_sx.take(row);
    return (tile_y * sy + row) * width + tile_x * sx + column;
  }

 private:
  int tiles_y_, tiles_x_;
};

}  // namespace bigain
