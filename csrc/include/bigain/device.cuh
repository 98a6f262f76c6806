// What launchers ask of the current device.
#pragma once

#include "bigain/common.cuh"

namespace bigain {

// Bytes of shared memory that one block can ask for.
inline size_t shared_limit() {
#ifdef BIGAIN_EMULATE
  return simt::shared_limit();
#else
  int device = 0, bytes = 0;
  check_cuda(cudaGetDevice(&device));
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return static_cast<size_t>(bytes);
#endif
}

}  // namespace bigain
