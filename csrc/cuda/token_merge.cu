// token_merge, token_merge_norm and token_unmerge for CUDA tensors. The values of the tables are on the device and are
// not checked here: the kernels clamp them.
#include "bigain/layer_norm.cuh"
#include "bigain/token_merge.cuh"
#include "bigain/token_unmerge.cuh"
#include "op_common_cuda.h"

namespace bigain {
namespace {

// The tensor as float32 with a unit last stride.
Tensor as_float(const Tensor& tensor) {
  return with_unit_stride(tensor.scalar_type() == ScalarType::Float ? tensor
                                                                    : torch::stable::to(tensor, ScalarType::Float));
}

template <typename T>
void copy_rows(const Tensor& y, const Tensor& index, const Tensor& out, TokenUnmerge<T> problem, cudaStream_t stream) {
  problem.y = data_of<T>(y);
  problem.batch_stride = y.stride(0);
  problem.slot_stride = y.stride(1);
  problem.batch = to_int(y.size(0));
  problem.slots = to_int(y.size(1));
  problem.tokens = to_int(index.size(1));
  problem.channels = y.size(2);
  problem.index = data_of<int32_t>(index);
  problem.plan_rows = to_int(index.size(0));
  problem.out = mutable_data_of<T>(out);
  launch_token_unmerge(problem, stream);
}

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

// An operand that a kernel reads as it is: it has the dtype of x, or becomes float32.
struct WideOperand {
  std::optional<Tensor> tensor;
  Operand kind = Operand::kNone;

  WideOperand(const std::optional<Tensor>& given, const Tensor& x) {
    if (!given.has_value()) return;
    const bool same = given->scalar_type() == x.scalar_type();
    kind = same ? Operand::kSame : Operand::kWide;
    tensor = same ? with_unit_stride(*given) : as_float(*given);
  }

  ChannelRows rows() const {
    if (!tensor.has_value()) return {};
    return {tensor->const_data_ptr(), kind, tensor->dim() == 2 ? tensor->stride(0) : 0};
  }
};

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

// y (B, M, C), plan tables, residual (B, N, C) or none, gate (B, C) or none -> (B, N, C)
Tensor token_unmerge(const Tensor& input, const Tensor& slot_in, const Tensor& offsets, const Tensor& members,
                     const Tensor& anchor, const std::optional<Tensor>& residual_in,
                     const std::optional<Tensor>& gate_in) {
  const PlanSizes sizes = check_unmerge(input, slot_in, offsets, members, anchor, residual_in, gate_in);
  const OnDeviceOf on(input);
  const Tensor slot = torch::stable::contiguous(slot_in), y = with_unit_stride(input);
  const WideOperand residual(residual_in, y), gate(gate_in, y);
  Tensor out = new_tensor(y, {sizes.batch, sizes.tokens, sizes.channels}, y.scalar_type());
  if (out.numel() == 0) return out;
  with_type_of(y, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    TokenUnmerge<T> problem = {};
    problem.gate_is = gate.kind;
    if (gate.tensor.has_value()) {
      problem.gate = gate.tensor->const_data_ptr();
      problem.gate_stride = gate.tensor->stride(0);
    }
    problem.residual_is = residual.kind;
    if (residual.tensor.has_value()) {
      problem.residual = residual.tensor->const_data_ptr();
      problem.residual_batch_stride = residual.tensor->stride(0);
      problem.residual_token_stride = residual.tensor->stride(1);
    }
    copy_rows<T>(y, slot, out, problem, on.stream());
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
  m.def(
      "token_unmerge(Tensor y, Tensor slot, Tensor offsets, Tensor members, Tensor anchor, Tensor? residual,"
      " Tensor? gate) -> Tensor");
}
BIGAIN_IMPL(bigain_cuda, m) {
  m.impl("token_merge", TORCH_BOX(&bigain::token_merge));
  m.impl("token_merge_norm", TORCH_BOX(&bigain::token_merge_norm));
  m.impl("token_unmerge", TORCH_BOX(&bigain::token_unmerge));
}
