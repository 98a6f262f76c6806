// As much of the CUDA runtime as launch.cuh asks for, for test_launch.py: counts calls instead of making them.
#pragma once

#include <atomic>
#include <cstddef>

#define __host__
#define __device__
#define __forceinline__ inline

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaStream_t = void*;
using cudaError_t = int;
constexpr int cudaSuccess = 0, cudaFuncAttributeMaxDynamicSharedMemorySize = 8;
constexpr int cudaDevAttrMaxSharedMemoryPerBlockOptin = 97, cudaLaunchAttributeProgrammaticStreamSerialization = 6;
struct cudaFuncAttributes {
  int ptxVersion;
  size_t sharedSizeBytes;
};
struct cudaLaunchAttribute {
  int id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline thread_local int device = 0;
inline std::atomic<int> attributes_read, attributes_set, largest_set, launches, early;

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "error"; }
inline cudaError_t cudaGetDevice(int* current) {
  *current = device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int of) {
  *value = 100000 + of;
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  // An older architecture on device 1.
  *attributes = {device == 1 ? 80 : 90, 1000};
  ++attributes_read;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, int, int bytes) {
  ++attributes_set;
  if (bytes > largest_set) largest_set = bytes;
  return cudaSuccess;
}
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*)(Parameters...), Arguments&&...) {
  ++launches;
  early += static_cast<int>(config->numAttrs);
  return cudaSuccess;
}
