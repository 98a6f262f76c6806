// Loops over channels, written for the compiler to vectorise. build_native.py compiles this file once per instruction
// set, with BIGAIN_ISA naming the namespace; isa.cpp chooses one.
//
// `omp simd` is the promise that a sum may be reordered into vector lanes. The order depends on the number of channels
// alone (the build forbids peeling for alignment), so results are the same for every address and thread.
#include "row_kernels.h"

namespace bigain::BIGAIN_ISA {
namespace {

inline float absolute(float value) { return __builtin_fabsf(value); }
inline double absolute(double value) { return __builtin_fabs(value); }
inline float square_root(float value) { return __builtin_sqrtf(value); }
inline double square_root(double value) { return __builtin_sqrt(value); }

// Source: BiGain, arXiv 2603.12240, the 3x3 Laplacian with four neighbours. Four tokens at a time share their
// neighbours.
template <typename T, bool kSquare>
void laplacian(const T* const* row, const T* const* above, const T* const* below, int64_t channels,
               accumulate_t<T>* out) {
  using A = accumulate_t<T>;
  const T *r0 = row[0], *r1 = row[1], *r2 = row[2], *r3 = row[3], *r4 = row[4], *r5 = row[5];
  const T *a0 = above[0], *a1 = above[1], *a2 = above[2], *a3 = above[3];
  const T *b0 = below[0], *b1 = below[1], *b2 = below[2], *b3 = below[3];
  A s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t c = 0; c < channels; ++c) {
    const A x0 = widen(r0[c]), x1 = widen(r1[c]), x2 = widen(r2[c]), x3 = widen(r3[c]), x4 = widen(r4[c]);
    const A y0 = 4 * x1 - widen(a0[c]) - widen(b0[c]) - x0 - x2;
    const A y1 = 4 * x2 - widen(a1[c]) - widen(b1[c]) - x1 - x3;
    const A y2 = 4 * x3 - widen(a2[c]) - widen(b2[c]) - x2 - x4;
    const A y3 = 4 * x4 - widen(a3[c]) - widen(b3[c]) - x3 - widen(r5[c]);
    s0 += kSquare ? y0 * y0 : absolute(y0);
    s1 += kSquare ? y1 * y1 : absolute(y1);
    s2 += kSquare ? y2 * y2 : absolute(y2);
    s3 += kSquare ? y3 * y3 : absolute(y3);
  }
  out[0] = kSquare ? square_root(s0) : s0;
  out[1] = kSquare ? square_root(s1) : s1;
  out[2] = kSquare ? square_root(s2) : s2;
  out[3] = kSquare ? square_root(s3) : s3;
}

// Parts of a long sum are added up on their own: similarities of thousands of channels show the rounding of one sum
// where the compiler makes no vector lanes of it, as with sanitizers.
constexpr int64_t kPart = 512;

template <typename T>
accumulate_t<T> norm(const T* x, int64_t channels) {
  accumulate_t<T> total = 0;
  for (int64_t first = 0; first < channels; first += kPart) {
    const int64_t end = first + kPart < channels ? first + kPart : channels;
    accumulate_t<T> part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t c = first; c < end; ++c) {
      part += widen(x[c]) * widen(x[c]);
    }
    total += part;
  }
  return square_root(total);
}

template <typename T>
void dot_four(const T* x, const accumulate_t<T>* const* y, int64_t channels, accumulate_t<T>* out) {
  using A = accumulate_t<T>;
  const A *y0 = y[0], *y1 = y[1], *y2 = y[2], *y3 = y[3];
  A s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t c = 0; c < channels; ++c) {
    const A value = widen(x[c]);
    s0 += value * y0[c];
    s1 += value * y1[c];
    s2 += value * y2[c];
    s3 += value * y3[c];
  }
  out[0] = s0;
  out[1] = s1;
  out[2] = s2;
  out[3] = s3;
}

template <typename T>
void divide(const T* __restrict x, accumulate_t<T> divisor, int64_t channels, accumulate_t<T>* __restrict out) {
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    out[c] = widen(x[c]) / divisor;
  }
}

template <typename T>
void divide_narrow(const accumulate_t<T>* __restrict x, accumulate_t<T> divisor, int64_t channels, T* __restrict out) {
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    narrow(x[c] / divisor, out[c]);
  }
}

