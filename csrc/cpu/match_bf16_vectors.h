// What the kernels that multiply bfloat16 share: packed tokens, and the best destinations so far. Each kernel is
// compiled for its own instructions, all of them with AVX-512.
#pragma once

#include <immintrin.h>

#include <cstring>
#include <limits>

#include "match_bf16.h"

namespace bigain {
namespace {

constexpr int64_t kTile = 16 * kBf16Step;  // values of a tile: 16 rows of 64 bytes

// Splits kBf16Step channels of a token into parts (parts, kBf16Step) of falling magnitude.
inline void split(const BFloat16* x, uint16_t (*parts)[kBf16Step]) { memcpy(parts[0], x, sizeof(parts[0])); }

inline __m512 load_sixteen(const float* x) { return _mm512_loadu_ps(x); }
inline __m512 load_sixteen(const Half* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
inline __m512 widen_sixteen(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

template <typename T>
inline void split(const T* x, uint16_t (*parts)[kBf16Step]) {
  __m512 low = load_sixteen(x), high = load_sixteen(x + 16);
  for (int64_t part = 0; part < kBf16Parts<T>; ++part) {
    const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    _mm512_storeu_si512(parts[part], rounded);
    low = _mm512_sub_ps(low, widen_sixteen(_mm512_castsi512_si256(rounded)));
    high = _mm512_sub_ps(high, widen_sixteen(_mm512_extracti64x4_epi64(rounded, 1)));
  }
}

// As `split`, of the last channels of a token, of which there are only `count`; zeros behind them.
template <typename T>
inline void split_some(const T* x, int64_t count, uint16_t (*parts)[kBf16Step]) {
  T padded[kBf16Step] = {};
  memcpy(padded, x, count * sizeof(T));
  split(padded, parts);
}

// A row of a destination tile holds 32 channels of one destination.
template <typename T>
void pack_destinations(const T* const* tokens, int64_t count, int64_t channels, uint16_t* block) {
  for (int64_t start = 0; start < channels; start += kBf16Step) {
    const int64_t size = channels - start < kBf16Step ? channels - start : kBf16Step;
    for (int64_t j = 0; j < kBf16Block; ++j) {
      uint16_t parts[kBf16Parts<T>][kBf16Step] = {};
      if (j < count) size == kBf16Step ? split(tokens[j] + start, parts) : split_some(tokens[j] + start, size, parts);
      for (int64_t part = 0; part < kBf16Parts<T>; ++part) {
        memcpy(block + (2 * part + j / 16) * kTile + j % 16 * kBf16Step, parts[part], sizeof(parts[part]));
      }
    }
    block += 2 * kBf16Parts<T> * kTile;
  }
}

// Transposes 16 rows of 16 words.
inline void transpose(const uint32_t (*rows)[16], uint32_t* out) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(rows[i]);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // Row 4 g + k of a holds column k of four rows g in each of its 128-bit lanes, columns 4 apart.
  for (int k = 0; k < 4; ++k) {
    const __m512i low = _mm512_shuffle_i32x4(a[k], a[k + 4], 0x88), high = _mm512_shuffle_i32x4(a[k], a[k + 4], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(a[k + 8], a[k + 12], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(a[k + 8], a[k + 12], 0xdd);
    _mm512_storeu_si512(out + k * 16, _mm512_shuffle_i32x4(low, low2, 0x88));
    _mm512_storeu_si512(out + (k + 4) * 16, _mm512_shuffle_i32x4(high, high2, 0x88));
    _mm512_storeu_si512(out + (k + 8) * 16, _mm512_shuffle_i32x4(low, low2, 0xdd));
    _mm512_storeu_si512(out + (k + 12) * 16, _mm512_shuffle_i32x4(high, high2, 0xdd));
  }
}

// A row of a source tile holds two neighbouring channels of 16 sources, as the unit wants its second operand.
template <typename T>
void pack_sources(const T* const* tokens, int64_t count, int64_t channels, uint16_t* block) {
  for (int64_t start = 0; start < channels; start += kBf16Step) {
    const int64_t size = channels - start < kBf16Step ? channels - start : kBf16Step;
    for (int64_t tile = 0; tile < 2; ++tile) {
      alignas(64) uint32_t rows[kBf16Parts<T>][16][16] = {};
      for (int64_t j = 0; j < 16 && tile * 16 + j < count; ++j) {
        const T* const token = tokens[tile * 16 + j] + start;
        uint16_t parts[kBf16Parts<T>][kBf16Step];
        size == kBf16Step ? split(token, parts) : split_some(token, size, parts);
        for (int64_t part = 0; part < kBf16Parts<T>; ++part) {
          memcpy(rows[part][j], parts[part], sizeof(parts[part]));
        }
      }
      for (int64_t part = 0; part < kBf16Parts<T>; ++part) {
        transpose(rows[part], reinterpret_cast<uint32_t*>(block + (2 * part + tile) * kTile));
      }
    }
    block += 2 * kBf16Parts<T> * kTile;
  }
}

// The best so far of 32 packed sources.
struct Best {
  __m512 value[2] = {_mm512_set1_ps(-std::numeric_limits<float>::infinity()), value[0]};
  __m512i position[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};

  // The 16 sources of one half meet the destination at `at`; their products with it are total * scale.
  inline void meet(int half, __m512 total, __m512 scale, __m512i at) {
    const __m512 product = _mm512_mul_ps(total, scale);
    // Strictly greater: the first of equal destinations stays. False for NaN.
    const __mmask16 better = _mm512_cmp_ps_mask(product, value[half], _CMP_GT_OQ);
    value[half] = _mm512_mask_mov_ps(value[half], better, product);
    position[half] = _mm512_mask_mov_epi32(position[half], better, at);
  }

  // As `meet`, and keeps the best of those that are not the best in `second`.
  inline void meet(int half, __m512 total, __m512 scale, __m512i at, __m512* second) {
    const __m512 product = _mm512_mul_ps(total, scale);
    const __mmask16 better = _mm512_cmp_ps_mask(product, value[half], _CMP_GT_OQ);
    // Of NaN and a number the maximum is its second operand.
    const __m512 behind = _mm512_max_ps(product, second[half]);
    second[half] = _mm512_mask_mov_ps(behind, better, value[half]);
    value[half] = _mm512_mask_mov_ps(value[half], better, product);
    position[half] = _mm512_mask_mov_epi32(position[half], better, at);
  }

  void store(float* values, int32_t* positions) const {
    for (int half = 0; half < 2; ++half) {
      _mm512_storeu_ps(values + 16 * half, value[half]);
      _mm512_storeu_si512(positions + 16 * half, position[half]);
    }
  }
};

}  // namespace
}  // namespace bigain
