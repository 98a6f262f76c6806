// Laplacian scores and all that matching needs (inverse norms, the smoothest token of each tile, the list of the other
// tokens) in one pass over the tokens; L-GTM of BiGain, arXiv 2603.12240.
#pragma once

#include "bigain/common.cuh"
#include "bigain/packed.cuh"
#include "bigain/row_norms.cuh"
#include "bigain/select_destinations.cuh"

namespace bigain {

enum class ScoreMode {
  kL1,
  kL2,
  kPlan,       // L1, and what matching needs
  kPlanShared  // the same of the mean of the rows that share a plan
};

constexpr int kScoreThreads = 128;
// Tokens of a column that one group of lanes computes: their common neighbours are read once.
constexpr int kScoreRows = 2;
// Tiles of more tokens are searched by the kernel of select_destinations.cuh, in parallel inside the tile.
constexpr int64_t kLargestFusedTile = 64;

template <typename T>
struct LaplacianScore {
  const T* x;  // (share * rows, N, channels), unit stride in channels; batch row b belongs to row b mod rows
  int64_t batch_stride, token_stride;
  int rows, share;  // share is read by kPlanShared
  int64_t channels;
  TileGrid grid;  // its tiles are read in the modes kPlan and kPlanShared
  float* score;   // (rows, N)
  // For the modes kPlan and kPlanShared only:
  float* inverse_norm;  // (rows, N), see inverse_norm()
  TileTables tables;
  T* mean;  // (rows, N, channels), written by kPlanShared: the tokens averaged and rounded to T
};

// How the launch cuts the grid: a block owns `rows` x `columns` tokens, which are whole tiles.
struct ScoreBlocks {
  int lanes, rows, columns;
  bool select;
};

// Channels from c on of one token of row b, averaged in mode kPlanShared; zero outside the grid.
template <typename T, bool kAligned, ScoreMode kMode>
__device__ __forceinline__ Vector<T> load_token(const LaplacianScore<T>& p, int b, int row, int column, int64_t c) {
  if (row < 0 || row >= p.grid.height || column < 0 || column >= p.grid.width) return Vector<T>{};
  const T* token = p.x + b * p.batch_stride + (row * p.grid.width + column) * p.token_stride;
  Vector<T> vector = load_vector<kAligned>(token, c, p.channels);
  if constexpr (kMode == ScoreMode::kPlanShared) {
    float sum[kVector<T>];
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) sum[i] = to_float(vector.value[i]);
#pragma unroll 1
    for (int k = 1; k < p.share; ++k) {
      token += p.rows * p.batch_stride;
      vector = load_vector<kAligned>(token, c, p.channels);
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) sum[i] += to_float(vector.value[i]);
    }
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) vector.value[i] = from_float<T>(sum[i] / static_cast<float>(p.share));
  }
  return vector;
}

