// laplacian_score on the CPU (BiGain, arXiv 2603.12240).
#include "op_common.h"
#include "row_kernels.h"

namespace bigain {
namespace {

// x (B, N, C) -> (B, N) float32; N are the tokens of `frames` grids
template <typename T>
void score_tokens(const Tensor& x, int64_t height, int64_t width, int64_t frames, bool l2, float* score) {
  const Tokens<T> tokens(x);
  const int64_t channels = x.size(2);
  const RowKernels<T>& kernels = row_kernels<T>();
  const auto laplacian = l2 ? kernels.laplacian_l2 : kernels.laplacian_l1;
  // Stands for the tokens outside the grid.
  const std::vector<T> zeros(std::max<int64_t>(channels, 1), T{});
  // Down the rows of a few columns: a token is in the first-level cache when it is read again as a neighbour.
  constexpr int64_t kBlockRows = 8;
  const int64_t blocks = (height + kBlockRows - 1) / kBlockRows;
  for_each_task(x.size(0) * frames * blocks, kBlockRows * width * channels, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks / frames, frame = task / blocks % frames, first_row = task % blocks * kBlockRows;
      const int64_t first = frame * height * width;
      const auto token = [&](int64_t row, int64_t column) {
        const bool inside = row >= 0 && row < height && column >= 0 && column < width;
        return inside ? tokens.row(b, first + row * width + column) : zeros.data();
      };
      // A frame that is not there is the frame itself.
      const int64_t before = frame > 0 ? -height * width : 0, after = frame + 1 < frames ? height * width : 0;
      for (int64_t column = 0; column < width; column += 4) {
        for (int64_t y = first_row; y < std::min(first_row + kBlockRows, height); ++y) {
          const T *row[6], *above[4], *below[4];
          accumulate_t<T> norms[4];
          for (int64_t i = 0; i < 6; ++i) {
            row[i] = token(y, column + i - 1);
          }
          for (int64_t i = 0; i < 4; ++i) {
            above[i] = token(y - 1, column + i);
            below[i] = token(y + 1, column + i);
          }
          const T* times[8];
          for (int64_t i = 0; frames > 1 && i < 4; ++i) {
            const int64_t n = first + y * width + std::min(column + i, width - 1);
            times[i] = tokens.row(b, n + before);
            times[4 + i] = tokens.row(b, n + after);
          }
          laplacian(row, above, below, frames > 1 ? times : nullptr, channels, norms);
          for (int64_t i = 0; i < std::min<int64_t>(4, width - column); ++i) {
            score[(b * frames + frame) * height * width + y * width + column + i] = static_cast<float>(norms[i]);
          }
        }
      }
    }
  });
}

Tensor laplacian_score(const Tensor& input, int64_t height, int64_t width, const std::string& norm, int64_t frames) {
  check_score_arguments(input, height, width, norm, frames);
  const Tensor x = with_unit_stride(input);
  Tensor score = new_tensor({x.size(0), x.size(1)}, ScalarType::Float);
  with_type_of(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    score_tokens<T>(x, height, width, frames, norm == "l2", score.mutable_data_ptr<float>());
  });
  return score;
}

}  // namespace
}  // namespace bigain

STABLE_TORCH_LIBRARY_FRAGMENT(bigain_cpp, m) {
  m.def("laplacian_score(Tensor x, int height, int width, str norm, int frames=1) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(bigain_cpp, CPU, m) { m.impl("laplacian_score", TORCH_BOX(&bigain::laplacian_score)); }
