// What the plans of merges share: from which tokens go where to the tables of a MergePlan.
//
// Several blocks plan a row. Each of them decides on the whole row, which takes a few passes over N integers, and
// writes the tables of a part of its tokens: no block waits for another, and none does more than the others. The r-th
// highest key is found by its digits, eight bits a pass, counted in shared memory. A member's place is the start of its
// slot, which is a prefix sum of the sizes of slots, plus the members before it: those in front of the block's tokens
// are counted with the sizes, those among them by a warp that goes through them in order. All of it is integer work
// whose result does not depend on the order in which threads run, and whose time hardly depends on the data.
//
// A block works in two buffers of N words, in shared memory where they fit, otherwise in global memory, which the cache
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

// A lane has kOwn tokens side by side, a warp kStep in a step.
constexpr int kMostWarps = 32, kOwn = 4, kStep = kOwn * kWarp;
constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;
// More blocks for one row would mostly do again what the others do; fewer where scratch memory, which is for so many
// tokens of all blocks together, would leave the L2 cache.
constexpr int64_t kMostParts = 64, kScratchTokens = int64_t{1} << 22;

// What is stored of a token. A word is two halves: numbers of slots, or of tokens before the block's, above places.
struct Narrow {
  using Token = uint16_t;
  using Word = uint32_t;
};
struct Wide {
  using Token = uint32_t;
  using Word = unsigned long long;
};
template <typename Word>
constexpr int kHalf = 4 * static_cast<int>(sizeof(Word));
template <typename Word>
__device__ __forceinline__ Word high(Word word) {
  return word >> kHalf<Word>;
}
template <typename Word>
__device__ __forceinline__ Word low(Word word) {
  return word & (~Word{0} >> kHalf<Word>);
}

// Whether tokens, places and slots of a row have 16 bits each. The number of all tokens need not: it stands behind the
// last token, and nothing looks there.
inline bool fits_16_bits(int64_t tokens) { return tokens <= 65536; }

// kOwn words that one access moves, two if they are of 64 bits.
template <typename Word>
struct alignas(sizeof(Word) == 8 ? 16 : kOwn * sizeof(Word)) Quad {
  Word at[kOwn];
};
template <typename Word>
__device__ __forceinline__ Quad<Word>& quad(Word* words, int n) {
  return *reinterpret_cast<Quad<Word>*>(words + n);
}

// How a launch divides rows among blocks, and their tokens among warps.
struct Division {
  Divisor by_parts;
  int count;  // tokens of a row
  int part;   // tokens of a block, a multiple of kWarp; the last may have fewer
  int steps;  // of a warp
};

// A block's own: its row and the tokens whose tables it writes; and how the whole row is shared out: warp w has those
// from token(0) on, `steps` times kStep. What lies behind the row is there in buffers.
struct Share {
  int lane, warp, steps, count;
  int64_t i_b;
  int first, last;

  __device__ explicit Share(const Division& division)
      : lane(threadIdx.x % kWarp), warp(threadIdx.x / kWarp), steps(division.steps), count(division.count) {
    unsigned row = blockIdx.x;
    first = static_cast<int>(division.by_parts.take(row)) * division.part;
    last = min(first + division.part, count);
    i_b = row;
  }
  __device__ int token(int step) const { return (warp * steps + step) * kStep + lane * kOwn; }
};

template <typename Word>
__device__ __forceinline__ Word warp_total(Word value) {
  if constexpr (sizeof(Word) == 8) {
    // Halves do not run over: neither counts more than all tokens.
    const unsigned high = __reduce_add_sync(kAllLanes, static_cast<unsigned>(value >> 32));
    return static_cast<Word>(high) << 32 | __reduce_add_sync(kAllLanes, static_cast<unsigned>(value));
  } else {
    return __reduce_add_sync(kAllLanes, value);
  }
}

// Sum over the lanes up to this one.
template <typename Word>
__device__ __forceinline__ Word warp_prefix(Word value, int lane) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const Word other = __shfl_up_sync(kAllLanes, value, distance);
    if (lane >= distance) value += other;
  }
  return value;
}

// Sum over the warps before this one of what their lanes have. `totals` (kMostWarps) is free again after the next
// barrier.
template <typename Word>
__device__ __forceinline__ Word sum_before(const Share& share, Word of_lane, Word* totals) {
  const Word total = warp_total(of_lane);
  if (share.lane == 0) totals[share.warp] = total;
  __syncthreads();
  return warp_total(share.lane < share.warp ? totals[share.lane] : Word{0});
}

