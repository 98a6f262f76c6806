// Vectors of the numbers that row kernels compute with, read from and written to memory in the type of the tokens.
//
// Compiled once per instruction set, in a namespace of its own. Conversions are those of the machine where it has them,
// and integer arithmetic on whole vectors otherwise: compilers do not find them in loops over sixteen-bit floats.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "numbers.h"

namespace bigain::BIGAIN_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
};
template <typename A>
using vector_t = typename VectorOf<A>::type;
using Words = uint32_t __attribute__((vector_size(kVectorBytes)));
using Halves = uint16_t __attribute__((vector_size(kVectorBytes / 2)));

// All bits are those of another vector.
template <typename To, typename From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  return reinterpret_cast<To>(from);
}

// Sixteen-bit lanes to 32 bits and back; of what is narrowed the upper bits are zero. Compilers make detours of
// __builtin_convertvector where vectors are long.
#if defined(__AVX512F__)
inline Words widen_words(Halves halves) { return bits_as<Words>(_mm512_cvtepu16_epi32(bits_as<__m256i>(halves))); }
inline Halves narrow_words(Words words) { return bits_as<Halves>(_mm512_cvtepi32_epi16(bits_as<__m512i>(words))); }
#elif defined(__AVX2__)
inline Words widen_words(Halves halves) { return bits_as<Words>(_mm256_cvtepu16_epi32(bits_as<__m128i>(halves))); }
inline Halves narrow_words(Words words) {
  const __m256i all = bits_as<__m256i>(words);
  return bits_as<Halves>(_mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
}
#else
inline Words widen_words(Halves halves) { return __builtin_convertvector(halves, Words); }
inline Halves narrow_words(Words words) { return __builtin_convertvector(words, Halves); }
#endif

// As `widen` and `narrow` of numbers.h, lane by lane.
inline vector_t<float> widen_lanes(BFloat16, Halves bits) { return bits_as<vector_t<float>>(widen_words(bits) << 16); }

inline Halves narrow_lanes(BFloat16, vector_t<float> value) {
  const Words bits = bits_as<Words>(value);
  const Words rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return narrow_words(value != value ? Words{} + 0x7fc0u : rounded);
}

#if defined(__AVX512F__)
inline vector_t<float> widen_lanes(Half, Halves bits) { return _mm512_cvtph_ps(bits_as<__m256i>(bits)); }
inline Halves narrow_lanes(Half, vector_t<float> value) {
  return bits_as<Halves>(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
inline vector_t<float> widen_lanes(Half, Halves bits) { return _mm256_cvtph_ps(bits_as<__m128i>(bits)); }
inline Halves narrow_lanes(Half, vector_t<float> value) {
  return bits_as<Halves>(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__aarch64__) && defined(__ARM_NEON)
inline vector_t<float> widen_lanes(Half, Halves bits) {
  return bits_as<vector_t<float>>(vcvt_f32_f16(bits_as<float16x4_t>(bits)));
}
inline Halves narrow_lanes(Half, vector_t<float> value) {
  return bits_as<Halves>(vcvt_f16_f32(bits_as<float32x4_t>(value)));
}
#else
inline vector_t<float> widen_lanes(Half, Halves halves) {
  const Words bits = widen_words(halves);
  const Words magnitude = bits & 0x7fffu, sign = (bits & 0x8000u) << 16;
  const Words shifted = (magnitude << 13) + (112u << 23);
  const Words normal = magnitude >= 0x7c00u ? shifted | 0x7f800000u : shifted;
  // Halves are below 2^31, so that they are converted as signed integers, for which there is an instruction.
  typedef int32_t Signed __attribute__((vector_size(kVectorBytes)));
  const vector_t<float> count = __builtin_convertvector(bits_as<Signed>(magnitude), vector_t<float>);
  const Words subnormal = bits_as<Words>(count * 0x1p-24f);
  return bits_as<vector_t<float>>(sign | (magnitude < 0x0400u ? subnormal : normal));
}

inline Halves narrow_lanes(Half, vector_t<float> value) {
  const Words bits = bits_as<Words>(value), magnitude = bits & 0x7fffffffu;
  const Words normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const vector_t<float> half = vector_t<float>{} + 0.5f;
  const Words subnormal = bits_as<Words>(bits_as<vector_t<float>>(magnitude) + half) - bits_as<Words>(half);
  Words rounded = magnitude < 113u << 23 ? subnormal : normal;
  rounded = magnitude >= 143u << 23 ? Words{} + 0x7c00u : rounded;
  rounded = magnitude > 0x7f800000u ? Words{} + 0x7e00u : rounded;
  return narrow_words((bits >> 16 & 0x8000u) | rounded);
}
#endif

// kLanes values of type T in memory as a vector of the type that they are computed in.
template <typename T>
struct Lanes {
  using A = accumulate_t<T>;
  using Vector = vector_t<A>;
  static constexpr int64_t kLanes = kVectorBytes / sizeof(A);

  static Vector load(const T* from) {
    if constexpr (sizeof(T) == 2) {
      Halves bits;
      memcpy(&bits, from, sizeof(bits));
      return widen_lanes(T{}, bits);
    } else {
      Vector value;
      memcpy(&value, from, sizeof(value));
      return value;
    }
  }

  static void store(Vector value, T* to) {
    if constexpr (sizeof(T) == 2) {
      const Halves bits = narrow_lanes(T{}, value);
      memcpy(to, &bits, sizeof(bits));
    } else {
      memcpy(to, &value, sizeof(value));
    }
  }

  // As load and store of the first `count` lanes; the other lanes of what is loaded are zero.
  static Vector load_some(const T* from, int64_t count) {
    T padded[kLanes] = {};
    memcpy(padded, from, count * sizeof(T));
    return load(padded);
  }

  static void store_some(Vector value, T* to, int64_t count) {
    T padded[kLanes];
    store(value, padded);
    memcpy(to, padded, count * sizeof(T));
  }
};

// Functions over the channels see memory through one of these: a whole vector at `c`, or the first lanes of one.
struct Whole {
  int64_t c;
  template <typename T>
  auto load(const T* from) const {
    return Lanes<T>::load(from + c);
  }
  template <typename T, typename V>
  void store(V value, T* to) const {
    Lanes<T>::store(value, to + c);
  }
};

struct Some {
  int64_t c, count;
  template <typename T>
  auto load(const T* from) const {
    return Lanes<T>::load_some(from + c, count);
  }
  template <typename T, typename V>
  void store(V value, T* to) const {
    Lanes<T>::store_some(value, to + c, count);
  }
};

// f(place) over channels of type A, in ascending order; the last place may hold some lanes only.
template <typename A, typename F>
inline void for_each_vector(int64_t channels, const F& f) {
  constexpr int64_t kLanes = kVectorBytes / sizeof(A);
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) f(Whole{c});
  if (c < channels) f(Some{c, channels - c});
}

// Sum of the lanes: halves are added until one is left.
template <typename V>
inline auto sum_of(V value) {
  constexpr int kLanes = sizeof(V) / sizeof(value[0]);
  auto lanes = value;
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

}  // namespace
}  // namespace bigain::BIGAIN_ISA
