// Matching as a blocked matrix product on AMX tiles that keeps only the best of each source.
//
// The unit multiplies bfloat16 and adds in float32: a tile product sums 32 channels, and is added to the total as one
// number, so that the rounding error grows with channels / 32. float16 and float are split into 2 and 3 bfloat16 parts
// whose sum is the value itself. Of the products of parts, those below 2^-24 of the whole are left out: a similarity
// of float tokens is as exact as float32 arithmetic makes it, at six products instead of one.
//
// Rows of a tile are destinations, columns are sources: the running maximum of 16 sources is one register, and equal
// destinations are met in ascending order, so that the first one stays. Every product is summed in one order wherever
// its source stands: results depend on neither batch nor threads.
#include "match_amx.h"

#include <immintrin.h>

#include <cstring>
#include <limits>

namespace bigain::amx {
namespace {

constexpr int64_t kTile = 16 * kAmxStep;  // values of a tile: 16 rows of 64 bytes

// 64 bytes that _tile_loadconfig reads (Intel, "Intel AMX instruction set reference").
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

void configure_tiles() {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = 16;
  }
  _tile_loadconfig(&config);
}

// Splits kAmxStep channels of a token into parts (parts, kAmxStep) of falling magnitude.
inline void split(const BFloat16* x, uint16_t (*parts)[kAmxStep]) { memcpy(parts[0], x, sizeof(parts[0])); }

template <typename T>
inline void split(const T* x, uint16_t (*parts)[kAmxStep]) {
  float rest[kAmxStep];
  for (int64_t i = 0; i < kAmxStep; ++i) {
    rest[i] = widen(x[i]);
  }
  for (int64_t part = 0; part < kAmxParts<T>; ++part) {
    for (int64_t i = 0; i < kAmxStep; ++i) {
      BFloat16 rounded;
      narrow(rest[i], rounded);
      parts[part][i] = rounded.bits;
      rest[i] -= widen(rounded);
    }
  }
}

// As `split`, of the last channels of a token, of which there are only `count`; zeros behind them.
template <typename T>
inline void split_some(const T* x, int64_t count, uint16_t (*parts)[kAmxStep]) {
  T padded[kAmxStep] = {};
  memcpy(padded, x, count * sizeof(T));
  split(padded, parts);
}

// A row of a destination tile holds 32 channels of one destination.
template <typename T>
void pack_destinations(const T* const* tokens, int64_t count, int64_t channels, uint16_t* block) {
  for (int64_t start = 0; start < channels; start += kAmxStep) {
    const int64_t size = channels - start < kAmxStep ? channels - start : kAmxStep;
    for (int64_t j = 0; j < kAmxBlock; ++j) {
      uint16_t parts[kAmxParts<T>][kAmxStep] = {};
      if (j < count) size == kAmxStep ? split(tokens[j] + start, parts) : split_some(tokens[j] + start, size, parts);
      for (int64_t part = 0; part < kAmxParts<T>; ++part) {
        memcpy(block + (2 * part + j / 16) * kTile + j % 16 * kAmxStep, parts[part], sizeof(parts[part]));
      }
    }
    block += 2 * kAmxParts<T> * kTile;
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
  for (int64_t start = 0; start < channels; start += kAmxStep) {
    const int64_t size = channels - start < kAmxStep ? channels - start : kAmxStep;
    for (int64_t tile = 0; tile < 2; ++tile) {
      alignas(64) uint32_t rows[kAmxParts<T>][16][16] = {};
      for (int64_t j = 0; j < 16 && tile * 16 + j < count; ++j) {
        const T* const token = tokens[tile * 16 + j] + start;
        uint16_t parts[kAmxParts<T>][kAmxStep];
        size == kAmxStep ? split(token, parts) : split_some(token, size, parts);
        for (int64_t part = 0; part < kAmxParts<T>; ++part) {
          memcpy(rows[part][j], parts[part], sizeof(parts[part]));
        }
      }
      for (int64_t part = 0; part < kAmxParts<T>; ++part) {
        transpose(rows[part], reinterpret_cast<uint32_t*>(block + (2 * part + tile) * kTile));
      }
    }
    block += 2 * kAmxParts<T> * kTile;
  }
}

// The best so far of 32 sources.
struct Best {
  __m512 value[2];
  __m512i position[2];
};

// Totals of 32 destinations (2 tiles of 16) and 32 sources (2 tiles of 16).
using Totals = float[2][2][16][16];

// Compares destinations begin, ..., end - 1 of a block, whose first one is destination `first` of all.
inline void compare(const Totals& totals, const float* scale, int64_t first, int64_t begin, int64_t end, Best& out) {
  Best best = out;
  for (int64_t d = begin; d < end; ++d) {
    const __m512 factor = _mm512_set1_ps(scale[d]);
    const __m512i position = _mm512_set1_epi32(static_cast<int>(first + d));
    for (int half = 0; half < 2; ++half) {
      const __m512 product = _mm512_mul_ps(_mm512_load_ps(totals[d / 16][half][d % 16]), factor);
      // Strictly greater: the first of equal destinations stays. False for NaN.
      const __mmask16 better = _mm512_cmp_ps_mask(product, best.value[half], _CMP_GT_OQ);
      best.value[half] = _mm512_mask_mov_ps(best.value[half], better, product);
      best.position[half] = _mm512_mask_mov_epi32(best.position[half], better, position);
    }
  }
  out = best;
}

// Tiles 0 to 3 are totals, 4 and 5 destinations, 6 and 7 sources.
#define BIGAIN_LOAD_DESTINATIONS(part)                   \
  _tile_loadd(4, destinations + 2 * (part) * kTile, 64); \
  _tile_loadd(5, destinations + (2 * (part) + 1) * kTile, 64)
#define BIGAIN_LOAD_SOURCES(part)                   \
  _tile_loadd(6, sources + 2 * (part) * kTile, 64); \
  _tile_loadd(7, sources + (2 * (part) + 1) * kTile, 64)
#define BIGAIN_MULTIPLY()  \
  _tile_dpbf16ps(0, 4, 6); \
  _tile_dpbf16ps(1, 4, 7); \
  _tile_dpbf16ps(2, 5, 6); \
  _tile_dpbf16ps(3, 5, 7)

// Adds the products of 32 channels. The order saves loads: neighbours share an operand.
template <typename T>
inline void multiply_step(const uint16_t* destinations, const uint16_t* sources) {
  BIGAIN_LOAD_DESTINATIONS(0);
  if constexpr (kAmxParts<T> == 3) {
    BIGAIN_LOAD_SOURCES(2);
    BIGAIN_MULTIPLY();
  }
  BIGAIN_LOAD_SOURCES(0);
  BIGAIN_MULTIPLY();
  if constexpr (kAmxParts<T> > 1) {
    BIGAIN_LOAD_SOURCES(1);
    BIGAIN_MULTIPLY();
    BIGAIN_LOAD_DESTINATIONS(1);
    BIGAIN_MULTIPLY();
    BIGAIN_LOAD_SOURCES(0);
    BIGAIN_MULTIPLY();
  }
  if constexpr (kAmxParts<T> == 3) {
    BIGAIN_LOAD_DESTINATIONS(2);
    BIGAIN_MULTIPLY();
  }
}

// Totals of two blocks, with `meanwhile(step)` between the steps.
template <typename T, typename F>
inline void multiply(const uint16_t* destinations, const uint16_t* sources, int64_t steps, Totals& totals,
                     const F& meanwhile) {
  constexpr int64_t kStep = 2 * kAmxParts<T> * kTile;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; ++step) {
    multiply_step<T>(destinations + step * kStep, sources + step * kStep);
    meanwhile(step);
  }
  _tile_stored(0, totals[0][0], 64);
  _tile_stored(1, totals[0][1], 64);
  _tile_stored(2, totals[1][0], 64);
  _tile_stored(3, totals[1][1], 64);
}

template <typename T>
void match(const uint16_t* sources, int64_t groups, const uint16_t* destinations, int64_t blocks, const float* scale,
           int64_t channels, float* best_value, int32_t* best_position) {
  const int64_t steps = (channels + kAmxStep - 1) / kAmxStep, size = AmxKernel<T>::block_size(channels);
  Best best[kAmxGroups];
  for (Best& each : best) {
    each.value[0] = each.value[1] = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    each.position[0] = each.position[1] = _mm512_setzero_si512();
  }
  configure_tiles();
  // While the unit works on one block, the vector units compare the totals of the one before, a few of them at each
  // step so that both are busy all the time.
  alignas(64) Totals totals[2];
  const int64_t rounds = blocks * groups, at_once = (kAmxBlock + steps - 1) / steps;
  const auto compare_some = [&](int64_t round, int64_t begin, int64_t end) {
    if (round < 0 || begin >= kAmxBlock) return;
    const int64_t first = round / groups * kAmxBlock;
    compare(totals[round % 2], scale + first, first, begin, end < kAmxBlock ? end : kAmxBlock, best[round % groups]);
  };
  for (int64_t round = 0; round < rounds; ++round) {
    multiply<T>(destinations + round / groups * size, sources + round % groups * size, steps, totals[round % 2],
                [&](int64_t step) { compare_some(round - 1, step * at_once, (step + 1) * at_once); });
  }
  compare_some(rounds - 1, 0, kAmxBlock);
  _tile_release();
  for (int64_t i = 0; i < 2 * groups; ++i) {
    _mm512_storeu_ps(best_value + 16 * i, best[i / 2].value[i % 2]);
    _mm512_storeu_si512(best_position + 16 * i, best[i / 2].position[i % 2]);
  }
}

}  // namespace

template <typename T>
const AmxKernel<T>& amx_kernel() {
  static constexpr AmxKernel<T> table = {pack_sources<T>, pack_destinations<T>, match<T>};
  return table;
}

template const AmxKernel<float>& amx_kernel<float>();
template const AmxKernel<BFloat16>& amx_kernel<BFloat16>();
template const AmxKernel<Half>& amx_kernel<Half>();

}  // namespace bigain::amx
