// What the CPU ops share: views of token tensors, checks of values, allocation, threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <type_traits>
#include <vector>

#include "../op_arguments.h"
#include "numbers.h"

namespace bigain {

// All values of a contiguous int32 tensor lie in [low, high).
inline void check_range(const char* name, const Tensor& tensor, int64_t low, int64_t high) {
  const int32_t* values = tensor.const_data_ptr<int32_t>();
  const int64_t count = tensor.numel();
  int32_t smallest = std::numeric_limits<int32_t>::max(), largest = std::numeric_limits<int32_t>::min();
  for (int64_t i = 0; i < count; ++i) {
    smallest = std::min(smallest, values[i]);
    largest = std::max(largest, values[i]);
  }
  if (count > 0 && (smallest < low || largest >= high)) {
    fail(name, ": got values from ", smallest, " to ", largest, ", expected ", low, " <= value < ", high);
  }
}

// The contiguous tensor in the type that `like` accumulates in.
inline Tensor accumulated(const Tensor& tensor, const Tensor& like) {
  const ScalarType type = like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return torch::stable::contiguous(tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type));
}

inline std::optional<Tensor> accumulated(const std::optional<Tensor>& tensor, const Tensor& like) {
  return tensor.has_value() ? std::optional<Tensor>(accumulated(*tensor, like)) : std::nullopt;
}

// (B, N, C) tokens as rows of C values; T is the type of the bits. Rows without values point somewhere harmless.
template <typename T>
struct Tokens {
  const T* data;
  int64_t batch_stride, token_stride;

  explicit Tokens(const Tensor& x) : batch_stride(x.stride(0)), token_stride(x.stride(1)) {
    static const T nothing{};
    data = x.numel() > 0 ? static_cast<const T*>(x.const_data_ptr()) : &nothing;
  }

  const T* row(int64_t b, int64_t n) const { return data + b * batch_stride + n * token_stride; }
};

// An uninitialized CPU tensor. Builds for tests fill it with NaN (all bits one): what a kernel forgets to write shows.
inline Tensor new_tensor(std::initializer_list<int64_t> shape, ScalarType type) {
  const std::vector<int64_t> sizes(shape);
  Tensor out = torch::stable::empty(sizes, type);
#ifdef BIGAIN_POISON
  if (out.numel() > 0) std::memset(out.mutable_data_ptr(), 0xff, out.numel() * out.element_size());
#endif
  return out;
}

// Calls f with a null pointer of the type that stands for the dtype of x.
template <typename F>
auto with_type_of(const Tensor& x, F&& f) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return f(static_cast<double*>(nullptr));
    case ScalarType::BFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case ScalarType::Half:
      return f(static_cast<Half*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}

// f(i) for 0 <= i < count on torch's threads, each taking a run of tasks worth about 16,000 values or more.
template <typename F>
void for_each_task(int64_t count, int64_t values_per_task, const F& f) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, values_per_task));
  torch::stable::parallel_for(0, count, grain, [&f](int64_t begin, int64_t end) { f(begin, end); });
}

}  // namespace bigain
