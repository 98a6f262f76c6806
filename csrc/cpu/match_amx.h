// Matching on AMX, the matrix unit of Intel CPUs from Sapphire Rapids on. See match_amx.cpp.
#pragma once

#include <cstdint>

#include "numbers.h"

namespace bigain {

// Sources and destinations are packed and matched in blocks of this many tokens: two tiles of 16.
constexpr int64_t kAmxBlock = 32;
// Channels of one tile.
constexpr int64_t kAmxStep = 32;
// Most blocks of sources that one call of AmxKernel::match takes.
constexpr int64_t kAmxGroups = 4;

// The unit multiplies bfloat16 values, which have 8 significant bits. A value is the sum of this many of them, exactly:
// bfloat16 itself, float16 with its 11 bits, float with its 24.
template <typename T>
constexpr int64_t kAmxParts = sizeof(T) == 4 ? 3 : 1;
template <>
inline constexpr int64_t kAmxParts<Half> = 2;

// T is float, BFloat16 or Half.
template <typename T>
struct AmxKernel {
  // Values of a packed block: (steps, parts, 2 tiles, 16 rows, 32 values), where steps = ceil(channels / kAmxStep).
  static int64_t block_size(int64_t channels) {
    return (channels + kAmxStep - 1) / kAmxStep * kAmxParts<T> * kAmxBlock * kAmxStep;
  }

  // Pack `count` <= kAmxBlock tokens of `channels` values, zeros behind them. Blocks are aligned to 64 bytes.
  void (*pack_sources)(const T* const* tokens, int64_t count, int64_t channels, uint16_t* block);
  void (*pack_destinations)(const T* const* tokens, int64_t count, int64_t channels, uint16_t* block);

  // For every source of `groups` <= kAmxGroups packed blocks: the largest (source . destination) * scale[destination]
  // over `blocks` packed blocks of destinations, and the first destination that has it. Where scale is NaN nothing is
  // compared; a source that compares with nothing gets -inf and 0. best, position (groups * kAmxBlock).
  void (*match)(const uint16_t* sources, int64_t groups, const uint16_t* destinations, int64_t blocks,
                const float* scale, int64_t channels, float* best, int32_t* position);
};

// The table, or null where this machine has no AMX or BIGAIN_CPU_ISA forbids it.
template <typename T>
const AmxKernel<T>* amx_kernel();

}  // namespace bigain
