// laplacian_score for CUDA tensors.
#include "bigain/laplacian_score.cuh"
#include "op_common_cuda.h"

namespace bigain {
namespace {

// x (B, N, C) -> (B, N) float32; N are the tokens of `frames` grids
Tensor laplacian_score(const Tensor& input, int64_t height, int64_t width, const std::string& norm, int64_t frames) {
  check_score_arguments(input, height, width, norm, frames);
  const OnDeviceOf on(input);
  const Tensor x = with_unit_stride(input);
  Tensor score = new_tensor(x, {x.size(0), x.size(1)}, ScalarType::Float);
  with_type_of(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    LaplacianScore<T> problem = {};
    problem.x = data_of<T>(x);
    problem.batch_stride = x.stride(0);
    problem.token_stride = x.stride(1);
    problem.rows = to_int(x.size(0) * frames);
    problem.frames = to_int(frames);
    problem.channels = x.size(2);
    problem.grid = TileGrid(height, width, 1, 1);
    problem.score = mutable_data_of<float>(score);
    if (norm == "l1") {
      launch_laplacian_score<T, ScoreMode::kL1>(problem, on.stream());
    } else {
      launch_laplacian_score<T, ScoreMode::kL2>(problem, on.stream());
    }
  });
  return score;
}

}  // namespace
}  // namespace bigain

STABLE_TORCH_LIBRARY_FRAGMENT(bigain_cuda, m) {
  m.def("laplacian_score(Tensor x, int height, int width, str norm, int frames=1) -> Tensor");
}
BIGAIN_IMPL(bigain_cuda, m) { m.impl("laplacian_score", TORCH_BOX(&bigain::laplacian_score)); }
