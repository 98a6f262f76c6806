// kv_downsample for CUDA tensors: one launch for all tensors of a dtype, up to kPoolTensors of them.
#include "bigain/kv_downsample.cuh"
#include "op_common_cuda.h"

namespace bigain {
namespace {

// xs: (B, N, C_i) -> (B, (H // sy) * (W // sx), C_i); row_alpha (B,) float32 replaces alpha
std::vector<Tensor> kv_downsample(const std::vector<Tensor>& xs, int64_t height, int64_t width, int64_t sy, int64_t sx,
                                  double alpha, const std::optional<Tensor>& row_alpha) {
  check_pool(xs, height, width, sy, sx, row_alpha);
  const OnDeviceOf on(xs[0]);
  std::optional<Tensor> weights;
  if (row_alpha.has_value()) weights = torch::stable::contiguous(*row_alpha);
  std::vector<Tensor> inputs, pooled;
  for (const Tensor& x : xs) {
    inputs.push_back(with_unit_stride(x));
    pooled.push_back(new_tensor(x, {x.size(0), (height / sy) * (width / sx), x.size(2)}, x.scalar_type()));
  }
  std::vector<bool> done(xs.size(), false);
  for (size_t first = 0; first < xs.size(); ++first) {
    if (done[first]) continue;
    with_type_of(inputs[first], [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      KvDownsample<T> problem = {};
      problem.batch = to_int(inputs[first].size(0));
      problem.height = to_int(height);
      problem.width = to_int(width);
      problem.sy = to_int(sy);
      problem.sx = to_int(sx);
      problem.alpha = static_cast<float>(alpha);
      problem.row_alpha = weights.has_value() ? data_of<float>(*weights) : nullptr;
      for (size_t i = first; i < xs.size() && problem.count < kPoolTensors; ++i) {
        const Tensor& x = inputs[i];
        if (done[i] || x.scalar_type() != inputs[first].scalar_type()) continue;
        done[i] = true;
        problem.tensors[problem.count++] = {data_of<T>(x), x.stride(0), x.stride(1), x.size(2),
                                            mutable_data_of<T>(pooled[i])};
      }
      launch_kv_downsample(problem, on.stream());
    });
  }
  return pooled;
}

}  // namespace
}  // namespace bigain

STABLE_TORCH_LIBRARY_FRAGMENT(bigain_cuda, m) {
  m.def(
      "kv_downsample(Tensor[] xs, int height, int width, int sy, int sx, float alpha, Tensor? row_alpha)"
      " -> Tensor[]");
}
BIGAIN_IMPL(bigain_cuda, m) { m.impl("kv_downsample", TORCH_BOX(&bigain::kv_downsample)); }
