// What the lanes of a warp compute together. Fragment layouts: PTX ISA, "Matrix fragments for mma.m16n8k16",
// "... for mma.m16n8k8" and "ldmatrix".
#include <string>

#include "../cpu/numbers.h"
#include "simt.h"

namespace bigain::simt {
namespace {

float low_half(uint32_t word, Half) { return widen(Half{static_cast<uint16_t>(word)}); }
float low_half(uint32_t word, BFloat16) { return widen(BFloat16{static_cast<uint16_t>(word)}); }

// A tensor core reads the upper 19 bits of a float32.
float as_tf32(uint32_t word) { return bits_float(word & 0xffffe000u); }

void require_all(Mma* const lanes[kWarp]) {
  for (int i = 0; i < kWarp; ++i) {
    if (lanes[i] == nullptr) throw std::runtime_error("mma without lane " + std::to_string(i));
  }
}

// Truncated to float32, as tensor cores do: the errors of a long sum do not cancel.
float toward_zero(double value) {
  const float nearest = static_cast<float>(value);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(value) ? std::nextafter(nearest, 0.0f) : nearest;
}

// Fills c from a (16, depth) and b (8, depth). The products and their sum are made in float64.
template <int depth>
void multiply(Mma* const lanes[kWarp], const float (&a)[16][depth], const float (&b)[8][depth]) {
  for (int i = 0; i < kWarp; ++i) {
    const int group = i / 4, pair = i % 4 * 2;
    for (int j = 0; j < 4; ++j) {
      const int row = group + j / 2 * 8, column = pair + j % 2;
      double sum = lanes[i]->c[j];
      for (int k = 0; k < depth; ++k) {
        sum += static_cast<double>(a[row][k]) * static_cast<double>(b[column][k]);
      }
      lanes[i]->c[j] = toward_zero(sum);
    }
  }
}

template <typename T>
void mma_16x8x16(Mma* const lanes[kWarp]) {
  require_all(lanes);
  float a[16][16], b[8][16];
  for (int i = 0; i < kWarp; ++i) {
    const int group = i / 4, pair = i % 4 * 2;
    for (int e = 0; e < 2; ++e) {
      for (int j = 0; j < 4; ++j) {
        a[group + j % 2 * 8][pair + e + j / 2 * 8] = low_half(lanes[i]->a[j] >> 16 * e, T{});
      }
      for (int j = 0; j < 2; ++j) {
        b[group][pair + e + j * 8] = low_half(lanes[i]->b[j] >> 16 * e, T{});
      }
    }
  }
  multiply(lanes, a, b);
}

}  // namespace

void resolve_shuffle(Shuffle* const lanes[kWarp]) {
  for (int i = 0; i < kWarp; ++i) {
    if (lanes[i] == nullptr) continue;
    const int source = lanes[i]->source;
    if (lanes[source] == nullptr) {
      throw std::runtime_error("a shuffle reads lane " + std::to_string(source) + ", which is not in the mask");
    }
    lanes[i]->result = lanes[source]->value;
  }
}

void resolve_ballot(Vote* const lanes[kWarp]) {
  int64_t ballot = 0;
  for (int i = 0; i < kWarp; ++i) {
    if (lanes[i] != nullptr && lanes[i]->value != 0) ballot |= int64_t{1} << i;
  }
  for (int i = 0; i < kWarp; ++i) {
    if (lanes[i] != nullptr) lanes[i]->result = ballot;
  }
}

void resolve_match(Vote* const lanes[kWarp]) {
  for (int i = 0; i < kWarp; ++i) {
    if (lanes[i] == nullptr) continue;
    lanes[i]->result = 0;
    for (int j = 0; j < kWarp; ++j) {
      if (lanes[j] != nullptr && lanes[j]->value == lanes[i]->value) lanes[i]->result |= int64_t{1} << j;
    }
  }
}

void resolve_add(Vote* const lanes[kWarp]) {
  int64_t sum = 0;
  for (int i = 0; i < kWarp; ++i) {
    if (lanes[i] != nullptr) sum += lanes[i]->value;
  }
  for (int i = 0; i < kWarp; ++i) {
    if (lanes[i] != nullptr) lanes[i]->result = sum;
  }
}

void resolve_load_matrix(LoadMatrix* const lanes[kWarp]) {
  for (int i = 0; i < kWarp; ++i) {
    if (lanes[i] == nullptr) throw std::runtime_error("ldmatrix without lane " + std::to_string(i));
    if (reinterpret_cast<uintptr_t>(lanes[i]->row) % 16 != 0) throw std::runtime_error("ldmatrix: a row not aligned");
  }
  for (int i = 0; i < kWarp; ++i) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const auto* const row = static_cast<const unsigned char*>(lanes[matrix * 8 + i / 4]->row);
      memcpy(&lanes[i]->result[matrix], row + i % 4 * 4, 4);
    }
  }
}

void resolve_mma_16x8x16_half(Mma* const lanes[kWarp]) { mma_16x8x16<Half>(lanes); }
void resolve_mma_16x8x16_bfloat16(Mma* const lanes[kWarp]) { mma_16x8x16<BFloat16>(lanes); }

void resolve_mma_16x8x8_tf32(Mma* const lanes[kWarp]) {
  require_all(lanes);
  float a[16][8], b[8][8];
  for (int i = 0; i < kWarp; ++i) {
    const int group = i / 4, column = i % 4;
    for (int j = 0; j < 4; ++j) {
      a[group + j % 2 * 8][column + j / 2 * 4] = as_tf32(lanes[i]->a[j]);
    }
    for (int j = 0; j < 2; ++j) {
      b[group][column + j * 4] = as_tf32(lanes[i]->b[j]);
    }
  }
  multiply(lanes, a, b);
}

}  // namespace bigain::simt
