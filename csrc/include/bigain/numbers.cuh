// The number types of tokens, and float32 as bits.
#pragma once

#include <type_traits>

#include "bigain/device_code.cuh"

namespace bigain {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

__device__ __forceinline__ uint32_t float_bits(float value) {
#ifdef BIGAIN_EMULATE
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
#else
  return __float_as_uint(value);
#endif
}

__device__ __forceinline__ float bits_float(uint32_t bits) {
#ifdef BIGAIN_EMULATE
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
#else
  return __uint_as_float(bits);
#endif
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(BFloat16 value) {
  return bits_float(static_cast<uint32_t>(value.bits) << 16);
}
__device__ __forceinline__ float to_float(Half value) {
#ifdef BIGAIN_EMULATE
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  // The exponent moves from bias 15 to bias 127; infinities and NaN keep an exponent of all ones.
  const uint32_t shifted = (magnitude << 13) + (112u << 23);
  const uint32_t normal = magnitude >= 0x7c00u ? shifted | 0x7f800000u : shifted;
  const uint32_t subnormal = float_bits(static_cast<float>(magnitude) * 0x1p-24f);
  return bits_float(sign | (magnitude < 0x0400u ? subnormal : normal));
#else
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#endif
}

// from_float<T>(value): to the nearest, ties to even.
template <typename T>
__device__ __forceinline__ T from_float(float value);

template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float value) {
#ifdef BIGAIN_EMULATE
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return {static_cast<uint16_t>(value != value ? 0x7fffu : rounded)};
#else
  BFloat16 narrow;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
  return narrow;
#endif
}
template <>
__device__ __forceinline__ Half from_float<Half>(float value) {
#ifdef BIGAIN_EMULATE
  const uint32_t bits = float_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // Below 2^-14 the unit in the last place is 2^-24, which is that of 0.5 in float: the addition rounds.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
  uint32_t rounded = magnitude < 113u << 23 ? subnormal : normal;
  rounded = magnitude >= 143u << 23 ? 0x7c00u : rounded;
  // All NaN become this one, as on the device.
  if (magnitude > 0x7f800000u) return {0x7fffu};
  return {static_cast<uint16_t>((bits >> 16 & 0x8000u) | rounded)};
#else
  Half narrow;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
  return narrow;
#endif
}

// from_float of two values, the first in the low half: one instruction.
template <typename T>
__device__ __forceinline__ uint32_t pair_from_floats(float low, float high) {
#ifdef BIGAIN_EMULATE
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
#else
  uint32_t pair;
  if constexpr (std::is_same_v<T, Half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
#endif
}

// value / count, where inverse is 1 / count, rounded: a step of Newton's method, in a third of the instructions of a
// division. For whole numbers up to 32 it has the last bit of the division, compared at every mantissa (subnormal
// quotients apart), else it may be one off. Where the quotient is infinite the rest is NaN, and put aside by the
// minimum.
__device__ __forceinline__ float divide(float value, float count, float inverse) {
  const float quotient = value * inverse;
  return fmaf(min(fmaf(-quotient, count, value), 3e38f), inverse, quotient);
}

__device__ __forceinline__ bool is_nan(float value) { return value != value; }

// What matching multiplies a token with: 1 / norm, or 0 for a token without a direction (zero, NaN, or a norm that
// overflows).
__device__ __forceinline__ float inverse_norm(float sum_of_squares) {
  const float norm = sqrtf(sum_of_squares);
  return norm > 0.0f && norm < bits_float(0x7f800000u) ? 1.0f / norm : 0.0f;
}

}  // namespace bigain
