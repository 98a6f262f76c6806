// L2 norms of tokens, for calls in which no score pass has computed them.
#pragma once

#include <algorithm>

#include "bigain/common.cuh"

namespace bigain {

constexpr int kRowNormThreads = 128;

// Adds the squares of the kVector<T> values of a vector, one after another.
template <typename T>
__device__ __forceinline__ void add_squares(float& sum, const Vector<T>& vector) {
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) {
    const float value = vector[i];
    sum = fmaf(value, value, sum);
  }
}

// The order of a sum over the channels of a token, which the kernel here and that of laplacian_score.cuh have in
// common: of kSumLanes lanes, lane i has vectors i, i + kSumLanes, ..., in runs of `run` vectors that are summed by
// themselves, and adds its runs in order; then group_sum. It depends on the number of vectors alone.
constexpr int kSumLanes = 8;
// Runs of a lane: few, that threads have several vectors each, but no run of more than three for that.
constexpr int kFewRuns = 6, kMostRuns = 12, kShortRun = 3;

struct SumOrder {
  int run, runs;

  explicit SumOrder(int64_t vectors) {
    const int64_t of_lane = ceil_div(vectors, kSumLanes);
    run = to_int(std::max(std::min(ceil_div(of_lane, kFewRuns), int64_t{kShortRun}), ceil_div(of_lane, kMostRuns)));
    runs = run > 0 ? to_int(ceil_div(of_lane, run)) : 1;
  }
  // Where a thread sums each run: thread i has run i / kSumLanes of lane i mod kSumLanes, which begins at first(i).
  __host__ __device__ int threads() const { return kSumLanes * runs; }
  __device__ int first(int thread) const { return thread / kSumLanes * kSumLanes * run + thread % kSumLanes; }
};

template <typename T>
struct RowNorms {
  const T* x;  // (rows, tokens, channels), unit stride in channels
  int64_t batch_stride, token_stride;
  int64_t rows, tokens, channels;  // rows * tokens below 2^31
  bool inverse;
  float* norms;  // (rows, tokens): the norm, or what inverse_norm() makes of it
};

// kSumLanes lanes own a token.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kRowNormThreads)
    row_norms_kernel(const RowNorms<T> p, const SumOrder order, const Divisor by_tokens) {
  const unsigned row = (blockIdx.x * kRowNormThreads + threadIdx.x) / kSumLanes;
  const bool exists = row < p.rows * p.tokens;
  unsigned b = row;
  const unsigned n = by_tokens.take(b);
  const T* const token = p.x + b * p.batch_stride + n * p.token_stride;
  const int vectors = exists ? static_cast<int>(num_vectors<T>(p.channels)) : 0;
  follow_launches();
  const int lane = threadIdx.x % kSumLanes;
  float sum = 0.0f, run = 0.0f;
  int left = order.run;
#pragma unroll 1
  for (int v = lane; v < vectors; v += kLoadsAhead * kSumLanes) {
    Vector<T> ahead[kLoadsAhead];
    load_ahead<kAligned>(ahead, token, v, vectors, p.channels, kSumLanes);
#pragma unroll
    for (int i = 0; i < kLoadsAhead; ++i) {
      if (v + i * kSumLanes < vectors) {
        add_squares(run, ahead[i]);
        if (--left == 0) {
          sum += run;
          run = 0.0f;
          left = order.run;
        }
      }
    }
  }
  sum = group_sum(sum + run, kSumLanes);
  if (exists && lane == 0) p.norms[row] = p.inverse ? inverse_norm(sum) : sqrtf(sum);
}

// One launch.
template <typename T>
void launch_row_norms(const RowNorms<T>& p, cudaStream_t stream) {
  const unsigned blocks = grid_extent(ceil_div(to_int(p.rows * p.tokens), kRowNormThreads / kSumLanes));
  const bool aligned = has_vectors<T>(p.x, p.channels, p.batch_stride, p.token_stride);
  launch(aligned ? row_norms_kernel<T, true> : row_norms_kernel<T, false>, blocks, kRowNormThreads, 0, stream, p,
         SumOrder(num_vectors<T>(p.channels)), Divisor(p.tokens));
}

}  // namespace bigain
