// Matching as a blocked matrix product on vdpbf16ps, which multiplies pairs of bfloat16 and adds them in float32
// (AVX512_BF16). It is for bfloat16 tokens alone: as sums of bfloat16 parts, float16 would take four of these products
// in place of two of float32's.
//
// A tile of 8 destinations times 32 sources lives in registers: a lane is a source, a broadcast pair of channels a
// destination. Every similarity is summed in one order wherever its source stands: results depend on neither batch nor
// threads.
#include "match_bf16_vectors.h"

namespace bigain::vdpbf16 {
namespace {

constexpr int64_t kRows = 8;  // destinations of a tile; with two registers of sources each
static_assert(16 % kRows == 0);
// Sums run over this many steps of 32 channels before they are added to the total: the rounding error of a long sum of
// equal signs grows with the length of the run.
constexpr int64_t kRunSteps = 4;

// Adds the products of `steps` steps to `sum`. destinations: the first of kRows rows of a packed tile.
inline void multiply(const uint16_t* destinations, const uint16_t* sources, int64_t steps, __m512 (*sum)[2]) {
  for (int64_t step = 0; step < steps; ++step) {
    for (int64_t pair = 0; pair < kBf16Step / 2; ++pair) {
      const __m512bh low = (__m512bh)_mm512_load_si512(sources + pair * 32);
      const __m512bh high = (__m512bh)_mm512_load_si512(sources + kTile + pair * 32);
      for (int64_t i = 0; i < kRows; ++i) {
        int32_t both;
        memcpy(&both, destinations + i * kBf16Step + 2 * pair, sizeof(both));
        const __m512bh destination = (__m512bh)_mm512_set1_epi32(both);
        sum[i][0] = _mm512_dpbf16_ps(sum[i][0], low, destination);
        sum[i][1] = _mm512_dpbf16_ps(sum[i][1], high, destination);
      }
    }
    destinations += 2 * kTile;
    sources += 2 * kTile;
  }
}

// kRows destinations, of which the first is destination `first` of all, meet a block of sources.
inline void compare(const uint16_t* destinations, const uint16_t* sources, int64_t steps, const float* scale,
                    int64_t first, Best& best) {
  __m512 total[kRows][2];
  for (int64_t start = 0; start < steps; start += kRunSteps) {
    __m512 sum[kRows][2];
    for (auto& each : sum) each[0] = each[1] = _mm512_setzero_ps();
    multiply(destinations + start * 2 * kTile, sources + start * 2 * kTile,
             steps - start < kRunSteps ? steps - start : kRunSteps, sum);
    for (int64_t i = 0; i < kRows; ++i) {
      for (int half = 0; half < 2; ++half) {
        total[i][half] = start == 0 ? sum[i][half] : _mm512_add_ps(total[i][half], sum[i][half]);
      }
    }
  }
  for (int64_t i = 0; i < kRows; ++i) {
    const __m512 factor = _mm512_set1_ps(scale[i]);
    const __m512i position = _mm512_set1_epi32(static_cast<int>(first + i));
    best.meet(0, total[i][0], factor, position);
    best.meet(1, total[i][1], factor, position);
  }
}

void match(const uint16_t* sources, int64_t groups, const uint16_t* destinations, int64_t blocks, const float* scale,
           int64_t channels, float* best_value, int32_t* best_position) {
  const int64_t steps = (channels + kBf16Step - 1) / kBf16Step;
  const int64_t size = Bf16Kernel<BFloat16>::block_size(channels);
  Best best[kBf16Groups];
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t d = 0; d < kBf16Block; d += kRows) {
        compare(destinations + block * size + d / 16 * kTile + d % 16 * kBf16Step, sources + group * size, steps,
                scale + block * kBf16Block + d, block * kBf16Block + d, best[group]);
      }
    }
  }
  for (int64_t group = 0; group < groups; ++group) {
    best[group].store(best_value + group * kBf16Block, best_position + group * kBf16Block);
  }
}

}  // namespace

const Bf16Kernel<BFloat16>& bf16_kernel() {
  static constexpr Bf16Kernel<BFloat16> table = {pack_sources<BFloat16>, pack_destinations<BFloat16>, match, nullptr};
  return table;
}

}  // namespace bigain::vdpbf16
