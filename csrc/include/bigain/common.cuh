// What the CUDA kernels share: launches, number types, 16-byte vectors, divisors, and sums over a warp.
//
// Nothing here knows torch. Compiled with -DBIGAIN_EMULATE by a C++ compiler, the same source runs on the CPU, in the
// emulator of csrc/emulate. To make both give the same bits, nothing contracts a * b + c unless the source says fmaf.
#pragma once

#include "bigain/divisor.cuh"
#include "bigain/launch.cuh"
#include "bigain/vectors.cuh"

namespace bigain {

// Sum over groups of `lanes` neighbouring lanes (a power of two), the same bits in every lane of a group: lanes half a
// group apart are added first, neighbours last. Every lane of the warp takes part.
__device__ __forceinline__ float group_sum(float value, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

// Sum over the lanes of a warp, the same bits in every lane.
__device__ __forceinline__ float warp_sum(float value) { return group_sum(value, kWarp); }

// The lanes that share the channels of a token in sums over channels: lane i adds vectors i, i + count(), ... in order,
// a vector at a time (tree_sum), then group_sum.
class Lanes {
 public:
  explicit Lanes(int bits) : bits_(bits) {}
  __host__ __device__ int count() const { return 1 << bits_; }
  __device__ int lane() const { return threadIdx.x & (count() - 1); }
  // The group of a thread in its block, and the groups of the blocks before, of `threads` threads each.
  __device__ unsigned group() const { return threadIdx.x >> bits_; }
  __device__ unsigned groups_before(unsigned threads) const { return blockIdx.x * (threads >> bits_); }

 private:
  int bits_;
};

// Eight lanes read 128 bytes, a cache line. The number depends on the shape and dtype alone, so the order of the sum
// does too.
template <typename T>
Lanes lanes_per_token(int64_t channels) {
  return Lanes(num_vectors<T>(channels) > 64 ? 5 : 3);
}

// Loads of a lane that are on their way before the first is used.
constexpr int kLoadsAhead = 4;

// Vectors v, v + lanes, ... of a token; those from `vectors` on are zero.
template <bool kAligned, typename T>
__device__ __forceinline__ void load_ahead(Vector<T> (&ahead)[kLoadsAhead], const T* token, int v, int vectors,
                                           int64_t channels, int lanes) {
#pragma unroll
  for (int i = 0; i < kLoadsAhead; ++i) {
    const int own = v + i * lanes;
    ahead[i] = load_vector<kAligned>(token, own * kVector<T>, channels, own < vectors);
  }
}

}  // namespace bigain
