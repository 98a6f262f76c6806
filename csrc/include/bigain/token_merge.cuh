// Merging tokens by a plan.
//
// The order of every sum is fixed. A slot of up to kLongSlot members is summed in ascending token order. A longer one
// is summed by kLongLanes interleaved lanes, lane i taking members i, i + kLongLanes, ... in order, and the lanes are
// folded by tree_sum: when one destination attracts thousands of sources, a block reads them side by side instead of
// one thread one after another. Nothing is accumulated in memory.
//
// Tokens may be normalized as they are read (LayerNorm). Merging is linear, so the affine parts are applied once to the
// mean instead of to every token.
//
// The tables cannot be checked on the host without waiting for the device. What lies out of range is clamped, so that a
// wrong plan gives wrong numbers and never reads or writes out of bounds.
#pragma once

#include <type_traits>

#include "bigain/common.cuh"
#include "bigain/layer_norm.cuh"
#include "bigain/row_norms.cuh"

namespace bigain {

constexpr int kMergeThreads = 256;
// Vectors of channels that a block owns: 128 bytes, so that gathered rows are read in whole cache lines.
constexpr int kMergeVectors = 8;
constexpr int kMergeSlots = kMergeThreads / kMergeVectors;
constexpr int kLongSlot = 32;
constexpr int kLongLanes = kMergeSlots;
// Members whose rows are loaded before the first is added.
constexpr int kMergeUnroll = 4;

// Which tokens each slot holds, for plan_rows rows; batch row b uses plan row b mod plan_rows.
struct MergeTables {
  const int32_t* offsets;  // (plan_rows, slots + 1)
  const int32_t* members;  // (plan_rows, tokens)
  int plan_rows, tokens, slots;

  struct Slot {
    const int32_t* members;
    int size;
  };

  __device__ Slot slot(int b, int m) const {
    const int64_t row = b % plan_rows;
    const int32_t* const bounds = offsets + row * (slots + 1) + m;
    const int begin = min(max(bounds[0], 0), tokens), end = min(max(bounds[1], begin), tokens);
    return {members + row * tokens + begin, end - begin};
  }

