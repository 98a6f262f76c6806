// The tensors of a merge, checked: token_merge, token_merge_norm and token_unmerge.
#pragma once

#include <optional>

#include "op_common.h"

namespace bigain {

// A table of a plan, contiguous, with its values checked: 0 <= value < high.
inline Tensor plan_table(const char* name, const Tensor& table, int64_t high) {
  const Tensor result = torch::stable::contiguous(table);
  check_range(name, result, 0, high);
  return result;
}

inline void check_ascending(const Tensor& offsets) {
  const int32_t* values = offsets.const_data_ptr<int32_t>();
  const int64_t width = offsets.size(1), count = offsets.numel();
  for (int64_t i = 0; i + 1 < count; ++i) {
    if ((i + 1) % width != 0 && values[i] > values[i + 1]) {
      fail("offsets: got ", values[i], " before ", values[i + 1], ", expected ascending values");
    }
  }
}

struct MergeArguments {
  const int32_t *offsets, *members;
  int64_t rows, slots;
  const void* weights;  // (B, N) of the accumulation type, or null
  bool mlerp;
};

// The tensors of a merge, checked, as the kernels read them.
struct Merge : PlanSizes {
  Tensor x, anchor, members, offsets;
  std::optional<Tensor> weights;

  Merge(const Tensor& input, const Tensor& slot, const Tensor& offsets_in, const Tensor& members_in,
        const Tensor& anchor_in, const std::optional<Tensor>& weights_in)
      : PlanSizes(check_merge(input, slot, offsets_in, members_in, anchor_in, weights_in)),
        x(with_unit_stride(input)),
        anchor(plan_table("anchor", anchor_in, tokens)),
        members(plan_table("members", members_in, tokens)),
        offsets(plan_table("offsets", offsets_in, tokens + 1)),
        weights(accumulated(weights_in, x)) {
    check_ascending(offsets);
  }

  MergeArguments arguments(bool mlerp) const {
    return {offsets.const_data_ptr<int32_t>(),
            members.const_data_ptr<int32_t>(),
            rows,
            slots,
            weights.has_value() ? weights->const_data_ptr() : nullptr,
            mlerp};
  }
};

// The members of one slot in ascending order of tokens, their weights (one if none are given) and the sum of those.
template <typename T>
struct SlotMembers {
  using A = accumulate_t<T>;
  std::vector<const T*> rows;
  std::vector<A> weights;
  A total = 0;

  void find(const Tokens<T>& tokens, const MergeArguments& arguments, int64_t b, int64_t slot, int64_t count) {
    const int64_t p = b % arguments.rows;
    const int32_t* const bounds = arguments.offsets + p * (arguments.slots + 1) + slot;
    const int32_t* const members = arguments.members + p * count;
    const A* const given = static_cast<const A*>(arguments.weights);
    rows.clear();
    weights.clear();
    total = 0;
    for (int32_t i = bounds[0]; i < bounds[1]; ++i) {
      rows.push_back(tokens.row(b, members[i]));
      weights.push_back(given == nullptr ? A(1) : given[b * count + members[i]]);
      total += weights.back();
    }
  }
};

}  // namespace bigain
