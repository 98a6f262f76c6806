// Bipartite matching of all sources with all destinations by products of bfloat16, where the machine has them.
#pragma once

#include <memory>

#include "match_bf16.h"
#include "matching.h"

namespace bigain {

// These instructions take numbers below 2^-126 for zero. Between these norms, products of values that count in a
// similarity stay far above that, and sums far below the largest float. Other tokens are rare, and matched without
// them.
constexpr float kBf16LeastNorm = 0x1p-40f, kBf16LargestNorm = 0x1p40f;

// Whether row b is matched by them. It depends on nothing but this row.
template <typename T>
bool fits_bf16(const Matching<T>& m, int64_t b) {
  if constexpr (std::is_same_v<T, double>) {
    return false;
  } else {
    if (bf16_kernel<T>() == nullptr || m.channels == 0) return false;
    return std::all_of(m.norm + b * m.tokens, m.norm + (b + 1) * m.tokens,
                       [](float norm) { return norm == 0 || (norm >= kBf16LeastNorm && norm <= kBf16LargestNorm); });
  }
}

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

// All sources of rows first_row, ..., last_row - 1 against all destinations.
template <typename T>
void match_rows_in_bf16(const Matching<T>& m, int64_t first_row, int64_t last_row) {
  const Bf16Kernel<T>& kernel = *bf16_kernel<T>();
  const int64_t num_rows = last_row - first_row, blocks = (m.count + kBf16Block - 1) / kBf16Block;
  const int64_t size = kernel.block_size(m.channels);
  AlignedValues packed(num_rows * blocks * size);
  // NaN keeps out what is similar to nothing: destinations without a direction, and the empty places of a last block.
  std::vector<float> scale(num_rows * blocks * kBf16Block, std::numeric_limits<float>::quiet_NaN());
  for_each_task(num_rows * blocks, kBf16Block * m.channels, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = first_row + task / blocks, first = task % blocks * kBf16Block;
      const int64_t count = std::min(kBf16Block, m.count - first);
      const T* tokens[kBf16Block];
      for (int64_t j = 0; j < count; ++j) {
        const int64_t n = m.destinations[b * m.count + first + j];
        const float norm = m.norm[b * m.tokens + n];
        tokens[j] = m.x.row(b, n);
        if (norm > 0) scale[task * kBf16Block + j] = 1 / norm;
      }
      kernel.pack_destinations(tokens, count, m.channels, packed + task * size);
    }
  });

  const SourceChunks chunks(m, first_row, last_row, kBf16Groups * kBf16Block);
  for_each_task(chunks.count(), kBf16Groups * kBf16Block * m.count * m.channels / 256, [&](int64_t begin, int64_t end) {
    AlignedValues sources(kBf16Groups * size);
    const T* tokens[kBf16Block];
    float best[kBf16Groups * kBf16Block];
    int32_t position[kBf16Groups * kBf16Block];
    for (int64_t task = begin; task < end; ++task) {
      const SourceChunks::Chunk chunk = chunks[task];
      const int64_t groups = (chunk.count + kBf16Block - 1) / kBf16Block, row = chunk.row - first_row;
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t first = group * kBf16Block, count = std::min(kBf16Block, chunk.count - first);
        for (int64_t i = 0; i < count; ++i) {
          tokens[i] = m.x.row(chunk.row, chunk.sources[first + i]);
        }
        kernel.pack_sources(tokens, count, m.channels, sources + group * size);
      }
      kernel.match(sources + 0, groups, packed + row * blocks * size, blocks, scale.data() + row * blocks * kBf16Block,
                   m.channels, best, position);
      for (int64_t i = 0; i < chunk.count; ++i) {
        m.store(chunk.row, chunk.sources[i], best[i], position[i]);
      }
    }
  });
}

}  // namespace bigain
