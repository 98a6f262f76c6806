// What the plans of merges share: from which tokens go where to the tables of a MergePlan.
//
// A choice of the r highest keys is an exact radix search for the r-th, eight bits at a time. Ties, anchors and slots
// are numbered by prefix sums in raster order: a warp owns a run of tokens and counts with ballots. Members are the
// tokens sorted by slot with a stable radix sort; slot boundaries in the sorted list are the offsets. It is all integer
// work whose result does not depend on the order in which threads run.
//
// A row works in two buffers of N words, in shared memory where they fit, otherwise in global memory, which the cache
// holds: docs/kernels.md.
#pragma once

#include "bigain/device.cuh"
#include "bigain/packed.cuh"

namespace bigain {

// P rows of N tokens and M slots; see bigain_kernels.MergePlan.
struct PlanTables {
  int32_t* slot;     // (P, N)
  int32_t* offsets;  // (P, M + 1)
  int32_t* members;  // (P, N)
  int32_t* anchor;   // (P, M)
};

namespace plan {

constexpr int kMostWarps = 32, kTokensPerWarp = 64;
constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;
// One more than there are warps: the counters of a warp lie in different banks.
constexpr int kPitch = kMostWarps + 1;
constexpr int kMostKeyBytes = 8;

// How tokens are shared out: warp w owns those from first(w) on, 32 at a time, so that reading them is coalesced.
struct Share {
  int lane, warp, warps, steps, count;

  __device__ Share(int tokens, const Divisor& by_threads)
      : lane(threadIdx.x % kWarp),
        warp(threadIdx.x / kWarp),
        warps(blockDim.x / kWarp),
        steps(by_threads.quotient(tokens + blockDim.x - 1)),
        count(tokens) {}
  // Token of this lane in a step; may be past the end.
  __device__ int token(int step) const { return (warp * steps + step) * kWarp + lane; }
  __device__ unsigned lower_lanes() const { return (1u << lane) - 1; }
};

// Sum of `count` over the warps before this one. `totals` (kMostWarps) is free again after the next barrier.
__device__ __forceinline__ int sum_before(const Share& share, int count, int* totals) {
  if (share.lane == 0) totals[share.warp] = count;
  __syncthreads();
  return __reduce_add_sync(kAllLanes, share.lane < share.warp ? totals[share.lane] : 0);
}

// The digit in which the `left`-th highest of the counted keys lies, and `left` less the keys above it; warp 0 only.
__device__ __forceinline__ void find_digit(const int* histogram /* (kDigits) */, int left,
                                           int* digit_and_left /* (2) */) {
  constexpr int kOwn = kDigits / kWarp;
  const int lane = threadIdx.x;
  int own[kOwn], total = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    own[i] = histogram[lane * kOwn + i];
    total += own[i];
  }
  int from_here = total;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int other = __shfl_down_sync(kAllLanes, from_here, distance);
    if (lane + distance < kWarp) from_here += other;
  }
  int above = from_here - total;
#pragma unroll
  for (int i = kOwn - 1; i >= 0; --i) {
    if (above < left && left <= above + own[i]) {
      digit_and_left[0] = lane * kOwn + i;
      digit_and_left[1] = left - above;
    }
    above += own[i];
  }
}

// Calls mark(n, chosen) for every n < count, chosen for the r highest keys, ties to the lowest n. The r-th highest key
// is not 0. `counters` has kMostKeyBytes * kDigits entries. Ends without a barrier.
template <int kKeyBytes, typename Word, typename Mark>
__device__ __forceinline__ void choose_highest(const Word* keys /* (count) */, int count, int r,
                                               const Divisor& by_threads, int* counters, int* totals /* (kMostWarps) */,
                                               const Mark& mark) {
  BIGAIN_SHARED(int, digit_and_left, 2);
  const Share share(count, by_threads);
  Word threshold = 0;
  int left = r;
  if (r > 0) {
    for (int i = threadIdx.x; i < kKeyBytes * kDigits; i += blockDim.x) counters[i] = 0;
    __syncthreads();
    for (int shift = 8 * (kKeyBytes - 1); shift >= 0; shift -= kDigitBits) {
      int* const histogram = counters + shift / kDigitBits * kDigits;
      for (int step = 0; step < share.steps; ++step) {
        const int n = share.token(step);
        if (n >= count) break;
        // Equal above this digit; two shifts, since one by all bits is not defined.
        const Word key = keys[n];
        if (((key ^ threshold) >> shift >> kDigitBits) == 0) atomicAdd(&histogram[key >> shift & (kDigits - 1)], 1);
      }
      __syncthreads();
      if (share.warp == 0) find_digit(histogram, left, digit_and_left);
      __syncthreads();
      threshold |= static_cast<Word>(digit_and_left[0]) << shift;
      left = digit_and_left[1];
    }
  }

  int ties = 0;
  for (int step = 0; step < share.steps; ++step) {
    const int n = share.token(step);
    ties += __popc(__ballot_sync(kAllLanes, r > 0 && n < count && keys[n] == threshold));
  }
  int rank = sum_before(share, ties, totals);
  for (int step = 0; step < share.steps; ++step) {
    const int n = share.token(step);
    const Word key = n < count ? keys[n] : 0;
    const bool tie = r > 0 && n < count && key == threshold;
    const unsigned ballot = __ballot_sync(kAllLanes, tie);
    const bool chosen = r > 0 && (key > threshold || (tie && rank + __popc(ballot & share.lower_lanes()) < left));
    rank += __popc(ballot);
    if (n < count) mark(n, chosen);
  }
}

