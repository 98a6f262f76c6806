// Operands that a kernel reads in the type of its tokens or in float, as they come: converting them first would be a
// launch of its own.
#pragma once

#include "bigain/common.cuh"

namespace bigain {

// Values of type T, of float, or none.
enum class Operand { kNone, kSame, kWide };

// kVector<T> values of an operand as they lie in memory: loading takes nothing apart, so that the next load need not
// wait for it.
template <typename T>
struct RawOperand {
  static constexpr int kParts = kVector<T> / kVector<float>;
  uint32_t word[4 * kParts] = {};

  template <bool kAligned>
  __device__ __forceinline__ void load(const void* operand, Operand kind, int64_t offset, int64_t c, int64_t channels) {
    if (kind == Operand::kSame) {
      const Vector<T> vector = load_vector<kAligned>(static_cast<const T*>(operand) + offset, c, channels);
#pragma unroll
      for (int i = 0; i < 4; ++i) word[i] = vector.word[i];
    } else if (kind == Operand::kWide) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const Vector<float> vector =
            load_vector<kAligned>(static_cast<const float*>(operand) + offset, c + part * kVector<float>, channels);
#pragma unroll
        for (int i = 0; i < 4; ++i) word[4 * part + i] = vector.word[i];
      }
    }
  }

  // As float; the operand is there.
  __device__ __forceinline__ void widen(Operand kind, float (&out)[kVector<T>]) const {
    if (kind == Operand::kSame) {
      const Vector<T> vector = {{word[0], word[1], word[2], word[3]}};
#pragma unroll
      for (int k = 0; k < kVector<T>; ++k) out[k] = vector[k];
    } else {
#pragma unroll
      for (int k = 0; k < kVector<T>; ++k) out[k] = bits_float(word[k]);
    }
  }
};

// Whether RawOperand<T>::load<true> may read all rows of an operand.
template <typename T>
bool operand_has_vectors(const void* operand, Operand kind, int64_t channels, int64_t batch_stride,
                         int64_t token_stride) {
  if (kind == Operand::kNone) return true;
  return kind == Operand::kSame ? has_vectors<T>(operand, channels, batch_stride, token_stride)
                                : has_vectors<float>(operand, channels, batch_stride, token_stride);
}

}  // namespace bigain
