// Small kernels with known results, right and wrong ones, for test_emulator.py.
#include <string>
#include <vector>

#include "bigain/divisor.cuh"
#include "bigain/mma.cuh"

using namespace bigain;

// Sum of count values per block, by shuffles and shared memory.
__global__ void sum_kernel(const float* x /* (blocks, count) */, float* sums /* (blocks) */, int count) {
  BIGAIN_SHARED(float, of_warp, 32);
  float sum = 0.0f;
  for (int i = threadIdx.x; i < count; i += blockDim.x) sum += x[blockIdx.x * count + i];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0.0f;
    for (unsigned i = 0; i < blockDim.x / 32; ++i) sum += of_warp[i];
    sums[blockIdx.x] = sum;
  }
}

__global__ void votes_kernel(const int* values /* (32) */, unsigned* out /* (7, 32) */) {
  const int lane = threadIdx.x, value = values[lane];
  out[0 * 32 + lane] = __ballot_sync(~0u, value > 0);
  out[1 * 32 + lane] = __match_any_sync(~0u, value);
  out[2 * 32 + lane] = __reduce_add_sync(~0u, value);
  out[3 * 32 + lane] = __shfl_up_sync(~0u, value, 3);
  out[4 * 32 + lane] = __shfl_down_sync(~0u, value, 5, 16);
  out[5 * 32 + lane] = __shfl_xor_sync(~0u, value, 9);
  out[6 * 32 + lane] = __shfl_sync(~0u, value, 40);
}

// mma of one warp: a (16, K), b (8, K), c (16, 8), through shared memory and ldmatrix.
template <typename T>
__global__ void mma_kernel(const T* a, const T* b, float* c) {
  BIGAIN_SHARED(uint4, rows, 48);  // chunk by chunk: 16 rows of a twice, 8 rows of b twice
  const int lane = threadIdx.x, values = 16 / sizeof(T);
  for (int i = lane; i < 48; i += 32) {
    const T* const from =
        i < 32 ? a + i % 16 * 2 * values + i / 16 * values : b + (i - 32) % 8 * 2 * values + (i - 32) / 8 * values;
    copy_async_16(&rows[i], from, 16);
  }
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  uint32_t of_a[4], of_b[4];
  load_matrix_x4(of_a, &rows[lane]);
  load_matrix_x4(of_b, &rows[32 + lane % 16]);
  float sums[4] = {};
  mma<T>(sums, of_a, {of_b[0], of_b[1]});
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

// Copies 10 of 16 bytes; what is read before the wait must show.
__global__ void copy_kernel(const uint4* from, uint4* out /* (2) */, int wait_first) {
  BIGAIN_DYNAMIC_SHARED(uint4, shared);
  copy_async_16(shared, from, 10);
  copy_async_commit();
  if (wait_first) copy_async_wait<0>();
  out[0] = shared[0];
  copy_async_wait<0>();
  out[1] = shared[0];
}

__global__ void shared_is_poisoned_kernel(float* out /* (2) */) {
  BIGAIN_SHARED(float, fixed, 1);
  BIGAIN_DYNAMIC_SHARED(float, dynamic);
  out[0] = fixed[0];
  out[1] = dynamic[0];
  fixed[0] = dynamic[0] = 1.0f;
}

// Every thread tells its neighbour its number; without the barrier the result depends on the order of threads.
__global__ void neighbour_kernel(int* out /* (blockDim.x) */, int with_barrier) {
  BIGAIN_SHARED(int, number, 64);
  number[threadIdx.x] = -1;
  __syncthreads();
  number[threadIdx.x] = threadIdx.x;
  if (with_barrier) __syncthreads();
  out[threadIdx.x] = number[(threadIdx.x + 1) % blockDim.x];
}

__global__ void last_block_kernel(int* out) {
  if (threadIdx.x == 0) *out = blockIdx.x;
}

// n (count) -> quotients (count), remainders (count)
__global__ void divide_kernel(const unsigned* n, unsigned* out, int count, const Divisor divisor) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    unsigned quotient = n[i];
    out[count + i] = divisor.take(quotient);
    out[i] = quotient;
  }
}

