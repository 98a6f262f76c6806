// What the CUDA kernels share: number types, 16-byte vectors, sums over a warp, and the one way to launch.
//
// Nothing here knows torch. Compiled with -DBIGAIN_EMULATE by a C++ compiler, the same source runs on the CPU, in the
// emulator of csrc/emulate. To make both give the same bits, nothing contracts a * b + c unless the source says fmaf.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef BIGAIN_EMULATE
#include "simt.h"
#else
#include <cuda_runtime.h>

// An array in shared memory.
#define BIGAIN_SHARED(type, name, count) __shared__ type name[count]
// The shared memory whose size the launch gives, aligned to a row of all banks.
#define BIGAIN_DYNAMIC_SHARED(type, name)                                 \
  extern __shared__ __align__(128) unsigned char bigain_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(bigain_dynamic_shared)
#endif

namespace bigain {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
// Blocks in y and z of a grid; x takes 2^31 - 1.
constexpr int64_t kMaxGridYZ = 65535;

// ---- launch ----------------------------------------------------------------------------------------------------

#ifndef BIGAIN_EMULATE
// Raises what a call of the CUDA runtime reports.
inline void check_cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // a later call must not report it again
  throw std::runtime_error(std::string("bigain CUDA kernel: ") + cudaGetErrorString(error));
}
#endif

// Runs kernel(args...) on `grid` blocks of `block` threads with `shared_bytes` of dynamic shared memory. An empty grid
// is no launch. Raises when the launch itself is refused; does not wait for the kernel.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#ifdef BIGAIN_EMULATE
  (void)stream;
  simt::launch(kernel, grid, block, shared_bytes, static_cast<Parameters>(arguments)...);
#else
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (shared_bytes > kWithoutAsking) {
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)));
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
#endif
}

// A grid extent. Raises when the count does not fit.
inline unsigned grid_extent(int64_t count, int64_t limit = 2147483647) {
  if (count < 0 || count > limit) {
    throw std::invalid_argument("bigain CUDA kernel: got " + std::to_string(count) + " blocks, expected at most " +
                                std::to_string(limit));
  }
  return static_cast<unsigned>(count);
}

// A size that kernels keep in 32 bits, where a division costs a fraction of one in 64. Raises when it does not fit.
inline int to_int(int64_t size) { return static_cast<int>(grid_extent(size)); }

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- numbers ---------------------------------------------------------------------------------------------------

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

__device__ __forceinline__ uint32_t float_bits(float value) {
#ifdef BIGAIN_EMULATE
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
#else
  return __float_as_uint(value);
#endif
}

__device__ __forceinline__ float bits_float(uint32_t bits) {
#ifdef BIGAIN_EMULATE
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
#else
  return __uint_as_float(bits);
#endif
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(BFloat16 value) {
  return bits_float(static_cast<uint32_t>(value.bits) << 16);
}
__device__ __forceinline__ float to_float(Half value) {
#ifdef BIGAIN_EMULATE
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  // The exponent moves from bias 15 to bias 127; infinities and NaN keep an exponent of all ones.
  const uint32_t shifted = (magnitude << 13) + (112u << 23);
  const uint32_t normal = magnitude >= 0x7c00u ? shifted | 0x7f800000u : shifted;
  const uint32_t subnormal = float_bits(static_cast<float>(magnitude) * 0x1p-24f);
  return bits_float(sign | (magnitude < 0x0400u ? subnormal : normal));
#else
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#endif
}

// from_float<T>(value): to the nearest, ties to even.
template <typename T>
__device__ __forceinline__ T from_float(float value);

template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float value) {
#ifdef BIGAIN_EMULATE
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return {static_cast<uint16_t>(value != value ? 0x7fffu : rounded)};
#else
  BFloat16 narrow;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
  return narrow;
#endif
}
template <>
__device__ __forceinline__ Half from_float<Half>(float value) {
#ifdef BIGAIN_EMULATE
  const uint32_t bits = float_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // Below 2^-14 the unit in the last place is 2^-24, which is that of 0.5 in float: the addition rounds.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
  uint32_t rounded = magnitude < 113u << 23 ? subnormal : normal;
  rounded = magnitude >= 143u << 23 ? 0x7c00u : rounded;
  // All NaN become this one, as on the device.
  if (magnitude > 0x7f800000u) return {0x7fffu};
  return {static_cast<uint16_t>((bits >> 16 & 0x8000u) | rounded)};
#else
  Half narrow;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
  return narrow;
#endif
}

