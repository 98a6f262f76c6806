// select_destinations on the CPU (BiGain, arXiv 2603.12240).
#include <algorithm>
#include <limits>

#include "op_common.h"

namespace bigain {
namespace {

// score (B, N) -> (B, D) int32, ascending
Tensor select_destinations(const Tensor& input, int64_t height, int64_t width, int64_t sy, int64_t sx) {
  check_tiles(input, height, width, sy, sx);
  const Tensor score = with_unit_stride(input);
  const int64_t batch = score.size(0), tiles_y = height / sy, tiles_x = width / sx, count = tiles_y * tiles_x;
  Tensor destinations = new_tensor({batch, count}, ScalarType::Int);
  int32_t* const chosen = destinations.mutable_data_ptr<int32_t>();
  for_each_task(batch, height * width, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const float* values = score.const_data_ptr<float>() + b * score.stride(0);
      int32_t* out = chosen + b * count;
      for (int64_t tile = 0; tile < count; ++tile) {
        const int64_t first = tile / tiles_x * sy * width + tile % tiles_x * sx;
        int64_t best = first;
        float lowest = std::numeric_limits<float>::infinity();
        for (int64_t i = 0; i < sy; ++i) {
          for (int64_t j = 0; j < sx; ++j) {
            // Strictly less: ties to the lowest token. False for NaN, which counts as infinity.
            const int64_t n = first + i * width + j;
            if (values[n] < lowest) {
              lowest = values[n];
              best = n;
            }
          }
        }
        out[tile] = static_cast<int32_t>(best);
      }
      // Within a row of tiles a tile further right may have chosen a token of a higher row.
      for (int64_t tile = 0; tile < count; tile += tiles_x) {
        std::sort(out + tile, out + tile + tiles_x);
      }
    }
  });
  return destinations;
}

}  // namespace
}  // namespace bigain

STABLE_TORCH_LIBRARY_FRAGMENT(bigain_cpp, m) {
  m.def("select_destinations(Tensor score, int height, int width, int sy, int sx) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(bigain_cpp, CPU, m) {
  m.impl("select_destinations", TORCH_BOX(&bigain::select_destinations));
}
