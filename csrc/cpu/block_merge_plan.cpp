// block_merge_plan on the CPU: from tile scores to the tables of a MergePlan.
#include <cmath>
#include <limits>

#include "plan_rows.h"

namespace bigain {
namespace {

// One number for the scores of a tile, in float64; NaN counts as +inf.
double reduce_tile(const float* tile, int64_t width, int64_t sy, int64_t sx, const std::string& reduce) {
  double sum = 0, largest = -std::numeric_limits<double>::infinity(), smallest = -largest;
  for (int64_t i = 0; i < sy; ++i) {
    for (int64_t j = 0; j < sx; ++j) {
      const double value = tile[i * width + j];
      if (value != value) return std::numeric_limits<double>::infinity();
      sum += value;
      largest = std::max(largest, value);
      smallest = std::min(smallest, value);
    }
  }
  const double mean = sum / static_cast<double>(sy * sx);
  double squares = 0;
  for (int64_t i = 0; i < sy; ++i) {
    for (int64_t j = 0; j < sx; ++j) {
      const double difference = tile[i * width + j] - mean;
      squares += difference * difference;
    }
  }
  const double value = reduce == "max"    ? largest
                       : reduce == "min"  ? smallest
                       : reduce == "sum"  ? sum
                       : reduce == "mean" ? mean
                                          : std::sqrt(squares / static_cast<double>(sy * sx));
  return value != value ? std::numeric_limits<double>::infinity() : value;
}

// score (B, N) float32 -> tables with M = N - (sy * sx - 1) * min(r // (sy * sx - 1), tiles) slots
Tables block_merge_plan(const Tensor& input, int64_t height, int64_t width, int64_t sy, int64_t sx, int64_t r,
                        const std::string& reduce) {
  const BlockSizes sizes = check_block_plan(input, height, width, sy, sx, r, reduce);
  const Tensor score = torch::stable::contiguous(input);
  const int64_t batch = score.size(0), tokens = height * width;
  const int64_t tiles_x = width / sx, tiles = height / sy * tiles_x;
  const int64_t removed = sizes.removed, merged = sizes.merged;

  const Plan plan(batch, tokens, tokens - merged * removed);
  const PlanRows rows(plan);
  const float* const scores = score.const_data_ptr<float>();
  // Waking a thread takes as long as a small row.
  for_each_task(batch, 4 * tokens, [&](int64_t begin, int64_t end) {
    std::vector<std::pair<double, int64_t>> order(tiles);  // compares by value, then by tile
    std::vector<int32_t> assign(tokens);
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t n = 0; n < tokens; ++n) {
        assign[n] = static_cast<int32_t>(n);
      }
      if (merged > 0) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t corner = tile / tiles_x * sy * width + tile % tiles_x * sx;
          order[tile] = {reduce_tile(scores + b * tokens + corner, width, sy, sx, reduce), tile};
        }
        if (merged < tiles) std::nth_element(order.begin(), order.begin() + merged, order.end());
      }
      for (int64_t k = 0; k < merged; ++k) {
        const int64_t tile = order[k].second, corner = tile / tiles_x * sy * width + tile % tiles_x * sx;
        for (int64_t i = 0; i < sy; ++i) {
          std::fill_n(assign.begin() + corner + i * width, sx, static_cast<int32_t>(corner));
        }
      }
      rows.fill(b, assign.data());
    }
  });
  return plan.tables();
}

}  // namespace
}  // namespace bigain

STABLE_TORCH_LIBRARY_FRAGMENT(bigain_cpp, m) {
  m.def(
      "block_merge_plan(Tensor score, int height, int width, int sy, int sx, int r, str reduce)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(bigain_cpp, CPU, m) { m.impl("block_merge_plan", TORCH_BOX(&bigain::block_merge_plan)); }