__device__ __forceinline__ bool is_nan(float value) { return value != value; }

// What matching multiplies a token with: 1 / norm, or 0 for a token without a direction (zero, NaN, or a norm that
// overflows).
__device__ __forceinline__ float inverse_norm(float sum_of_squares) {
  const float norm = sqrtf(sum_of_squares);
  return norm > 0.0f && norm < bits_float(0x7f800000u) ? 1.0f / norm : 0.0f;
}

// ---- 16-byte vectors -------------------------------------------------------------------------------------------

template <typename T>
constexpr int kVector = static_cast<int>(16 / sizeof(T));

// Consecutive channels of a token. Sums over channels are always made vector by vector, also where the memory does not
// allow vector accesses: their order does not depend on addresses.
template <typename T>
struct alignas(16) Vector {
  T value[kVector<T>];
};

// Whether all rows of a tensor can be read in whole vectors.
template <typename T>
bool has_vectors(const void* pointer, int64_t channels, int64_t batch_stride, int64_t token_stride) {
  constexpr int64_t v = kVector<T>;
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && channels % v == 0 && batch_stride % v == 0 &&
         token_stride % v == 0;
}

template <typename T>
__host__ __device__ constexpr int64_t num_vectors(int64_t channels) {
  return ceil_div(channels, kVector<T>);
}

// The kVector<T> values at p + c, zero from channel `channels` on. kAligned promises what has_vectors asks.
template <bool kAligned, typename T>
__device__ __forceinline__ Vector<T> load_vector(const T* p, int64_t c, int64_t channels) {
  Vector<T> vector;
  if constexpr (kAligned) {
#ifdef BIGAIN_EMULATE
    if (reinterpret_cast<uintptr_t>(p + c) % 16 != 0) simt::trap();
    memcpy(&vector, p + c, 16);
#else
    *reinterpret_cast<uint4*>(&vector) = *reinterpret_cast<const uint4*>(p + c);
#endif
  } else {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      vector.value[i] = c + i < channels ? p[c + i] : T{};
    }
  }
  return vector;
}

template <bool kAligned, typename T>
__device__ __forceinline__ void store_vector(T* p, int64_t c, int64_t channels, const Vector<T>& vector) {
  if constexpr (kAligned) {
#ifdef BIGAIN_EMULATE
    if (reinterpret_cast<uintptr_t>(p + c) % 16 != 0) simt::trap();
    memcpy(p + c, &vector, 16);
#else
    // In assembly, because nvcc splits the store of four floats that divisions have left apart.
    const uint4 bits = *reinterpret_cast<const uint4*>(&vector);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(__cvta_generic_to_global(p + c)), "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
                 : "memory");
#endif
  } else {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      if (c + i < channels) p[c + i] = vector.value[i];
    }
  }
}

// Sum of kCount values, a power of two: neighbours are added, then neighbours of the sums, and so on. Overwrites them.
template <int kCount>
__device__ __forceinline__ float tree_sum_of(float* values) {
  if constexpr (kCount == 1) {
    return values[0];
  } else {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) values[i] = values[2 * i] + values[2 * i + 1];
    return tree_sum_of<kCount / 2>(values);
  }
}
template <int kCount>
__device__ __forceinline__ float tree_sum(float (&values)[kCount]) {
  return tree_sum_of<kCount>(values);
}

// ---- warps -----------------------------------------------------------------------------------------------------

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

// Lanes that share the channels of a token in sums over channels: lane i adds vectors i, i + lanes, ... in order, a
// vector at a time (tree_sum), then group_sum. Eight lanes read 128 bytes, a cache line. The number depends on
// the shape and dtype alone, so the order of the sum does too.
template <typename T>
int lanes_per_token(int64_t channels) {
  return num_vectors<T>(channels) > 64 ? kWarp : 8;
}

}  // namespace bigain
