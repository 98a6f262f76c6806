// Laplacian scores and all that matching needs (inverse norms, the smoothest token of each tile, the list of the other
// tokens) in one pass over the tokens; L-GTM of BiGain, arXiv 2603.12240.
#pragma once

#include <algorithm>

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

// The most threads of a block, and the blocks that a launch has at least where its tokens allow: two a multiprocessor.
constexpr int kScoreThreads = 256, kScoreBlocks = 256;
// Tokens that a thread computes in the channels of a vector: it reads 20 for 8, each once.
constexpr int kPatchRows = 2, kPatchColumns = 4, kPatch = kPatchRows * kPatchColumns;
static_assert(kPatchColumns == 4, "sums of a row are stored four at a time");
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

// How the launch cuts the grid: a block owns `rows` x `columns` tokens, which are whole tiles where the kernel selects,
// in patches, `patches` of them at a time and `patches_x` side by side.
struct ScoreBlocks {
  SumOrder order;
  int rows, columns, patches, patches_x;
  bool select;
  Divisor by_threads, by_columns, by_patches_x, by_blocks_x, by_blocks_y, by_frames;
};

// The tokens of a patch and their neighbours in the channels of one vector; zero outside the grid.
template <typename T>
struct Stencil {
  // Rows and columns of the patch, and one around it of which the corners are not read.
  Vector<T> token[kPatchRows + 2][kPatchColumns + 2];

  // 4 x - above - below - left - right of value k of token (i, j) of the patch; the first product is exact.
  __device__ __forceinline__ float response(int i, int j, int k) const {
    float value = fmaf(4.0f, token[i + 1][j + 1][k], -token[i][j + 1][k]);
    value -= token[i + 2][j + 1][k];
    value -= token[i + 1][j][k];
    return value - token[i + 1][j + 2][k];
  }
};

// Reads the tokens of a patch and around it, in the channels of the vector at c.
template <typename T, bool kAligned, ScoreMode kMode>
struct ScoreReader {
  const LaplacianScore<T>& p;
  int row, column;  // of the first token of the patch
  int64_t c, row_stride, token_stride;

  __device__ bool inside(int i, int j) const {
    return static_cast<unsigned>(row + i) < static_cast<unsigned>(p.grid.height) &&
           static_cast<unsigned>(column + j) < static_cast<unsigned>(p.grid.width);
  }
  // Token (i, j) of the patch, whose first token is at `patch`.
  __device__ __forceinline__ Vector<T> at(const T* patch, int i, int j) const {
    return load_vector<kAligned>(patch + i * row_stride + j * token_stride, c, p.channels, inside(i, j));
  }
  // The mean of the two or more batch rows that share a plan, of which the first two are given.
  __device__ __forceinline__ Vector<T> mean(const Vector<T>& first, const Vector<T>& second, const T* patch, int i,
                                            int j) const {
    float sum[kVector<T>];
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) sum[k] = first[k] + second[k];
#pragma unroll 1
    for (int s = 2; s < p.share; ++s) {
      const Vector<T> next = at(patch + s * p.rows * p.batch_stride, i, j);
#pragma unroll
      for (int k = 0; k < kVector<T>; ++k) sum[k] += next[k];
    }
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) sum[k] /= static_cast<float>(p.share);
    return to_vector<T>(sum);
  }

  // The tokens of a turn, of kTurns; all that they read is on its way before the first is used.
  template <int kTurn>
  __device__ __forceinline__ void load(const T* patch, Stencil<T>& tokens) const {
    each<kTurn>([&](int i, int j) { tokens.token[i][j] = at(patch, i - 1, j - 1); });
    if constexpr (kMode == ScoreMode::kPlanShared) {
      Stencil<T> second;
      const T* const next = patch + p.rows * p.batch_stride;
      each<kTurn>([&](int i, int j) { second.token[i][j] = at(next, i - 1, j - 1); });
      each<kTurn>([&](int i, int j) {
        tokens.token[i][j] = mean(tokens.token[i][j], second.token[i][j], patch, i - 1, j - 1);
      });
    }
  }

  // Of two batch rows, half of the columns are as many loads as all of one. What the last column of the patch alone
  // needs comes last, into registers that have been used.
  static constexpr int kTurns = kMode == ScoreMode::kPlanShared ? 3 : 2;
  static __device__ constexpr int turn(int i, int j) {
    const bool outer_row = i % (kPatchRows + 1) == 0;
    if (outer_row && j % (kPatchColumns + 1) == 0) return -1;  // a corner
    if (j > kPatchColumns || (outer_row && j == kPatchColumns)) return kTurns - 1;
    return kTurns > 2 && j > kPatchColumns / 2 ? 1 : 0;
  }

 private:
  // Calls work(i, j) for the tokens of a turn.
  template <int kTurn, typename Work>
  static __device__ __forceinline__ void each(const Work& work) {
#pragma unroll
    for (int j = 0; j < kPatchColumns + 2; ++j) {
#pragma unroll
      for (int i = 0; i < kPatchRows + 2; ++i) {
        if (turn(i, j) == kTurn) work(i, j);
      }
    }
  }
};