// One pass of a stable radix sort: `from` (count) to `to` (count) by the digit of `bits` bits at `shift`.
template <typename Word>
__device__ __forceinline__ void sort_by_digit(const Word* from, Word* to, int count, int shift, int bits,
                                              const Divisor& by_threads, int* counters /* (2 ** bits, kPitch) */,
                                              int* totals) {
  const Share share(count, by_threads);
  const int digits = 1 << bits, entries = digits * kPitch;
  for (int i = threadIdx.x; i < entries; i += blockDim.x) counters[i] = 0;
  __syncthreads();
  for (int step = 0; step < share.steps; ++step) {
    const int n = share.token(step);
    if (n >= count) break;
    atomicAdd(&counters[static_cast<int>(from[n] >> shift & (digits - 1)) * kPitch + share.warp], 1);
  }
  __syncthreads();
  // Where the first token of (digit, warp) goes: the sum of all counters before it. A thread sums a run of odd length,
  // so that a warp's reads hit different banks.
  const int run = by_threads.quotient(entries + blockDim.x - 1) | 1;
  const int begin = min(static_cast<int>(threadIdx.x) * run, entries), end = min(begin + run, entries);
  int own = 0;
  for (int i = begin; i < end; ++i) own += counters[i];
  int up_to_here = own;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int other = __shfl_up_sync(kAllLanes, up_to_here, distance);
    if (share.lane >= distance) up_to_here += other;
  }
  const int total = __shfl_sync(kAllLanes, up_to_here, kWarp - 1);
  int before = sum_before(share, total, totals) + up_to_here - own;
  for (int i = begin; i < end; ++i) {
    const int counted = counters[i];
    counters[i] = before;
    before += counted;
  }
  __syncthreads();
  for (int step = 0; step < share.steps; ++step) {
    const int n = share.token(step);
    const Word word = n < count ? from[n] : 0;
    const int digit = n < count ? static_cast<int>(word >> shift & (digits - 1)) : digits;
    const unsigned peers = __match_any_sync(kAllLanes, digit);
    int* const next = &counters[digit * kPitch + share.warp];
    const int first = n < count ? *next : 0;
    __syncwarp();
    if (n < count) {
      const int rank = __popc(peers & share.lower_lanes());
      if (rank == 0) *next = first + __popc(peers);
      to[first + rank] = word;
    }
    __syncwarp();
  }
  __syncthreads();
}

// The bits of a digit where numbers of `bits` bits are sorted in as few passes as there can be.
__host__ __device__ constexpr int digit_width(int bits) {
  static_assert(kDigitBits == 8, "at most four passes");
  return bits <= 8 ? bits : bits <= 16 ? (bits + 1) / 2 : bits <= 24 ? (bits + 2) / 3 : (bits + 3) / 4;
}

