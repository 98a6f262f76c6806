// merge_plan for CUDA tensors: one launch.
#include <string>

#include "bigain/merge_plan.cuh"
#include "op_common_cuda.h"
#include "plan_tables.h"

namespace bigain {

// lgtm_plan.cu calls these.
template void plan::launch_words<true, plan::Narrow>(const PlanInputs&, int64_t, const plan::Layout&, const PlanTables&,
                                                     void*, cudaStream_t);
template void plan::launch_words<true, plan::Wide>(const PlanInputs&, int64_t, const plan::Layout&, const PlanTables&,
                                                   void*, cudaStream_t);
template void plan::launch_words<false, plan::Narrow>(const PlanInputs&, int64_t, const plan::Layout&,
                                                      const PlanTables&, void*, cudaStream_t);
template void plan::launch_words<false, plan::Wide>(const PlanInputs&, int64_t, const plan::Layout&, const PlanTables&,
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
  const int on_device = multiprocessors();
  const Tensor scratch = plan_scratch(similarity, merge_plan_scratch_bytes(batch, tokens, on_device));
  PlanInputs p = {};
  p.similarity = data_of<float>(similarity);
  p.match = data_of<int32_t>(match);
  p.destinations = data_of<int32_t>(destinations);
  p.similarity_stride = similarity.stride(0);
  p.match_stride = match.stride(0);
  p.destination_stride = destinations.stride(0);
  p.num_destinations = count;
  launch_merge_plan(p, batch, tokens, r, plan.pointers(), mutable_data_of<void>(scratch), on_device, on.stream());
  return plan.tables();
}

}  // namespace
}  // namespace bigain

STABLE_TORCH_LIBRARY_FRAGMENT(bigain_cuda, m) {
  m.def("merge_plan(Tensor similarity, Tensor match, Tensor destinations, int r) -> (Tensor, Tensor, Tensor, Tensor)");
}
BIGAIN_IMPL(bigain_cuda, m) { m.impl("merge_plan", TORCH_BOX(&bigain::merge_plan)); }