// A block of kScoreThreads / lanes groups; a group owns kScoreRows tokens of a column at a time and reads a vector of
// each and of their neighbours. Left and right neighbours are the centres of other groups, found in the cache.
template <typename T, bool kAligned, ScoreMode kMode>
__global__ void __launch_bounds__(kScoreThreads, kMode == ScoreMode::kPlanShared ? 3 : 4)
    laplacian_score_kernel(const LaplacianScore<T> p, const ScoreBlocks blocks) {
  constexpr bool kPlan = kMode == ScoreMode::kPlan || kMode == ScoreMode::kPlanShared;
  BIGAIN_DYNAMIC_SHARED(float, block_score);  // (rows, columns) of the block, when it selects
  const unsigned blocks_x = (p.grid.width + blocks.columns - 1) / blocks.columns;
  const unsigned blocks_y = (p.grid.height + blocks.rows - 1) / blocks.rows;
  const int b = blockIdx.x / blocks_x / blocks_y;
  const int top = blockIdx.x / blocks_x % blocks_y * blocks.rows, left = blockIdx.x % blocks_x * blocks.columns;
  const int64_t first_token = static_cast<int64_t>(b) * p.grid.tokens(), vectors = num_vectors<T>(p.channels);
  const int lanes = blocks.lanes, lane = threadIdx.x % lanes;
  const int groups = kScoreThreads / lanes, strips = (blocks.rows + kScoreRows - 1) / kScoreRows;

  // Every thread makes every round, for the shuffles; groups without a token load nothing.
  for (int first = 0; first < strips * blocks.columns; first += groups) {
    const int own = first + threadIdx.x / lanes;
    const int strip = own / blocks.columns * kScoreRows, column_in_block = own % blocks.columns;
    const int row = top + strip, column = left + column_in_block;
    const bool exists = strip < blocks.rows && row < p.grid.height && column < p.grid.width;
    float response_sum[kScoreRows] = {}, squares[kScoreRows] = {};
    for (int64_t v = exists ? lane : vectors; v < vectors; v += lanes) {
      const int64_t c = v * kVector<T>;
      // centre[0] and centre[kScoreRows + 1] are the tokens above and below.
      Vector<T> centre[kScoreRows + 2], beside[2][kScoreRows];
#pragma unroll
      for (int i = 0; i < kScoreRows + 2; ++i) {
        centre[i] = load_token<T, kAligned, kMode>(p, b, row + i - 1, column, c);
      }
#pragma unroll
      for (int i = 0; i < kScoreRows; ++i) {
        beside[0][i] = load_token<T, kAligned, kMode>(p, b, row + i, column - 1, c);
        beside[1][i] = load_token<T, kAligned, kMode>(p, b, row + i, column + 1, c);
      }
#pragma unroll
      for (int i = 0; i < kScoreRows; ++i) {
        float parts[kVector<T>];
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j) {
          float response = 4.0f * to_float(centre[i + 1].value[j]);
          response -= to_float(centre[i].value[j]);
          response -= to_float(centre[i + 2].value[j]);
          response -= to_float(beside[0][i].value[j]);
          response -= to_float(beside[1][i].value[j]);
          parts[j] = kMode == ScoreMode::kL2 ? response * response : fabsf(response);
        }
        response_sum[i] += tree_sum(parts);
        if constexpr (kPlan) squares[i] += sum_of_squares(centre[i + 1]);
        if constexpr (kMode == ScoreMode::kPlanShared) {
          if (strip + i < blocks.rows && row + i < p.grid.height) {
            T* const out = p.mean + (first_token + (row + i) * p.grid.width + column) * p.channels;
            store_vector<kAligned>(out, c, p.channels, centre[i + 1]);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kScoreRows; ++i) {
      float score = group_sum(response_sum[i], lanes);
      if (kMode == ScoreMode::kL2) score = sqrtf(score);
      if constexpr (kPlan) squares[i] = group_sum(squares[i], lanes);
      if (exists && lane == 0 && strip + i < blocks.rows && row + i < p.grid.height) {
        const int64_t n = first_token + (row + i) * p.grid.width + column;
        p.score[n] = score;
        if constexpr (kPlan) {
          p.inverse_norm[n] = inverse_norm(squares[i]);
          if (blocks.select) block_score[(strip + i) * blocks.columns + column_in_block] = score;
        }
      }
    }
  }

  if constexpr (kPlan) {
    if (!blocks.select) return;
    __syncthreads();
    const TileGrid grid = p.grid;
    const int sy = grid.sy, sx = grid.sx, across = blocks.columns / sx;
    int* const block_best = reinterpret_cast<int*>(block_score + blocks.rows * blocks.columns);
    for (int tile = threadIdx.x; tile < blocks.rows / sy * across; tile += kScoreThreads) {
      const int y = tile / across * sy, x = tile % across * sx;
      const int tile_y = top / sy + tile / across, tile_x = left / sx + tile % across;
      if (tile_y >= grid.tiles_y() || tile_x >= grid.tiles_x()) continue;
      int best = 0;
      float lowest = -minus_infinity();
      for (int i = 0; i < sy * sx; ++i) {
        // Strictly less: ties to the lowest token. False for NaN, which counts as infinity.
        const float score = block_score[(y + i / sx) * blocks.columns + x + i % sx];
        if (score < lowest) {
          lowest = score;
          best = i;
        }
      }
      block_best[tile] = best;
      p.tables.destinations[static_cast<int64_t>(b) * grid.tiles() + tile_y * grid.tiles_x() + tile_x] =
          grid.token(tile_y, tile_x, best);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < blocks.rows * blocks.columns; i += kScoreThreads) {
      const int y = i / blocks.columns, x = i % blocks.columns;
      if (top + y >= p.grid.height || left + x >= p.grid.width) continue;
      write_token(p.tables, grid, b, top + y, left + x, [&] { return block_best[y / sy * across + x / sx]; });
    }
  }
}

// One launch; two in the modes kPlan and kPlanShared with tiles of more than kLargestFusedTile tokens.
template <typename T, ScoreMode kMode>
void launch_laplacian_score(const LaplacianScore<T>& p, cudaStream_t stream) {
  constexpr bool kPlan = kMode == ScoreMode::kPlan || kMode == ScoreMode::kPlanShared;
  ScoreBlocks blocks;
  blocks.lanes = lanes_per_token<T>(p.channels);
  blocks.select = kPlan && static_cast<int64_t>(p.grid.sy) * p.grid.sx <= kLargestFusedTile;
  const int sy = blocks.select ? p.grid.sy : 1, sx = blocks.select ? p.grid.sx : 1;
  blocks.rows = sy * static_cast<int>(ceil_div(kScoreRows, sy));
  // As many columns as fill the block's groups once.
  const int strips = static_cast<int>(ceil_div(blocks.rows, kScoreRows));
  blocks.columns = sx * static_cast<int>(ceil_div(ceil_div(kScoreThreads / blocks.lanes, strips), sx));
  const size_t shared_bytes = blocks.select ? 2 * sizeof(float) * blocks.rows * blocks.columns : 0;
  const int64_t blocks_of_row = ceil_div(p.grid.height, blocks.rows) * ceil_div(p.grid.width, blocks.columns);
  const unsigned grid = grid_extent(p.rows * blocks_of_row);
  const bool aligned = has_vectors<T>(p.x, p.channels, p.batch_stride, p.token_stride);
  launch(aligned ? laplacian_score_kernel<T, true, kMode> : laplacian_score_kernel<T, false, kMode>, grid,
         kScoreThreads, shared_bytes, stream, p, blocks);
  if (kPlan && !blocks.select) {
    launch_select_destinations<false>({p.score, p.grid.tokens(), p.rows, p.grid, p.tables}, stream);
  }
}

}  // namespace bigain
