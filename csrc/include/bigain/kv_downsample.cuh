// Interpolate-extrapolate downsampling of keys and values, several tensors in one launch (IE-KVD of BiGain,
// arXiv 2603.12240; nearest alone is ToDo, 2024).
#pragma once

#include "bigain/common.cuh"

namespace bigain {

constexpr int kPoolThreads = 256;
constexpr int kPoolTensors = 4;  // in one launch

template <typename T>
struct PoolTensor {
  const T* x;  // (batch, height * width, channels), unit stride in channels
  int64_t batch_stride, token_stride, channels;
  T* out;  // (batch, (height / sy) * (width / sx), channels), contiguous
};

template <typename T>
struct KvDownsample {
  PoolTensor<T> tensors[kPoolTensors];
  int count, batch, height, width, sy, sx;
  float alpha;
  const float* row_alpha;  // (batch,) replaces alpha; or null
};

// The "nearest-exact" rule along one axis: floor((i + 0.5) * size / out). With size = out * stride + rest it is
// (2 * i + 1) * stride / 2 and a fraction of which `rest` alone is left to divide.
class NearestIndex {
 public:
  NearestIndex() = default;
  NearestIndex(int size, int stride)
      : stride_(stride), out_(size / stride), rest_(size % stride), by_out2_(2 * int64_t{out_}) {
    to_int((2 * int64_t{rest_} + 1) * out_);  // what is divided fits
  }
  __device__ __forceinline__ unsigned operator()(unsigned i) const {
    const unsigned twice = (2 * i + 1) * stride_;
    return twice / 2 + by_out2_.quotient(twice % 2 * out_ + (2 * i + 1) * rest_);
  }

 private:
  unsigned stride_ = 1, out_ = 0, rest_ = 0;
  Divisor by_out2_;
};

// How a launch counts: blocks and vectors of a row of a tensor, pooled tokens of a row of the grid.
struct PoolCounts {
  Divisor by_blocks[kPoolTensors], by_vectors[kPoolTensors], by_out_x;
  NearestIndex nearest_y, nearest_x;
  int out_y, out_x;
};

// A thread owns one vector of one pooled token of tensor blockIdx.y. A window is added in raster order. kSize is sy and
// sx when the compiler may unroll the window, or 0. With alpha = 1 the nearest token is copied, nothing else is read.
template <typename T, bool kAligned, int kSize>
__global__ void __launch_bounds__(kPoolThreads, kAligned ? 4 : 3)
    kv_downsample_kernel(const KvDownsample<T> p, const PoolCounts counts) {
  const int sy = kSize > 0 ? kSize : p.sy, sx = kSize > 0 ? kSize : p.sx, pooled = counts.out_y * counts.out_x;
  const PoolTensor<T> tensor = p.tensors[blockIdx.y];
  unsigned b = blockIdx.x;
  unsigned n = counts.by_blocks[blockIdx.y].take(b) * kPoolThreads + threadIdx.x;  // first of all vectors of the row
  const int64_t c = counts.by_vectors[blockIdx.y].take(n) * kVector<T>;
  unsigned i = n;
  const unsigned j = counts.by_out_x.take(i);
  const unsigned nearest = counts.nearest_y(i) * p.width + counts.nearest_x(j);
  follow_launches();
  // Tensors of fewer channels have fewer blocks.
  if (b >= static_cast<unsigned>(p.batch) || n >= static_cast<unsigned>(pooled)) return;
  const T* const x = tensor.x + b * tensor.batch_stride;
  Vector<T> result = load_vector<kAligned>(x + nearest * tensor.token_stride, c, tensor.channels);
  const float alpha = p.row_alpha == nullptr ? p.alpha : p.row_alpha[b];
  if (alpha != 1.0f) {
    const T* const window = x + (static_cast<int>(i) * sy * p.width + static_cast<int>(j) * sx) * tensor.token_stride;
    const int64_t row_stride = p.width * tensor.token_stride;
    float sum[kVector<T>] = {};
    const auto load = [&](int y, int column, bool wanted) {
      const T* const token = window + y * row_stride + column * tensor.token_stride;
      return load_vector<kAligned>(token, c, tensor.channels, wanted);
    };
    const auto add = [&](const Vector<T>& values) {
#pragma unroll
      for (int k = 0; k < kVector<T>; ++k) sum[k] += values[k];
    };
    if constexpr (kSize > 0) {
      Vector<T> ahead[kSize * kSize];
#pragma unroll
      for (int l = 0; l < kSize * kSize; ++l) ahead[l] = load(l / kSize, l % kSize, true);
#pragma unroll
      for (int l = 0; l < kSize * kSize; ++l) add(ahead[l]);
    } else {
      for (int y = 0; y < sy; ++y) {
#pragma unroll 1
        for (int column = 0; column < sx; column += kLoadsAhead) {
          Vector<T> ahead[kLoadsAhead];
#pragma unroll
          for (int l = 0; l < kLoadsAhead; ++l) ahead[l] = load(y, column + l, column + l < sx);
#pragma unroll
          for (int l = 0; l < kLoadsAhead; ++l) {
            if (column + l < sx) add(ahead[l]);
          }
        }
      }
    }
    const float beta = 1.0f - alpha, size = static_cast<float>(sy * sx);
    float mixed[kVector<T>];
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) {
      const float average = sum[k] / size;
      // What has weight zero is left out: zero times an infinite token would be NaN.
      mixed[k] = alpha == 0.0f ? average : alpha * result[k] + beta * average;
    }
    result = to_vector<T>(mixed);
  }
  T* const out = tensor.out + (b * static_cast<int64_t>(pooled) + n) * tensor.channels;
  store_vector<kAligned>(out, c, tensor.channels, result);
}

// One launch for up to kPoolTensors tensors.
template <typename T>
void launch_kv_downsample(const KvDownsample<T>& p, cudaStream_t stream) {
  PoolCounts counts;
  counts.out_y = p.height / p.sy;
  counts.out_x = p.width / p.sx;
  counts.by_out_x = Divisor(counts.out_x);
  counts.nearest_y = NearestIndex(p.height, p.sy);
  counts.nearest_x = NearestIndex(p.width, p.sx);
  const int64_t pooled = int64_t{counts.out_y} * counts.out_x;
  int64_t blocks = 0;
  bool aligned = true;
  for (int i = 0; i < p.count; ++i) {
    const PoolTensor<T>& tensor = p.tensors[i];
    const int64_t vectors = num_vectors<T>(tensor.channels), row = pooled * vectors;
    const int64_t blocks_of_row = to_int(row + kPoolThreads - 1) / kPoolThreads, own = p.batch * blocks_of_row;
    counts.by_blocks[i] = Divisor(blocks_of_row);
    counts.by_vectors[i] = Divisor(vectors);
    blocks = own > blocks ? own : blocks;
    aligned = aligned && has_vectors<T>(tensor.x, tensor.channels, tensor.batch_stride, tensor.token_stride) &&
              has_vectors<T>(tensor.out, tensor.channels, tensor.channels, tensor.channels);
  }
  const auto kernel = p.sy == 2 && p.sx == 2
                          ? (aligned ? kv_downsample_kernel<T, true, 2> : kv_downsample_kernel<T, false, 2>)
                          : (aligned ? kv_downsample_kernel<T, true, 0> : kv_downsample_kernel<T, false, 0>);
  launch(kernel, dim3(grid_extent(blocks), p.count), kPoolThreads, 0, stream, p, counts);
}

}  // namespace bigain
