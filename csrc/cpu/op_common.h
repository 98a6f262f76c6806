// What the CPU ops share: argument checks, views of token tensors, allocation, threads.
//
// The public functions of the package check their arguments and name the mistake. The checks here are the ones that
// keep a direct call of torch.ops.bigain.* from reading or writing out of bounds.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "numbers.h"

namespace bigain {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Raises ValueError. Messages read "argument: what came, what was expected".
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text << (i ? ", " : "") << tensor.size(i);
  }
  text << ")";
  return text.str();
}

inline void check_rank(const char* name, const Tensor& tensor, int64_t rank) {
  if (!tensor.defined()) fail(name, ": got an undefined tensor");
  if (!tensor.is_cpu()) fail(name, ": is not on the CPU, where the other tensors are");
  if (tensor.dim() != rank) fail(name, ": got shape ", shape_of(tensor), ", expected ", rank, " dimensions");
}

inline bool is_floating(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

inline void check_floating(const char* name, const Tensor& tensor, int64_t rank) {
  check_rank(name, tensor, rank);
  if (!is_floating(tensor)) fail(name, ": wrong dtype, expected float16, bfloat16, float32 or float64");
}

inline void check_dtype(const char* name, const Tensor& tensor, int64_t rank, ScalarType type, const char* type_name) {
  check_rank(name, tensor, rank);
  if (tensor.scalar_type() != type) fail(name, ": wrong dtype, expected ", type_name);
}

inline void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> expected) {
  int64_t i = 0;
  bool same = tensor.dim() == static_cast<int64_t>(expected.size());
  std::ostringstream text;
  for (const int64_t size : expected) {
    same = same && tensor.size(i) == size;
    text << (i++ ? ", " : "") << size;
  }
  if (!same) fail(name, ": got shape ", shape_of(tensor), ", expected (", text.str(), ")");
}

// Token indices are int32.
inline void check_token_count(const char* name, int64_t tokens) {
  if (tokens > std::numeric_limits<int32_t>::max()) fail(name, ": got ", tokens, " tokens, expected fewer than 2^31");
}

inline void check_grid(int64_t height, int64_t width, int64_t tokens) {
  int64_t product = 0;
  if (height < 1 || width < 1 || __builtin_mul_overflow(height, width, &product) || product != tokens) {
    fail("grid: got (", height, ", ", width, "), expected H * W = ", tokens);
  }
}

inline void check_stride(int64_t sy, int64_t sx) {
  if (sy < 1 || sx < 1) fail("stride: got (", sy, ", ", sx, "), expected both to be at least 1");
}

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

// The tensor with a last dimension of stride one.
inline Tensor with_unit_stride(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.stride(last) == 1 || tensor.size(last) <= 1 ? tensor : torch::stable::contiguous(tensor);
}

// The contiguous tensor in the type that `like` accumulates in.
inline Tensor accumulated(const Tensor& tensor, const Tensor& like) {
  const ScalarType type = like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return torch::stable::contiguous(tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type));
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
