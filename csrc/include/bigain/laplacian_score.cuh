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
  int rows, share;  // share, at least 2, is read by kPlanShared
  int frames;       // read in the modes kL1 and kL2: x is (rows / frames, frames * N, channels)
  int64_t channels;
  TileGrid grid;  // its tiles are read in the modes kPlan and kPlanShared
  float* score;   // (rows, N)
  // For the modes kPlan and kPlanShared only:
  float* inverse_norm;  // (rows, N), see inverse_norm()
  TileTables tables;
  T* mean;  // (rows, N, channels), written by kPlanShared: the tokens averaged and rounded to T
};

// How the launch cuts the grid: a block owns `rows` x `columns` tokens, which are whole tiles, `tiles_x` of them side
// by side where the kernel selects.
struct ScoreBlocks {
  Lanes lanes;
  int rows, columns, tiles_x;
  bool select;
  Divisor by_columns, by_tiles_x, by_blocks_x, by_blocks_y, by_frames;
};

// What kScoreRows tokens of a column and their neighbours have in the channels of one vector.
template <typename T>
struct Stencil {
  static constexpr int kTokens = 3 * kScoreRows + 2;
  // The tokens from above the first to below the last one, then those to the left, then those to the right.
  Vector<T> token[kTokens];

  __device__ const Vector<T>& centre(int i) const { return token[i + 1]; }
  __device__ const Vector<T>& above(int i) const { return token[i]; }
  __device__ const Vector<T>& below(int i) const { return token[i + 2]; }
  __device__ const Vector<T>& left(int i) const { return token[kScoreRows + 2 + i]; }
  __device__ const Vector<T>& right(int i) const { return token[2 * kScoreRows + 2 + i]; }

  // Of the batch row at x; all loads are on their way before the first is used. Zero outside the grid.
  template <bool kAligned>
  __device__ __forceinline__ void load(const LaplacianScore<T>& p, const T* x, int row, int column, int64_t c) {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) token[i] = load_token<kAligned>(p, x, i, row, column, c);
  }

  // The same of the mean of the two or more batch rows that share a plan, the first of which is at x.
  template <bool kAligned>
  __device__ __forceinline__ void load_mean(const LaplacianScore<T>& p, const T* x, int row, int column, int64_t c) {
    const int64_t stride = p.rows * p.batch_stride;
    Stencil second;
    load<kAligned>(p, x, row, column, c);
    second.template load<kAligned>(p, x + stride, row, column, c);
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      float sum[kVector<T>];
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) sum[j] = token[i][j] + second.token[i][j];
#pragma unroll 1
      for (int k = 2; k < p.share; ++k) {
        const Vector<T> next = load_token<kAligned>(p, x + k * stride, i, row, column, c);
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j) sum[j] += next[j];
      }
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) sum[j] /= static_cast<float>(p.share);
      token[i] = to_vector<T>(sum);
    }
  }

  template <bool kAligned>
  static __device__ __forceinline__ Vector<T> load_token(const LaplacianScore<T>& p, const T* x, int i, int row,
                                                         int column, int64_t c) {
    const bool in_column = i < kScoreRows + 2, on_left = i < 2 * kScoreRows + 2;
    row += in_column ? i - 1 : (i - kScoreRows - 2) % kScoreRows;
    column += in_column ? 0 : on_left ? -1 : 1;
    const bool inside = static_cast<unsigned>(row) < static_cast<unsigned>(p.grid.height) &&
                        static_cast<unsigned>(column) < static_cast<unsigned>(p.grid.width);
    return load_vector<kAligned>(x + (row * p.grid.width + column) * p.token_stride, c, p.channels, inside);
  }
};

