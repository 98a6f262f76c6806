// Loops over channels in vectors of the machine. build_native.py compiles this file once per instruction set, with
// BIGAIN_ISA naming the namespace; isa.cpp chooses one.
//
// Sums are kept per lane and added up at the end. Their order depends on the number of channels alone, so results are
// the same for every address and thread.
#include "row_kernels.h"

#include <limits>

#include "lanes.h"

namespace bigain::BIGAIN_ISA {
namespace {

inline float square_root(float value) { return __builtin_sqrtf(value); }
inline double square_root(double value) { return __builtin_sqrt(value); }

// Without the bit of the sign.
template <typename V>
inline V absolute(V value) {
  using Index = decltype(value < value);
  return bits_as<V>(bits_as<Index>(value) & std::numeric_limits<decltype(Index{}[0] + 0)>::max());
}

// Source: BiGain, arXiv 2603.12240, the 3x3 Laplacian with four neighbours. Four tokens at a time share their
// neighbours. With kTimes their neighbours in time as well, four of the frame before and four of that after.
template <typename T, bool kSquare, bool kTimes>
void laplacian_of(const T* const* row, const T* const* above, const T* const* below, const T* const* times,
                  int64_t channels, accumulate_t<T>* out) {
  using A = accumulate_t<T>;
  const T *r0 = row[0], *r1 = row[1], *r2 = row[2], *r3 = row[3], *r4 = row[4], *r5 = row[5];
  const T *a0 = above[0], *a1 = above[1], *a2 = above[2], *a3 = above[3];
  const T *b0 = below[0], *b1 = below[1], *b2 = below[2], *b3 = below[3];
  vector_t<A> s0 = {}, s1 = {}, s2 = {}, s3 = {};
  const auto size = [](vector_t<A> y) { return kSquare ? y * y : absolute(y); };
  const auto response = [&](auto at, int i, auto in_frame, auto x) {
    if constexpr (kTimes) in_frame += (x - at.load(times[i])) + (x - at.load(times[4 + i]));
    return in_frame;
  };
  for_each_vector<A>(channels, [&](auto at) {
    const auto x0 = at.load(r0), x1 = at.load(r1), x2 = at.load(r2), x3 = at.load(r3), x4 = at.load(r4);
    s0 += size(response(at, 0, 4 * x1 - at.load(a0) - at.load(b0) - x0 - x2, x1));
    s1 += size(response(at, 1, 4 * x2 - at.load(a1) - at.load(b1) - x1 - x3, x2));
    s2 += size(response(at, 2, 4 * x3 - at.load(a2) - at.load(b2) - x2 - x4, x3));
    s3 += size(response(at, 3, 4 * x4 - at.load(a3) - at.load(b3) - x3 - at.load(r5), x4));
  });
  const A sums[4] = {sum_of(s0), sum_of(s1), sum_of(s2), sum_of(s3)};
  for (int i = 0; i < 4; ++i) out[i] = kSquare ? square_root(sums[i]) : sums[i];
}

// `times` is null where there are no other frames.
template <typename T, bool kSquare>
void laplacian(const T* const* row, const T* const* above, const T* const* below, const T* const* times,
               int64_t channels, accumulate_t<T>* out) {
  if (times == nullptr) {
    laplacian_of<T, kSquare, false>(row, above, below, times, channels, out);
  } else {
    laplacian_of<T, kSquare, true>(row, above, below, times, channels, out);
  }
}

// Parts of a long sum are added up on their own: similarities of thousands of channels show the rounding of one sum
// where vectors are short.
constexpr int64_t kPart = 512;

// Four chains of additions at a time: one alone would wait for each of them.
template <typename T>
accumulate_t<T> dot(const T* x, const T* y, int64_t channels) {
  using A = accumulate_t<T>;
  using L = Lanes<T>;
  A total = 0;
  for (int64_t first = 0; first < channels; first += kPart) {
    const int64_t end = channels - first < kPart ? channels : first + kPart;
    typename L::Vector chain[4] = {};
    int64_t c = first;
    for (; c + 4 * L::kLanes <= end; c += 4 * L::kLanes) {
      for (int64_t i = 0; i < 4; ++i) chain[i] += L::load(x + c + i * L::kLanes) * L::load(y + c + i * L::kLanes);
    }
    for_each_vector<A>(end - c, [&](auto at) { chain[at.c / L::kLanes] += at.load(x + c) * at.load(y + c); });
    total += sum_of((chain[0] + chain[1]) + (chain[2] + chain[3]));
  }
  return total;
}

template <typename T>
accumulate_t<T> norm(const T* x, int64_t channels) {
  return square_root(dot(x, x, channels));
}

template <typename T>
void dot_four(const T* x, const accumulate_t<T>* const* y, int64_t channels, accumulate_t<T>* out) {
  using A = accumulate_t<T>;
  const A *y0 = y[0], *y1 = y[1], *y2 = y[2], *y3 = y[3];
  vector_t<A> s0 = {}, s1 = {}, s2 = {}, s3 = {};
  for_each_vector<A>(channels, [&](auto at) {
    const auto value = at.load(x);
    s0 += value * at.load(y0);
    s1 += value * at.load(y1);
    s2 += value * at.load(y2);
    s3 += value * at.load(y3);
  });
  out[0] = sum_of(s0);
  out[1] = sum_of(s1);
  out[2] = sum_of(s2);
  out[3] = sum_of(s3);
}

template <typename T>
void divide(const T* x, accumulate_t<T> divisor, int64_t channels, accumulate_t<T>* out) {
  for_each_vector<accumulate_t<T>>(channels, [&](auto at) { at.store(at.load(x) / divisor, out); });
}

template <typename T>
void divide_narrow(const accumulate_t<T>* x, accumulate_t<T> divisor, int64_t channels, T* out) {
  for_each_vector<accumulate_t<T>>(channels, [&](auto at) { at.store(at.load(x) / divisor, out); });
}

template <typename T>
void add(const T* x, accumulate_t<T> weight, int64_t channels, accumulate_t<T>* sum) {
  for_each_vector<accumulate_t<T>>(channels, [&](auto at) { at.store(at.load(sum) + weight * at.load(x), sum); });
}

// f(sums, c) for vectors of sums over i < count of term(i, value of rows[i]): four neighbouring vectors at a time, so
// that the rows of a large slot are read by whole cache lines.
template <typename T, typename Term, typename Finish>
inline void sum_rows(const T* const* rows, int64_t count, int64_t channels, const Term& term, const Finish& finish) {
  using L = Lanes<T>;
  constexpr int64_t kBlock = 4 * L::kLanes;
  int64_t start = 0;
  for (; start + kBlock <= channels; start += kBlock) {
    typename L::Vector sum[4] = {};
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t v = 0; v < 4; ++v) sum[v] += term(i, L::load(rows[i] + start + v * L::kLanes));
    }
    for (int64_t v = 0; v < 4; ++v) finish(Whole{start + v * L::kLanes}, sum[v]);
  }
  for_each_vector<accumulate_t<T>>(channels - start, [&](auto at) {
    at.c += start;
    typename L::Vector sum = {};
    for (int64_t i = 0; i < count; ++i) sum += term(i, at.load(rows[i]));
    finish(at, sum);
  });
}

