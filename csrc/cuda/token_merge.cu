// token_merge and token_merge_norm for CUDA tensors. The values of the tables are on the device and are not checked
// here: the kernels clamp them.
#include "bigain/layer_norm.cuh"
#include "bigain/merge_rescale.cuh"
#include "bigain/token_merge.cuh"
#include "op_common_cuda.h"
#include "row_operands.h"

namespace bigain {
namespace {

// The mean in float32, the norms of the tokens, and the mean brought to the length of the longest: three launches.
template <typename T>
void merge_to_longest(const TokenMerge<T>& problem, const Tensor& x, const Tensor& out, cudaStream_t stream) {
  const MergeTables& tables = problem.tables;
  const Tensor mean = new_tensor(x, {problem.batch, tables.slots, problem.channels}, ScalarType::Float);
  const Tensor norms = new_tensor(x, {problem.batch, tables.tokens}, ScalarType::Float);
  launch_token_merge_mean(problem, mutable_data_of<float>(mean), stream);
  const RowNorms<T> tokens = {
      problem.x, problem.batch_stride,         problem.token_stride, problem.batch, tables.tokens, problem.channels,
      false,     mutable_data_of<float>(norms)};
  launch_row_norms(tokens, stream);
  const MergeRescale<T> rescale = {
      data_of<float>(mean), data_of<float>(norms), problem.batch, problem.channels, tables, mutable_data_of<T>(out)};
  launch_merge_rescale(rescale, stream);
}

// The tensors of a merge, checked, as the kernels read them.
struct Merge : PlanSizes {
  OnDeviceOf on;
  Tensor x, offsets, members, anchor;
  std::optional<Tensor> weights;

  Merge(const Tensor& input, const Tensor& slot, const Tensor& offsets_in, const Tensor& members_in,
        const Tensor& anchor_in, const std::optional<Tensor>& weights_in)
      : PlanSizes(check_merge(input, slot, offsets_in, members_in, anchor_in, weights_in)),
        on(input),
        x(with_unit_stride(input)),
        offsets(torch::stable::contiguous(offsets_in)),
        members(torch::stable::contiguous(members_in)),
        anchor(torch::stable::contiguous(anchor_in)) {
    if (weights_in.has_value()) weights = as_float(*weights_in);
  }

  template <typename T>
  TokenMerge<T> problem() const {
    TokenMerge<T> problem = {};
    problem.x = data_of<T>(x);
    problem.batch_stride = x.stride(0);
    problem.token_stride = x.stride(1);
    problem.batch = to_int(batch);
    problem.channels = channels;
    problem.tables = {data_of<int32_t>(offsets), data_of<int32_t>(members), to_int(rows), to_int(tokens),
                      to_int(slots)};
    if (weights.has_value()) {
      problem.weights = data_of<float>(*weights);
      problem.weight_batch_stride = weights->stride(0);
    }
    return problem;
  }
};

// x (B, N, C), plan tables of P rows with P dividing B -> (B, M, C)
Tensor token_merge(const Tensor& input, const Tensor& slot, const Tensor& offsets, const Tensor& members,
                   const Tensor& anchor, const std::string& mode, const std::optional<Tensor>& weights) {
  check_merge_mode(mode);
  const Merge merge(input, slot, offsets, members, anchor, weights);
  Tensor out = new_tensor(merge.x, {merge.batch, merge.slots, merge.channels}, merge.x.scalar_type());
  if (out.numel() == 0) return out;
  with_type_of(merge.x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (mode == "prune") {
      copy_rows<T>(merge.x, merge.anchor, out, {}, merge.on.stream());
    } else if (mode == "mean") {
      launch_token_merge_mean(merge.problem<T>(), mutable_data_of<T>(out), merge.on.stream());
    } else {
      merge_to_longest(merge.problem<T>(), merge.x, out, merge.on.stream());
    }
  });
  return out;
}

// token_merge with mode "mean" of LayerNorm(x): two launches. norm_weight and norm_bias (C), scale and shift (B, C).
Tensor token_merge_norm(const Tensor& input, const Tensor& slot, const Tensor& offsets, const Tensor& members,
                        const Tensor& anchor, const std::optional<Tensor>& weights, double norm_eps,
                        const std::optional<Tensor>& norm_weight_in, const std::optional<Tensor>& norm_bias_in,
                        const std::optional<Tensor>& scale_in, const std::optional<Tensor>& shift_in) {
  const Merge merge(input, slot, offsets, members, anchor, weights);
  check_norm(input, merge, norm_weight_in, norm_bias_in, scale_in, shift_in);
  const int64_t batch = merge.batch, channels = merge.channels;
  const WideOperand norm_weight(norm_weight_in, input), norm_bias(norm_bias_in, input);
  const WideOperand scale(scale_in, input), shift(shift_in, input);
  Tensor out = new_tensor(merge.x, {batch, merge.slots, channels}, merge.x.scalar_type());
  if (out.numel() == 0) return out;
  const Tensor statistics = new_tensor(merge.x, {batch, merge.tokens, 2}, ScalarType::Float);
  with_type_of(merge.x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const TokenMerge<T> problem = merge.problem<T>();
    Moments* const moments = mutable_data_of<Moments>(statistics);
    const float eps = static_cast<float>(norm_eps);
    const RowMoments<T> tokens = {
        problem.x, problem.batch_stride, problem.token_stride, batch, merge.tokens, channels, eps, moments};
    launch_row_moments(tokens, merge.on.stream());
    const MergeNorm norm = {moments, {norm_weight.rows(), norm_bias.rows(), scale.rows(), shift.rows()}};
    launch_token_merge_mean(problem, mutable_data_of<T>(out), merge.on.stream(), norm);
  });
  return out;
}

}  // namespace
}  // namespace bigain

STABLE_TORCH_LIBRARY_FRAGMENT(bigain_cuda, m) {
  m.def(
      "token_merge(Tensor x, Tensor slot, Tensor offsets, Tensor members, Tensor anchor, str mode, Tensor? weights)"
      " -> Tensor");
  m.def(
      "token_merge_norm(Tensor x, Tensor slot, Tensor offsets, Tensor members, Tensor anchor, Tensor? weights,"
      " float norm_eps, Tensor? norm_weight, Tensor? norm_bias, Tensor? scale, Tensor? shift) -> Tensor");
}
BIGAIN_IMPL(bigain_cuda, m) {
  m.impl("token_merge", TORCH_BOX(&bigain::token_merge));
  m.impl("token_merge_norm", TORCH_BOX(&bigain::token_merge_norm));
}