// A block of kScoreThreads / lanes groups; a group owns kScoreRows tokens of a column at a time and reads a vector of
// each and of their neighbours. Left and right neighbours are the centres of other groups, found in the cache.
template <typename T, bool kAligned, ScoreMode kMode>
__global__ void __launch_bounds__(kScoreThreads, kMode != ScoreMode::kPlanShared ? 4
                                                 : kAligned                      ? 3
                                                                                 : 2)
    laplacian_score_kernel(const LaplacianScore<T> p, const ScoreBlocks blocks) {
  constexpr bool kPlan = kMode == ScoreMode::kPlan || kMode == ScoreMode::kPlanShared;
  BIGAIN_DYNAMIC_SHARED(float, block_score);  // (rows, columns) of the block, when it selects
  unsigned number = blockIdx.x;
  const int block_x = blocks.by_blocks_x.take(number), block_y = blocks.by_blocks_y.take(number);
  const int b = number, top = block_y * blocks.rows, left = block_x * blocks.columns;
  const int64_t first_token = static_cast<int64_t>(b) * p.grid.tokens();
  unsigned video = b;
  const int frame = kPlan ? 0 : blocks.by_frames.take(video);
  const int64_t to_next = p.grid.tokens() * p.token_stride;
  const T* const x = p.x + video * p.batch_stride + frame * to_next;
  // A frame that is not there is the frame itself.
  const T* const before = x - (!kPlan && frame > 0 ? to_next : 0);
  const T* const after = x + (!kPlan && frame + 1 < p.frames ? to_next : 0);
  const int lanes = blocks.lanes.count(), lane = blocks.lanes.lane();
  const int vectors = static_cast<int>(num_vectors<T>(p.channels));
  const int groups = kScoreThreads / lanes, strips = (blocks.rows + kScoreRows - 1) / kScoreRows;
  follow_launches();

  // Every thread makes every round, for the shuffles; groups without a token load nothing.
  for (int first = 0; first < strips * blocks.columns; first += groups) {
    unsigned own = first + blocks.lanes.group();
    const int column_in_block = blocks.by_columns.take(own), strip = own * kScoreRows;
    const int row = top + strip, column = left + column_in_block;
    const bool exists = strip < blocks.rows && row < p.grid.height && column < p.grid.width;
    float response_sum[kScoreRows] = {}, squares[kScoreRows] = {};
    for (int v = exists ? lane : vectors; v < vectors; v += lanes) {
      const int64_t c = v * kVector<T>;
      Stencil<T> tokens;
      if constexpr (kMode == ScoreMode::kPlanShared) {
        tokens.template load_mean<kAligned>(p, x, row, column, c);
      } else {
        tokens.template load<kAligned>(p, x, row, column, c);
      }
      Vector<T> earlier[kScoreRows] = {}, later[kScoreRows] = {};
      if (!kPlan && p.frames > 1) {
#pragma unroll
        for (int i = 0; i < kScoreRows; ++i) {
          earlier[i] = Stencil<T>::template load_token<kAligned>(p, before, i + 1, row, column, c);
          later[i] = Stencil<T>::template load_token<kAligned>(p, after, i + 1, row, column, c);
        }
      }
#pragma unroll
      for (int i = 0; i < kScoreRows; ++i) {
        float parts[kVector<T>];
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j) {
          float response = 4.0f * tokens.centre(i)[j];
          response -= tokens.above(i)[j];
          response -= tokens.below(i)[j];
          response -= tokens.left(i)[j];
          response -= tokens.right(i)[j];
          if (!kPlan && p.frames > 1) {
            response += (tokens.centre(i)[j] - earlier[i][j]) + (tokens.centre(i)[j] - later[i][j]);
          }
          parts[j] = kMode == ScoreMode::kL2 ? response * response : fabsf(response);
        }
        response_sum[i] += tree_sum(parts);
        if constexpr (kPlan) squares[i] += sum_of_squares(tokens.centre(i));
        if constexpr (kMode == ScoreMode::kPlanShared) {
          if (strip + i < blocks.rows && row + i < p.grid.height) {
            T* const out = p.mean + (first_token + (row + i) * p.grid.width + column) * p.channels;
            store_vector<kAligned>(out, c, p.channels, tokens.centre(i));
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
    const int sy = grid.sy, sx = grid.sx, tiles_x = blocks.tiles_x;
    const int first_y = grid.by_sy.quotient(top), first_x = block_x * tiles_x;
    int* const block_best = reinterpret_cast<int*>(block_score + blocks.rows * blocks.columns);
    for (int tile = threadIdx.x;; tile += kScoreThreads) {
      unsigned y = tile;
      const int x = blocks.by_tiles_x.take(y), tile_y = first_y + y, tile_x = first_x + x;
      if (static_cast<int>(y) * sy >= blocks.rows) break;
      if (tile_y >= grid.tiles_y() || tile_x >= grid.tiles_x()) continue;
      int best = 0;
      float lowest = -minus_infinity();
      const float* score = block_score + y * sy * blocks.columns + x * sx;
      for (int i = 0; i < sy; ++i, score += blocks.columns) {
        for (int j = 0; j < sx; ++j) {
          // Strictly less: ties to the lowest token. False for NaN, which counts as infinity.
          if (score[j] < lowest) {
            lowest = score[j];
            best = i * sx + j;
          }
        }
      }
      block_best[tile] = best;
      p.tables.destinations[static_cast<int64_t>(b) * grid.tiles() + tile_y * grid.tiles_x() + tile_x] =
          grid.token(tile_y, tile_x, best);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < blocks.rows * blocks.columns; i += kScoreThreads) {
      unsigned y = i;
      const unsigned x = blocks.by_columns.take(y);
      if (top + static_cast<int>(y) >= p.grid.height || left + static_cast<int>(x) >= p.grid.width) continue;
      write_token(p.tables, grid, b, top + y, left + x,
                  [&] { return block_best[grid.by_sy.quotient(y) * tiles_x + grid.by_sx.quotient(x)]; });
    }
  }
}

// One launch; two in the modes kPlan and kPlanShared with tiles of more than kLargestFusedTile tokens.
template <typename T, ScoreMode kMode>
void launch_laplacian_score(const LaplacianScore<T>& p, cudaStream_t stream) {
  constexpr bool kPlan = kMode == ScoreMode::kPlan || kMode == ScoreMode::kPlanShared;
  const bool select = kPlan && static_cast<int64_t>(p.grid.sy) * p.grid.sx <= kLargestFusedTile;
  const Lanes lanes = lanes_per_token<T>(p.channels);
  const int sy = select ? p.grid.sy : 1, sx = select ? p.grid.sx : 1;
  const int rows = sy * static_cast<int>(ceil_div(kScoreRows, sy));
  // As many columns as fill the block's groups once.
  const int strips = static_cast<int>(ceil_div(rows, kScoreRows));
  const int tiles_x = static_cast<int>(ceil_div(ceil_div(kScoreThreads / lanes.count(), strips), sx));
  const int columns = sx * tiles_x;
  const int64_t blocks_x = ceil_div(p.grid.width, columns), blocks_y = ceil_div(p.grid.height, rows);
  const ScoreBlocks blocks = {lanes,
                              rows,
                              columns,
                              tiles_x,
                              select,
                              Divisor(columns),
                              Divisor(tiles_x),
                              Divisor(blocks_x),
                              Divisor(blocks_y),
                              Divisor(kPlan ? 1 : p.frames)};
  const size_t shared_bytes = select ? 2 * sizeof(float) * rows * columns : 0;
  const unsigned grid = grid_extent(p.rows * blocks_y * blocks_x);
  const bool aligned = has_vectors<T>(p.x, p.channels, p.batch_stride, p.token_stride);
  launch(aligned ? laplacian_score_kernel<T, true, kMode> : laplacian_score_kernel<T, false, kMode>, grid,
         kScoreThreads, shared_bytes, stream, p, blocks);
  if (kPlan && !select) {
    launch_select_destinations<false>({p.score, p.grid.tokens(), p.rows, p.grid, p.tables}, stream);
  }
}

}  // namespace bigain
