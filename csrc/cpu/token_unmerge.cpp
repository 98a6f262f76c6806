// token_unmerge on the CPU.
#include <cstring>
#include <optional>
#include <type_traits>

#include "merge_tensors.h"
#include "row_kernels.h"

namespace bigain {
namespace {

// y (B, M, C) -> out (B, N, C): gate * y[slot] + residual. R is the type of the residual, that of y or the wide one.
template <typename T, typename R>
void unmerge(const Tensor& y, const int32_t* slot, int64_t rows, int64_t tokens, const accumulate_t<T>* gate,
             const std::optional<Tensor>& residual, T* out) {
  const Tokens<T> slots(y);
  const int64_t channels = y.size(2);
  const RowKernels<T>& kernels = row_kernels<T>();
  std::optional<Tokens<R>> added;
  if (residual.has_value()) added.emplace(*residual);
  for_each_task(y.size(0) * tokens, channels, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / tokens, n = task % tokens;
      const T* const source = slots.row(b, slot[b % rows * tokens + n]);
      T* const target = out + task * channels;
      if (gate == nullptr && !added.has_value()) {
        std::memcpy(target, source, channels * sizeof(T));
        continue;
      }
      const accumulate_t<T>* const row_gate = gate == nullptr ? nullptr : gate + b * channels;
      const R* const row_residual = added.has_value() ? added->row(b, n) : nullptr;
      if constexpr (std::is_same_v<T, R>) {
        kernels.affine(source, row_gate, row_residual, channels, target);
      } else {
        kernels.affine_wide(source, row_gate, row_residual, channels, target);
      }
    }
  });
}

// y (B, M, C), plan tables, residual (B, N, C) or none, gate (B, C) or none -> (B, N, C)
Tensor token_unmerge(const Tensor& input, const Tensor& slot_in, const Tensor& offsets, const Tensor& members,
                     const Tensor& anchor, const std::optional<Tensor>& residual_in,
                     const std::optional<Tensor>& gate_in) {
  const PlanSizes sizes = check_unmerge(input, slot_in, offsets, members, anchor, residual_in, gate_in);
  const int64_t tokens = sizes.tokens, rows = sizes.rows;
  const Tensor slot = plan_table("slot", slot_in, sizes.slots), y = with_unit_stride(input);
  const std::optional<Tensor> gate = accumulated(gate_in, y);
  const bool same_type = !residual_in.has_value() || residual_in->scalar_type() == y.scalar_type();
  const std::optional<Tensor> residual =
      residual_in.has_value() && same_type ? with_unit_stride(*residual_in) : accumulated(residual_in, y);
  Tensor out = new_tensor({sizes.batch, tokens, sizes.channels}, y.scalar_type());
  if (out.numel() == 0) return out;
  with_type_of(y, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = accumulate_t<T>;
    const int32_t* const slot_of = slot.const_data_ptr<int32_t>();
    const A* const gates = gate.has_value() ? static_cast<const A*>(gate->const_data_ptr()) : nullptr;
    T* const target = static_cast<T*>(out.mutable_data_ptr());
    if (same_type) {
      unmerge<T, T>(y, slot_of, rows, tokens, gates, residual, target);
    } else {
      unmerge<T, A>(y, slot_of, rows, tokens, gates, residual, target);
    }
  });
  return out;
}

}  // namespace
}  // namespace bigain

STABLE_TORCH_LIBRARY_FRAGMENT(bigain_cpp, m) {
  m.def(
      "token_unmerge(Tensor y, Tensor slot, Tensor offsets, Tensor members, Tensor anchor, Tensor? residual,"
      " Tensor? gate) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(bigain_cpp, CPU, m) { m.impl("token_unmerge", TORCH_BOX(&bigain::token_unmerge)); }
