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

  // As `match`, by half of the products: a similarity may be wrong by screen_error(channels), and `second` (groups *
  // kBf16Block) is the largest but the best, so that a source whose two differ by more than twice the error has found
  // its destination. Null where `match` needs all products that there are.
  void (*screen)(const uint16_t* sources, int64_t groups, const uint16_t* destinations, int64_t blocks,
                 const float* scale, int64_t channels, float* best, float* second, int32_t* position);

  // For tokens of norm one. A part is at most 2^-8 of the one before: the products left out, of second parts and of
  // first with third ones, are 3 * 2^-16 of the whole by Cauchy's inequality (and a few parts in a thousand, of all
  // that is smaller still). A product of tiles adds two chains of 16 products and both to the total, with a rounding of
  // 2^-24 for each addition, and there are three to a step; one more is that of the scale.
  static float screen_error(int64_t channels) {
    const int64_t steps = (channels + kBf16Step - 1) / kBf16Step;
    return 3.02f * 0x1p-16f + static_cast<float>(20 + 3 * steps) * 0x1p-24f;
  }
};

// The table, or null where tokens of this type are matched in their own arithmetic (isa.cpp).
template <typename T>
const Bf16Kernel<T>* bf16_kernel();

}  // namespace bigain
