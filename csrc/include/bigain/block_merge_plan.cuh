// From scores of tiles to the tables of a MergePlan: the smoothest tiles merge whole (ABM). One launch, one block per
// row.
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

// Grid (P). The `count` tiles of the lowest reduced score merge whole into their top-left tokens.
template <bool kInShared>
__global__ void __launch_bounds__(plan::kMostWarps* kWarp, 1)
    block_merge_plan_kernel(const BlockPlanInputs p, const PlanTables tables, const Divisor by_threads,
                            size_t counter_bytes, uint64_t* scratch) {
  BIGAIN_DYNAMIC_SHARED(unsigned char, shared);
  BIGAIN_SHARED(int, totals, plan::kMostWarps);
  int* const counters = reinterpret_cast<int*>(shared);
  const int64_t i_b = blockIdx.x;
  const TileGrid grid = p.grid;
  const int width = grid.width, count = grid.tokens(), tiles = grid.tiles(), sy = grid.sy, sx = grid.sx;
  uint64_t* const keys = plan::buffers<kInShared>(shared, counter_bytes, scratch, count, i_b);
  uint64_t* const is_merged = keys + count;
  const float* const score = p.score + i_b * p.score_stride;
  follow_launches();
  for (int tile = threadIdx.x; tile < tiles; tile += blockDim.x) {
    unsigned tile_y = tile;
    const unsigned tile_x = grid.by_tiles_x.take(tile_y);
    keys[tile] = ordered_key_64(-reduce_tile(score + grid.token(tile_y, tile_x, 0), width, sy, sx, p.reduce));
  }
  __syncthreads();
  plan::choose_highest<8>(keys, tiles, static_cast<int>(p.count), by_threads, counters, totals,
                          [&](int tile, bool merged) { is_merged[tile] = merged; });
  __syncthreads();
  uint64_t* const assign = keys;
  for (int n = threadIdx.x; n < count; n += blockDim.x) {
    unsigned row = n;
    const unsigned column = grid.by_width.take(row);
    const int tile_y = grid.by_sy.quotient(row), tile_x = grid.by_sx.quotient(column);
    const bool merged =
        tile_y < grid.tiles_y() && tile_x < grid.tiles_x() && is_merged[tile_y * grid.tiles_x() + tile_x] != 0;
    assign[n] = merged ? grid.token(tile_y, tile_x, 0) : n;
  }
  __syncthreads();
  const int num_slots = count - static_cast<int>(p.count) * (sy * sx - 1);
  plan::write_tables(assign, is_merged, count, num_slots, i_b, tables, by_threads, counters, totals);
}

// Bytes of scratch memory, aligned to 8, that each row needs for a plan with num_slots slots; 0 where shared memory
// suffices.
inline int64_t block_merge_plan_scratch_bytes(int64_t tokens, int64_t num_slots) {
  return static_cast<int64_t>(plan::Layout(tokens, num_slots, sizeof(uint64_t)).scratch_bytes());
}

// The p.count tiles of the lowest score merge; M = N - p.count * (sy * sx - 1). One launch, or none without tokens.
inline void launch_block_merge_plan(const BlockPlanInputs& p, int64_t rows, const PlanTables& tables, void* scratch,
                                    cudaStream_t stream) {
  const int64_t tokens = p.grid.tokens();
  if (rows * tokens == 0) return;
  const int64_t removed = p.count > 0 ? int64_t{p.grid.sy} * p.grid.sx - 1 : 0;
  const plan::Layout layout(tokens, tokens - p.count * removed, sizeof(uint64_t));
  launch(layout.in_shared ? block_merge_plan_kernel<true> : block_merge_plan_kernel<false>, dim3(grid_extent(rows)),
         plan::threads(tokens), layout.shared_bytes(), stream, p, tables, Divisor(plan::threads(tokens).x),
         layout.counter_bytes, static_cast<uint64_t*>(scratch));
}

}  // namespace bigain
