// What the CUDA ops share: device and stream of a call, allocation, dtypes. In emulation the same ops take CPU tensors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../op_arguments.h"
#include "bigain/common.cuh"

// Registers implementations for the tensors that the library takes.
#ifdef BIGAIN_EMULATE
#define BIGAIN_IMPL(library, m) STABLE_TORCH_LIBRARY_IMPL(library, CPU, m)
#else
#define BIGAIN_IMPL(library, m) STABLE_TORCH_LIBRARY_IMPL(library, CUDA, m)
#endif

namespace bigain {

// Makes the device of a tensor current while it lives. Kernels run on torch's current stream of that device, so calls
// can be captured in CUDA graphs.
class OnDeviceOf {
 public:
#ifdef BIGAIN_EMULATE
  explicit OnDeviceOf(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
#else
  explicit OnDeviceOf(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
#endif
};

// Multiprocessors of the current device.
inline int multiprocessors() {
#ifdef BIGAIN_EMULATE
  return simt::multiprocessors();
#else
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device));
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
#endif
}

// An uninitialized tensor on the device of `like`, from torch's allocator. Test builds fill it with NaN (all bits one):
// what a kernel forgets to write shows.
inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  const std::vector<int64_t> sizes(shape);
  Tensor out = torch::stable::new_empty(like, sizes, type);
#ifdef BIGAIN_POISON
  if (out.numel() > 0) std::memset(out.mutable_data_ptr(), 0xff, out.numel() * out.element_size());
#endif
  return out;
}

// Calls f with a null pointer of the type that stands for the dtype of x, not float64.
template <typename F>
auto with_type_of(const Tensor& x, F&& f) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case ScalarType::Half:
      return f(static_cast<Half*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}

template <typename T>
const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* mutable_data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace bigain