template <typename T>
void mean(const T* const* rows, const accumulate_t<T>* weights, int64_t count, accumulate_t<T> total, int64_t channels,
          T* out) {
  const auto finish = [&](auto at, auto sum) { at.store(sum / total, out); };
  if (weights == nullptr) {
    sum_rows(rows, count, channels, [](int64_t, auto value) { return value; }, finish);
  } else {
    sum_rows(rows, count, channels, [&](int64_t i, auto value) { return weights[i] * value; }, finish);
  }
}

// One reading of the token, without the cancellation of E[x^2] - E[x]^2: each lane has the mean of its values and the
// sum of squares about that mean, of eight vectors at a time while they are in registers. Two such pairs are joined by
// the formula of Chan, Golub and LeVeque (1979).
template <typename T>
void moments(const T* x, int64_t channels, accumulate_t<T> eps, accumulate_t<T>* mean_out,
             accumulate_t<T>* inverse_out) {
  using A = accumulate_t<T>;
  using L = Lanes<T>;
  using Vector = typename L::Vector;
  constexpr int64_t kMost = 8;
  const int64_t vectors = channels / L::kLanes, rest = channels % L::kLanes;
  Vector means = {}, squares = {};
  const auto join = [&](int64_t first, int64_t size) {
    Vector value[kMost], sum = {}, deviations = {};
    for (int64_t i = 0; i < size; ++i) {
      value[i] = L::load(x + (first + i) * L::kLanes);
      sum += value[i];
    }
    const Vector average = sum / static_cast<A>(size), step = average - means;
    for (int64_t i = 0; i < size; ++i) deviations += (value[i] - average) * (value[i] - average);
    const A share = static_cast<A>(size) / static_cast<A>(first + size);
    means += step * share;
    squares += deviations + step * step * (static_cast<A>(first) * share);
  };
  int64_t joined = 0;
  for (; joined + kMost <= vectors; joined += kMost) join(joined, kMost);
  if (joined < vectors) join(joined, vectors - joined);

  const A weight = static_cast<A>(vectors);
  const T* const last = x + vectors * L::kLanes;
  const A mean = (weight * sum_of(means) + sum_of(L::load_some(last, rest))) / static_cast<A>(channels);
  const Vector apart = means - mean;
  A total = sum_of(squares + weight * (apart * apart));
  for (int64_t i = 0; i < rest; ++i) total += (widen(last[i]) - mean) * (widen(last[i]) - mean);
  *mean_out = mean;
  *inverse_out = 1 / square_root(total / static_cast<A>(channels) + eps);
}

