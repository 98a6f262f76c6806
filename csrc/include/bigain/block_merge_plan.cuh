// From scores of tiles to the tables of a MergePlan: the smoothest tiles merge whole (ABM). One launch, several blocks
// a row.
#pragma once

#include "bigain/plan_steps.cuh"
#include "bigain/tile_grid.cuh"

namespace bigain {

enum class Reduce { kMax, kSum, kMean, kMin, kStd };

struct BlockPlanInputs {
  const float* score;  // (P, N)
  int64_t score_stride;
  TileGrid grid;
  int64_t count;  // tiles that merge
  Reduce reduce;
};

// One number for the scores of a tile, in float64 as in the reference; NaN counts as +inf.
__device__ __forceinline__ double reduce_tile(const float* tile /* (sy, sx) of rows of `width` */, int width, int sy,
                                              int sx, Reduce reduce) {
  const double infinity = -minus_infinity();
  double sum = 0, largest = -infinity, smallest = infinity;
  for (int i = 0; i < sy; ++i) {
    for (int j = 0; j < sx; ++j) {
      const double value = tile[i * static_cast<int64_t>(width) + j];
      if (value != value) return infinity;
      sum += value;
      largest = value > largest ? value : largest;
      smallest = value < smallest ? value : smallest;
    }
  }
  if (reduce == Reduce::kMax) return largest;
  if (reduce == Reduce::kMin) return smallest;
  const double size = static_cast<double>(sy) * sx, mean = sum / size;
  double result = reduce == Reduce::kSum ? sum : mean;
  if (reduce == Reduce::kStd) {
    double squares = 0;
    for (int i = 0; i < sy; ++i) {
      for (int j = 0; j < sx; ++j) {
        const double difference = tile[i * static_cast<int64_t>(width) + j] - mean;
        squares += difference * difference;
      }
    }
    result = sqrt(squares / size);
  }
  return result != result ? infinity : result;
}

// Keys in the order of float64 values that are not NaN, as ordered_key.
__device__ __forceinline__ uint64_t ordered_key_64(double value) {
  constexpr uint64_t kSign = uint64_t{1} << 63;
  const double without_sign_of_zero = value + 0.0;
  uint64_t bits;
  memcpy(&bits, &without_sign_of_zero, sizeof(bits));
  return bits & kSign ? ~bits : bits | kSign;
}

// Grid (P * parts). The `count` tiles of the lowest reduced score merge whole into their top-left tokens. A warp has
// `tile_steps` steps of tiles.
template <typename Size, bool kInShared>
__global__ void __launch_bounds__(plan::kMostWarps* kWarp, 1)
    block_merge_plan_kernel(const BlockPlanInputs p, int tile_steps, const plan::Division division,
                            const PlanTables tables, unsigned char* scratch) {
  using Word = typename Size::Word;
  using Token = typename Size::Token;
  using Key = uint64_t;
  constexpr int kKeyBytes = sizeof(Key), kCounters = kKeyBytes * plan::kDigits;
  BIGAIN_DYNAMIC_SHARED(unsigned char, shared);
  BIGAIN_SHARED(Word, totals, plan::kMostWarps);
  int* const counters = reinterpret_cast<int*>(shared);
  const plan::Share share(division);
  const plan::Buffers<kInShared, Key, Token> buffers(shared + sizeof(int) * kCounters, scratch, share);
  Key* const keys = buffers.words;
  Token* const assign = buffers.tokens;
  const TileGrid grid = p.grid;
  const int width = grid.width, tiles = grid.tiles(), sy = grid.sy, sx = grid.sx, threads = blockDim.x;
  const float* const score = p.score + share.i_b * p.score_stride;
  follow_launches();
  // To unroll loops over threads, nvcc would divide by their number.
#pragma unroll 1
  for (int i = threadIdx.x; i < kCounters; i += threads) counters[i] = 0;
#pragma unroll 1
  for (int tile = threadIdx.x; tile < tile_steps * threads * plan::kOwn; tile += threads) {
    unsigned tile_y = tile;
    const unsigned tile_x = grid.by_tiles_x.take(tile_y);
    keys[tile] =
        tile < tiles ? ordered_key_64(-reduce_tile(score + grid.token(tile_y, tile_x, 0), width, sy, sx, p.reduce)) : 0;
  }
  const auto merges = plan::choose_highest<kKeyBytes>(keys, static_cast<int>(p.count), share, tile_steps, counters,
                                                      reinterpret_cast<int*>(totals));
  // Every thread has read all keys; from here on they say whether a tile merges.
  __syncthreads();
#pragma unroll 1
  for (int tile = threadIdx.x; tile < tiles; tile += threads) keys[tile] = merges(keys[tile], tile);
  __syncthreads();
#pragma unroll 1
  for (int n = threadIdx.x; n < share.steps * threads * plan::kOwn; n += threads) {
    unsigned row = n;
    const unsigned column = grid.by_width.take(row);
    const int tile_y = grid.by_sy.quotient(row), tile_x = grid.by_sx.quotient(column);
    const bool merged =
        tile_y < grid.tiles_y() && tile_x < grid.tiles_x() && keys[tile_y * grid.tiles_x() + tile_x] != 0;
    assign[n] = static_cast<Token>(merged ? grid.token(tile_y, tile_x, 0) : n);
  }
  __syncthreads();
  Word* const words = reinterpret_cast<Word*>(keys);
#pragma unroll 1
  for (int n = threadIdx.x; n < share.steps * threads * plan::kOwn; n += threads) words[n] = 0;
  const int num_slots = share.count - static_cast<int>(p.count) * (sy * sx - 1);
  plan::write_tables(assign, words, num_slots, share, tables, totals);
}

namespace plan {

// Sizes of block_merge_plan's launch. rows * tokens > 0.
inline Layout block_layout(int64_t tokens, int64_t rows, int multiprocessors) {
  return Layout(tokens, rows, multiprocessors, 8, sizeof(uint64_t));
}

}  // namespace plan

// Bytes of scratch memory, aligned to 16, that launch_block_merge_plan needs; 0 where shared memory suffices.
inline int64_t block_merge_plan_scratch_bytes(int64_t rows, int64_t tokens, int multiprocessors) {
  return rows * tokens == 0 ? 0 : plan::block_layout(tokens, rows, multiprocessors).scratch_bytes();
}

// The p.count tiles of the lowest score merge; M = N - p.count * (sy * sx - 1). One launch, or none without tokens.
// `multiprocessors` of the device decide how many blocks share a row.
inline void launch_block_merge_plan(const BlockPlanInputs& p, int64_t rows, const PlanTables& tables, void* scratch,
                                    int multiprocessors, cudaStream_t stream) {
  const int64_t tokens = p.grid.tokens();
  if (rows * tokens == 0) return;
  const plan::Layout layout = plan::block_layout(tokens, rows, multiprocessors);
  const auto kernel =
      plan::fits_16_bits(tokens)
          ? (layout.in_shared ? block_merge_plan_kernel<plan::Narrow, true>
                              : block_merge_plan_kernel<plan::Narrow, false>)
          : (layout.in_shared ? block_merge_plan_kernel<plan::Wide, true> : block_merge_plan_kernel<plan::Wide, false>);
  launch(kernel, layout.grid(), layout.threads(), layout.shared_bytes(), stream, p,
         static_cast<int>(ceil_div(p.grid.tiles(), layout.warps * plan::kStep)), layout.division(), tables,
         static_cast<unsigned char*>(scratch));
}

}  // namespace bigain
