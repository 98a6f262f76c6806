// A similarity and the token it belongs to in one 64-bit word, whose maximum is the highest similarity and, among
// equals, the lowest token: the same in whatever order words are compared.
#pragma once

#include "bigain/common.cuh"

namespace bigain {

using Packed = unsigned long long;  // what atomicMax takes

constexpr uint32_t kSignBit = 0x80000000u;

__device__ __forceinline__ float minus_infinity() { return bits_float(0xff800000u); }

// Keys in the order of float32 values that are not NaN; both zeros get one key. 0 is below them all.
__device__ __forceinline__ uint32_t ordered_key(float value) {
  const uint32_t bits = float_bits(value + 0.0f);
  return bits & kSignBit ? ~bits : bits | kSignBit;
}

__device__ __forceinline__ float key_to_float(uint32_t key) {
  return bits_float(key & kSignBit ? key ^ kSignBit : ~key);
}

__device__ __forceinline__ Packed pack(uint32_t key, int token) {
  return static_cast<Packed>(key) << 32 | ~static_cast<uint32_t>(token);
}

__device__ __forceinline__ uint32_t unpack_key(Packed packed) { return static_cast<uint32_t>(packed >> 32); }
__device__ __forceinline__ int unpack_token(Packed packed) { return static_cast<int>(~static_cast<uint32_t>(packed)); }

}  // namespace bigain
