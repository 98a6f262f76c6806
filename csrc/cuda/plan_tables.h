// The tables of a new plan, and the scratch memory of the kernels that fill them.
#pragma once

#include <tuple>

#include "bigain/plan_steps.cuh"
#include "op_common_cuda.h"

namespace bigain {

using Tables = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// slot (rows, N), offsets (rows, M + 1), members (rows, N), anchor (rows, M), int32, on the device of `like`.
class NewPlan {
 public:
  NewPlan(const Tensor& like, int64_t rows, int64_t tokens, int64_t slots)
      : slot_(new_tensor(like, {rows, tokens}, ScalarType::Int)),
        offsets_(new_tensor(like, {rows, slots + 1}, ScalarType::Int)),
        members_(new_tensor(like, {rows, tokens}, ScalarType::Int)),
        anchor_(new_tensor(like, {rows, slots}, ScalarType::Int)) {
    // Nothing is launched for rows without tokens.
    if (tokens == 0) torch::stable::fill_(offsets_, 0.0);
  }

  PlanTables pointers() {
    return {mutable_data_of<int32_t>(slot_), mutable_data_of<int32_t>(offsets_), mutable_data_of<int32_t>(members_),
            mutable_data_of<int32_t>(anchor_)};
  }
  Tables tables() const { return {slot_, offsets_, members_, anchor_}; }

 private:
  Tensor slot_, offsets_, members_, anchor_;
};

// So many bytes, a multiple of 8.
inline Tensor plan_scratch(const Tensor& like, int64_t bytes) {
  return new_tensor(like, {bytes / 8}, ScalarType::Long);
}

}  // namespace bigain
