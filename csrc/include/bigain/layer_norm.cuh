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
  int64_t rows, tokens, channels;  // rows * tokens below 2^31
  float eps;
  Moments* moments;  // (rows, tokens)
};

// A group of lanes owns a token; see Lanes for the order of the sums. The second read of a token comes from the
// cache: squares of deviations do not cancel as E[x^2] - E[x]^2 does.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kRowMomentsThreads)
    row_moments_kernel(const RowMoments<T> p, const Lanes lanes, const Divisor by_tokens) {
  const unsigned row = lanes.groups_before(kRowMomentsThreads) + lanes.group();
  const bool exists = row < p.rows * p.tokens;
  unsigned b = row;
  const unsigned n = by_tokens.take(b);
  const T* const token = p.x + b * p.batch_stride + n * p.token_stride;
  const int vectors = exists ? static_cast<int>(num_vectors<T>(p.channels)) : 0, step = lanes.count();
  const float count = static_cast<float>(p.channels);
  follow_launches();
  Vector<T> ahead[kLoadsAhead];
  float values[kVector<T>];
  float sum = 0.0f;
#pragma unroll 1
  for (int v = lanes.lane(); v < vectors; v += kLoadsAhead * step) {
    load_ahead<kAligned>(ahead, token, v, vectors, p.channels, step);
#pragma unroll
    for (int i = 0; i < kLoadsAhead; ++i) {
#pragma unroll
      for (int k = 0; k < kVector<T>; ++k) values[k] = ahead[i][k];
      if (v + i * step < vectors) sum += tree_sum(values);
    }
  }
  const float mean = group_sum(sum, step) / count;
  float squares = 0.0f;
#pragma unroll 1
  for (int v = lanes.lane(); v < vectors; v += kLoadsAhead * step) {
    load_ahead<kAligned>(ahead, token, v, vectors, p.channels, step);
#pragma unroll
    for (int i = 0; i < kLoadsAhead; ++i) {
      const int c = (v + i * step) * kVector<T>;
#pragma unroll
      for (int k = 0; k < kVector<T>; ++k) {
        const float deviation = ahead[i][k] - mean;
        values[k] = kAligned || c + k < p.channels ? deviation * deviation : 0.0f;
      }
      if (v + i * step < vectors) squares += tree_sum(values);
    }
  }
  const float variance = group_sum(squares, step) / count;
  if (exists && lanes.lane() == 0) p.moments[row] = {mean, 1.0f / sqrtf(variance + p.eps)};
}

// One launch.
template <typename T>
void launch_row_moments(const RowMoments<T>& p, cudaStream_t stream) {
  const Lanes lanes = lanes_per_token<T>(p.channels);
  const unsigned blocks = grid_extent(ceil_div(to_int(p.rows * p.tokens), kRowMomentsThreads / lanes.count()));
  const bool aligned = has_vectors<T>(p.x, p.channels, p.batch_stride, p.token_stride);
  launch(aligned ? row_moments_kernel<T, true> : row_moments_kernel<T, false>, blocks, kRowMomentsThreads, 0, stream, p,
         lanes, Divisor(p.tokens));
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

// kVector<T> channels of the four, as they lie in memory.
template <typename T>
struct RawAffine {
  RawOperand<T> norm_weight, norm_bias, scale, shift;

  // Channels from c on of batch element b.
  template <bool kAligned>
  __device__ __forceinline__ void load(const NormAffine& p, int b, int64_t c, int64_t channels) {
    const auto load_row = [&](RawOperand<T>& raw, const ChannelRows& rows) {
      raw.template load<kAligned>(rows.data, rows.kind, b * rows.batch_stride, c, channels);
    };
    load_row(norm_weight, p.norm_weight);
    load_row(norm_bias, p.norm_bias);
    load_row(scale, p.scale);
    load_row(shift, p.shift);
  }

  // (value * norm_weight + norm_bias) * (1 + scale) + shift.
  __device__ __forceinline__ void apply(const NormAffine& p, float (&values)[kVector<T>]) const {
    float factor[kVector<T>], offset[kVector<T>];
    if (p.norm_weight.kind != Operand::kNone) {
      norm_weight.widen(p.norm_weight.kind, factor);
      norm_bias.widen(p.norm_bias.kind, offset);
#pragma unroll
      for (int k = 0; k < kVector<T>; ++k) values[k] = values[k] * factor[k] + offset[k];
    }
    if (p.scale.kind != Operand::kNone) {
      scale.widen(p.scale.kind, factor);
      shift.widen(p.shift.kind, offset);
#pragma unroll
      for (int k = 0; k < kVector<T>; ++k) values[k] = values[k] * (1.0f + factor[k]) + offset[k];
    }
  }
};

// Whether RawAffine<T>::load<true> may be used.
template <typename T>
bool affine_has_vectors(const NormAffine& p, int64_t channels) {
  bool all = true;
  for (const ChannelRows& rows : {p.norm_weight, p.norm_bias, p.scale, p.shift}) {
    all = all && operand_has_vectors<T>(rows.data, rows.kind, channels, rows.batch_stride, 0);
  }
  return all;
}

}  // namespace bigain
