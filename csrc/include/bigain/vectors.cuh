// 16 bytes of consecutive channels of a token: how the kernels read and write memory.
#pragma once

#include "bigain/numbers.cuh"

namespace bigain {

template <typename T>
constexpr int kVector = static_cast<int>(16 / sizeof(T));

// Consecutive channels of a token. Sums over channels are always made vector by vector, also where the memory does not
// allow vector accesses: their order does not depend on addresses.
//
// Words of 32 bits, which a load writes as they are, and values only where they are used: nvcc would take an array of
// 16-bit values apart as soon as it is loaded, and so wait for each load before it issues the next.
template <typename T>
struct alignas(16) Vector {
  uint32_t word[4];

  // Value i as float.
  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (std::is_same_v<T, float>) {
      return bits_float(word[i]);
    } else {
      return to_float(bits(i));
    }
  }
  __device__ __forceinline__ T bits(int i) const {
    if constexpr (std::is_same_v<T, float>) {
      return bits_float(word[i]);
    } else {
      return T{static_cast<uint16_t>(word[i / 2] >> i % 2 * 16)};
    }
  }
  // For a value that is zero so far.
  __device__ __forceinline__ void set(int i, T value) {
    if constexpr (std::is_same_v<T, float>) {
      word[i] = float_bits(value);
    } else {
      word[i / 2] |= static_cast<uint32_t>(value.bits) << i % 2 * 16;
    }
  }
};

// The values rounded to T.
template <typename T>
__device__ __forceinline__ Vector<T> to_vector(const float (&values)[kVector<T>]) {
  Vector<T> vector;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      vector.word[i] = float_bits(values[i]);
    } else {
      vector.word[i] = pair_from_floats<T>(values[2 * i], values[2 * i + 1]);
    }
  }
  return vector;
}

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

// What a load leaves where it is not wanted.
enum class Unwanted { kZero, kAnything };

// The kVector<T> values at p + c, zero from channel `channels` on; nothing is read unless `wanted`. kAligned promises
// what has_vectors asks.
template <bool kAligned, Unwanted kUnwanted = Unwanted::kZero, typename T>
__device__ __forceinline__ Vector<T> load_vector(const T* p, int64_t c, int64_t channels, bool wanted = true) {
  Vector<T> vector = {};
  if constexpr (kAligned) {
#ifdef BIGAIN_EMULATE
    if (kUnwanted == Unwanted::kAnything) memset(&vector, 0xff, 16);
    if (!wanted) return vector;
    if (reinterpret_cast<uintptr_t>(p + c) % 16 != 0) simt::trap();
    simt::count_load();
    memcpy(&vector, p + c, 16);
#else
    // In assembly, because nvcc would put a branch around a load that is not always wanted, and move loads to where
    // they are used.
#define BIGAIN_LOAD(words)                                                                                     \
  asm volatile(                                                                                                \
      "{\n.reg .pred wanted;\nsetp.ne.b32 wanted, %5, 0;\n@wanted ld.global.v4.b32 {%0, %1, %2, %3}, [%4];\n}" \
      : words(vector.word[0]), words(vector.word[1]), words(vector.word[2]), words(vector.word[3])             \
      : "l"(__cvta_generic_to_global(p + c)), "r"(static_cast<uint32_t>(wanted)))
    if constexpr (kUnwanted == Unwanted::kZero) {
      BIGAIN_LOAD("+r");
    } else {
      BIGAIN_LOAD("=r");
    }
#undef BIGAIN_LOAD
#endif
  } else {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      if (wanted && c + i < channels) vector.set(i, p[c + i]);
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
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(__cvta_generic_to_global(p + c)), "r"(vector.word[0]), "r"(vector.word[1]), "r"(vector.word[2]),
                   "r"(vector.word[3])
                 : "memory");
#endif
  } else {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      if (c + i < channels) p[c + i] = vector.bits(i);
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

}  // namespace bigain
