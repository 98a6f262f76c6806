// Bipartite matching of all sources with all destinations by products of bfloat16, where the machine has them.
#pragma once

#include <atomic>
#include <memory>

#include "match_bf16.h"
#include "matching.h"

namespace bigain {

// These instructions take numbers below 2^-126 for zero. Between these norms, products of values that count in a
// similarity stay far above that, and sums far below the largest float. Other tokens are rare, and rows that have one
// are matched without them.
constexpr float kBf16LeastNorm = 0x1p-40f, kBf16LargestNorm = 0x1p40f;

inline bool fits_bf16(float norm) { return norm == 0 || (norm >= kBf16LeastNorm && norm <= kBf16LargestNorm); }

// Memory for `count` values whose address is a multiple of 64.
class AlignedValues {
 public:
  explicit AlignedValues(int64_t count) : memory_(new uint16_t[count + 31]) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    start_ = memory_.get() + (64 - address % 64) % 64 / sizeof(uint16_t);
  }
  uint16_t* operator+(int64_t i) { return start_ + i; }

 private:
  std::unique_ptr<uint16_t[]> memory_;
  uint16_t* start_;
};

// Destinations of some rows, packed. NaN as the scale keeps out what is similar to nothing: destinations without a
// direction, and the empty places of a last block.
struct Bf16Destinations {
  int64_t blocks, size;  // of a row; values of a block
  AlignedValues packed;
  std::vector<float> scale;

  Bf16Destinations(int64_t rows, int64_t count, int64_t block_size)
      : blocks((count + kBf16Block - 1) / kBf16Block),
        size(block_size),
        packed(rows * blocks * block_size),
        scale(rows * blocks * kBf16Block, std::numeric_limits<float>::quiet_NaN()) {}
};

// f(chunk, packed sources, groups of them) for all sources of the rows that `others` does not mark. Their norms are
// found on the way, while a token is at hand.
template <typename T, typename F>
void for_each_packed_chunk(const Matching<T>& m, const uint8_t* others, int64_t first_row, int64_t last_row,
                           std::atomic<bool>* unfit, const F& f) {
  const Bf16Kernel<T>& kernel = *bf16_kernel<T>();
  const int64_t size = kernel.block_size(m.channels);
  const SourceChunks chunks(m, others, first_row, last_row, kBf16Groups * kBf16Block);
  for_each_task(chunks.count(), kBf16Groups * kBf16Block * m.count * m.channels / 256, [&](int64_t begin, int64_t end) {
    AlignedValues sources(kBf16Groups * size);
    const T* tokens[kBf16Block];
    for (int64_t task = begin; task < end; ++task) {
      const SourceChunks::Chunk chunk = chunks[task];
      const int64_t groups = (chunk.count + kBf16Block - 1) / kBf16Block;
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t first = group * kBf16Block, count = std::min(kBf16Block, chunk.count - first);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t n = chunk.sources[first + i];
          tokens[i] = m.x.row(chunk.row, n);
          const float norm = m.norm[chunk.row * m.tokens + n] = m.length(tokens[i]);
          if (!fits_bf16(norm)) unfit[chunk.row - first_row] = true;
        }
        kernel.pack_sources(tokens, count, m.channels, sources + group * size);
      }
      f(chunk, sources + 0, groups);
    }
  });
}

// All sources of rows first_row, ..., last_row - 1 against all destinations. Returns the rows for which this was in
// vain: they have tokens that do not fit, and are to be matched again.
template <typename T>
std::vector<int64_t> match_rows_in_bf16(const Matching<T>& m, int64_t first_row, int64_t last_row) {
  const Bf16Kernel<T>& kernel = *bf16_kernel<T>();
  const int64_t num_rows = last_row - first_row;
  Bf16Destinations to(num_rows, m.count, kernel.block_size(m.channels));
  std::vector<std::atomic<bool>> unfit(num_rows);
  for (auto& row : unfit) row = false;
  for_each_task(num_rows * to.blocks, kBf16Block * m.channels, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / to.blocks, first = task % to.blocks * kBf16Block;
      const int64_t count = std::min(kBf16Block, m.count - first);
      const T* tokens[kBf16Block];
      for (int64_t j = 0; j < count; ++j) {
        tokens[j] = m.x.row(first_row + row, m.destinations[(first_row + row) * m.count + first + j]);
        const float norm = m.length(tokens[j]);
        if (!fits_bf16(norm)) unfit[row] = true;
        if (norm > 0) to.scale[task * kBf16Block + j] = 1 / norm;
      }
      kernel.pack_destinations(tokens, count, m.channels, to.packed + task * to.size);
    }
  });
  const auto row_of = [&](const SourceChunks::Chunk& chunk) { return (chunk.row - first_row) * to.blocks; };
  constexpr int64_t kMost = kBf16Groups * kBf16Block;

  const uint8_t* others = m.is_destination;
  std::vector<uint8_t> settled;
  if constexpr (kBf16Parts<T> == 3) {
    // Those whose best destination is beyond doubt, nearly all, are settled by fewer products; their similarity is
    // computed on its own. The others are too close to call and come again below.
    settled.assign(others, others + m.batch * m.tokens);
    const float doubt = 2 * kernel.screen_error(m.channels);
    for_each_packed_chunk(
        m, others, first_row, last_row, unfit.data(), [&](auto& chunk, auto* sources, int64_t groups) {
          float best[kMost], second[kMost];
          int32_t position[kMost];
          const float* const scale = to.scale.data() + row_of(chunk) * kBf16Block;
          kernel.screen(sources, groups, to.packed + row_of(chunk) * to.size, to.blocks, scale, m.channels, best,
                        second, position);
          for (int64_t i = 0; i < chunk.count; ++i) {
            const int64_t n = chunk.sources[i], at = chunk.row * m.tokens + n;
            if (best[i] - second[i] <= doubt * m.norm[at]) continue;
            settled[at] = 1;
            if (best[i] > -std::numeric_limits<float>::infinity()) {
              const T* const destination = m.x.row(chunk.row, m.destinations[chunk.row * m.count + position[i]]);
              best[i] = m.rows->dot(m.x.row(chunk.row, n), destination, m.channels) * scale[position[i]];
            }
            m.store(chunk.row, n, best[i], position[i]);
          }
        });
    others = settled.data();
  }
  for_each_packed_chunk(m, others, first_row, last_row, unfit.data(), [&](auto& chunk, auto* sources, int64_t groups) {
    float best[kMost];
    int32_t position[kMost];
    kernel.match(sources, groups, to.packed + row_of(chunk) * to.size, to.blocks,
                 to.scale.data() + row_of(chunk) * kBf16Block, m.channels, best, position);
    for (int64_t i = 0; i < chunk.count; ++i) {
      m.store(chunk.row, chunk.sources[i], best[i], position[i]);
    }
  });

  std::vector<int64_t> again;
  for (int64_t row = 0; row < num_rows; ++row) {
    if (!unfit[row]) continue;
    again.push_back(first_row + row);
    std::fill_n(m.similarity + (first_row + row) * m.tokens, m.tokens, -std::numeric_limits<float>::infinity());
  }
  return again;
}

}  // namespace bigain
