// Loops over the channels of single tokens, compiled once per instruction set. See row_kernels.cpp.
#pragma once

#include <cstdint>

#include "numbers.h"

namespace bigain {

// Tokens are pointers to `channels` consecutive values of type T; A is the accumulation type.
template <typename T>
struct RowKernels {
  using A = accumulate_t<T>;

  // Norm over channels of 4 row[i] - above[i - 1] - below[i - 1] - row[i - 1] - row[i + 1] for i = 1, 2, 3, 4.
  // With `times`, four tokens of the frame before and four of that after, 2 row[i] - times[i - 1] - times[i + 3] more.
  void (*laplacian_l1)(const T* const* row, const T* const* above, const T* const* below, const T* const* times,
                       int64_t channels, A* out);
  void (*laplacian_l2)(const T* const* row, const T* const* above, const T* const* below, const T* const* times,
                       int64_t channels, A* out);

  // L2 norm.
  A (*norm)(const T* x, int64_t channels);

  // Sum of x * y.
  A (*dot)(const T* x, const T* y, int64_t channels);

  // out[i] = sum of x * y[i] for i = 0, 1, 2, 3.
  void (*dot_four)(const T* x, const A* const* y, int64_t channels, A* out);

  // out = x / divisor.
  void (*divide)(const T* x, A divisor, int64_t channels, A* out);
  void (*divide_narrow)(const A* x, A divisor, int64_t channels, T* out);

  // sum += weight * x.
  void (*add)(const T* x, A weight, int64_t channels, A* sum);

  // out = sum over `count` tokens of weights[i] * rows[i], / total; without weights all are one.
  void (*mean)(const T* const* rows, const A* weights, int64_t count, A total, int64_t channels, T* out);

  // The mean over channels, and 1 / sqrt(variance + eps).
  void (*moments)(const T* x, int64_t channels, A eps, A* mean, A* inverse);

  // out = sum over `count` tokens of weights[i] * (rows[i] - means[i]), / total * factor + offset; factor and offset
  // may both be null.
  void (*mean_normalized)(const T* const* rows, const A* means, const A* weights, int64_t count, A total,
                          const A* factor, const A* offset, int64_t channels, T* out);

  // out = gate * y + residual; either may be null, not both. The residual has the type of y, or is wide.
  void (*affine)(const T* y, const A* gate, const T* residual, int64_t channels, T* out);
  void (*affine_wide)(const T* y, const A* gate, const A* residual, int64_t channels, T* out);

  // out = nearest_weight * nearest + window_weight * sum of `count` tokens.
  void (*pool)(const T* const* window, int64_t count, const T* nearest, A nearest_weight, A window_weight,
               int64_t channels, T* out);
};

// The table for this machine: T is float, double, BFloat16 or Half.
template <typename T>
const RowKernels<T>& row_kernels();

}  // namespace bigain
