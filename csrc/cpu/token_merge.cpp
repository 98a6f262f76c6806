// token_merge on the CPU.
#include "merge_tensors.h"
#include "row_kernels.h"

namespace bigain {
namespace {

// x (B, N, C) -> out (B, M, C): the mean over the members of each slot, in ascending order of tokens.
template <typename T>
void merge_mean(const Tensor& x, const MergeArguments& arguments, T* out) {
  using A = accumulate_t<T>;
  const Tokens<T> tokens(x);
  const RowKernels<T>& kernels = row_kernels<T>();
  const RowKernels<A>& wide = row_kernels<A>();
  const int64_t count = x.size(1), channels = x.size(2), slots = arguments.slots;
  const A* const weights = static_cast<const A*>(arguments.weights);
  for_each_task(x.size(0) * slots, channels, [&](int64_t begin, int64_t end) {
    SlotMembers<T> slot;
    std::vector<A> sum(arguments.mlerp ? channels : 0);
    for (int64_t task = begin; task < end; ++task) {
      slot.find(tokens, arguments, task / slots, task % slots, count);
      T* const target = out + task * channels;
      if (slot.rows.size() == 1 && weights == nullptr && !arguments.mlerp) {
        std::memcpy(target, slot.rows[0], channels * sizeof(T));
        continue;
      }
      const int64_t size = static_cast<int64_t>(slot.rows.size());
      if (!arguments.mlerp) {
        kernels.mean(slot.rows.data(), weights == nullptr ? nullptr : slot.weights.data(), size, slot.total, channels,
                     target);
        continue;
      }
      std::fill(sum.begin(), sum.end(), A(0));
      A largest = 0;
      for (int64_t i = 0; i < size; ++i) {
        kernels.add(slot.rows[i], slot.weights[i], channels, sum.data());
        largest = std::max(largest, kernels.norm(slot.rows[i], channels));
      }
      // The mean first: |sum| of large or tiny weights would over- or underflow. A mean without a length stays zero.
      for (A& value : sum) value /= slot.total;
      const A length = wide.norm(sum.data(), channels);
      kernels.divide_narrow(sum.data(), length != 0 ? length / largest : A(1), channels, target);
    }
  });
}

// x (B, N, C), plan tables of P rows with P dividing B -> (B, M, C)
Tensor token_merge(const Tensor& input, const Tensor& slot, const Tensor& offsets, const Tensor& members,
                   const Tensor& anchor, const std::string& mode, const std::optional<Tensor>& weights) {
  check_merge_mode(mode);
  const Merge merge(input, slot, offsets, members, anchor, weights);
  Tensor out = new_tensor({merge.batch, merge.slots, merge.channels}, merge.x.scalar_type());
  if (out.numel() == 0) return out;
  with_type_of(merge.x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* const target = static_cast<T*>(out.mutable_data_ptr());
    if (mode == "prune") {
      const Tokens<T> view(merge.x);
      const int32_t* const kept = merge.anchor.const_data_ptr<int32_t>();
      const int64_t slots = merge.slots, channels = merge.channels;
      for_each_task(merge.batch * slots, channels, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t b = task / slots;
          std::memcpy(target + task * channels, view.row(b, kept[b % merge.rows * slots + task % slots]),
                      channels * sizeof(T));
        }
      });
    } else {
      merge_mean<T>(merge.x, merge.arguments(mode == "mlerp"), target);
    }
  });
  return out;
}

}  // namespace
}  // namespace bigain

STABLE_TORCH_LIBRARY_FRAGMENT(bigain_cpp, m) {
  m.def(
      "token_merge(Tensor x, Tensor slot, Tensor offsets, Tensor members, Tensor anchor, str mode, Tensor? weights)"
      " -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(bigain_cpp, CPU, m) { m.impl("token_merge", TORCH_BOX(&bigain::token_merge)); }
