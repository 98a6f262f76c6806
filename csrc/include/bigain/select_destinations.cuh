// The token of the lowest score in each tile, and the tables that matching starts from.
#pragma once

#include "bigain/common.cuh"
#include "bigain/packed.cuh"

namespace bigain {

constexpr int kSelectThreads = 256;

// Whole sy x sx tiles cover the top-left of a grid; the strips to the right and below hold only sources.
struct TileGrid {
  int height, width, sy, sx;

  __host__ __device__ int tiles_y() const { return height / sy; }
  __host__ __device__ int tiles_x() const { return width / sx; }
  __host__ __device__ int tokens() const { return height * width; }
  __host__ __device__ int tiles() const { return tiles_y() * tiles_x(); }
  // Token number `inside`, in raster order, of a tile.
  __device__ int token(int tile_y, int tile_x, int inside) const {
    return (tile_y * sy + inside / sx) * width + tile_x * sx + inside % sx;
  }
};

// A grid of fewer than 2^31 tokens. Tiles that do not fit are none: a size that is no divisor stands for theirs.
inline TileGrid tile_grid(int64_t height, int64_t width, int64_t sy, int64_t sx) {
  return {to_int(height), to_int(width), to_int(sy > height ? height + 1 : sy), to_int(sx > width ? width + 1 : sx)};
}

struct TileTables {
  // (rows, tiles), in the order of the tiles, or ascending: see who writes it
  int32_t* destinations;
  // (rows, N - tiles): all other tokens, tile by tile, then the strip on the right, then the one below
  int32_t* sources;
  // (rows, N): -inf and itself at destinations (everywhere if there are none), 0 at sources
  Packed* packed;
};

// Writes `sources` and `packed` for the token at (row, column); best() is the destination's number in its tile.
template <typename Best>
__device__ __forceinline__ void write_token(const TileTables& tables, const TileGrid& grid, int64_t b, int row,
                                            int column, const Best& best) {
  const int n = row * grid.width + column, tiles = grid.tiles(), tokens = grid.tokens();
  const int tile_y = row / grid.sy, tile_x = column / grid.sx;
  Packed* const packed = tables.packed + b * tokens + n;
  int position;
  bool is_destination = tiles == 0;
  if (tile_y >= grid.tiles_y()) {
    position = n - tiles;
  } else if (tile_x >= grid.tiles_x()) {
    const int covered = grid.tiles_x() * grid.sx;
    position = tiles * (grid.sy * grid.sx - 1) + row * (grid.width - covered) + column - covered;
  } else {
    const int inside = row % grid.sy * grid.sx + column % grid.sx, destination = best();
    position = (tile_y * grid.tiles_x() + tile_x) * (grid.sy * grid.sx - 1) + inside - (inside > destination);
    is_destination = inside == destination;
  }
  if (is_destination) {
    *packed = pack(ordered_key(minus_infinity()), n);
  } else {
    *packed = 0;
    tables.sources[b * (tokens - tiles) + position] = n;
  }
}

struct SelectDestinations {
  const float* score;  // (rows, N), unit stride in tokens
  int64_t batch_stride;
  int64_t rows;
  TileGrid grid;
  TileTables tables;  // when ascending, `sources` is scratch for the destinations by tile, and `packed` is not used
};

// A block owns a row of tiles, the last one also the strip below. `lanes` lanes (a power of two up to a warp) search a
// tile. kAscending sorts the destinations and writes nothing else.
template <bool kAscending>
__global__ void __launch_bounds__(kSelectThreads)
    select_destinations_kernel(const SelectDestinations p, const int lanes) {
  BIGAIN_SHARED(int, warp_count, kSelectThreads / kWarp);
  const TileGrid grid = p.grid;
  const int tiles_x = grid.tiles_x(), block_rows = max(grid.tiles_y(), 1), size = grid.sy * grid.sx;
  const int b = blockIdx.x / block_rows, tile_y = blockIdx.x % block_rows;
  const float* const score = p.score + b * p.batch_stride;
  const int64_t own = static_cast<int64_t>(b) * grid.tiles() + tile_y * tiles_x;
  int32_t* const by_tile = (kAscending ? p.tables.sources : p.tables.destinations) + own;
  const int groups = kSelectThreads / lanes, lane = threadIdx.x % lanes;

  for (int first = 0; grid.tiles() > 0 && first < tiles_x; first += groups) {
    const int tile = first + threadIdx.x / lanes;
    const bool exists = tile < tiles_x;
    int best = size;
    float lowest = -minus_infinity();
    for (int i = exists ? lane : size; i < size; i += lanes) {
      // Strictly less: ties to the lowest token. False for NaN, which counts as infinity.
      const float value = score[grid.token(tile_y, tile, i)];
      if (value < lowest) {
        lowest = value;
        best = i;
      }
    }
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      const float other = __shfl_xor_sync(kAllLanes, lowest, distance);
      const int other_best = __shfl_xor_sync(kAllLanes, best, distance);
      if (other < lowest || (other == lowest && other_best < best)) {
        lowest = other;
        best = other_best;
      }
    }
    // Nothing is below infinity in a tile of NaN and infinities: its first token.
    if (exists && lane == 0) by_tile[tile] = grid.token(tile_y, tile, best < size ? best : 0);
  }
  __syncthreads();

  if constexpr (!kAscending) {
    const int last_row = tile_y + 1 < grid.tiles_y() ? (tile_y + 1) * grid.sy : grid.height;
    for (unsigned n = tile_y * grid.sy * grid.width + threadIdx.x; n < static_cast<unsigned>(last_row * grid.width);
         n += kSelectThreads) {
      const int row = n / grid.width, column = n % grid.width;
      write_token(p.tables, grid, b, row, column, [&] {
        const int token = by_tile[column / grid.sx];
        return token / grid.width % grid.sy * grid.sx + token % grid.width % grid.sx;
      });
    }
    return;
  }

  // Ascending order is by row inside the tiles, then by tile: a stable partition for each of the sy rows.
  int32_t* out = p.tables.destinations + own;
  const int warp = threadIdx.x / kWarp;
  const unsigned lanes_before = (1u << threadIdx.x % kWarp) - 1;
  for (int row = 0; row < grid.sy; ++row) {
    for (int first = 0; first < tiles_x; first += kSelectThreads) {
      const int tile = first + threadIdx.x;
      const int token = tile < tiles_x ? by_tile[tile] : 0;
      const bool here = tile < tiles_x && token / grid.width == tile_y * grid.sy + row;
      const unsigned votes = __ballot_sync(kAllLanes, here);
      if (threadIdx.x % kWarp == 0) warp_count[warp] = __popc(votes);
      __syncthreads();
      int before = __popc(votes & lanes_before), total = 0;
#pragma unroll 1
      for (int i = 0; i < kSelectThreads / kWarp; ++i) {
        before += i < warp ? warp_count[i] : 0;
        total += warp_count[i];
      }
      if (here) out[before] = token;
      out += total;
      __syncthreads();
    }
  }
}

// One launch.
template <bool kAscending>
void launch_select_destinations(const SelectDestinations& p, cudaStream_t stream) {
  if (p.grid.tiles() == 0 && kAscending) return;
  const int lanes = p.grid.tiles() > 0 && p.grid.sy * p.grid.sx > kWarp ? kWarp : 1;
  const int block_rows = p.grid.tiles_y() > 0 ? p.grid.tiles_y() : 1;
  launch(select_destinations_kernel<kAscending>, grid_extent(p.rows * block_rows), kSelectThreads, 0, stream, p, lanes);
}

}  // namespace bigain
