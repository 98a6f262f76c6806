// LayerNorm over the channels of tokens, for a merge that normalizes tokens as it reads them: the statistics of every
// token, a launch of their own, and the affine parts, which a merge applies once to each mean.
#pragma once

#include "bigain/common.cuh"
#include "bigain/operand.cuh"

namespace bigain {

constexpr int kRowMomentsThreads = 128;

struct alignas(8) Moments {
  float mean;
  float inverse;  // 1 / sqrt(variance + eps)
};

template <typename T>
struct RowMoments {
  const T* x;  // (rows, tokens, channels), unit stride in channels
  int64_t batch_stride, token_stride;
  int64_t rows, tokens, channels;
  float eps;
  Moments* moments;  // (rows, tokens)
};

// `lanes` lanes own a token; see lanes_per_token for the order of the sums. The second read of a token comes from the
// cache: squares of deviations do not cancel as E[x^2] - E[x]^2 does.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kRowMomentsThreads) row_moments_kernel(const RowMoments<T> p, const int lanes) {
  const int64_t row = blockIdx.x * static_cast<int64_t>(kRowMomentsThreads / lanes) + threadIdx.x / lanes;
  const bool exists = row < p.rows * p.tokens;
  const int lane = threadIdx.x % lanes;
  const T* const token = exists ? p.x + row / p.tokens * p.batch_stride + row % p.tokens * p.token_stride : p.x;
  const int64_t vectors = exists ? num_vectors<T>(p.channels) : 0;
  const float count = static_cast<float>(p.channels);
  float values[kVector<T>];
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t v = lane; v < vectors; v += lanes) {
    const Vector<T> vector = load_vector<kAligned>(token, v * kVector<T>, p.channels);
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) values[k] = to_float(vector.value[k]);
    sum += tree_sum(values);
  }
  const float mean = group_sum(sum, lanes) / count;
  float squares = 0.0f;
#pragma unroll 4
  for (int64_t v = lane; v < vectors; v += lanes) {
    const int64_t c = v * kVector<T>;
    const Vector<T> vector = load_vector<kAligned>(token, c, p.channels);
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) {
      const float deviation = to_float(vector.value[k]) - mean;
      values[k] = kAligned || c + k < p.channels ? deviation * deviation : 0.0f;
    }
    squares += tree_sum(values);
  }
  const float variance = group_sum(squares, lanes) / count;
  if (exists && lane == 0) p.moments[row] = {mean, 1.0f / sqrtf(variance + p.eps)};
}

// One launch.
template <typename T>
void launch_row_moments(const RowMoments<T>& p, cudaStream_t stream) {
  const int lanes = lanes_per_token<T>(p.channels);
  const unsigned blocks = grid_extent(ceil_div(p.rows * p.tokens, kRowMomentsThreads / lanes));
  const bool aligned = has_vectors<T>(p.x, p.channels, p.batch_stride, p.token_stride);
  launch(aligned ? row_moments_kernel<T, true> : row_moments_kernel<T, false>, blocks, kRowMomentsThreads, 0, stream, p,
         lanes);
}

// A row of channels for each batch element, or, with stride 0, one for all.
struct ChannelRows {
  const void* data;
  Operand kind;
  int64_t batch_stride;
};

// The affine part of a LayerNorm and that of adaLN; the operands of a pair are both there or both not.
struct NormAffine {
  ChannelRows norm_weight, norm_bias, scale, shift;
};

// (value * norm_weight + norm_bias) * (1 + scale) + shift, for kVector<T> channels from c on.
template <bool kAligned, typename T>
__device__ __forceinline__ void apply_affine(const NormAffine& p, int b, int64_t c, int64_t channels,
                                             float (&values)[kVector<T>]) {
  float factor[kVector<T>], offset[kVector<T>];
  if (p.norm_weight.kind != Operand::kNone) {
    load_operand<kAligned, T>(p.norm_weight.data, p.norm_weight.kind, b * p.norm_weight.batch_stride, c, channels,
                              factor);
    load_operand<kAligned, T>(p.norm_bias.data, p.norm_bias.kind, b * p.norm_bias.batch_stride, c, channels, offset);
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) values[k] = values[k] * factor[k] + offset[k];
  }
  if (p.scale.kind != Operand::kNone) {
    load_operand<kAligned, T>(p.scale.data, p.scale.kind, b * p.scale.batch_stride, c, channels, factor);
    load_operand<kAligned, T>(p.shift.data, p.shift.kind, b * p.shift.batch_stride, c, channels, offset);
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) values[k] = values[k] * (1.0f + factor[k]) + offset[k];
  }
}

// Whether apply_affine<true, T> may be used.
template <typename T>
bool affine_has_vectors(const NormAffine& p, int64_t channels) {
  bool all = true;
  for (const ChannelRows& rows : {p.norm_weight, p.norm_bias, p.scale, p.shift}) {
    all = all && operand_has_vectors<T>(rows.data, rows.kind, channels, rows.batch_stride, 0);
  }
  return all;
}

}  // namespace bigain