// The digit in which the `left`-th highest of the counted keys lies, `left` less the keys above it, and how many keys
// have the digit; warp 0 only.
__device__ __forceinline__ void find_digit(int* histogram /* (kDigits) */, int left, int* found /* (3) */) {
  constexpr int kQuads = kDigits / kStep;
  const int lane = threadIdx.x;
  Quad<int> own[kQuads];
  int total = 0;
#pragma unroll
  for (int i = 0; i < kQuads * kOwn; ++i) {
    if (i % kOwn == 0) own[i / kOwn] = quad(histogram, lane * kQuads * kOwn + i);
    total += own[i / kOwn].at[i % kOwn];
  }
  const int up_to_here = warp_prefix(total, lane);
  int above = __shfl_sync(kAllLanes, up_to_here, kWarp - 1) - up_to_here;
  if (above >= left || above + total < left) return;
#pragma unroll
  for (int i = kQuads * kOwn - 1; i >= 0; --i) {
    const int here = own[i / kOwn].at[i % kOwn];
    if (above < left && left <= above + here) {
      found[0] = lane * kQuads * kOwn + i;
      found[1] = left - above;
      found[2] = here;
    }
    above += here;
  }
}

// Which keys are chosen.
template <typename Key>
struct Choice {
  Key threshold;
  int last_tie;

  __device__ bool operator()(Key key, int n) const { return key > threshold || (key == threshold && n <= last_tie); }
};

// The r highest of the keys of `steps` steps, ties to the lowest n. The r-th highest key is not 0, which stands behind
// the last. Begins with a barrier, ends without one.
template <int kKeyBytes, typename Key>
__device__ __forceinline__ Choice<Key> choose_highest(Key* keys, int r, const Share& share, int steps,
                                                      int* counters /* (kKeyBytes, kDigits), zero */,
                                                      int* totals /* (kMostWarps) */) {
  BIGAIN_SHARED(int, found, 4);
  __syncthreads();
  if (r == 0) return {static_cast<Key>(~Key{0}), -1};
  Key threshold = 0;
  int left = r, there = 0;
  const int from = share.warp * steps * kStep + share.lane * kOwn;
#pragma unroll 1
  for (int shift = 8 * (kKeyBytes - 1); shift >= 0; shift -= kDigitBits) {
    int* const histogram = counters + shift / kDigitBits * kDigits;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const Quad<Key> own = quad(keys, from + step * kStep);
#pragma unroll
      for (Key key : own.at) {
        // Equal above this digit; two shifts, since one by all bits is not defined.
        if (((key ^ threshold) >> shift >> kDigitBits) == 0) atomicAdd(&histogram[key >> shift & (kDigits - 1)], 1);
      }
    }
    __syncthreads();
    if (share.warp == 0) find_digit(histogram, left, found);
    __syncthreads();
    threshold |= static_cast<Key>(found[0]) << shift;
    left = found[1];
    there = found[2];
  }
  // All that tie are chosen, or the first `left`.
  if (left == there) return {threshold, 0x7fffffff};
  const auto ties_of = [&](int n) {
    int ties = 0;
#pragma unroll
    for (Key key : quad(keys, n).at) ties += key == threshold;
    return ties;
  };
  int ties = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) ties += ties_of(from + step * kStep);
  int before = sum_before(share, ties, totals);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const int n = from + step * kStep, own = ties_of(n), up_to_here = before + warp_prefix(own, share.lane);
    int rank = up_to_here - own;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      rank += quad(keys, n).at[i] == threshold;
      if (quad(keys, n).at[i] == threshold && rank == left) found[3] = n + i;
    }
    before = __shfl_sync(kAllLanes, up_to_here, kWarp - 1);
  }
  __syncthreads();
  return {threshold, found[3]};
}

// The tables of the block's tokens from assign: the token that represents each token of a row, itself for anchors and
// behind the row. There are `num_slots` anchors; one more for a source that matches itself, which is a mistake of the
// caller. `words`, zero, becomes counts and then the places of the next members. Begins with a barrier.
template <typename Token, typename Word>
__device__ __forceinline__ void write_tables(Token* assign, Word* words, int num_slots, const Share& share,
                                             const PlanTables& tables, Word* totals /* (kMostWarps) */) {
  constexpr Word kAnchor = Word{1} << kHalf<Word> | 1;
  const int count = share.count, first = share.first, last = share.last;
  const int64_t i_b = share.i_b;
  int32_t* const slot = tables.slot + i_b * count;
  int32_t* const members = tables.members + i_b * count;
  int32_t* const offsets = tables.offsets + i_b * (num_slots + int64_t{1});
  int32_t* const anchor = tables.anchor + i_b * num_slots;
  const auto slot_of = [&](Word place) { return min(static_cast<int>(high(place)), num_slots - 1); };

  __syncthreads();
#pragma unroll 1
  for (int step = 0; step < share.steps; ++step) {
    const int n = share.token(step);
    const Quad<Token> to = quad(assign, n);
    const Word one = 1 + (static_cast<Word>(n < first) << kHalf<Word>);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (static_cast<int>(to.at[i]) != n + i) atomicAdd(&words[to.at[i]], one);
    }
  }
  __syncthreads();
  // Sizes below, anchors above: their sums before a token are where its slot starts, and its number.
  const auto sizes_of = [&](const Quad<Word>& counts, const Quad<Token>& to, int n, int i) {
    return low(counts.at[i]) + (static_cast<int>(to.at[i]) == n + i ? kAnchor : Word{0});
  };
  Word own = 0;
