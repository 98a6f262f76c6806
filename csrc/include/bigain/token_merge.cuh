// Merging tokens by a plan.
//
// Slots have any size: most have a few members, and one destination may attract thousands of sources. A slot of up to
// kLongSlot members is one part, a longer one is cut into parts, and the parts of a block's slots are shared out
// evenly: a group of eight lanes sums one after another, whatever slots they belong to.
//
// The order of every sum is fixed by the slot alone: the members of a part are added in ascending token order, and the
// parts, in that order, to the first. Nothing is accumulated in memory.
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

namespace bigain {

constexpr int kMergeThreads = 256;
// Lanes of a group, each of which owns vectors of channels: 128 bytes, so that gathered rows are read in whole cache
// lines.
constexpr int kMergeVectors = 8;
constexpr int kMergeGroups = kMergeThreads / kMergeVectors;
// Slots of a block, a group for each. docs/kernels.md has the counts behind this and the next two.
constexpr int kMergeSlots = 32;
// The longest slot that one group sums alone, in the order of the reference. Longer ones are cut into parts of
// 2 ** kPartBits members, or of twice, four times, ... as many where there were more than 2 ** kMostPartsBits of them.
constexpr int kLongSlotBits = 5, kLongSlot = 1 << kLongSlotBits, kPartBits = 3, kMostPartsBits = 5;
// Members whose rows a lane loads before it adds the first.
constexpr int kMergeAhead = 8;
static_assert(kMergeSlots <= kWarp, "a lane knows one slot");

// Which tokens each slot holds, for plan_rows rows; batch row b uses plan row b mod plan_rows.
struct MergeTables {
  const int32_t* offsets;  // (plan_rows, slots + 1)
  const int32_t* members;  // (plan_rows, tokens)
  int plan_rows, tokens, slots;

  // Members begin to begin + size - 1 of a row.
  struct Slot {
    int begin, size;

    // A part has at most 2 ** bits() members; there are at most 2 ** kMostPartsBits parts, and at least one.
    __device__ int bits() const {
      if (size <= kLongSlot) return kLongSlotBits;
      const int above = kWarp - __clz(size - 1) - kMostPartsBits;
      return max(above, kPartBits);
    }
    __device__ int parts() const { return max((size + (1 << bits()) - 1) >> bits(), 1); }
  };