// Whether a token is one of the block's and of the grid.
__device__ __forceinline__ bool in_block(const ScoreBlocks& blocks, const TileGrid& grid, int top, int left, int row,
                                         int column) {
  return row < min(top + blocks.rows, grid.height) && column < min(left + blocks.columns, grid.width);
}

// Of four sums over eight neighbouring lanes, in the order of group_sum: lane 2 i and the next one get sum i. At each
// step a lane keeps half of its sums and gives away the others.
__device__ __forceinline__ float group_sum_of_four(const float (&values)[4]) {
  const bool upper = threadIdx.x & 4, odd = threadIdx.x & 2;
  float half[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float given = upper ? values[i] : values[i + 2];
    half[i] = (upper ? values[i + 2] : values[i]) + __shfl_xor_sync(kAllLanes, given, 4);
  }
  const float given = odd ? half[0] : half[1];
  return group_sum((odd ? half[1] : half[0]) + __shfl_xor_sync(kAllLanes, given, 2), 2);
}

// What bounds a thread's registers. 128 let two blocks of kScoreThreads run side by side; for sm_100, nvcc 13.0 asks
// for a few more. A thread has 168 there and where other frames may be read too, and as many as it asks for where other
// batch rows are, or values one by one.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1100
constexpr int kScoreBeside = 1;
#else
constexpr int kScoreBeside = 2;
#endif
constexpr int score_beside(bool aligned, ScoreMode mode) {
  return aligned && mode == ScoreMode::kPlan ? kScoreBeside : 1;
}
constexpr int score_threads(bool aligned, ScoreMode mode) {
  const bool asks = !aligned || mode == ScoreMode::kPlanShared;
  return asks || score_beside(aligned, mode) == 2 ? kScoreThreads : kScoreThreads * 3 / 2;
}

