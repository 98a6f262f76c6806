// The one way to launch, and how a launch begins before the one ahead of it has ended.
#pragma once

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "bigain/device_code.cuh"

namespace bigain {

// Blocks in y and z of a grid; x takes 2^31 - 1.
constexpr int64_t kMaxGridYZ = 65535;

// Every kernel begins with this, before it reads or writes memory of other launches (global memory, that is).
//
// From sm_90 on it lets the next launch of the stream start its blocks wherever there is room, and waits until all
// launches ahead have ended and their writes are seen. So the start of a launch costs no time of its own, and an order
// of launches means what it meant: a launch that has waited ends after all those that it waited for, and the next one
// waits for its end. Nothing may be read through the read-only path (__ldg), whose lines may be older than the wait.
__device__ __forceinline__ void follow_launches() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#ifndef BIGAIN_EMULATE
// Raises what a call of the CUDA runtime reports.
inline void check_cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // a later call must not report it again
  throw std::runtime_error(std::string("bigain CUDA kernel: ") + cudaGetErrorString(error));
}

// What the runtime was asked, once, about each kernel on each device.
class Asked {
 public:
  // ask(device), which the first call makes for a kernel on the current device; threads that come meanwhile wait.
  template <typename Ask>
  int of(const void* kernel, const Ask& ask) {
    int device = 0;
    check_cuda(cudaGetDevice(&device));
    const std::pair<const void*, int> key(kernel, device);
    // Not a shared mutex, which asks for a glibc of 2021.
    const std::lock_guard lock(mutex_);
    const auto found = answers_.find(key);
    return found != answers_.end() ? found->second : answers_.emplace(key, ask(device)).first->second;
  }

 private:
  std::mutex mutex_;
  std::map<std::pair<const void*, int>, int> answers_;
};

// Whether what runs on the current device waits in follow_launches(). PTX of sm_80 that the driver translates for a
// newer device does not.
inline bool can_follow_launches(const void* kernel) {
  static Asked architectures;
  return architectures.of(kernel, [&](int) {
    cudaFuncAttributes attributes;
    check_cuda(cudaFuncGetAttributes(&attributes, kernel));
    return attributes.ptxVersion;
  }) >= 90;
}

// Lets a kernel have all the dynamic shared memory that the current device has for a block, of which launches without
// asking get 48 KiB.
inline void allow_shared_memory(const void* kernel) {
  static Asked limits;
  limits.of(kernel, [&](int device) {
    cudaFuncAttributes attributes;
    check_cuda(cudaFuncGetAttributes(&attributes, kernel));
    int limit = 0;
    check_cuda(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    limit -= static_cast<int>(attributes.sharedSizeBytes);
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit));
    return limit;
  });
}
#endif

// Runs kernel(args...) on `grid` blocks of `block` threads with `shared_bytes` of dynamic shared memory. An empty grid
// is no launch. Raises when the launch itself is refused; does not wait for the kernel, which calls follow_launches().
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#ifdef BIGAIN_EMULATE
  (void)stream;
  simt::launch(kernel, grid, block, shared_bytes, static_cast<Parameters>(arguments)...);
#else
  const void* const function = reinterpret_cast<const void*>(kernel);
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (shared_bytes > kWithoutAsking) allow_shared_memory(function);
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = can_follow_launches(function) ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
#endif
}

// A grid extent. Raises when the count does not fit.
inline unsigned grid_extent(int64_t count, int64_t limit = 2147483647) {
  if (count < 0 || count > limit) {
    throw std::invalid_argument("bigain CUDA kernel: got " + std::to_string(count) + " blocks, expected at most " +
                                std::to_string(limit));
  }
  return static_cast<unsigned>(count);
}

// A size that kernels keep in 32 bits, where a division costs a fraction of one in 64. Raises when it does not fit.
inline int to_int(int64_t size) { return static_cast<int>(grid_extent(size)); }

}  // namespace bigain