  __device__ int token(int32_t member) const {
    return min(static_cast<unsigned>(member), static_cast<unsigned>(tokens - 1));
  }
};

template <typename T>
struct TokenMerge {
  const T* x;  // (batch, tokens, channels), unit stride in channels
  int64_t batch_stride, token_stride;
  int batch;
  int64_t channels;
  MergeTables tables;
  const float* weights;  // (batch, tokens), unit stride in tokens; or null
  int64_t weight_batch_stride;
};

// What normalizes the tokens as they are read, or nothing.
struct MergeNorm {
  const Moments* moments;  // (batch, tokens)
  NormAffine affine;
};
struct NoNorm {};

// Adds members first, first + step, ... of a slot to sum and their weights to total, in this order. x, weights and
// moments are those of the batch element.
template <typename T, bool kAligned, bool kWeighted, bool kNorm>
__device__ __forceinline__ void add_members(const TokenMerge<T>& p, const T* x, const float* weights,
                                            const Moments* moments, const MergeTables::Slot& slot, unsigned first,
                                            unsigned step, int64_t c, float (&sum)[kVector<T>], float& total) {
  const unsigned size = slot.size;
  for (unsigned i = first; i < size; i += kMergeUnroll * step) {
    Vector<T> rows[kMergeUnroll];
    float weight[kMergeUnroll];
    Moments moment[kMergeUnroll];
#pragma unroll
    for (int j = 0; j < kMergeUnroll; ++j) {
      if (i + j * step < size) {
        const int token = p.tables.token(slot.members[i + j * step]);
        rows[j] = load_vector<kAligned>(x + token * p.token_stride, c, p.channels);
        if constexpr (kWeighted) weight[j] = weights[token];
        if constexpr (kNorm) moment[j] = moments[token];
      }
    }
#pragma unroll
    for (int j = 0; j < kMergeUnroll; ++j) {
      if (i + j * step < size) {
#pragma unroll
        for (int k = 0; k < kVector<T>; ++k) {
          float value = to_float(rows[j].value[k]);
          if constexpr (kNorm) value = (value - moment[j].mean) * moment[j].inverse;
          sum[k] += kWeighted ? value * weight[j] : value;
        }
        if constexpr (kWeighted) total += weight[j];
      }
    }
  }
}

// y (batch, slots, channels), contiguous, is the mean over members in type Out. A block owns kMergeSlots slots and
// kMergeVectors vectors of channels; a thread sums one vector of one slot.
template <typename T, typename Out, bool kAligned, bool kWeighted, typename Norm>
__global__ void __launch_bounds__(kMergeThreads, kAligned&& std::is_same_v<Norm, NoNorm> ? 3 : 2)
    token_merge_kernel(const TokenMerge<T> p, const Norm norm, Out* const y) {
  constexpr bool kNorm = std::is_same_v<Norm, MergeNorm>;
  constexpr int kWidth = kMergeVectors * kVector<T>;
  BIGAIN_SHARED(float, partial, kLongLanes* kWidth);
  BIGAIN_SHARED(float, partial_total, kLongLanes);
  const int slots = p.tables.slots;
  const unsigned slot_blocks = ceil_div(slots, kMergeSlots);
  const unsigned slabs = ceil_div(num_vectors<T>(p.channels), kMergeVectors);
  const int b = blockIdx.x / slabs / slot_blocks;
  const int first_slot = blockIdx.x / slabs % slot_blocks * kMergeSlots;
  const int64_t first_channel = static_cast<int64_t>(blockIdx.x % slabs) * kWidth;
  const T* const x = p.x + b * p.batch_stride;
  const float* const weights = kWeighted ? p.weights + b * p.weight_batch_stride : nullptr;
  const Moments* moments = nullptr;
  if constexpr (kNorm) moments = norm.moments + b * static_cast<int64_t>(p.tables.tokens);
  const int lane = threadIdx.x / kMergeVectors;
  const int m = first_slot + lane;
  const int64_t c = first_channel + threadIdx.x % kMergeVectors * kVector<T>,
                first_out = b * static_cast<int64_t>(slots);
  bool is_long = false;
  if (m < slots && c < p.channels) {
    const MergeTables::Slot slot = p.tables.slot(b, m);
    is_long = slot.size > kLongSlot;
    if (!is_long) {
      float sum[kVector<T>] = {}, total = 0.0f;
      add_members<T, kAligned, kWeighted, kNorm>(p, x, weights, moments, slot, 0, 1, c, sum, total);
      if constexpr (!kWeighted) total = static_cast<float>(max(slot.size, 1));
      if constexpr (kNorm) {
#pragma unroll
        for (int k = 0; k < kVector<T>; ++k) sum[k] /= total;
        apply_affine<kAligned, T>(norm.affine, b, c, p.channels, sum);
      }
      Out* const out = y + (first_out + m) * p.channels;
      if constexpr (sizeof(Out) == sizeof(T)) {
        Vector<Out> mean;
#pragma unroll
        for (int k = 0; k < kVector<T>; ++k) mean.value[k] = from_float<Out>(kNorm ? sum[k] : sum[k] / total);
        store_vector<kAligned>(out, c, p.channels, mean);
      } else {
        static_assert(!kNorm, "normalized tokens are merged to their own type");
#pragma unroll
        for (int k = 0; k < kVector<T>; ++k) {
          if (c + k < p.channels) out[c + k] = from_float<Out>(sum[k] / total);
        }
      }
    }
  }
  if (!__syncthreads_or(is_long)) return;

  for (int i = first_slot; i < min(slots, first_slot + kMergeSlots); ++i) {
    const MergeTables::Slot slot = p.tables.slot(b, i);
    if (slot.size <= kLongSlot) continue;
    float sum[kVector<T>] = {}, total = 0.0f;
    if (c < p.channels) {
      add_members<T, kAligned, kWeighted, kNorm>(p, x, weights, moments, slot, lane, kLongLanes, c, sum, total);
    }
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) {
      partial[lane * kWidth + threadIdx.x % kMergeVectors * kVector<T> + k] = sum[k];
    }
    if (kWeighted && threadIdx.x % kMergeVectors == 0) partial_total[lane] = total;
    __syncthreads();
    if (threadIdx.x < kWidth && first_channel + threadIdx.x < p.channels) {
      float lanes[kLongLanes];
#pragma unroll
      for (int j = 0; j < kLongLanes; ++j) lanes[j] = partial[j * kWidth + threadIdx.x];
      const float whole = tree_sum(lanes);
      total = static_cast<float>(slot.size);
      if constexpr (kWeighted) {
#pragma unroll
        for (int j = 0; j < kLongLanes; ++j) lanes[j] = partial_total[j];
        total = tree_sum(lanes);
      }
      if constexpr (kNorm) {
        partial[threadIdx.x] = whole / total;  // no other thread reads this column
      } else {
        y[(first_out + i) * p.channels + first_channel + threadIdx.x] = from_float<Out>(whole / total);
      }
    }
    __syncthreads();
    if constexpr (kNorm) {
      if (lane == 0 && c < p.channels) {
#pragma unroll
        for (int k = 0; k < kVector<T>; ++k) sum[k] = partial[threadIdx.x * kVector<T> + k];
        apply_affine<kAligned, T>(norm.affine, b, c, p.channels, sum);
        Vector<Out> mean;
#pragma unroll
        for (int k = 0; k < kVector<T>; ++k) mean.value[k] = from_float<Out>(sum[k]);
        store_vector<kAligned>(y + (first_out + i) * p.channels, c, p.channels, mean);
      }
      __syncthreads();
    }
  }
}

