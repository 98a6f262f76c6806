// L2 norms of tokens, for calls in which no score pass has computed them.
#pragma once

#include "bigain/common.cuh"

namespace bigain {

constexpr int kRowNormThreads = 128;

// The squares of the kVector<T> values of a vector, as float, summed.
template <typename T>
__device__ __forceinline__ float sum_of_squares(const Vector<T>& vector) {
  float squares[kVector<T>];
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) {
    const float value = vector[i];
    squares[i] = value * value;
  }
  return tree_sum(squares);
}

template <typename T>
struct RowNorms {
  const T* x;  // (rows, tokens, channels), unit stride in channels
  int64_t batch_stride, token_stride;
  int64_t rows, tokens, channels;  // rows * tokens below 2^31
  bool inverse;
  float* norms;  // (rows, tokens): the norm, or what inverse_norm() makes of it
};

// A group of lanes owns a token; see Lanes for the order of the sum.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kRowNormThreads)
    row_norms_kernel(const RowNorms<T> p, const Lanes lanes, const Divisor by_tokens) {
  const unsigned row = lanes.groups_before(kRowNormThreads) + lanes.group();
  const bool exists = row < p.rows * p.tokens;
  unsigned b = row;
  const unsigned n = by_tokens.take(b);
  const T* const token = p.x + b * p.batch_stride + n * p.token_stride;
  const int vectors = exists ? static_cast<int>(num_vectors<T>(p.channels)) : 0;
  follow_launches();
  float sum = 0.0f;
#pragma unroll 1
  for (int v = lanes.lane(); v < vectors; v += kLoadsAhead * lanes.count()) {
    Vector<T> ahead[kLoadsAhead];
    load_ahead<kAligned>(ahead, token, v, vectors, p.channels, lanes);
#pragma unroll
    for (int i = 0; i < kLoadsAhead; ++i) {
      if (v + i * lanes.count() < vectors) sum += sum_of_squares(ahead[i]);
    }
  }
  sum = group_sum(sum, lanes.count());
  if (exists && lanes.lane() == 0) p.norms[row] = p.inverse ? inverse_norm(sum) : sqrtf(sum);
}

// One launch.
template <typename T>
void launch_row_norms(const RowNorms<T>& p, cudaStream_t stream) {
  const Lanes lanes = lanes_per_token<T>(p.channels);
  const unsigned blocks = grid_extent(ceil_div(to_int(p.rows * p.tokens), kRowNormThreads / lanes.count()));
  const bool aligned = has_vectors<T>(p.x, p.channels, p.batch_stride, p.token_stride);
  launch(aligned ? row_norms_kernel<T, true> : row_norms_kernel<T, false>, blocks, kRowNormThreads, 0, stream, p, lanes,
         Divisor(p.tokens));
}

}  // namespace bigain
