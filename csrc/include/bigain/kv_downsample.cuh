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

// The "nearest-exact" rule along one axis: floor((i + 0.5) * size / out).
__device__ __forceinline__ int nearest_index(int i, int size, int out) {
  constexpr int kFitsIn32Bits = 1 << 15;  // 2 * out * size < 2^32
  if (size <= kFitsIn32Bits) return (2u * i + 1u) * size / (2u * out);
  return static_cast<int>((2 * static_cast<int64_t>(i) + 1) * size / (2 * static_cast<int64_t>(out)));
}

// A thread owns one vector of one pooled token of tensor blockIdx.y. A window is added in raster order. kSize is sy and
// sx when the compiler may unroll the window, or 0. With alpha = 1 the nearest token is copied, nothing else is read.
template <typename T, bool kAligned, int kSize>
__global__ void __launch_bounds__(kPoolThreads, kAligned ? 4 : 3) kv_downsample_kernel(const KvDownsample<T> p) {
  const int sy = kSize > 0 ? kSize : p.sy, sx = kSize > 0 ? kSize : p.sx;
  const int out_y = p.height / sy, out_x = p.width / sx, pooled = out_y * out_x;
  const PoolTensor<T> tensor = p.tensors[blockIdx.y];
  // The launcher makes sure that a row has fewer than 2^31 vectors.
  const unsigned vectors = num_vectors<T>(tensor.channels), blocks = ceil_div(pooled * vectors, kPoolThreads);
  // Tensors of fewer channels have fewer blocks.
  const int b = blocks > 0 ? blockIdx.x / blocks : p.batch;
  if (b >= p.batch) return;
  const unsigned own = blockIdx.x % blocks * kPoolThreads + threadIdx.x;
  const int n = own / vectors;
  if (n >= pooled) return;
  const int64_t c = own % vectors * kVector<T>;
  const int i = n / out_x, j = n % out_x;
  const T* const x = tensor.x + b * tensor.batch_stride;
  T* const out = tensor.out + (b * static_cast<int64_t>(pooled) + n) * tensor.channels;
  const float alpha = p.row_alpha == nullptr ? p.alpha : p.row_alpha[b];
  const int nearest = nearest_index(i, p.height, out_y) * p.width + nearest_index(j, p.width, out_x);
  Vector<T> result = load_vector<kAligned>(x + nearest * tensor.token_stride, c, tensor.channels);
  if (alpha != 1.0f) {
    float sum[kVector<T>] = {};
    const T* const window = x + (i * sy * p.width + j * sx) * tensor.token_stride;
    const int64_t row_stride = p.width * tensor.token_stride;
    const auto add = [&](int y, int column) {
      const T* const token = window + y * row_stride + column * tensor.token_stride;
      const Vector<T> values = load_vector<kAligned>(token, c, tensor.channels);
#pragma unroll
      for (int k = 0; k < kVector<T>; ++k) sum[k] += to_float(values.value[k]);
    };
    if constexpr (kSize > 0) {
#pragma unroll
      for (int l = 0; l < kSize * kSize; ++l) add(l / kSize, l % kSize);
    } else {
      for (int y = 0; y < sy; ++y) {
#pragma unroll 4
        for (int column = 0; column < sx; ++column) add(y, column);
      }
    }
    const float beta = 1.0f - alpha, size = static_cast<float>(sy * sx);
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) {
      const float average = sum[k] / size;
      // What has weight zero is left out: zero times an infinite token would be NaN.
      result.value[k] = from_float<T>(alpha == 0.0f ? average : alpha * to_float(result.value[k]) + beta * average);
    }
  }
  store_vector<kAligned>(out, c, tensor.channels, result);
}

// One launch for up to kPoolTensors tensors.
template <typename T>
void launch_kv_downsample(const KvDownsample<T>& p, cudaStream_t stream) {
  int64_t blocks = 0;
  bool aligned = true;
  for (int i = 0; i < p.count; ++i) {
    const PoolTensor<T>& tensor = p.tensors[i];
    const int row = to_int((p.height / p.sy) * (p.width / p.sx) * num_vectors<T>(tensor.channels));
    const int64_t own = p.batch * ceil_div(row, kPoolThreads);
    blocks = own > blocks ? own : blocks;
    aligned = aligned && has_vectors<T>(tensor.x, tensor.channels, tensor.batch_stride, tensor.token_stride) &&
              has_vectors<T>(tensor.out, tensor.channels, tensor.channels, tensor.channels);
  }
  const auto kernel = p.sy == 2 && p.sx == 2
                          ? (aligned ? kv_downsample_kernel<T, true, 2> : kv_downsample_kernel<T, false, 2>)
                          : (aligned ? kv_downsample_kernel<T, true, 0> : kv_downsample_kernel<T, false, 0>);
  launch(kernel, dim3(grid_extent(blocks), p.count), kPoolThreads, 0, stream, p);
}

}  // namespace bigain