// The tables of one row from assign (N): the token that represents each token, itself for anchors, of which there are
// `num_slots`. `words` (N) and, once it has been read, `assign` are the buffers of the sort.
template <typename Word>
__device__ __forceinline__ void write_tables(Word* assign, Word* words, int count, int num_slots, int64_t i_b,
                                             const PlanTables& tables, const Divisor& by_threads, int* counters,
                                             int* totals) {
  constexpr int kTokenBits = 4 * sizeof(Word);  // a word is (slot, token)
  constexpr Word kTokenMask = (Word{1} << kTokenBits) - 1;
  int32_t* const slot = tables.slot + i_b * count;
  int32_t* const members = tables.members + i_b * count;
  int32_t* const offsets = tables.offsets + i_b * (num_slots + int64_t{1});
  int32_t* const anchor = tables.anchor + i_b * num_slots;
  const Share share(count, by_threads);

  int anchors = 0;
  for (int step = 0; step < share.steps; ++step) {
    const int n = share.token(step);
    anchors += __popc(__ballot_sync(kAllLanes, n < count && static_cast<int>(assign[n]) == n));
  }
  int next = sum_before(share, anchors, totals);
  for (int step = 0; step < share.steps; ++step) {
    const int n = share.token(step);
    const bool is_anchor = n < count && static_cast<int>(assign[n]) == n;
    const unsigned ballot = __ballot_sync(kAllLanes, is_anchor);
    // A source that matches itself, which is a mistake of the caller, would be an anchor too many.
    const int own = min(next + __popc(ballot & share.lower_lanes()), num_slots - 1);
    next += __popc(ballot);
    if (is_anchor) {
      slot[n] = own;
      anchor[own] = n;
    }
  }
  __syncthreads();
  for (int step = 0; step < share.steps; ++step) {
    const int n = share.token(step);
    if (n >= count) break;
    const int representative = static_cast<int>(assign[n]);
    // Only a match that is no destination, which is a mistake of the caller, leads to a slot out of range.
    const int own = min(max(slot[representative], 0), num_slots - 1);
    if (representative != n) slot[n] = own;
    words[n] = static_cast<Word>(own) << kTokenBits | static_cast<Word>(n);
  }
  __syncthreads();

  Word *from = words, *to = assign;
  const int bits = num_slots > 1 ? kWarp - __clz(num_slots - 1) : 0, passes = (bits + kDigitBits - 1) / kDigitBits;
  const int width = digit_width(bits);
  for (int pass = 0; pass < passes; ++pass) {
    sort_by_digit(from, to, count, kTokenBits + pass * width, width, by_threads, counters, totals);
    Word* const sorted = to;
    to = from;
    from = sorted;
  }
  for (int step = 0; step < share.steps; ++step) {
    const int i = share.token(step);
    if (i >= count) break;
    const int own = static_cast<int>(from[i] >> kTokenBits);
    members[i] = static_cast<int32_t>(from[i] & kTokenMask);
    if (i == 0 || own != static_cast<int>(from[i - 1] >> kTokenBits)) offsets[own] = i;
  }
  if (threadIdx.x == 0) offsets[num_slots] = count;
}

// Counters of the search and of the sort, which use them one after the other.
inline size_t counter_bytes(int64_t num_slots) {
  int bits = 0;
  while (((num_slots - 1) >> bits) > 0) ++bits;
  const size_t sort = size_t{kPitch} << digit_width(bits), search = kMostKeyBytes * kDigits;
  return sizeof(int) * (sort > search ? sort : search);
}

// Two buffers of N words: in shared memory behind the counters, or the row's part of `scratch`.
template <bool kInShared, typename Word>
__device__ __forceinline__ Word* buffers(unsigned char* shared, size_t counter_bytes, Word* scratch, int64_t count,
                                         int64_t i_b) {
  return kInShared ? reinterpret_cast<Word*>(shared + counter_bytes) : scratch + i_b * 2 * count;
}

struct Layout {
  size_t counter_bytes, buffer_bytes;
  bool in_shared;

  Layout(int64_t tokens, int64_t num_slots, size_t word_bytes)
      : counter_bytes(plan::counter_bytes(num_slots)),
        buffer_bytes(2 * static_cast<size_t>(tokens) * word_bytes),
        // Static shared memory takes less than the last kilobyte.
        in_shared(counter_bytes + buffer_bytes + 1024 <= shared_limit()) {}
  size_t shared_bytes() const { return counter_bytes + (in_shared ? buffer_bytes : 0); }
  size_t scratch_bytes() const { return in_shared ? 0 : buffer_bytes; }
};

// Tokens and slots of a word of 32 bits have 16 each.
inline bool fits_16_bits(int64_t tokens) { return tokens <= 65536; }

inline dim3 threads(int64_t tokens) {
  const int64_t warps = ceil_div(tokens, kTokensPerWarp);
  return dim3(static_cast<unsigned>(kWarp * (warps < kMostWarps ? warps : kMostWarps)));
}

}  // namespace plan

}  // namespace bigain
