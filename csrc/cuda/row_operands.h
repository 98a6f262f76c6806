// Operands beside the tokens, and rows copied by index: token_merge, token_merge_norm and token_unmerge.
#pragma once

#include <optional>

#include "bigain/layer_norm.cuh"
#include "bigain/token_unmerge.cuh"
#include "op_common_cuda.h"

namespace bigain {

// The tensor as float32 with a unit last stride.
inline Tensor as_float(const Tensor& tensor) {
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

}  // namespace bigain
