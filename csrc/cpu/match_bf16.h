// Matching by instructions that multiply bfloat16: AMX, the matrix unit of Intel CPUs from Sapphire Rapids on
// (match_amx.cpp), and vdpbf16ps of AVX512_BF16 (match_vdpbf16.cpp).
#pragma once

#include <cstdint>

#include "numbers.h"

namespace bigain {

// Sources and destinations are packed and matched in blocks of this many tokens: two tiles of 16.
constexpr int64_t kBf16Block = 32;
// Channels of one tile.
constexpr int64_t kBf16Step = 32;
// Most blocks of sources that one call of Bf16Kernel::match takes.
constexpr int64_t kBf16Groups = 4;

// bfloat16 has 8 significant bits. A value is the sum of this many of them, exactly:
// bfloat16 itself, float16 with its 11 bits, float with its 24.
template <typename T>
constexpr int64_t kBf16Parts = sizeof(T) == 4 ? 3 : 1;
template <>
inline constexpr int64_t kBf16Parts<Half> = 2;

// T is float, BFloat16 or Half.
template <typename T>
struct Bf16Kernel {
  // Values of a packed block: (steps, parts, 2 tiles, 16 rows, 32 values), where steps = ceil(channels / kBf16Step).
  static int64_t block_size(int64_t channels) {
    return (channels + kBf16Step - 1) / kBf16Step * kBf16Parts<T> * kBf16Block * kBf16Step;
  }

  // Pack `count` <= kBf16Block tokens of `channels` values, zeros behind them. Blocks are aligned to 64 bytes.
  void (*pack_sources)(const T* const* tokens, int64_t count, int64_t channels, uint16_t* block);
  void (*pack_destinations)(const T* const* tokens, int64_t count, int64_t channels, uint16_t* block);

  // For every source of `groups` <= kBf16Groups packed blocks: the largest (source . destination) * scale[destination]
  // over `blocks` packed blocks of destinations, and the first destination that has it. Where scale is NaN nothing is
  // compared; a source that compares with nothing gets -inf and 0. best, position (groups * kBf16Block).
  void (*match)(const uint16_t* sources, int64_t groups, const uint16_t* destinations, int64_t blocks,
                const float* scale, int64_t channels, float* best, int32_t* position);
};

// The table, or null where tokens of this type are matched in their own arithmetic (isa.cpp).
template <typename T>
const Bf16Kernel<T>* bf16_kernel();

}  // namespace bigain
