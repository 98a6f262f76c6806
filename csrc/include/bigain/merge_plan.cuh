// From matches to the tables of a MergePlan: one launch, several blocks a row, no sort.
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

// Grid (P * parts). scratch: what Layout asks for, not read with kInShared.
template <typename Size, bool kInShared, bool kPacked>
__global__ void __launch_bounds__(plan::kMostWarps* kWarp, 1)
    merge_plan_kernel(const PlanInputs p, int r, const plan::Division division, const PlanTables tables,
                      unsigned char* scratch) {
  using Word = typename Size::Word;
  using Token = typename Size::Token;
  constexpr int kKeyBytes = 4, kCounters = kKeyBytes * plan::kDigits;
  BIGAIN_DYNAMIC_SHARED(unsigned char, shared);
  BIGAIN_SHARED(Word, totals, plan::kMostWarps);
  int* const counters = reinterpret_cast<int*>(shared);
  const plan::Share share(division);
  const plan::Buffers<kInShared, Word, Token> buffers(shared + sizeof(int) * kCounters, scratch, share);
  Word* const keys = buffers.words;
  Token* const assign = buffers.tokens;
  const int count = share.count;
  const int64_t i_b = share.i_b;
  follow_launches();
  for (int i = threadIdx.x; i < kCounters; i += blockDim.x) counters[i] = 0;
#pragma unroll 1
  for (int step = 0; step < share.steps; ++step) {
    const int n = share.token(step);
    plan::Quad<Word> key;
    plan::Quad<Token> to;
    [[maybe_unused]] Packed packed[plan::kOwn];
    [[maybe_unused]] float similarity[plan::kOwn];
    [[maybe_unused]] int match[plan::kOwn];
#pragma unroll
    for (int i = 0; i < plan::kOwn; ++i) {
      const int own = min(n + i, count - 1);
      if constexpr (kPacked) {
        packed[i] = p.packed[i_b * count + own];
      } else {
        similarity[i] = p.similarity[i_b * p.similarity_stride + own];
        match[i] = p.match[i_b * p.match_stride + own];
      }
    }
#pragma unroll
    for (int i = 0; i < plan::kOwn; ++i) {
      if constexpr (kPacked) {
        match[i] = unpack_token(packed[i]);
        key.at[i] = match[i] == n + i ? 0 : unpack_key(packed[i]);
      } else {
        key.at[i] = ordered_key(is_nan(similarity[i]) ? minus_infinity() : similarity[i]);
      }
      // Never chosen.
      if (n + i >= count) key.at[i] = 0;
      to.at[i] = static_cast<Token>(min(max(match[i], 0), count - 1));
    }
    plan::quad(keys, n) = key;
    plan::quad(assign, n) = to;
  }
  if constexpr (!kPacked) {
    __syncthreads();
    // Below the key of -inf: destinations are never merged.
    for (int64_t d = threadIdx.x; d < p.num_destinations; d += blockDim.x) {
      const int n = p.destinations[i_b * p.destination_stride + d];
      if (n >= 0 && n < count) keys[n] = 0;
    }
  }
  const auto merges =
      plan::choose_highest<kKeyBytes>(keys, r, share, share.steps, counters, reinterpret_cast<int*>(totals));
#pragma unroll 1
  for (int step = 0; step < share.steps; ++step) {
    const int n = share.token(step);
    plan::Quad<Token> to = plan::quad(assign, n);
#pragma unroll
    for (int i = 0; i < plan::kOwn; ++i) {
      if (!merges(plan::quad(keys, n).at[i], n + i)) to.at[i] = static_cast<Token>(n + i);
    }
    plan::quad(assign, n) = to;
    plan::quad(keys, n) = {};
  }
  plan::write_tables(assign, keys, count - r, share, tables, totals);
}

// ---- launchers -------------------------------------------------------------------------------------------------

namespace plan {

// Sizes of merge_plan's launch. rows * tokens > 0.
inline Layout merge_layout(int64_t tokens, int64_t rows, int multiprocessors) {
  return Layout(tokens, rows, multiprocessors, 4, fits_16_bits(tokens) ? sizeof(Narrow::Word) : sizeof(Wide::Word));
}

template <bool kPacked, typename Size>
void launch_words(const PlanInputs& p, int64_t r, const Layout& layout, const PlanTables& tables, void* scratch,
                  cudaStream_t stream) {
  launch(layout.in_shared ? merge_plan_kernel<Size, true, kPacked> : merge_plan_kernel<Size, false, kPacked>,
         layout.grid(), layout.threads(), layout.shared_bytes(), stream, p, static_cast<int>(r), layout.division(),
         tables, static_cast<unsigned char*>(scratch));
}

}  // namespace plan

// Bytes of scratch memory, aligned to 16, that launch_merge_plan needs; 0 where shared memory suffices.
inline int64_t merge_plan_scratch_bytes(int64_t rows, int64_t tokens, int multiprocessors) {
  return rows * tokens == 0 ? 0 : plan::merge_layout(tokens, rows, multiprocessors).scratch_bytes();
}

// The r sources of the highest similarity merge into their matches, ties to the lowest token; M = N - r. One launch, or
// none without tokens. 0 <= r <= N - D. `multiprocessors` of the device decide how many blocks share a row.
inline void launch_merge_plan(const PlanInputs& p, int64_t rows, int64_t tokens, int64_t r, const PlanTables& tables,
                              void* scratch, int multiprocessors, cudaStream_t stream) {
  if (rows * tokens == 0) return;
  if (r < 0 || r >= tokens) {
    throw std::invalid_argument("r: got " + std::to_string(r) + ", expected 0 <= r < " + std::to_string(tokens));
  }
  const auto launch_with =
      p.packed != nullptr
          ? (plan::fits_16_bits(tokens) ? plan::launch_words<true, plan::Narrow> : plan::launch_words<true, plan::Wide>)
          : (plan::fits_16_bits(tokens) ? plan::launch_words<false, plan::Narrow>
                                        : plan::launch_words<false, plan::Wide>);
  launch_with(p, r, plan::merge_layout(tokens, rows, multiprocessors), tables, scratch, stream);
}

// The same from packed (P, N) alone, as matching leaves it: the third launch of L-GTM.
inline void launch_merge_plan_packed(const Packed* packed, int64_t rows, int64_t tokens, int64_t r,
                                     const PlanTables& tables, void* scratch, int multiprocessors,
                                     cudaStream_t stream) {
  PlanInputs p = {};
  p.packed = packed;
  launch_merge_plan(p, rows, tokens, r, tables, scratch, multiprocessors, stream);
}

}  // namespace bigain
