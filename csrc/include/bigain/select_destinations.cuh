// The token of the lowest score in each tile, and the tables that matching starts from.
#pragma once

#include "bigain/packed.cuh"
#include "bigain/tile_grid.cuh"

namespace bigain {

constexpr int kSelectThreads = 256;

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
  unsigned to_y = row, to_x = column;
  const int in_y = grid.by_sy.take(to_y), in_x = grid.by_sx.take(to_x);
  const int tile_y = to_y, tile_x = to_x;
  Packed* const packed = tables.packed + b * tokens + n;
  int position;
  bool is_destination = tiles == 0;
  if (tile_y >= grid.tiles_y()) {
    position = n - tiles;
  } else if (tile_x >= grid.tiles_x()) {
    const int covered = grid.tiles_x() * grid.sx;
    position = tiles * (grid.sy * grid.sx - 1) + row * (grid.width - covered) + column - covered;
  } else {
    const int inside = in_y * grid.sx + in_x, destination = best();
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
    select_destinations_kernel(const SelectDestinations p, const Lanes lanes, const Divisor by_block_rows) {
  BIGAIN_SHARED(int, warp_count, kSelectThreads / kWarp);
  const TileGrid grid = p.grid;
  const int tiles_x = grid.tiles_x(), size = grid.sy * grid.sx;
  unsigned b = blockIdx.x;
  const int tile_y = by_block_rows.take(b);
  const float* const score = p.score + b * p.batch_stride;
  const int64_t own = static_cast<int64_t>(b) * grid.tiles() + tile_y * tiles_x;
  int32_t* const by_tile = (kAscending ? p.tables.sources : p.tables.destinations) + own;
  const int groups = kSelectThreads / lanes.count(), lane = lanes.lane();
  follow_launches();

  for (int first = 0; grid.tiles() > 0 && first < tiles_x; first += groups) {
    const int tile = first + static_cast<int>(lanes.group());
    const bool exists = tile < tiles_x;
    int best = size;
    float lowest = -minus_infinity();
    for (int i = exists ? lane : size; i < size; i += lanes.count()) {
      // Strictly less: ties to the lowest token. False for NaN, which counts as infinity.
      const float value = score[grid.token(tile_y, tile, i)];
      if (value < lowest) {
        lowest = value;
        best = i;
      }
    }
    for (int distance = lanes.count() / 2; distance > 0; distance /= 2) {
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
      unsigned row = n;
      const unsigned column = grid.by_width.take(row);
      write_token(p.tables, grid, b, row, column, [&] {
        unsigned token_row = by_tile[grid.by_sx.quotient(column)];
        const unsigned token_column = grid.by_width.take(token_row);
        return static_cast<int>(grid.by_sy.remainder(token_row) * grid.sx + grid.by_sx.remainder(token_column));
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
      const bool here = tile < tiles_x && static_cast<int>(grid.by_width.quotient(token)) == tile_y * grid.sy + row;
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
  const Lanes lanes(p.grid.tiles() > 0 && p.grid.sy * p.grid.sx > kWarp ? 5 : 0);
  const int block_rows = p.grid.tiles_y() > 0 ? p.grid.tiles_y() : 1;
  launch(select_destinations_kernel<kAscending>, grid_extent(p.rows * block_rows), kSelectThreads, 0, stream, p, lanes,
         Divisor(block_rows));
}

}  // namespace bigain
