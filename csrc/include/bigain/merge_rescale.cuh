// The merge "mlerp": the mean of each slot, brought to the length of its longest member.
#pragma once

#include "bigain/row_norms.cuh"
#include "bigain/token_merge.cuh"

namespace bigain {

constexpr int kRescaleThreads = 128;

template <typename T>
struct MergeRescale {
  const float* mean;   // (batch, slots, channels), contiguous
  const float* norms;  // (batch, tokens): the norms of the tokens
  int batch;
  int64_t channels;
  MergeTables tables;
  T* y;  // (batch, slots, channels), contiguous: the mean, as long as the longest member
};

// A group of lanes owns a slot; see Lanes for the order of the sum.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kRescaleThreads)
    merge_rescale_kernel(const MergeRescale<T> p, const Lanes lanes, const Divisor by_slots,
                         const Divisor by_plan_rows) {
  const unsigned row = lanes.groups_before(kRescaleThreads) + lanes.group();
  const bool exists = row < static_cast<unsigned>(p.batch * p.tables.slots);
  const int lane = lanes.lane(), step = lanes.count();
  unsigned b = row;
  const int m = by_slots.take(b);
  const unsigned plan_row = by_plan_rows.remainder(b);
  const int vectors = exists ? static_cast<int>(num_vectors<float>(p.channels)) : 0;
  const float* const mean = p.mean + row * p.channels;
  const float* const norms = p.norms + static_cast<int64_t>(b) * p.tables.tokens;
  follow_launches();
  float squares = 0.0f, largest = 0.0f;
#pragma unroll 1
  for (int v = lane; v < vectors; v += kLoadsAhead * step) {
    Vector<float> ahead[kLoadsAhead];
    load_ahead<kAligned>(ahead, mean, v, vectors, p.channels, step);
#pragma unroll
    for (int i = 0; i < kLoadsAhead; ++i) {
      if (v + i * step < vectors) add_squares(squares, ahead[i]);
    }
  }
  if (exists) {
    const MergeTables::Slot slot = p.tables.slot(plan_row, m);
    const int32_t* const members = p.tables.members + static_cast<int64_t>(plan_row) * p.tables.tokens + slot.begin;
    for (int i = lane; i < slot.size; i += step) {
      const float norm = norms[p.tables.token(members[i])];
      if (norm > largest || is_nan(norm)) largest = norm;
    }
  }
  squares = group_sum(squares, step);
  for (int distance = step / 2; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, largest, distance);
    if (other > largest || is_nan(other)) largest = other;
  }
  const float length = sqrtf(squares), scale = largest / (length == 0.0f ? 1.0f : length);
#pragma unroll 1
  for (int v = lane; v < vectors; v += kLoadsAhead * step) {
    Vector<float> ahead[kLoadsAhead];
    load_ahead<kAligned>(ahead, mean, v, vectors, p.channels, step);
#pragma unroll
    for (int i = 0; i < kLoadsAhead; ++i) {
#pragma unroll
      for (int k = 0; k < kVector<float>; ++k) {
        const int64_t c = (v + i * step) * kVector<float> + k;
        if (c < p.channels) p.y[row * p.channels + c] = from_float<T>(ahead[i][k] * scale);
      }
    }
  }
}

// One launch.
template <typename T>
void launch_merge_rescale(const MergeRescale<T>& p, cudaStream_t stream) {
  const Lanes lanes = lanes_per_token<float>(p.channels);
  const int rows = to_int(static_cast<int64_t>(p.batch) * p.tables.slots);
  const unsigned blocks = grid_extent(ceil_div(rows, kRescaleThreads / lanes.count()));
  const bool aligned = has_vectors<float>(p.mean, p.channels, p.channels, p.channels);
  launch(aligned ? merge_rescale_kernel<T, true> : merge_rescale_kernel<T, false>, blocks, kRescaleThreads, 0, stream,
         p, lanes, Divisor(p.tables.slots), Divisor(p.tables.plan_rows));
}

}  // namespace bigain
