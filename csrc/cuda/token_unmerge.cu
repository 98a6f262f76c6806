// token_unmerge for CUDA tensors. The values of the tables are on the device and are not checked here: the kernel
// clamps them.
#include "row_operands.h"

namespace bigain {
namespace {

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
      "token_unmerge(Tensor y, Tensor slot, Tensor offsets, Tensor members, Tensor anchor, Tensor? residual,"
      " Tensor? gate) -> Tensor");
}
BIGAIN_IMPL(bigain_cuda, m) { m.impl("token_unmerge", TORCH_BOX(&bigain::token_unmerge)); }
