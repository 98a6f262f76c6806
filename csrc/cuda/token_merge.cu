// token_merge, token_merge_norm and token_unmerge for CUDA tensors. The values of the tables are on the device and are
// not checked here: the kernels clamp them.
#include "bigain/layer_norm.cuh"
#include "bigain/token_merge.cuh"
#include "bigain/token_unmerge.cuh"
#include "op_common_cuda.h"

namespace bigain {
namespace {

// Checks one table of a plan, (P, width) int32; returns it contiguous.
Tensor plan_table(const char* name, const Tensor& table, const Tensor& x, int64_t rows, int64_t width) {
  check_int32(name, table, 2);
  check_shape(name, table, {rows, width});
  check_same_device(name, table, x);
  return torch::stable::contiguous(table);
}

// P, the rows of the plan, which divide the batch.
int64_t plan_rows(const char* name, const Tensor& slot, int64_t batch) {
  check_int32("slot", slot, 2);
  const int64_t rows = slot.size(0);
  if (rows == 0 ? batch != 0 : batch % rows != 0) {
    fail(name, ": got batch ", batch, ", expected a multiple of the plan's ", rows, " rows");
  }
  return rows;
}

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
struct Merge {
  Tensor x, offsets, members, anchor;
  std::optional<Tensor> weights;
  int64_t batch, tokens, channels, slots, rows;

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

// x is a computable tensor (B, N, C); the tables have P rows with P dividing B.
Merge checked_merge(const Tensor& x, const Tensor& slot, const Tensor& offsets, const Tensor& members,
                    const Tensor& anchor, const std::optional<Tensor>& weights_in) {
  check_int32("anchor", anchor, 2);
  const int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2), slots = anchor.size(1);
  check_token_count("x", tokens);
  if (slots > tokens) fail("anchor: got ", slots, " slots, expected at most ", tokens, ", as x has tokens");
  const int64_t rows = plan_rows("x", slot, batch);
  check_shape("slot", slot, {rows, tokens});
  const Tensor anchor_table = plan_table("anchor", anchor, x, rows, slots);
  const Tensor members_table = plan_table("members", members, x, rows, tokens);
  const Tensor offsets_table = plan_table("offsets", offsets, x, rows, slots + 1);
  std::optional<Tensor> weights;
  if (weights_in.has_value()) {
    check_computable("weights", *weights_in, 2);
    check_shape("weights", *weights_in, {batch, tokens});
    check_same_device("weights", *weights_in, x);
    weights = as_float(*weights_in);
  }
  return {
      with_unit_stride(x), offsets_table, members_table, anchor_table, weights, batch, tokens, channels, slots, rows};
}

// x (B, N, C), plan tables of P rows with P dividing B -> (B, M, C)
Tensor token_merge(const Tensor& input, const Tensor& slot, const Tensor& offsets, const Tensor& members,
                   const Tensor& anchor, const std::string& mode, const std::optional<Tensor>& weights) {
  check_computable("x", input, 3);
  if (mode != "mean" && mode != "mlerp" && mode != "prune") {
    fail("mode: got '", mode, "', expected mean, mlerp or prune");
  }
  const OnDeviceOf on(input);
  const Merge merge = checked_merge(input, slot, offsets, members, anchor, weights);
  Tensor out = new_tensor(merge.x, {merge.batch, merge.slots, merge.channels}, merge.x.scalar_type());
  if (out.numel() == 0) return out;
  with_type_of(merge.x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (mode == "prune") {
      copy_rows<T>(merge.x, merge.anchor, out, {}, on.stream());
    } else if (mode == "mean") {
      launch_token_merge_mean(merge.problem<T>(), mutable_data_of<T>(out), on.stream());
    } else {
      merge_to_longest(merge.problem<T>(), merge.x, out, on.stream());
    }
  });
  return out;
}

// An operand of the affine parts of a LayerNorm, checked; operands of the dtype of x and of float32 are read as they
// are.
struct ChannelOperand {
  std::optional<Tensor> tensor;
  Operand kind = Operand::kNone;

