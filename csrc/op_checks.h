// Argument checks of the native ops, for CPU tensors and, where nvcc compiles, for CUDA tensors.
//
// The public functions of the package check their arguments and name the mistake. The checks here are the ones that
// keep a direct call of torch.ops.bigain.* from reading or writing out of bounds.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

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

// The CUDA kernels do not compute in float64, in emulation neither.
#if defined(__CUDACC__) || defined(BIGAIN_EMULATE)
constexpr bool kComputesDouble = false;
#else
constexpr bool kComputesDouble = true;
#endif

#ifdef __CUDACC__
constexpr const char* kHere = "GPU";
inline bool is_here(const Tensor& tensor) { return tensor.is_cuda(); }
#else
constexpr const char* kHere = "CPU";
inline bool is_here(const Tensor& tensor) { return tensor.is_cpu(); }
#endif

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    default:
      return "another dtype";
  }
}

inline void check_rank(const char* name, const Tensor& tensor, int64_t rank) {
  if (!tensor.defined()) fail(name, ": got an undefined tensor");
  if (!is_here(tensor)) {
    const char* const where = tensor.is_cpu() ? "the CPU" : tensor.is_cuda() ? "a GPU" : "another device";
    fail(name, ": got a tensor on ", where, ", expected the ", kHere, ", where the other tensors are");
  }
  if (tensor.dim() != rank) fail(name, ": got shape ", shape_of(tensor), ", expected ", rank, " dimensions");
}

inline bool is_floating(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

// A tensor of numbers that the ops of this library compute with.
inline void check_floating(const char* name, const Tensor& tensor, int64_t rank) {
  check_rank(name, tensor, rank);
  if (!is_floating(tensor) || (!kComputesDouble && tensor.scalar_type() == ScalarType::Double)) {
    fail(name, ": got ", dtype_name(tensor.scalar_type()), ", expected float16, bfloat16",
         kComputesDouble ? ", float32 or float64" : " or float32: the CUDA kernels do not compute in float64");
  }
}

inline void check_dtype(const char* name, const Tensor& tensor, int64_t rank, ScalarType type, const char* type_name) {
  check_rank(name, tensor, rank);
  if (tensor.scalar_type() != type) fail(name, ": got ", dtype_name(tensor.scalar_type()), ", expected ", type_name);
}

inline void check_int32(const char* name, const Tensor& tensor, int64_t rank) {
  check_dtype(name, tensor, rank, ScalarType::Int, "int32");
}

// All tensors of a call are on one device.
inline void check_same_device(const char* name, const Tensor& tensor, const Tensor& first) {
  if (tensor.get_device_index() != first.get_device_index()) {
    fail(name, ": is on device ", tensor.get_device_index(), ", expected ", first.get_device_index(),
         ", where the other tensors are");
  }
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

// Two optional tensors are both there or both not.
inline void check_pair(const char* name, const std::optional<Tensor>& tensor, const char* other_name,
                       const std::optional<Tensor>& other) {
  if (tensor.has_value() == other.has_value()) return;
  fail(tensor.has_value() ? other_name : name, ": got None, expected a tensor, as ",
       tensor.has_value() ? name : other_name, " is one");
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

// The tensor with a last dimension of stride one.
inline Tensor with_unit_stride(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.stride(last) == 1 || tensor.size(last) <= 1 ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace bigain