#pragma unroll 1
  for (int step = 0; step < share.steps; ++step) {
    const int n = share.token(step);
    const Quad<Word> counts = quad(words, n);
    const Quad<Token> to = quad(assign, n);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) own += sizes_of(counts, to, n, i);
  }
  Word before = sum_before(share, own, totals);
#pragma unroll 1
  for (int step = 0; step < share.steps; ++step) {
    const int n = share.token(step);
    Quad<Word> counts = quad(words, n);
    const Quad<Token> to = quad(assign, n);
    Word sum = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) sum += sizes_of(counts, to, n, i);
    const Word up_to_here = before + warp_prefix(sum, share.lane);
    Word start = up_to_here - sum;
    const bool is_own = first <= n && n < last;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const bool is_anchor = static_cast<int>(to.at[i]) == n + i;
      const Word size = sizes_of(counts, to, n, i);
      if (is_own && is_anchor && n + i < last) {
        anchor[slot_of(start)] = n + i;
        offsets[slot_of(start)] = static_cast<int32_t>(low(start));
      }
      // The anchor, which is not counted, is a member too.
      counts.at[i] = start + high(counts.at[i]) + (is_anchor && n < first);
      start += size;
    }
    quad(words, n) = counts;
    before = __shfl_sync(kAllLanes, up_to_here, kWarp - 1);
  }
  if (first == 0 && threadIdx.x == 0) offsets[num_slots] = count;
  __syncthreads();
  if (share.warp > 0) return;
#pragma unroll 1
  for (int begin = first; begin < last; begin += kWarp) {
    const int n = begin + share.lane;
    const bool exists = n < last;
    const Token to = assign[exists ? n : first];
    const unsigned peers = __match_any_sync(kAllLanes, exists ? static_cast<int>(to) : -1);
    const int rank = __popc(peers & ((1u << share.lane) - 1));
    const Word place = words[to];
    __syncwarp();
    if (exists) {
      if (rank == 0) words[to] = place + __popc(peers);
      members[low(place) + rank] = n;
      slot[n] = slot_of(place);
    }
    __syncwarp();
  }
}

// ---- launchers -------------------------------------------------------------------------------------------------

// Sizes of a launch for rows of `tokens` tokens. A block has `words` words of word_bytes for its keys and counts, and
// a number for each token.
struct Layout {
  int64_t rows, tokens, warps, steps, parts, part, padded;
  size_t counter_bytes, buffer_bytes;
  bool in_shared;

  Layout(int64_t tokens_, int64_t rows_, int multiprocessors, int key_bytes, size_t word_bytes)
      : rows(rows_), tokens(tokens_), counter_bytes(sizeof(int) * key_bytes * kDigits) {
    const int64_t of_warps = ceil_div(tokens, kStep), chunks = ceil_div(tokens, kWarp);
    steps = ceil_div(of_warps, kMostWarps);
    warps = ceil_div(of_warps, steps);
    padded = warps * steps * kStep;
    const size_t token_bytes = fits_16_bits(tokens) ? sizeof(Narrow::Token) : sizeof(Wide::Token);
    buffer_bytes = padded * (word_bytes + token_bytes);
    // Static shared memory takes less than the last kilobyte.
    in_shared = counter_bytes + buffer_bytes + 1024 <= shared_limit();
    // Blocks of few warps share a multiprocessor.
    parts = multiprocessors * least(kMostWarps / warps, 2) / rows;
    if (!in_shared) parts = least(parts, kScratchTokens / (rows * padded));
    parts = least(least(parts, kMostParts), chunks);
    part = ceil_div(chunks, parts > 0 ? parts : 1);
    parts = ceil_div(chunks, part);
    part *= kWarp;
  }
  dim3 grid() const { return dim3(grid_extent(rows * parts)); }
  dim3 threads() const { return dim3(static_cast<unsigned>(kWarp * warps)); }
  Division division() const { return {Divisor(parts), to_int(tokens), to_int(part), to_int(steps)}; }
  size_t shared_bytes() const { return counter_bytes + (in_shared ? buffer_bytes : 0); }
  int64_t scratch_bytes() const { return in_shared ? 0 : rows * parts * static_cast<int64_t>(buffer_bytes); }

 private:
  static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
};

// The buffers of a block: words, and numbers of tokens behind them.
template <bool kInShared, typename Word, typename Token>
struct Buffers {
  Word* words;
  Token* tokens;

  __device__ Buffers(unsigned char* behind_counters, unsigned char* scratch, const Share& share) {
    const int64_t padded = static_cast<int64_t>(blockDim.x) * kOwn * share.steps;
    unsigned char* const own =
        kInShared ? behind_counters : scratch + blockIdx.x * padded * int64_t{sizeof(Word) + sizeof(Token)};
    words = reinterpret_cast<Word*>(own);
    tokens = reinterpret_cast<Token*>(own + padded * int64_t{sizeof(Word)});
  }
};

}  // namespace plan

}  // namespace bigain