  __device__ Slot slot(unsigned row, int m) const {
    const int32_t* const bounds = offsets + row * (slots + int64_t{1}) + m;
    const int begin = min(max(bounds[0], 0), tokens), end = min(max(bounds[1], begin), tokens);
    return {begin, end - begin};
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

// How a launch counts: slabs of kMergeVectors * kMergeWide vectors, blocks of kMergeSlots slots, rows of the plan.
struct MergeCounts {
  Divisor by_slabs, by_slot_blocks, by_plan_rows;
};

// Vectors of channels of a thread, kMergeVectors apart: tables, masks and addresses are made once for them. Where
// values are loaded one by one, or weights or moments of tokens beside them, registers hold one.
template <bool kAligned, bool kWeighted, typename Norm>
constexpr int kMergeWide = kAligned && !kWeighted && std::is_same_v<Norm, NoNorm> ? 2 : 1;

// The sum of one thread's channels over members of a slot, and of their weights.
template <typename T, int kWide>
struct MergeSum {
  float sum[kWide * kVector<T>] = {}, weight = 0.0f;

  __device__ __forceinline__ void add(const MergeSum& other) {
#pragma unroll
    for (int k = 0; k < kWide * kVector<T>; ++k) sum[k] += other.sum[k];
    weight += other.weight;
  }
};

// Sums `count` members the first of which is at `members`; x, members, weights and moments are those of the batch
// element. What is summed of channels past the last one is not to be used.
template <typename T, bool kAligned, bool kWeighted, bool kNorm, int kWide>
__device__ __forceinline__ MergeSum<T, kWide> sum_members(const TokenMerge<T>& p, const T* x, const int32_t* members,
                                                          const float* weights, const Moments* moments, int count,
                                                          int64_t c) {
  MergeSum<T, kWide> whole;
  // As many loads as registers allow.
  constexpr int kAhead = kAligned ? kMergeAhead : kMergeAhead / 2;
  // In vectors, whose 32 bits reach 64 GiB, or in elements.
  const int64_t row_stride = kAligned ? p.token_stride / kVector<T> : p.token_stride;
#pragma unroll 1
  for (int i = 0; i < count; i += kAhead) {
    const int left = count - i;
    unsigned token[kAhead];
    float weight[kAhead];
    Moments moment[kAhead];
    Vector<T> rows[kAhead][kWide];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) token[j] = p.tables.token(members[i + min(j, left - 1)]);
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
#pragma unroll
      for (int w = 0; w < kWide; ++w) {
        constexpr int kApart = kMergeVectors * kVector<T>;
        const bool wanted = j < left && c + w * kApart < p.channels;
        if constexpr (kAligned) {
          const uint4* const row = reinterpret_cast<const uint4*>(x + c) + token[j] * static_cast<unsigned>(row_stride);
          rows[j][w] = load_vector<true, Unwanted::kAnything>(reinterpret_cast<const T*>(row) + w * kApart, 0,
                                                              kVector<T>, wanted);
        } else {
          rows[j][w] = load_vector<false>(x + token[j] * row_stride, c, p.channels, wanted);
        }
      }
      if constexpr (kWeighted) weight[j] = weights[token[j]];
      if constexpr (kNorm) moment[j] = moments[token[j]];
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (j < left) {
#pragma unroll
        for (int k = 0; k < kWide * kVector<T>; ++k) {
          float value = rows[j][k / kVector<T>][k % kVector<T>];
          if constexpr (kNorm) value = (value - moment[j].mean) * moment[j].inverse;
          whole.sum[k] += kWeighted ? value * weight[j] : value;
        }
        if constexpr (kWeighted) whole.weight += weight[j];
      }
    }
  }
  return whole;
}

// What a group of lanes sums in a round.
struct MergePart {
  MergeTables::Slot slot;
  int in_block;  // the number of the slot
  int part, parts, begin, count;
  bool exists;
};

// Of slots of one part each, group i has slot i. `own` is the slot that each lane of the warp knows.
__device__ __forceinline__ MergePart whole_slot(const MergeTables::Slot& own, int group) {
  const MergeTables::Slot slot = {__shfl_sync(kAllLanes, own.begin, group), __shfl_sync(kAllLanes, own.size, group)};
  return {slot, group, 0, 1, 0, slot.size, true};
}

// Of slots of several parts: group i of a round has part first + i, and `end` is how many parts there are up to the
// end of the lane's slot.
__device__ __forceinline__ MergePart part_of_slot(const MergeTables::Slot& own, int end, int first, int num_parts,
                                                  int group) {
  // The slot of a part is the first that ends after it.
  int in_block = 0;
#pragma unroll
  for (int i = 0; i < kWarp / kMergeVectors; ++i) {
    const int up_to = __popc(__ballot_sync(kAllLanes, end <= first + group / 4 * 4 + i));
    if (group % 4 == i) in_block = min(up_to, kWarp - 1);
  }
  const MergeTables::Slot slot = {__shfl_sync(kAllLanes, own.begin, in_block),
                                  __shfl_sync(kAllLanes, own.size, in_block)};
  const int slot_end = __shfl_sync(kAllLanes, end, in_block), parts = slot.parts();
  const bool exists = first + group < num_parts;
  const int part = exists ? first + group - (slot_end - parts) : 0, begin = part << slot.bits();
  return {slot, in_block, part, parts, begin, exists ? min(slot.size - begin, 1 << slot.bits()) : 0, exists};
}

// How many parts there are up to the end of the lane's slot.
__device__ __forceinline__ int parts_up_to(const MergeTables::Slot& own, bool has_slot, int lane) {
  int end = has_slot ? own.parts() : 0;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int before = __shfl_up_sync(kAllLanes, end, distance);
    if (lane >= distance) end += before;
  }
  return end;
}

