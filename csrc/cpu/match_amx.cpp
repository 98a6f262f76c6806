// Matching as a blocked matrix product on AMX tiles that keeps only the best of each source.
//
// The unit multiplies bfloat16 and adds in float32: a tile product sums 32 channels, and is added to the total as one
// number, so that the rounding error grows with channels / 32. float16 and float are split into 2 and 3 bfloat16 parts
// whose sum is the value itself. Of the products of parts, those below 2^-24 of the whole are left out: a similarity
// of float tokens is as exact as float32 arithmetic makes it, at six products instead of one. Three of them tell most
// destinations apart, with a bound on the error (`screen`); only sources that they leave in doubt need all six.
//
// Rows of a tile are destinations, columns are sources: the running maximum of 16 sources is one register, and equal
// destinations are met in ascending order, so that the first one stays. Every product is summed in one order wherever
// its source stands: results depend on neither batch nor threads.
#include <limits>
#include <type_traits>

#include "match_bf16_vectors.h"

namespace bigain::amx {
namespace {

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

// Totals of 32 destinations (2 tiles of 16) and 32 sources (2 tiles of 16).
using Totals = float[2][2][16][16];

// What is kept of 32 sources while destinations pass by.
struct Matched {
  Best best;
  inline void meet(int half, __m512 total, __m512 scale, __m512i at) { best.meet(half, total, scale, at); }
};
struct Screened {
  Best best;
  __m512 second[2] = {_mm512_set1_ps(-std::numeric_limits<float>::infinity()), second[0]};
  inline void meet(int half, __m512 total, __m512 scale, __m512i at) { best.meet(half, total, scale, at, second); }
};

// Compares destinations begin, ..., end - 1 of a block, whose first one is destination `first` of all.
template <typename Kept>
inline void compare(const Totals& totals, const float* scale, int64_t first, int64_t begin, int64_t end, Kept& out) {
  Kept kept = out;
  for (int64_t d = begin; d < end; ++d) {
    const __m512 factor = _mm512_set1_ps(scale[d]);
    const __m512i position = _mm512_set1_epi32(static_cast<int>(first + d));
    for (int half = 0; half < 2; ++half) {
      kept.meet(half, _mm512_load_ps(totals[d / 16][half][d % 16]), factor, position);
    }
  }
  out = kept;
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
template <int64_t kParts, bool kScreen>
inline void multiply_step(const uint16_t* destinations, const uint16_t* sources) {
  BIGAIN_LOAD_DESTINATIONS(0);
  if constexpr (kParts == 3 && !kScreen) {
    BIGAIN_LOAD_SOURCES(2);
    BIGAIN_MULTIPLY();
  }
  if constexpr (kScreen) {
    BIGAIN_LOAD_SOURCES(1);
    BIGAIN_MULTIPLY();
    BIGAIN_LOAD_SOURCES(0);
    BIGAIN_MULTIPLY();
    BIGAIN_LOAD_DESTINATIONS(1);
    BIGAIN_MULTIPLY();
    return;
  }
  BIGAIN_LOAD_SOURCES(0);
  BIGAIN_MULTIPLY();
  if constexpr (kParts > 1) {
    BIGAIN_LOAD_SOURCES(1);
    BIGAIN_MULTIPLY();
    BIGAIN_LOAD_DESTINATIONS(1);
    BIGAIN_MULTIPLY();
    BIGAIN_LOAD_SOURCES(0);
    BIGAIN_MULTIPLY();
  }
  if constexpr (kParts == 3) {
    BIGAIN_LOAD_DESTINATIONS(2);
    BIGAIN_MULTIPLY();
  }
}

// Totals of two blocks, with `meanwhile(step)` between the steps.
template <int64_t kParts, bool kScreen, typename F>
inline void multiply(const uint16_t* destinations, const uint16_t* sources, int64_t steps, Totals& totals,
                     const F& meanwhile) {
  constexpr int64_t kStep = 2 * kParts * kTile;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; ++step) {
    multiply_step<kParts, kScreen>(destinations + step * kStep, sources + step * kStep);
    meanwhile(step);
  }
  _tile_stored(0, totals[0][0], 64);
  _tile_stored(1, totals[0][1], 64);
  _tile_stored(2, totals[1][0], 64);
  _tile_stored(3, totals[1][1], 64);
}

// Lets all blocks of destinations pass by the groups of sources. `kept` begins as nothing.
template <typename T, typename Kept>
inline void pass(const uint16_t* sources, int64_t groups, const uint16_t* destinations, int64_t blocks,
                 const float* scale, int64_t channels, Kept* kept) {
  const int64_t steps = (channels + kBf16Step - 1) / kBf16Step, size = Bf16Kernel<T>::block_size(channels);
  configure_tiles();
  // While the unit works on one block, the vector units compare the totals of the one before, a few of them at each
  // step so that both are busy all the time.
  alignas(64) Totals totals[2];
  const int64_t rounds = blocks * groups, at_once = (kBf16Block + steps - 1) / steps;
  const auto compare_some = [&](int64_t round, int64_t begin, int64_t end) {
    if (round < 0 || begin >= kBf16Block) return;
    const int64_t first = round / groups * kBf16Block;
    compare(totals[round % 2], scale + first, first, begin, end < kBf16Block ? end : kBf16Block, kept[round % groups]);
  };
  for (int64_t round = 0; round < rounds; ++round) {
    multiply<kBf16Parts<T>, std::is_same_v<Kept, Screened>>(
        destinations + round / groups * size, sources + round % groups * size, steps, totals[round % 2],
        [&](int64_t step) { compare_some(round - 1, step * at_once, (step + 1) * at_once); });
  }
  compare_some(rounds - 1, 0, kBf16Block);
  _tile_release();
}

template <typename T>
void match(const uint16_t* sources, int64_t groups, const uint16_t* destinations, int64_t blocks, const float* scale,
           int64_t channels, float* best, int32_t* position) {
  Matched kept[kBf16Groups];
  pass<T>(sources, groups, destinations, blocks, scale, channels, kept);
  for (int64_t group = 0; group < groups; ++group) {
    kept[group].best.store(best + group * kBf16Block, position + group * kBf16Block);
  }
}

template <typename T>
void screen(const uint16_t* sources, int64_t groups, const uint16_t* destinations, int64_t blocks, const float* scale,
            int64_t channels, float* best, float* second, int32_t* position) {
  Screened kept[kBf16Groups];
  pass<T>(sources, groups, destinations, blocks, scale, channels, kept);
  for (int64_t group = 0; group < groups; ++group) {
    kept[group].best.store(best + group * kBf16Block, position + group * kBf16Block);
    for (int half = 0; half < 2; ++half) {
      _mm512_storeu_ps(second + group * kBf16Block + 16 * half, kept[group].second[half]);
    }
  }
}

}  // namespace

template <typename T>
const Bf16Kernel<T>& bf16_kernel() {
  static constexpr Bf16Kernel<T> table = {pack_sources<T>, pack_destinations<T>, match<T>,
                                          kBf16Parts<T> == 3 ? screen<T> : nullptr};
  return table;
}

template const Bf16Kernel<float>& bf16_kernel<float>();
template const Bf16Kernel<BFloat16>& bf16_kernel<BFloat16>();
template const Bf16Kernel<Half>& bf16_kernel<Half>();

}  // namespace bigain::amx