__global__ void barrier_for_some_kernel(int) {
  if (threadIdx.x < 40) __syncthreads();
}
__global__ void two_barriers_kernel(int) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void warp_and_block_kernel(int) {
  if (threadIdx.x % 32 < 16) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}
__global__ void missing_lane_kernel(int) {
  if (threadIdx.x % 32 != 7) __shfl_sync(~0u, 1, 0);
}
__global__ void lane_not_in_mask_kernel(int) {
  if (threadIdx.x % 32 < 4) __shfl_sync(0xfu, 1, 9);
}
__global__ void past_the_end_kernel(int) {
  BIGAIN_DYNAMIC_SHARED(int, shared);
  shared[16] = 0;
}
__global__ void misaligned_copy_kernel(int) {
  BIGAIN_DYNAMIC_SHARED(char, shared);
  static const uint4 from = {};
  copy_async_16(shared + 8, &from, 16);
}

namespace {
std::string message;

// Runs f; the message of what it throws, or "".
template <typename F>
const char* attempt(F&& f) {
  message.clear();
  try {
    f();
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
}  // namespace

extern "C" {
void set_order(int64_t order) { simt::set_order(order); }
int64_t launches() { return simt::launches(); }

const char* sums(const float* x, float* out, int blocks, int threads, int count) {
  return attempt([&] { launch(sum_kernel, dim3(blocks), dim3(threads), 0, nullptr, x, out, count); });
}
const char* votes(const int* values, unsigned* out) {
  return attempt([&] { launch(votes_kernel, dim3(1), dim3(32), 0, nullptr, values, out); });
}
const char* multiply(const char* dtype, const void* a, const void* b, float* c) {
  return attempt([&] {
    const auto run = [&](auto type) {
      using T = decltype(type);
      launch(mma_kernel<T>, dim3(1), dim3(32), 0, nullptr, static_cast<const T*>(a), static_cast<const T*>(b), c);
    };
    const std::string name = dtype;
    if (name == "float16") {
      run(Half{});
    } else if (name == "bfloat16") {
      run(BFloat16{});
    } else {
      run(float{});
    }
  });
}
const char* copies(const void* from, void* out, int wait_first) {
  return attempt([&] {
    launch(copy_kernel, dim3(1), dim3(1), 16, nullptr, static_cast<const uint4*>(from), static_cast<uint4*>(out),
           wait_first);
  });
}
const char* fresh_shared(float* out) {
  return attempt([&] { launch(shared_is_poisoned_kernel, dim3(2), dim3(1), 4, nullptr, out); });
}
const char* neighbours(int* out, int with_barrier) {
  return attempt([&] { launch(neighbour_kernel, dim3(1), dim3(64), 0, nullptr, out, with_barrier); });
}
const char* last_block(int* out) {
  return attempt([&] { launch(last_block_kernel, dim3(5), dim3(32), 0, nullptr, out); });
}
const char* divide(const unsigned* n, unsigned* out, int count, int64_t divisor) {
  return attempt([&] { launch(divide_kernel, dim3(1), dim3(32), 0, nullptr, n, out, count, Divisor(divisor)); });
}
const char* wrong(const char* name) {
  const std::pair<const char*, void (*)(int)> kernels[] = {
      {"barrier_for_some", barrier_for_some_kernel}, {"two_barriers", two_barriers_kernel},
      {"warp_and_block", warp_and_block_kernel},     {"missing_lane", missing_lane_kernel},
      {"lane_not_in_mask", lane_not_in_mask_kernel}, {"past_the_end", past_the_end_kernel},
      {"misaligned_copy", misaligned_copy_kernel}};
  for (const auto& [known, kernel] : kernels) {
    if (std::string(name) == known) return attempt([&] { launch(kernel, dim3(1), dim3(64), 64, nullptr, 0); });
  }
  return "no such kernel";
}
const char* too_many_threads() {
  return attempt([&] { launch(barrier_for_some_kernel, dim3(1), dim3(1025), 0, nullptr, 0); });
}
}