// One launch. Normalized tokens are merged to their own type.
template <typename T, typename Out, typename Norm = NoNorm>
void launch_token_merge_mean(const TokenMerge<T>& p, Out* y, cudaStream_t stream, const Norm& norm = {}) {
  const int64_t slabs = ceil_div(num_vectors<T>(p.channels), kMergeVectors);
  const unsigned blocks = grid_extent(p.batch * ceil_div(p.tables.slots, kMergeSlots) * slabs);
  bool aligned = has_vectors<T>(p.x, p.channels, p.batch_stride, p.token_stride) &&
                 has_vectors<Out>(y, p.channels, p.channels, p.channels);
  if constexpr (std::is_same_v<Norm, MergeNorm>) aligned = aligned && affine_has_vectors<T>(norm.affine, p.channels);
  const auto kernel =
      p.weights == nullptr
          ? (aligned ? token_merge_kernel<T, Out, true, false, Norm> : token_merge_kernel<T, Out, false, false, Norm>)
          : (aligned ? token_merge_kernel<T, Out, true, true, Norm> : token_merge_kernel<T, Out, false, true, Norm>);
  launch(kernel, blocks, kMergeThreads, 0, stream, p, norm, y);
}

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

// `lanes` lanes own a slot; see lanes_per_token for the order of the sum.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kRescaleThreads) merge_rescale_kernel(const MergeRescale<T> p, const int lanes) {
  const int64_t vectors = num_vectors<float>(p.channels);
  const int64_t row = blockIdx.x * static_cast<int64_t>(kRescaleThreads / lanes) + threadIdx.x / lanes;
  const bool exists = row < static_cast<int64_t>(p.batch) * p.tables.slots;
  const int lane = threadIdx.x % lanes;
  const float* const mean = p.mean + row * p.channels;
  float squares = 0.0f, largest = 0.0f;
  if (exists) {
    for (int64_t v = lane; v < vectors; v += lanes) {
      squares += sum_of_squares(load_vector<kAligned>(mean, v * kVector<float>, p.channels));
    }
    const int b = static_cast<int>(row / p.tables.slots), m = static_cast<int>(row % p.tables.slots);
    const float* const norms = p.norms + static_cast<int64_t>(b) * p.tables.tokens;
    const MergeTables::Slot slot = p.tables.slot(b, m);
    for (int i = lane; i < slot.size; i += lanes) {
      const float norm = norms[p.tables.token(slot.members[i])];
      if (norm > largest || is_nan(norm)) largest = norm;
    }
  }
  squares = group_sum(squares, lanes);
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, largest, distance);
    if (other > largest || is_nan(other)) largest = other;
  }
  if (!exists) return;
  const float length = sqrtf(squares), scale = largest / (length == 0.0f ? 1.0f : length);
  for (int64_t v = lane; v < vectors; v += lanes) {
    const int64_t c = v * kVector<float>;
    const Vector<float> values = load_vector<kAligned>(mean, c, p.channels);
#pragma unroll
    for (int k = 0; k < kVector<float>; ++k) {
      if (c + k < p.channels) p.y[row * p.channels + c + k] = from_float<T>(values.value[k] * scale);
    }
  }
}

// One launch.
template <typename T>
void launch_merge_rescale(const MergeRescale<T>& p, cudaStream_t stream) {
  const int lanes = lanes_per_token<float>(p.channels);
  const unsigned blocks =
      grid_extent(ceil_div(static_cast<int64_t>(p.batch) * p.tables.slots, kRescaleThreads / lanes));
  const bool aligned = has_vectors<float>(p.mean, p.channels, p.channels, p.channels);
  launch(aligned ? merge_rescale_kernel<T, true> : merge_rescale_kernel<T, false>, blocks, kRescaleThreads, 0, stream,
         p, lanes);
}

}  // namespace bigain
