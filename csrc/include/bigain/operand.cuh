// Operands that a kernel reads in the type of its tokens or in float, as they come: converting them first would be a
// launch of its own.
#pragma once

#include "bigain/common.cuh"

namespace bigain {

// Values of type T, of float, or none.
enum class Operand { kNone, kSame, kWide };

// kVector<T> values of an operand of type T or float, as float.
template <bool kAligned, typename T>
__device__ __forceinline__ void load_operand(const void* operand, Operand kind, int64_t offset, int64_t c,
                                             int64_t channels, float (&out)[kVector<T>]) {
  if (kind == Operand::kSame) {
    const Vector<T> values = load_vector<kAligned>(static_cast<const T*>(operand) + offset, c, channels);
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) out[k] = to_float(values.value[k]);
  } else {
#pragma unroll
    for (int k = 0; k < kVector<T>; k += kVector<float>) {
      const Vector<float> values = load_vector<kAligned>(static_cast<const float*>(operand) + offset, c + k, channels);
#pragma unroll
      for (int i = 0; i < kVector<float>; ++i) out[k + i] = values.value[i];
    }
  }
}

// Whether load_operand<true, T> may read all rows of an operand.
template <typename T>
bool operand_has_vectors(const void* operand, Operand kind, int64_t channels, int64_t batch_stride,
                         int64_t token_stride) {
  if (kind == Operand::kNone) return true;
  return kind == Operand::kSame ? has_vectors<T>(operand, channels, batch_stride, token_stride)
                                : has_vectors<float>(operand, channels, batch_stride, token_stride);
}

}  // namespace bigain
