// kv_downsample on the CPU (IE-KVD of BiGain, arXiv 2603.12240; nearest alone is ToDo, 2024).
#include <functional>

#include "op_common.h"
#include "row_kernels.h"

namespace bigain {
namespace {

struct Windows {
  int64_t height, width, sy, sx;

  int64_t rows() const { return height / sy; }
  int64_t columns() const { return width / sx; }

  // The "nearest-exact" rule along one axis: floor((i + 0.5) * size / out).
  static int64_t nearest(int64_t i, int64_t size, int64_t out) { return (2 * i + 1) * size / (2 * out); }
};

// One row of windows at a time of x (B, N, C) -> out (B, rows * columns, C): call(task) pools row task % rows of the
// windows of batch row task / rows. Row b blends with row_alpha[b], or with alpha when there is none.
template <typename T>
struct Pooling {
  Tokens<T> tokens;
  int64_t channels;
  Windows windows;
  double alpha;
  const float* row_alpha;
  T* out;
  // Looked up where it is made: what that throws would lose its message inside a parallel loop.
  const RowKernels<T>& kernels = row_kernels<T>();

  void operator()(int64_t task) const {
    using A = accumulate_t<T>;
    const int64_t rows = windows.rows(), columns = windows.columns(), size = windows.sy * windows.sx;
    const int64_t b = task / rows, i = task % rows;
    const A nearest_weight = static_cast<A>(row_alpha == nullptr ? alpha : row_alpha[b]);
    const A window_weight = (1 - nearest_weight) / static_cast<A>(size);
    const int64_t nearest_row = Windows::nearest(i, windows.height, rows) * windows.width;
    std::vector<const T*> window(size);
    for (int64_t j = 0; j < columns; ++j) {
      const T* const nearest = tokens.row(b, nearest_row + Windows::nearest(j, windows.width, columns));
      T* const target = out + (task * columns + j) * channels;
      // What has weight zero is left out: zero times an infinite token would be NaN.
      if (nearest_weight == 1) {
        std::copy_n(nearest, channels, target);
        continue;
      }
      const int64_t first = i * windows.sy * windows.width + j * windows.sx;
      for (int64_t k = 0; k < size; ++k) {
        window[k] = tokens.row(b, first + k / windows.sx * windows.width + k % windows.sx);
      }
      if (nearest_weight == 0) {
        kernels.mean(window.data(), nullptr, size, static_cast<A>(size), channels, target);
        continue;
      }
      kernels.pool(window.data(), size, nearest, nearest_weight, window_weight, channels, target);
    }
  }
};

// xs: (B, N, C_i) -> (B, (H // sy) * (W // sx), C_i); row_alpha (B,) float32 replaces alpha
std::vector<Tensor> kv_downsample(const std::vector<Tensor>& xs, int64_t height, int64_t width, int64_t sy, int64_t sx,
                                  double alpha, const std::optional<Tensor>& row_alpha) {
  check_pool(xs, height, width, sy, sx, row_alpha);
  const Windows windows = {height, width, sy, sx};
  std::optional<Tensor> weights;
  if (row_alpha.has_value()) weights = torch::stable::contiguous(*row_alpha);
  const float* const weight = weights.has_value() ? weights->const_data_ptr<float>() : nullptr;
  std::vector<Tensor> inputs, pooled;
  std::vector<std::function<void(int64_t)>> poolings;
  int64_t most_channels = 0;
  for (const Tensor& input : xs) {
    inputs.push_back(with_unit_stride(input));
    const Tensor& x = inputs.back();
    pooled.push_back(new_tensor({x.size(0), windows.rows() * windows.columns(), x.size(2)}, x.scalar_type()));
    if (pooled.back().numel() == 0) continue;
    most_channels = std::max(most_channels, x.size(2));
    with_type_of(x, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      T* const out = static_cast<T*>(pooled.back().mutable_data_ptr());
      poolings.push_back(Pooling<T>{Tokens<T>(x), x.size(2), windows, alpha, weight, out});
    });
  }
  // Keys and values in one go: threads are woken once.
  const int64_t tasks = xs[0].size(0) * windows.rows();
  for_each_task(static_cast<int64_t>(poolings.size()) * tasks, sy * width * most_channels,
                [&](int64_t begin, int64_t end) {
                  for (int64_t i = begin; i < end; ++i) poolings[i / tasks](i % tasks);
                });
  return pooled;
}

}  // namespace
}  // namespace bigain

STABLE_TORCH_LIBRARY_FRAGMENT(bigain_cpp, m) {
  m.def(
      "kv_downsample(Tensor[] xs, int height, int width, int sy, int sx, float alpha, Tensor? row_alpha)"
      " -> Tensor[]");
}
STABLE_TORCH_LIBRARY_IMPL(bigain_cpp, CPU, m) { m.impl("kv_downsample", TORCH_BOX(&bigain::kv_downsample)); }