// y (batch, slots, channels), contiguous, is the mean over members in type Out. A block owns kMergeSlots slots and
// kMergeVectors times kMergeWide vectors of channels, a thread its vectors of the parts of its group.
template <typename T, typename Out, bool kAligned, bool kWeighted, typename Norm>
__global__ void __launch_bounds__(kMergeThreads, 2)
    token_merge_kernel(const TokenMerge<T> p, const Norm norm, Out* const y, const MergeCounts counts) {
  constexpr bool kNorm = std::is_same_v<Norm, MergeNorm>;
  constexpr int kWide = kMergeWide<kAligned, kWeighted, Norm>;
  // What folds is in the group of its first part; [kMergeGroups + i % 2] is what round i leaves to the next one.
  using Sum = MergeSum<T, kWide>;
  BIGAIN_SHARED(Sum, partial, (kMergeGroups + 2) * kMergeVectors);
  unsigned b = blockIdx.x;
  const unsigned slab = counts.by_slabs.take(b);
  const int first_slot = counts.by_slot_blocks.take(b) * kMergeSlots, slots = p.tables.slots;
  const unsigned plan_row = counts.by_plan_rows.remainder(b);
  const int lane = threadIdx.x % kWarp, group = threadIdx.x / kMergeVectors, vector = threadIdx.x % kMergeVectors;
  const int64_t c = (static_cast<int64_t>(slab) * kMergeVectors * kWide + vector) * kVector<T>;
  const T* const x = p.x + b * p.batch_stride;
  const int32_t* const members = p.tables.members + static_cast<int64_t>(plan_row) * p.tables.tokens;
  const float* const weights = kWeighted ? p.weights + b * p.weight_batch_stride : nullptr;
  const Moments* moments = nullptr;
  if constexpr (kNorm) moments = norm.moments + b * static_cast<int64_t>(p.tables.tokens);
  follow_launches();

  // A lane knows one slot of the block, and, where there are long ones, how many parts there are up to its end.
  const bool has_slot = lane < kMergeSlots && first_slot + lane < slots;
  MergeTables::Slot own = {};
  if (has_slot) own = p.tables.slot(plan_row, first_slot + lane);
  const bool any_long = __ballot_sync(kAllLanes, own.size > kLongSlot) != 0;
  int end = 0, num_parts = min(slots - first_slot, kMergeSlots);
  if (any_long) {
    end = parts_up_to(own, has_slot, lane);
    num_parts = __shfl_sync(kAllLanes, end, kWarp - 1);
  }

  for (int first = 0, round = 0; first < num_parts; first += kMergeGroups, ++round) {
    const MergePart own_part = any_long ? part_of_slot(own, end, first, num_parts, group) : whole_slot(own, group);
    const auto [slot, in_block, part, parts, begin, count, exists] = own_part;
    Sum whole = sum_members<T, kAligned, kWeighted, kNorm, kWide>(p, x, members + slot.begin + begin, weights, moments,
                                                                  count, c);
    bool done = parts == 1 && first_slot + in_block < slots;
    if (any_long) {
      done = done && exists;
      const bool shares = exists && parts > 1;
      if (shares) partial[threadIdx.x] = whole;
      __syncthreads();
      if (shares && (part == 0 || group == 0)) {
        if (part > 0) {
          Sum before = partial[(kMergeGroups + (round + 1) % 2) * kMergeVectors + vector];
          before.add(whole);
          whole = before;
        }
        const int together = min(parts - part, kMergeGroups - group);
        for (int i = 1; i < together; ++i) whole.add(partial[threadIdx.x + i * kMergeVectors]);
        done = part + together == parts;
        if (!done) partial[(kMergeGroups + round % 2) * kMergeVectors + vector] = whole;
      }
      __syncthreads();
    }
    if (!done || c >= p.channels) continue;
    const float total = kWeighted ? whole.weight : static_cast<float>(max(slot.size, 1));
    [[maybe_unused]] const float inverse = 1.0f / total;
#pragma unroll
    for (int k = 0; k < kWide * kVector<T>; ++k) {
      whole.sum[k] = kWeighted ? whole.sum[k] / total : divide(whole.sum[k], total, inverse);
    }
    if constexpr (kNorm) {
      RawAffine<T> affine;
      affine.template load<kAligned>(norm.affine, b, c, p.channels);
      affine.apply(norm.affine, whole.sum);
    }
    Out* const out = y + (b * static_cast<int64_t>(slots) + first_slot + in_block) * p.channels;
#pragma unroll
    for (int w = 0; w < kWide; ++w) {
      const int64_t own_c = c + w * kMergeVectors * kVector<T>;
      if (own_c >= p.channels) break;
#pragma unroll
      for (int k = 0; k < kVector<T>; k += kVector<Out>) {
        float values[kVector<Out>];
#pragma unroll
        for (int i = 0; i < kVector<Out>; ++i) values[i] = whole.sum[w * kVector<T> + k + i];
        store_vector<kAligned>(out, own_c + k, p.channels, to_vector<Out>(values));
      }
    }
  }
}

// One launch. Normalized tokens are merged to their own type.
template <typename T, typename Out, typename Norm = NoNorm>
void launch_token_merge_mean(const TokenMerge<T>& p, Out* y, cudaStream_t stream, const Norm& norm = {}) {
  bool aligned = has_vectors<T>(p.x, p.channels, p.batch_stride, p.token_stride) &&
                 has_vectors<Out>(y, p.channels, p.channels, p.channels) &&
                 p.tables.tokens * (p.token_stride / kVector<T>) <= UINT32_MAX;
  if constexpr (std::is_same_v<Norm, MergeNorm>) aligned = aligned && affine_has_vectors<T>(norm.affine, p.channels);
  const int vectors = kMergeVectors * (aligned && p.weights == nullptr ? kMergeWide<true, false, Norm> : 1);
  const int64_t slabs = ceil_div(num_vectors<T>(p.channels), vectors);
  const int64_t slot_blocks = ceil_div(p.tables.slots, kMergeSlots);
  const MergeCounts counts = {Divisor(slabs), Divisor(slot_blocks), Divisor(p.tables.plan_rows)};
  const auto kernel =
      p.weights == nullptr
          ? (aligned ? token_merge_kernel<T, Out, true, false, Norm> : token_merge_kernel<T, Out, false, false, Norm>)
          : (aligned ? token_merge_kernel<T, Out, true, true, Norm> : token_merge_kernel<T, Out, false, true, Norm>);
  launch(kernel, grid_extent(p.batch * slot_blocks * slabs), kMergeThreads, 0, stream, p, norm, y, counts);
}

}  // namespace bigain
