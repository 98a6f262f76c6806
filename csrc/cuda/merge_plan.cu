// merge_plan and block_merge_plan for CUDA tensors: one launch each.
#include <string>

#include "bigain/merge_plan.cuh"
#include "op_common_cuda.h"
#include "plan_tables.h"

namespace bigain {

// lgtm_plan.cu calls these.
template void plan::launch_words<true, uint32_t>(const PlanInputs&, int64_t, int64_t, int64_t, const PlanTables&, void*,
                                                 cudaStream_t);
template void plan::launch_words<true, uint64_t>(const PlanInputs&, int64_t, int64_t, int64_t, const PlanTables&, void*,
                                                 cudaStream_t);
template void plan::launch_words<false, uint32_t>(const PlanInputs&, int64_t, int64_t, int64_t, const PlanTables&,
                                                  void*, cudaStream_t);
template void plan::launch_words<false, uint64_t>(const PlanInputs&, int64_t, int64_t, int64_t, const PlanTables&,
                                                  void*, cudaStream_t);

namespace {

// similarity (B, N) float32, match (B, N) int32, destinations (B, D) int32 -> tables with M = N - r slots
//
// Reading the values of `match` would wait for the device: a match that is no destination gives a wrong plan, not an
// error.
Tables merge_plan(const Tensor& similarity_in, const Tensor& match_in, const Tensor& destinations_in, int64_t r) {
  check_plan_arguments(similarity_in, match_in, destinations_in, r);
  const int64_t batch = similarity_in.size(0), tokens = similarity_in.size(1), count = destinations_in.size(1);
  const OnDeviceOf on(similarity_in);
  const Tensor similarity = with_unit_stride(similarity_in), match = with_unit_stride(match_in);
  const Tensor destinations = with_unit_stride(destinations_in);
  NewPlan plan(similarity, batch, tokens, tokens - r);
  const Tensor scratch = plan_scratch(similarity, batch, merge_plan_scratch_bytes(tokens, r));
  PlanInputs p = {};
  p.similarity = data_of<float>(similarity);
  p.match = data_of<int32_t>(match);
  p.destinations = data_of<int32_t>(destinations);
  p.similarity_stride = similarity.stride(0);
  p.match_stride = match.stride(0);
  p.destination_stride = destinations.stride(0);
  p.num_destinations = count;
  launch_merge_plan(p, batch, tokens, r, plan.pointers(), mutable_data_of<void>(scratch), on.stream());
  return plan.tables();
}

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
  p.height = height;
  p.width = width;
  // Larger than the grid is as good as one more than it.
  p.sy = std::min(sy, height + 1);
  p.sx = std::min(sx, width + 1);
  p.count = sizes.merged;
  p.reduce = reduce_of(reduce);
  const int64_t slots = tokens - sizes.merged * sizes.removed;
  NewPlan plan(score, batch, tokens, slots);
  const Tensor scratch = plan_scratch(score, batch, block_merge_plan_scratch_bytes(tokens, slots));
  launch_block_merge_plan(p, batch, plan.pointers(), mutable_data_of<void>(scratch), on.stream());
  return plan.tables();
}

}  // namespace
}  // namespace bigain

STABLE_TORCH_LIBRARY_FRAGMENT(bigain_cuda, m) {
  m.def("merge_plan(Tensor similarity, Tensor match, Tensor destinations, int r) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "block_merge_plan(Tensor score, int height, int width, int sy, int sx, int r, str reduce)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
}
BIGAIN_IMPL(bigain_cuda, m) {
  m.impl("merge_plan", TORCH_BOX(&bigain::merge_plan));
  m.impl("block_merge_plan", TORCH_BOX(&bigain::block_merge_plan));
}
