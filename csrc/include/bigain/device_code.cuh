// What device code is written with: CUDA, or the emulator of csrc/emulate where BIGAIN_EMULATE is defined.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef BIGAIN_EMULATE
#include "simt.h"
#else
#include <cuda_runtime.h>

// An array in shared memory.
#define BIGAIN_SHARED(type, name, count) __shared__ type name[count]
// The shared memory whose size the launch gives, aligned to a row of all banks.
#define BIGAIN_DYNAMIC_SHARED(type, name)                                 \
  extern __shared__ __align__(128) unsigned char bigain_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(bigain_dynamic_shared)
#endif

namespace bigain {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace bigain
