// Matching as a blocked matrix product that keeps only the best of each row. build_native.py compiles this file once
// per instruction set, with BIGAIN_ISA naming the namespace; isa.cpp chooses one.
//
// A tile of kRows sources times one panel of destinations lives in registers. When its sum over channels is complete,
// it is compared with the best so far and forgotten, so no similarity is ever stored. Every similarity is summed over
// the channels in the same order wherever its source stands in a tile: results depend on neither batch nor threads.
#include "match_kernel.h"

#include <limits>

namespace bigain::BIGAIN_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRows = 8, kVectors = 3;  // 24 of 32 registers hold the tile
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kRows = 4, kVectors = 3;  // 12 of 16
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kRows = 8, kVectors = 2;  // 16 of 32
#else
constexpr int kVectorBytes = 16, kRows = 4, kVectors = 2;  // 8 of 16
#endif
static_assert(kMatchRows % kRows == 0);

// Sums run over this many channels before they are added to the total: the rounding error of a long sum of equal signs
// grows with the length of the run, not of the whole.
constexpr int64_t kRun = 64;

// Vector of A and the integers that its comparisons give; the loads are of any alignment.
template <typename A>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Index __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};
template <>
struct Lanes<double> {
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Index __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};

template <typename A>
struct Tile {
  using Vector = typename Lanes<A>::Vector;
  using Index = typename Lanes<A>::Index;
  static constexpr int64_t kLanes = kVectorBytes / sizeof(A);
  static constexpr int64_t kWidth = kVectors * kLanes;

  // Best of each lane for one source: lane l has seen destinations l, l + kLanes, l + 2 kLanes, ...
  struct Best {
    Vector value;
    Index position;
  };

  static Vector load(const A* from) { return *reinterpret_cast<const typename Lanes<A>::Unaligned*>(from); }

  // Compares kRows sources with the destinations first, ..., first + kUsed * kLanes - 1 of one panel (channels,
  // kWidth).
  template <int kUsed>
  static void compare(const A* const* rows, const A* panel, const A* bias, int64_t channels, int64_t first,
                      Best* best) {
    Vector total[kRows][kUsed] = {};
    for (int64_t start = 0; start < channels; start += kRun) {
      const int64_t end = channels - start < kRun ? channels : start + kRun;
      Vector sum[kRows][kUsed] = {};
      for (int64_t c = start; c < end; ++c) {
        Vector destination[kUsed];
        for (int v = 0; v < kUsed; ++v) {
          destination[v] = load(panel + c * kWidth + v * kLanes);
        }
        for (int i = 0; i < kRows; ++i) {
          for (int v = 0; v < kUsed; ++v) {
            sum[i][v] += rows[i][c] * destination[v];
          }
        }
      }
      for (int i = 0; i < kRows; ++i) {
        for (int v = 0; v < kUsed; ++v) {
          total[i][v] += sum[i][v];
        }
      }
    }
    for (int v = 0; v < kUsed; ++v) {
      const Vector offset = load(bias + v * kLanes);
      Index position;
      for (int64_t l = 0; l < kLanes; ++l) {
        position[l] = first + v * kLanes + l;
      }
      for (int i = 0; i < kRows; ++i) {
        const Vector similarity = total[i][v] + offset;
        // Strictly greater: the first of equal destinations stays. False for NaN.
        const Index better = similarity > best[i].value;
        best[i].value = better ? similarity : best[i].value;
        best[i].position = better ? position : best[i].position;
      }
    }
  }

  static void match(const A* const* rows, int64_t count, const A* panels, const A* bias, int64_t num_destinations,
                    int64_t channels, A* best_value, int32_t* best_position) {
    constexpr A kLowest = -std::numeric_limits<A>::infinity();
    // The last tile is filled up with its last source, whose results are the same each time.
    const A* padded[kMatchRows];
    Best best[kMatchRows];
    const int64_t filled = (count + kRows - 1) / kRows * kRows;
    for (int64_t i = 0; i < filled; ++i) {
      padded[i] = rows[i < count ? i : count - 1];
      best[i] = Best{Vector{} + kLowest, Index{}};
    }
    for (int64_t first = 0; first < num_destinations; first += kWidth) {
      // Vectors of the last panel that hold no destination are left out.
      const int64_t vectors = (num_destinations - first + kLanes - 1) / kLanes;
      const auto compare_some = vectors >= kVectors ? compare<kVectors> : vectors == 2 ? compare<2> : compare<1>;
      for (int64_t i = 0; i < filled; i += kRows) {
        compare_some(padded + i, panels + first * channels, bias + first, channels, first, best + i);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      A value = kLowest;
      int64_t position = 0;
      for (int64_t l = 0; l < kLanes; ++l) {
        const A other = best[i].value[l];
        const int64_t at = best[i].position[l];
        if (other > value || (other == value && other != kLowest && at < position)) {
          value = other;
          position = at;
        }
      }
      best_value[i] = value;
      best_position[i] = static_cast<int32_t>(position);
    }
  }

  static void pack(const A* rows, int64_t count, int64_t channels, A* panel) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t j = 0; j < kWidth; ++j) {
        panel[c * kWidth + j] = j < count ? rows[j * channels + c] : A(0);
      }
    }
  }
};

}  // namespace

template <typename A>
const MatchKernel<A>& match_kernel() {
  static constexpr MatchKernel<A> table = {Tile<A>::kWidth, Tile<A>::pack, Tile<A>::match};
  return table;
}

template const MatchKernel<float>& match_kernel<float>();
template const MatchKernel<double>& match_kernel<double>();

}  // namespace bigain::BIGAIN_ISA