template <typename T>
void mean_normalized(const T* const* rows, const accumulate_t<T>* means, const accumulate_t<T>* weights, int64_t count,
                     accumulate_t<T> total, const accumulate_t<T>* factor, const accumulate_t<T>* offset,
                     int64_t channels, T* out) {
  const auto term = [&](int64_t i, auto value) { return weights[i] * (value - means[i]); };
  if (factor == nullptr) {
    sum_rows(rows, count, channels, term, [&](auto at, auto sum) { at.store(sum / total, out); });
  } else {
    sum_rows(rows, count, channels, term,
             [&](auto at, auto sum) { at.store(sum / total * at.load(factor) + at.load(offset), out); });
  }
}

template <typename T, typename R>
void affine(const T* y, const accumulate_t<T>* gate, const R* residual, int64_t channels, T* out) {
  using A = accumulate_t<T>;
  if (gate == nullptr) {
    for_each_vector<A>(channels, [&](auto at) { at.store(at.load(y) + at.load(residual), out); });
  } else if (residual == nullptr) {
    for_each_vector<A>(channels, [&](auto at) { at.store(at.load(y) * at.load(gate), out); });
  } else {
    for_each_vector<A>(channels, [&](auto at) { at.store(at.load(y) * at.load(gate) + at.load(residual), out); });
  }
}

// kCount tokens in the window, or, with 0, `count`.
template <int kCount, typename T>
void pool_some(const T* const* window, int64_t count, const T* nearest, accumulate_t<T> nearest_weight,
               accumulate_t<T> window_weight, int64_t channels, T* out) {
  const int64_t size = kCount == 0 ? count : kCount;
  for_each_vector<accumulate_t<T>>(channels, [&](auto at) {
    auto sum = at.load(window[0]);
    for (int64_t i = 1; i < size; ++i) sum += at.load(window[i]);
    at.store(nearest_weight * at.load(nearest) + window_weight * sum, out);
  });
}

template <typename T>
void pool(const T* const* window, int64_t count, const T* nearest, accumulate_t<T> nearest_weight,
          accumulate_t<T> window_weight, int64_t channels, T* out) {
  // The usual window is 2 x 2.
  const auto some = count == 4 ? pool_some<4, T> : pool_some<0, T>;
  some(window, count, nearest, nearest_weight, window_weight, channels, out);
}

}  // namespace

template <typename T>
const RowKernels<T>& row_kernels() {
  static constexpr RowKernels<T> table = {
      laplacian<T, false>,
      laplacian<T, true>,
      norm<T>,
      dot<T>,
      dot_four<T>,
      divide<T>,
      divide_narrow<T>,
      add<T>,
      mean<T>,
      moments<T>,
      mean_normalized<T>,
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
