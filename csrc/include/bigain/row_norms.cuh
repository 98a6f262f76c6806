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
    const float value = to_float(vector.value[i]);
    squares[i] = value * value;
  }
  return tree_sum(squares);
}

template <typename T>
struct RowNorms {
  const T* x;  // (rows, tokens, channels), unit stride in channels
  int64_t batch_stride, token_stride;
  int64_t rows, tokens, channels;
  bool inverse;
  float* norms;  // (rows, tokens): the norm, or what inverse_norm() makes of it
};

// `lanes` lanes own a token; see lanes_per_token for the order of the sum.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kRowNormThreads) row_norms_kernel(const RowNorms<T> p, const int lanes) {
  const int64_t row = blockIdx.x * static_cast<int64_t>(blockDim.x / lanes) + threadIdx.x / lanes;
  const bool exists = row < p.rows * p.tokens;
  const int lane = threadIdx.x % lanes;
  float sum = 0.0f;
  if (exists) {
    const T* const token = p.x + row / p.tokens * p.batch_stride + row % p.tokens * p.token_stride;
    const int64_t vectors = num_vectors<T>(p.channels);
#pragma unroll 4
    for (int64_t v = lane; v < vectors; v += lanes) {
      sum += sum_of_squares(load_vector<kAligned>(token, v * kVector<T>, p.channels));
    }
  }
  sum = group_sum(sum, lanes);
  if (exists && lane == 0) p.norms[row] = p.inverse ? inverse_norm(sum) : sqrtf(sum);
}

// One launch.
template <typename T>
void launch_row_norms(const RowNorms<T>& p, cudaStream_t stream) {
  const int lanes = lanes_per_token<T>(p.channels);
  const unsigned blocks = grid_extent(ceil_div(p.rows * p.tokens, kRowNormThreads / lanes));
  const bool aligned = has_vectors<T>(p.x, p.channels, p.batch_stride, p.token_stride);
  launch(aligned ? row_norms_kernel<T, true> : row_norms_kernel<T, false>, blocks, kRowNormThreads, 0, stream, p,
         lanes);
}

}  // namespace bigain