  ChannelOperand(const char* name, const std::optional<Tensor>& given, std::initializer_list<int64_t> shape,
                 const Tensor& x) {
    if (!given.has_value()) return;
    check_computable(name, *given, static_cast<int64_t>(shape.size()));
    check_shape(name, *given, shape);
    check_same_device(name, *given, x);
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
  check_computable("x", input, 3);
  check_pair("norm_weight", norm_weight_in, "norm_bias", norm_bias_in);
  check_pair("scale", scale_in, "shift", shift_in);
  const OnDeviceOf on(input);
  const Merge merge = checked_merge(input, slot, offsets, members, anchor, weights);
  const int64_t batch = merge.batch, channels = merge.channels;
  const ChannelOperand norm_weight("norm_weight", norm_weight_in, {channels}, input);
  const ChannelOperand norm_bias("norm_bias", norm_bias_in, {channels}, input);
  const ChannelOperand scale("scale", scale_in, {batch, channels}, input);
  const ChannelOperand shift("shift", shift_in, {batch, channels}, input);
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
    launch_row_moments(tokens, on.stream());
    const MergeNorm norm = {moments, {norm_weight.rows(), norm_bias.rows(), scale.rows(), shift.rows()}};
    launch_token_merge_mean(problem, mutable_data_of<T>(out), on.stream(), norm);
  });
  return out;
}

// y (B, M, C), plan tables, residual (B, N, C) or none, gate (B, C) or none -> (B, N, C)
Tensor token_unmerge(const Tensor& input, const Tensor& slot_in, const Tensor& offsets, const Tensor& members,
                     const Tensor& anchor, const std::optional<Tensor>& residual_in,
                     const std::optional<Tensor>& gate_in) {
  check_computable("y", input, 3);
  const int64_t batch = input.size(0), slots = input.size(1), channels = input.size(2);
  const int64_t rows = plan_rows("y", slot_in, batch), tokens = slot_in.size(1);
  check_token_count("slot", tokens);
  if (slots == 0 && tokens > 0) fail("y: got no slots, expected at least one for ", tokens, " tokens");
  check_int32("offsets", offsets, 2);
  check_int32("members", members, 2);
  check_int32("anchor", anchor, 2);
  check_shape("offsets", offsets, {rows, slots + 1});
  check_shape("members", members, {rows, tokens});
  check_shape("anchor", anchor, {rows, slots});
  const OnDeviceOf on(input);
  const Tensor slot = plan_table("slot", slot_in, input, rows, tokens);
  const Tensor y = with_unit_stride(input);
  // Operands of the dtype of y and of float32 are read as they are.
  const auto operand = [&](const char* name, const Tensor& tensor, Operand& kind) {
    check_same_device(name, tensor, y);
    const bool same = tensor.scalar_type() == y.scalar_type();
    kind = same ? Operand::kSame : Operand::kWide;
    return same ? with_unit_stride(tensor) : as_float(tensor);
  };
  std::optional<Tensor> residual, gate;
  Operand residual_is = Operand::kNone, gate_is = Operand::kNone;
  if (gate_in.has_value()) {
    check_computable("gate", *gate_in, 2);
    check_shape("gate", *gate_in, {batch, channels});
    gate = operand("gate", *gate_in, gate_is);
  }
  if (residual_in.has_value()) {
    check_computable("residual", *residual_in, 3);
    check_shape("residual", *residual_in, {batch, tokens, channels});
    residual = operand("residual", *residual_in, residual_is);
  }
  Tensor out = new_tensor(y, {batch, tokens, channels}, y.scalar_type());
  if (out.numel() == 0) return out;
  with_type_of(y, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    TokenUnmerge<T> problem = {};
    problem.gate_is = gate_is;
    if (gate.has_value()) {
      problem.gate = gate->const_data_ptr();
      problem.gate_stride = gate->stride(0);
    }
    problem.residual_is = residual_is;
    if (residual.has_value()) {
      problem.residual = residual->const_data_ptr();
      problem.residual_batch_stride = residual->stride(0);
      problem.residual_token_stride = residual->stride(1);
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
