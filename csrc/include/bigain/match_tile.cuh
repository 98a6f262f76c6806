// Tiles of gathered rows in shared memory, and their product on the tensor cores: what bipartite_match.cuh is made of.
#pragma once

#include <type_traits>

#include "bigain/mma.cuh"

namespace bigain::match {

constexpr int kStages = 3;
constexpr int kChunks = 8;               // of 16 bytes, in a row of a tile in shared memory
constexpr int kRowBytes = 16 * kChunks;  // also a whole cache line
constexpr int kSubSteps = 4;             // mma along a row
template <typename T>
constexpr int kBlockK = kRowBytes / sizeof(T);
// Steps along the channels after which the accumulators of the tensor cores are added to the sums.
template <typename T>
constexpr int kStepsInCore = sizeof(T) == 4 ? 1 : 4;

template <int kSources, int kDestinations, int kWarpsM_, int kWarpsN_>
struct Tile {
  static constexpr int kM = kSources, kN = kDestinations, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kThreads = kWarp * kWarpsM * kWarpsN;
  static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;  // what a warp owns
  static constexpr int kTilesM = kWarpM / 16, kTilesN = kWarpN / 8;   // in mma
  static constexpr int kRowsOfThread = 2 * kTilesM;
  static constexpr int kBytesM = kM * kRowBytes, kBytesN = kN * kRowBytes;  // of one step along the channels
  static_assert(kThreads >= kM && kThreads >= kN && kTilesN % 2 == 0, "one thread per row, ldmatrix of 16 columns");
};
template <typename T>
struct LargeTile : Tile<128, 128, 2, 4> {};
// Twice the fragments: each number is two TF32 numbers.
template <>
struct LargeTile<float> : Tile<128, 64, 4, 2> {};
struct SmallTile : Tile<64, 64, 2, 2> {};

// Byte offset of a 16-byte chunk of a row. The eight rows of a chunk, which ldmatrix reads at once, lie in different
// banks, and so do the eight chunks of a row.
__device__ __forceinline__ int swizzled(int row, int chunk) { return row * kRowBytes + (chunk ^ (row & 7)) * 16; }

// Where a token begins: in 16-byte vectors, whose 32 bits reach 64 GiB, or in elements.
template <bool kAligned>
using RowOffset = std::conditional_t<kAligned, uint32_t, int64_t>;

template <bool kAligned>
__device__ __forceinline__ RowOffset<kAligned> row_offset(int token, int64_t vectors_or_elements) {
  return static_cast<RowOffset<kAligned>>(token) * static_cast<RowOffset<kAligned>>(vectors_or_elements);
}

// A chunk of the row at `offset` from channel c on, `left` values of it; zeros for the rest.
template <bool kAligned, typename T>
__device__ __forceinline__ void copy_chunk(unsigned char* shared, const T* x, RowOffset<kAligned> offset, int c,
                                           int left) {
  if constexpr (kAligned) {
    copy_async_16(shared, reinterpret_cast<const uint4*>(x + c) + offset, left * static_cast<int>(sizeof(T)));
  } else {
    *reinterpret_cast<Vector<T>*>(shared) = load_vector<false>(x + offset + c, 0, left);
  }
}

// One step along the channels: `core` += sources (kM, 128 bytes) times destinations (kN, 128 bytes) transposed.
// first_m and first_n are where the part of this warp begins.
template <typename T, typename Shape>
__device__ __forceinline__ void multiply(float (&core)[Shape::kTilesM][Shape::kTilesN][4], const unsigned char* sources,
                                         const unsigned char* destinations, int first_m, int first_n, int lane) {
  // Matrices of A: rows 0-7 and 8-15, then the same of the next chunk. Of B: two chunks, then 8 columns on. Rows 16
  // apart are swizzled alike, and two chunks on is one bit of the offset.
  const int at_a = swizzled(first_m + lane % 16, lane / 16);
  const int at_b = swizzled(first_n + lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (int k = 0; k < kSubSteps; ++k) {
    uint32_t a[Shape::kTilesM][4], b[Shape::kTilesN / 2][4];
#pragma unroll
    for (int i = 0; i < Shape::kTilesM; ++i) {
      load_matrix_x4(a[i], sources + (at_a ^ 32 * k) + i * 16 * kRowBytes);
    }
#pragma unroll
    for (int j = 0; j < Shape::kTilesN / 2; ++j) {
      load_matrix_x4(b[j], destinations + (at_b ^ 32 * k) + j * 16 * kRowBytes);
    }
    if constexpr (sizeof(T) == 4) {
      uint32_t a_low[Shape::kTilesM][4], b_low[Shape::kTilesN / 2][4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
#pragma unroll
        for (int i = 0; i < Shape::kTilesM; ++i) split_tf32(a[i][e], a[i][e], a_low[i][e]);
#pragma unroll
        for (int j = 0; j < Shape::kTilesN / 2; ++j) split_tf32(b[j][e], b[j][e], b_low[j][e]);
      }
      // The small products first. That of the two low parts is below 2^-22 of the whole.
#pragma unroll
      for (int i = 0; i < Shape::kTilesM; ++i) {
#pragma unroll
        for (int j = 0; j < Shape::kTilesN; ++j) {
          mma<T>(core[i][j], a_low[i], {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]});
          mma<T>(core[i][j], a[i], {b_low[j / 2][j % 2 * 2], b_low[j / 2][j % 2 * 2 + 1]});
        }
      }
    }
#pragma unroll
    for (int i = 0; i < Shape::kTilesM; ++i) {
#pragma unroll
      for (int j = 0; j < Shape::kTilesN; ++j) {
        mma<T>(core[i][j], a[i], {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]});
      }
    }
  }
}

}  // namespace bigain::match
