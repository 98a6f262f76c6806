// block_merge_plan for CUDA tensors: one launch.
#include <string>

#include "bigain/block_merge_plan.cuh"
#include "op_common_cuda.h"
#include "plan_tables.h"

namespace bigain {
namespace {

// A name that check_block_plan lets pass.
Reduce reduce_of(const std::string& name) {
  if (name == "max") return Reduce::kMax;
  if (name == "sum") return Reduce::kSum;
  if (name == "mean") return Reduce::kMean;
  return name == "min" ? Reduce::kMin : Reduce::kStd;
}

// score (B, N) float32 -> tables with M = N - (sy * sx - 1) * min(r // (sy * sx - 1), tiles) slots
Tables block_merge_plan(const Tensor& input, int64_t height, int64_t width, int64_t sy, int64_t sx, int64_t r,
                        const std::string& reduce) {
  const BlockSizes sizes = check_block_plan(input, height, width, sy, sx, r, reduce);
  const OnDeviceOf on(input);
  const Tensor score = with_unit_stride(input);
  const int64_t batch = score.size(0), tokens = height * width;
  BlockPlanInputs p = {};
  p.score = data_of<float>(score);
  p.score_stride = score.stride(0);
  p.grid = TileGrid(height, width, sy, sx);
  p.count = sizes.merged;
  p.reduce = reduce_of(reduce);
  const int64_t slots = tokens - sizes.merged * sizes.removed;
  NewPlan plan(score, batch, tokens, slots);
  const int on_device = multiprocessors();
  const Tensor scratch = plan_scratch(score, block_merge_plan_scratch_bytes(batch, tokens, on_device));
  launch_block_merge_plan(p, batch, plan.pointers(), mutable_data_of<void>(scratch), on_device, on.stream());
  return plan.tables();
}

}  // namespace
}  // namespace bigain

STABLE_TORCH_LIBRARY_FRAGMENT(bigain_cuda, m) {
  m.def(
      "block_merge_plan(Tensor score, int height, int width, int sy, int sx, int r, str reduce)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
}
BIGAIN_IMPL(bigain_cuda, m) { m.impl("block_merge_plan", TORCH_BOX(&bigain::block_merge_plan)); }