// A block has `order.threads()` threads for each of `patches` patches. A thread sums its vectors of all tokens of a
// patch, and leaves the sums in shared memory, where eight lanes add those of four tokens.
template <typename T, bool kAligned, ScoreMode kMode>
__global__ void __launch_bounds__(score_threads(kAligned, kMode), score_beside(kAligned, kMode))
    laplacian_score_kernel(const LaplacianScore<T> p, const ScoreBlocks blocks) {
  constexpr bool kPlan = kMode == ScoreMode::kPlan || kMode == ScoreMode::kPlanShared;
  // Sums of a patch, four tokens of a row together: responses, then squares.
  constexpr int kSums = kPlan ? 2 * kPatch : kPatch, kFours = kSums / 4;
  // partial (kFours, threads), block_score (rows, columns)
  BIGAIN_DYNAMIC_SHARED(float4, partial);
  float* const block_score = reinterpret_cast<float*>(partial + kFours * blockDim.x);
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
  unsigned own_patch = threadIdx.x;
  const int own_thread = blocks.by_threads.take(own_patch);
  const int vectors = static_cast<int>(num_vectors<T>(p.channels));
  const int strips = (blocks.rows + kPatchRows - 1) / kPatchRows, patches = strips * blocks.patches_x;
  follow_launches();

  // Every thread makes every round, for the barriers; threads without a patch load nothing.
  for (int first = 0; first < patches; first += blocks.patches) {
    unsigned strip = first + own_patch;
    const int in_strip = blocks.by_patches_x.take(strip);
    const int row = top + strip * kPatchRows, column = left + in_strip * kPatchColumns;
    const bool exists = static_cast<int>(own_patch) < blocks.patches && static_cast<int>(strip) < strips &&
                        row < p.grid.height && column < p.grid.width;
    const int64_t patch = (static_cast<int64_t>(row) * p.grid.width + column) * p.token_stride;
    float sums[kSums] = {};
    int v = blocks.order.first(own_thread);
#pragma unroll 1
    for (int step = exists ? 0 : blocks.order.run; step < blocks.order.run; ++step, v += kSumLanes) {
      if (v >= vectors) break;
      const int64_t token_stride = p.token_stride;
      const ScoreReader<T, kAligned, kMode> reader = {
          p, row, column, v * kVector<T>, p.grid.width * token_stride, token_stride};
      Stencil<T> tokens;
      reader.template load<0>(x + patch, tokens);
      if constexpr (reader.kTurns > 2) reader.template load<1>(x + patch, tokens);
#pragma unroll
      for (int j = 0; j < kPatchColumns; ++j) {
        if (j == 1) reader.template load<reader.kTurns - 1>(x + patch, tokens);
        Vector<T> earlier[kPatchRows] = {}, later[kPatchRows] = {};
        if (!kPlan && p.frames > 1) {
#pragma unroll
          for (int i = 0; i < kPatchRows; ++i) {
            earlier[i] = reader.at(before + patch, i, j);
            later[i] = reader.at(after + patch, i, j);
          }
        }
#pragma unroll
        for (int i = 0; i < kPatchRows; ++i) {
          const Vector<T>& centre = tokens.token[i + 1][j + 1];
          float& sum = sums[i * kPatchColumns + j];
#pragma unroll
          for (int k = 0; k < kVector<T>; ++k) {
            float response = tokens.response(i, j, k);
            if (!kPlan && p.frames > 1) response += (centre[k] - earlier[i][k]) + (centre[k] - later[i][k]);
            sum = kMode == ScoreMode::kL2 ? fmaf(response, response, sum) : sum + fabsf(response);
          }
          if constexpr (kPlan) add_squares(sums[kPatch + i * kPatchColumns + j], centre);
          if constexpr (kMode == ScoreMode::kPlanShared) {
            const int n = (row + i) * p.grid.width + column + j;
            if (in_block(blocks, p.grid, top, left, row + i, column + j)) {
              store_vector<kAligned>(p.mean + (first_token + n) * p.channels, reader.c, p.channels, centre);
            }
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      partial[i * blockDim.x + threadIdx.x] = {sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]};
    }
    __syncthreads();

    // Eight lanes add four sums, and end with one of them each, twice.
    const int lane = threadIdx.x % kSumLanes, count = blocks.patches * kFours * kSumLanes;
#pragma unroll 1
    for (int own = threadIdx.x; own / kWarp * kWarp < count; own += blockDim.x) {
      const int four = own / kSumLanes % kFours, patch = own / (kSumLanes * kFours);
      const float4* const of_patch = partial + four * blockDim.x + patch * blocks.order.threads() + lane;
      float total[4] = {};
#pragma unroll
      for (int i = 0; i < kMostRuns; ++i) {
        if (own < count && i < blocks.order.runs) {
          const float4 run = of_patch[i * kSumLanes];
          total[0] += run.x;
          total[1] += run.y;
          total[2] += run.z;
          total[3] += run.w;
        }
      }
      const float sum = group_sum_of_four(total);
      unsigned y = first + patch;
      const int x_in_block = blocks.by_patches_x.take(y) * kPatchColumns + lane / 2;
      const int y_in_block = y * kPatchRows + four % kPatchRows;
      const int row = top + y_in_block, column = left + x_in_block;
      if (lane % 2 != 0 || own >= count || !in_block(blocks, p.grid, top, left, row, column)) continue;
      const int64_t n = first_token + row * p.grid.width + column;
      if (kPlan && four >= kPatchRows) {
        p.inverse_norm[n] = inverse_norm(sum);
      } else {
        p.score[n] = kMode == ScoreMode::kL2 ? sqrtf(sum) : sum;
        if (kPlan) block_score[y_in_block * blocks.columns + x_in_block] = sum;
      }
    }
    __syncthreads();
  }

  if constexpr (kPlan) {
    if (!blocks.select) return;
    const TileGrid& grid = p.grid;
#pragma unroll 1
    for (int i = threadIdx.x; i < blocks.rows * blocks.columns; i += blockDim.x) {
      unsigned y = i;
      const unsigned x = blocks.by_columns.take(y);
      const int row = top + y, column = left + x;
      if (row >= grid.height || column >= grid.width) continue;
      write_token(p.tables, grid, b, row, column, [&] {
        // Every token searches its tile.
        const unsigned tile_y = grid.by_sy.quotient(y), tile_x = grid.by_sx.quotient(x);
        const float* score = block_score + tile_y * grid.sy * blocks.columns + tile_x * grid.sx;
        int best = 0;
        float lowest = -minus_infinity();
#pragma unroll 1
        for (int tile_row = 0; tile_row < grid.sy; ++tile_row, score += blocks.columns) {
#pragma unroll 1
          for (int j = 0; j < grid.sx; ++j) {
            // Strictly less: ties to the lowest token. False for NaN, which counts as infinity.
            if (score[j] < lowest) {
              lowest = score[j];
              best = tile_row * grid.sx + j;
            }
          }
        }
        if (best == static_cast<int>((y - tile_y * grid.sy) * grid.sx + x - tile_x * grid.sx)) {
          const int tile = (grid.by_sy.quotient(top) + tile_y) * grid.tiles_x() + grid.by_sx.quotient(left) + tile_x;
          p.tables.destinations[static_cast<int64_t>(b) * grid.tiles() + tile] = row * grid.width + column;
        }
        return best;
      });
    }
  }
}

// Patches that a block computes at a time: the fewest of those that leave the fewest warps. No sum depends on it.
template <typename T>
int score_patches(const LaplacianScore<T>& p, const SumOrder& order) {
  const int64_t across = ceil_div(p.grid.width, kPatchColumns);
  const int64_t all = p.rows * ceil_div(p.grid.height, kPatchRows) * across;
  const int64_t most = std::max(std::min(all / kScoreBlocks, int64_t{kScoreThreads / order.threads()}), int64_t{1});
  int best = 1;
  int64_t fewest = INT64_MAX;
  for (int patches = 1; patches <= most; ++patches) {
    const int64_t warps = ceil_div(across, patches) * ceil_div(patches * order.threads(), kWarp);
    if (warps >= fewest) continue;
    best = patches;
    fewest = warps;
  }
  return best;
}

// One launch; two in the modes kPlan and kPlanShared with tiles of more than kLargestFusedTile tokens.
template <typename T, ScoreMode kMode>
void launch_laplacian_score(const LaplacianScore<T>& p, cudaStream_t stream) {
  constexpr bool kPlan = kMode == ScoreMode::kPlan || kMode == ScoreMode::kPlanShared;
  const bool select = kPlan && static_cast<int64_t>(p.grid.sy) * p.grid.sx <= kLargestFusedTile;
  const SumOrder order(num_vectors<T>(p.channels));
  const int sy = select ? p.grid.sy : 1, sx = select ? p.grid.sx : 1;
  const int rows = sy * static_cast<int>(ceil_div(kPatchRows, sy));
  const int strips = static_cast<int>(ceil_div(rows, kPatchRows)), patches = score_patches(p, order);
  // As many columns as the block computes at once.
  const int columns = sx * static_cast<int>(ceil_div(kPatchColumns * ceil_div(patches, strips), sx));
  const int patches_x = static_cast<int>(ceil_div(columns, kPatchColumns));
  const int64_t blocks_x = ceil_div(p.grid.width, columns), blocks_y = ceil_div(p.grid.height, rows);
  const ScoreBlocks blocks = {order,
                              rows,
                              columns,
                              patches,
                              patches_x,
                              select,
                              Divisor(order.threads()),
                              Divisor(columns),
                              Divisor(patches_x),
                              Divisor(blocks_x),
                              Divisor(blocks_y),
                              Divisor(kPlan ? 1 : p.frames)};
  const unsigned threads = kWarp * static_cast<unsigned>(ceil_div(patches * order.threads(), kWarp));
  const size_t shared_bytes = sizeof(float) * ((kPlan ? 2 : 1) * kPatch * threads + (kPlan ? rows * columns : 0));
  const unsigned grid = grid_extent(p.rows * blocks_y * blocks_x);
  const bool aligned = has_vectors<T>(p.x, p.channels, p.batch_stride, p.token_stride);
  launch(aligned ? laplacian_score_kernel<T, true, kMode> : laplacian_score_kernel<T, false, kMode>, grid, threads,
         shared_bytes, stream, p, blocks);
  if (kPlan && !select) {
    launch_select_destinations<false>({p.score, p.grid.tokens(), p.rows, p.grid, p.tables}, stream);
  }
}

}  // namespace bigain
