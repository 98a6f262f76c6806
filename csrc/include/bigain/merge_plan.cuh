// From matches to the tables of a MergePlan: one launch, one block per row, no sort by value.
#pragma once

#include "bigain/plan_steps.cuh"

namespace bigain {

// What merge_plan reads: similarity, match and destinations, or `packed` alone, where destinations match themselves.
struct PlanInputs {
  const Packed* packed;         // (P, N)
  const float* similarity;      // (P, N)
  const int32_t* match;         // (P, N)
  const int32_t* destinations;  // (P, D), distinct
  int64_t similarity_stride, match_stride, destination_stride;
  int64_t num_destinations;
};

// Grid (P). scratch: (P, 2, N) words, not read with kInShared.
template <typename Word, bool kInShared, bool kPacked>
__global__ void __launch_bounds__(plan::kMostWarps* kWarp, 1)
    merge_plan_kernel(const PlanInputs p, int count, int r, const PlanTables tables, const Divisor by_threads,
                      size_t counter_bytes, Word* scratch) {
  BIGAIN_DYNAMIC_SHARED(unsigned char, shared);
  BIGAIN_SHARED(int, totals, plan::kMostWarps);
  int* const counters = reinterpret_cast<int*>(shared);
  const int64_t i_b = blockIdx.x;
  Word* const keys = plan::buffers<kInShared>(shared, counter_bytes, scratch, count, i_b);
  Word* const assign = keys + count;
  const plan::Share share(count, by_threads);
  follow_launches();
  for (int step = 0; step < share.steps; ++step) {
    const int n = share.token(step);
    if (n >= count) break;
    int match;
    if constexpr (kPacked) {
      const Packed packed = p.packed[i_b * count + n];
      match = unpack_token(packed);
      keys[n] = match == n ? 0 : unpack_key(packed);
    } else {
      const float similarity = p.similarity[i_b * p.similarity_stride + n];
      match = p.match[i_b * p.match_stride + n];
      keys[n] = ordered_key(is_nan(similarity) ? minus_infinity() : similarity);
    }
    assign[n] = static_cast<Word>(min(max(match, 0), count - 1));
  }
  __syncthreads();
  if constexpr (!kPacked) {
    // Below the key of -inf: destinations are never merged.
    for (int64_t d = threadIdx.x; d < p.num_destinations; d += blockDim.x) {
      const int n = p.destinations[i_b * p.destination_stride + d];
      if (n >= 0 && n < count) keys[n] = 0;
    }
    __syncthreads();
  }
  plan::choose_highest<4>(keys, count, r, by_threads, counters, totals, [&](int n, bool merged) {
    if (!merged) assign[n] = static_cast<Word>(n);
  });
  __syncthreads();
  plan::write_tables(assign, keys, count, count - r, i_b, tables, by_threads, counters, totals);
}

// ---- launchers -------------------------------------------------------------------------------------------------

namespace plan {

template <bool kPacked, typename Word>
void launch_words(const PlanInputs& p, int64_t rows, int64_t tokens, int64_t r, const PlanTables& tables, void* scratch,
                  cudaStream_t stream) {
  const Layout layout(tokens, tokens - r, sizeof(Word));
  launch(layout.in_shared ? merge_plan_kernel<Word, true, kPacked> : merge_plan_kernel<Word, false, kPacked>,
         dim3(grid_extent(rows)), threads(tokens), layout.shared_bytes(), stream, p, static_cast<int>(tokens),
         static_cast<int>(r), tables, Divisor(threads(tokens).x), layout.counter_bytes, static_cast<Word*>(scratch));
}

}  // namespace plan

// Bytes of scratch memory, aligned to 8, that each row of launch_merge_plan needs; 0 where shared memory suffices.
inline int64_t merge_plan_scratch_bytes(int64_t tokens, int64_t r) {
  const size_t word = plan::fits_16_bits(tokens) ? sizeof(uint32_t) : sizeof(uint64_t);
  return static_cast<int64_t>(plan::Layout(tokens, tokens - r, word).scratch_bytes());
}

// The r sources of the highest similarity merge into their matches, ties to the lowest token; M = N - r. One launch, or
// none without tokens. 0 <= r <= N - D.
inline void launch_merge_plan(const PlanInputs& p, int64_t rows, int64_t tokens, int64_t r, const PlanTables& tables,
                              void* scratch, cudaStream_t stream) {
  if (rows * tokens == 0) return;
  if (r < 0 || r >= tokens) {
    throw std::invalid_argument("r: got " + std::to_string(r) + ", expected 0 <= r < " + std::to_string(tokens));
  }
  const auto launch_with =
      p.packed != nullptr
          ? (plan::fits_16_bits(tokens) ? plan::launch_words<true, uint32_t> : plan::launch_words<true, uint64_t>)
          : (plan::fits_16_bits(tokens) ? plan::launch_words<false, uint32_t> : plan::launch_words<false, uint64_t>);
  launch_with(p, rows, tokens, r, tables, scratch, stream);
}

// The same from packed (P, N) alone, as matching leaves it: the third launch of L-GTM.
inline void launch_merge_plan_packed(const Packed* packed, int64_t rows, int64_t tokens, int64_t r,
                                     const PlanTables& tables, void* scratch, cudaStream_t stream) {
  PlanInputs p = {};
  p.packed = packed;
  launch_merge_plan(p, rows, tokens, r, tables, scratch, stream);
}

}  // namespace bigain
