// Sixteen-bit floats as bits, converted with plain integer arithmetic so that loops over them vectorise on any CPU.
//
// Functions here are `static inline`: this header is compiled once per instruction set, and a function shared between
// those objects could be the one with instructions that the machine does not have.
#pragma once

#include <cstdint>
#include <cstring>

namespace bigain {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The type that sums over values of type T are kept in.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using accumulate_t = typename Accumulate<T>::type;

static inline uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

static inline float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

static inline double widen(double value) { return value; }
static inline float widen(float value) { return value; }
static inline float widen(BFloat16 value) { return bits_float(static_cast<uint32_t>(value.bits) << 16); }
static inline float widen(Half value) {
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  // The exponent moves from bias 15 to bias 127; infinities and NaN keep an exponent of all ones.
  const uint32_t shifted = (magnitude << 13) + (112u << 23);
  const uint32_t normal = magnitude >= 0x7c00u ? shifted | 0x7f800000u : shifted;
  const uint32_t subnormal = float_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return bits_float(sign | (magnitude < 0x0400u ? subnormal : normal));
}

// Round to nearest, ties to even.
static inline void narrow(double value, double& out) { out = value; }
static inline void narrow(float value, float& out) { out = value; }
static inline void narrow(float value, BFloat16& out) {
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}
static inline void narrow(float value, Half& out) {
  const uint32_t bits = float_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // Below 2^-14 the unit in the last place is 2^-24, which is that of 0.5 in float: the addition rounds.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
  uint32_t rounded = magnitude < 113u << 23 ? subnormal : normal;
  rounded = magnitude >= 143u << 23 ? 0x7c00u : rounded;
  rounded = magnitude > 0x7f800000u ? 0x7e00u : rounded;
  out.bits = static_cast<uint16_t>(bits >> 16 & 0x8000u) | static_cast<uint16_t>(rounded);
}

}  // namespace bigain
