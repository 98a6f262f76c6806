// The tables of a plan while they are made: merge_plan and block_merge_plan.
#pragma once

#include "op_common.h"

namespace bigain {

using Tables = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// The tables of a plan of `batch` rows, and one row of them. See bigain_kernels.MergePlan.
struct Plan {
  int64_t tokens, slots;
  Tensor slot, offsets, members, anchor;

  Plan(int64_t batch, int64_t n, int64_t m)
      : tokens(n),
        slots(m),
        slot(new_tensor({batch, n}, ScalarType::Int)),
        offsets(new_tensor({batch, m + 1}, ScalarType::Int)),
        members(new_tensor({batch, n}, ScalarType::Int)),
        anchor(new_tensor({batch, m}, ScalarType::Int)) {}

  Tables tables() const { return {slot, offsets, members, anchor}; }
};

// Row pointers, taken once: every call of data_ptr goes through the C interface of torch.
struct PlanRows {
  int64_t tokens, slots;
  int32_t *slot, *offsets, *members, *anchor;

  explicit PlanRows(const Plan& plan)
      : tokens(plan.tokens),
        slots(plan.slots),
        slot(plan.slot.mutable_data_ptr<int32_t>()),
        offsets(plan.offsets.mutable_data_ptr<int32_t>()),
        members(plan.members.mutable_data_ptr<int32_t>()),
        anchor(plan.anchor.mutable_data_ptr<int32_t>()) {}

  // Row b of the plan in which token n is represented by assign[n]; exactly `slots` tokens represent themselves, and
  // all others are represented by one of those.
  void fill(int64_t b, const int32_t* assign) const {
    int32_t *const row_slot = slot + b * tokens, *const row_offsets = offsets + b * (slots + 1);
    int32_t *const row_members = members + b * tokens, *const row_anchor = anchor + b * slots;
    int32_t used = 0;
    for (int64_t n = 0; n < tokens; ++n) {
      if (assign[n] == n) {
        row_anchor[used] = static_cast<int32_t>(n);
        row_slot[n] = used++;
      }
    }
    // A stable counting sort by slot. row_offsets[m + 1] counts, then points at the next free place of slot m.
    std::fill(row_offsets, row_offsets + slots + 1, 0);
    for (int64_t n = 0; n < tokens; ++n) {
      row_slot[n] = row_slot[assign[n]];
      ++row_offsets[row_slot[n] + 1];
    }
    int32_t start = 0;
    for (int64_t m = 1; m <= slots; ++m) {
      const int32_t size = row_offsets[m];
      row_offsets[m] = start;
      start += size;
    }
    for (int64_t n = 0; n < tokens; ++n) {
      row_members[row_offsets[row_slot[n] + 1]++] = static_cast<int32_t>(n);
    }
  }
};

}  // namespace bigain