template <typename T>
void add(const T* __restrict x, accumulate_t<T> weight, int64_t channels, accumulate_t<T>* __restrict sum) {
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    sum[c] += weight * widen(x[c]);
  }
}

// Squares of deviations do not cancel as E[x^2] - E[x]^2 does.
template <typename T>
void add_normalized(const T* __restrict x, accumulate_t<T> eps, accumulate_t<T> weight, int64_t channels,
                    accumulate_t<T>* __restrict sum) {
  using A = accumulate_t<T>;
  A total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t c = 0; c < channels; ++c) {
    total += widen(x[c]);
  }
  const A mean = total / static_cast<A>(channels);
  A squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t c = 0; c < channels; ++c) {
    const A deviation = widen(x[c]) - mean;
    squares += deviation * deviation;
  }
  const A inverse = 1 / square_root(squares / static_cast<A>(channels) + eps);
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    sum[c] += weight * ((widen(x[c]) - mean) * inverse);
  }
}

template <typename T>
void divide_affine(const accumulate_t<T>* __restrict x, accumulate_t<T> divisor,
                   const accumulate_t<T>* __restrict factor, const accumulate_t<T>* __restrict offset, int64_t channels,
                   T* __restrict out) {
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    narrow(x[c] / divisor * factor[c] + offset[c], out[c]);
  }
}

template <typename T, typename R>
void affine(const T* __restrict y, const accumulate_t<T>* __restrict gate, const R* __restrict residual,
            int64_t channels, T* __restrict out) {
  if (gate == nullptr) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      narrow(widen(y[c]) + widen(residual[c]), out[c]);
    }
  } else if (residual == nullptr) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      narrow(widen(y[c]) * gate[c], out[c]);
    }
  } else {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      narrow(widen(y[c]) * gate[c] + widen(residual[c]), out[c]);
    }
  }
}

// A window of four, the usual 2 x 2, in one pass.
template <typename T>
void pool_four(const T* const* window, const T* nearest, accumulate_t<T> nearest_weight, accumulate_t<T> window_weight,
               int64_t channels, T* __restrict out) {
  const T *first = window[0], *second = window[1], *third = window[2], *fourth = window[3];
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    const accumulate_t<T> sum = widen(first[c]) + widen(second[c]) + widen(third[c]) + widen(fourth[c]);
    narrow(nearest_weight * widen(nearest[c]) + window_weight * sum, out[c]);
  }
}

template <typename T>
void pool(const T* const* window, int64_t count, const T* nearest, accumulate_t<T> nearest_weight,
          accumulate_t<T> window_weight, int64_t channels, T* out) {
  if (count == 4) {
    pool_four(window, nearest, nearest_weight, window_weight, channels, out);
    return;
  }
  // A slice of channels whose sums stay in the first-level cache while the window is added up.
  constexpr int64_t kSlice = 256;
  accumulate_t<T> sum[kSlice];
  for (int64_t start = 0; start < channels; start += kSlice) {
    const int64_t size = channels - start < kSlice ? channels - start : kSlice;
    for (int64_t c = 0; c < size; ++c) {
      sum[c] = 0;
    }
    for (int64_t i = 0; i < count; ++i) {
      add(window[i] + start, accumulate_t<T>(1), size, sum);
    }
    const T* __restrict near = nearest + start;
    T* __restrict target = out + start;
#pragma omp simd
    for (int64_t c = 0; c < size; ++c) {
      narrow(nearest_weight * widen(near[c]) + window_weight * sum[c], target[c]);
    }
  }
}

}  // namespace

template <typename T>
const RowKernels<T>& row_kernels() {
  static constexpr RowKernels<T> table = {
      laplacian<T, false>,
      laplacian<T, true>,
      norm<T>,
      dot_four<T>,
      divide<T>,
      divide_narrow<T>,
      divide_affine<T>,
      add<T>,
      add_normalized<T>,
      affine<T, T>,
      affine<T, accumulate_t<T>>,
      pool<T>,
  };
  return table;
}

template const RowKernels<float>& row_kernels<float>();
template const RowKernels<double>& row_kernels<double>();
template const RowKernels<BFloat16>& row_kernels<BFloat16>();
template const RowKernels<Half>& row_kernels<Half>();

}  // namespace bigain::BIGAIN_ISA
