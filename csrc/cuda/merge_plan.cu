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
  check_dtype("similarity", similarity_in, 2, ScalarType::Float, "float32");
  check_int32("match", match_in, 2);
  check_int32("destinations", destinations_in, 2);
  check_same_device("match", match_in, similarity_in);
  check_same_device("destinations", destinations_in, similarity_in);
  const int64_t batch = similarity_in.size(0), tokens = similarity_in.size(1), count = destinations_in.size(1);
  check_token_count("similarity", tokens);
  check_shape("match", match_in, {batch, tokens});
  check_shape("destinations", destinations_in, {batch, count});
  // Without destinations there is nothing to merge into.
  const int64_t sources = count > 0 ? std::max<int64_t>(tokens - count, 0) : 0;
  if (r < 0 || r > sources) {
    fail("r: got ", r, ", expected 0 <= r <= ", sources, ", the number of sources that can merge");
  }
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

Reduce reduce_of(const std::string& name) {
  if (name == "max") return Reduce::kMax;
  if (name == "sum") return Reduce::kSum;
  if (name == "mean") return Reduce::kMean;
  if (name == "min") return Reduce::kMin;
  if (name == "std") return Reduce::kStd;
  fail("reduce: got '", name, "', expected max, sum, mean, min or std");
}

// score (B, N) float32 -> tables with M = N - (sy * sx - 1) * min(r // (sy * sx - 1), tiles) slots
Tables block_merge_plan(const Tensor& input, int64_t height, int64_t width, int64_t sy, int64_t sx, int64_t r,
                        const std::string& reduce) {
  check_dtype("score", input, 2, ScalarType::Float, "float32");
  check_grid(height, width, input.size(1));
  check_token_count("score", input.size(1));
  check_stride(sy, sx);
  if (r < 0) fail("r: got ", r, ", expected at least 0");
  const OnDeviceOf on(input);
  const Tensor score = with_unit_stride(input);
  const int64_t batch = score.size(0), tokens = height * width, tiles = height / sy * (width / sx);
  // Without a tile, sy * sx may be too large to multiply.
  const int64_t removed = tiles > 0 ? sy * sx - 1 : 0;
  BlockPlanInputs p = {};
  p.score = data_of<float>(score);
  p.score_stride = score.stride(0);
  p.height = height;
  p.width = width;
  // Larger than the grid is as good as one more than it.
  p.sy = std::min(sy, height + 1);
  p.sx = std::min(sx, width + 1);
  p.count = removed > 0 ? std::min(r / removed, tiles) : 0;
  p.reduce = reduce_of(reduce);
  const int64_t slots = tokens - p.count * removed;
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
