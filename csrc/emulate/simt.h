// CUDA device code on a CPU, for tests on machines without a GPU.
//
// The headers of csrc/include/bigain, compiled by a C++17 compiler with -DBIGAIN_EMULATE, see this file in place of the
// CUDA headers. A thread is a fiber; the fibers of a block take turns on one CPU thread and switch only where threads
// wait for one another: barriers, warp intrinsics, ldmatrix, mma. Blocks run one after another. What this shows:
//  * a barrier or a warp intrinsic that not all of its threads reach raises an error instead of hanging;
//  * shared memory starts as NaN bits in every block, and the target of an asynchronous copy is NaN bits until the
//  wait;
//  * a missing barrier or a dependence on the order of blocks changes results with set_order().
// What it cannot show: speed, bank conflicts, and the last bits of a tensor core, which adds in its own order.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#define __global__ inline
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

// NOLINTBEGIN: names of CUDA
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

using cudaStream_t = void*;

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
// NOLINTEND

namespace bigain::simt {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Runs `thread` for every thread of every block; std::runtime_error says what went wrong in which thread.
void run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Arguments&&... arguments) {
  const std::tuple<Parameters...> values(static_cast<Parameters>(arguments)...);
  run(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, [&] { std::apply(kernel, values); });
}

// What launchers ask of the device: its multiprocessors, and bytes of shared memory that a block can have.
int multiprocessors();
size_t shared_limit();
// From now on takes launches down instead of running them, as on a device with so many; 0 runs them again.
void record(int64_t multiprocessors, int64_t shared_limit);
// Of each launch taken down: the address of the kernel, from the start of the library, blocks, threads, bytes of
// dynamic shared memory.
std::vector<int64_t> recorded();

// Launches since the start of the process.
int64_t launches();
// Counts a read of a vector, or the copy of one, by the current thread, and says the counts since the start: of all
// threads, and, summed over the blocks, of the thread of a block that had the most.
void count_load();
std::vector<int64_t> loads();
// Which block and which thread of a block goes first: 0 ascending, -1 descending, above 0 shuffled with this seed.
void set_order(int64_t order);

// ---- shared memory -------------------------------------------------------------------------------------------------

unsigned char* dynamic_shared();
// Counts the blocks that have run: static shared memory is poisoned when a new one first touches it.
uint64_t block_number();

template <typename T, size_t kCount>
class Shared {
 public:
  using Array = T[kCount];

  Array& get() {
    if (block_ != block_number()) {
      block_ = block_number();
      memset(bytes_, 0xff, sizeof(Array));
    }
    return *reinterpret_cast<Array*>(bytes_);
  }

 private:
  alignas(128) unsigned char bytes_[sizeof(Array)];
  uint64_t block_ = 0;
};

#define BIGAIN_SHARED(type, name, count)                            \
  static ::bigain::simt::Shared<type, (count)> name##_of_the_block; \
  type(&name)[count] = name##_of_the_block.get()
#define BIGAIN_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(::bigain::simt::dynamic_shared())

// ---- waiting for one another ---------------------------------------------------------------------------------------

// Where a thread waits, for messages and to tell one barrier from another.
struct Place {
  const char* name;
  int line;
};

// Works on the operands of the lanes in the mask; other entries are null.
using Resolve = void (*)(void* const lanes[kWarp]);

// Waits until every lane of the mask is here with the same `resolve` at the same place; the last one resolves.
void meet(unsigned mask, Resolve resolve, void* operands, Place place);
// Waits until every thread of the block is here; returns how many of them gave a true `predicate`.
int meet_block(bool predicate, Place place);

// Copies that take effect when the thread waits for their group.
void copy_async(void* shared, const void* global, size_t bytes, size_t copied);
void commit_copies();
void wait_for_copies(int groups_left);

int lane();

template <typename Operands>
void meet(unsigned mask, void (*resolve)(Operands* const lanes[kWarp]), Operands& operands, Place place) {
  meet(mask, reinterpret_cast<Resolve>(resolve), &operands, place);
}

struct Shuffle {
  uint64_t value;
  int source;
  uint64_t result;
};
void resolve_shuffle(Shuffle* const lanes[kWarp]);

template <typename T>
T shuffle(unsigned mask, T value, int source, Place place) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  Shuffle operands = {0, source, 0};
  memcpy(&operands.value, &value, sizeof(T));
  meet(mask, resolve_shuffle, operands, place);
  memcpy(&value, &operands.result, sizeof(T));
  return value;
}

struct Vote {
  int64_t value;
  int64_t result;
};
void resolve_ballot(Vote* const lanes[kWarp]);
void resolve_match(Vote* const lanes[kWarp]);
void resolve_add(Vote* const lanes[kWarp]);

inline int64_t vote(unsigned mask, int64_t value, void (*resolve)(Vote* const lanes[kWarp]), Place place) {
  Vote operands = {value, 0};
  meet(mask, resolve, operands, place);
  return operands.result;
}

// ldmatrix.x4: every lane gives the address of one row of 16 bytes, lanes 8 i to 8 i + 7 those of matrix i.
struct LoadMatrix {
  const void* row;
  uint32_t result[4];
};
void resolve_load_matrix(LoadMatrix* const lanes[kWarp]);

// mma.sync, rows of A times columns of B, fragments as the PTX ISA lays them out; c is read and written.
struct Mma {
  uint32_t a[4], b[2];
  float c[4];
};
void resolve_mma_16x8x16_half(Mma* const lanes[kWarp]);
void resolve_mma_16x8x16_bfloat16(Mma* const lanes[kWarp]);
void resolve_mma_16x8x8_tf32(Mma* const lanes[kWarp]);

[[noreturn]] inline void trap(int line = __builtin_LINE()) {
  throw std::runtime_error("trap at line " + std::to_string(line));
}

}  // namespace bigain::simt

// ---- the intrinsics that the kernels use, as the CUDA C++ programming guide describes them --------------------------
// NOLINTBEGIN

inline void __syncthreads(int line = __builtin_LINE()) { bigain::simt::meet_block(false, {"__syncthreads", line}); }
inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  return bigain::simt::meet_block(predicate, {"__syncthreads_or", line}) != 0;
}
inline void __syncwarp(unsigned mask = bigain::simt::kAllLanes, int line = __builtin_LINE()) {
  bigain::simt::vote(mask, 0, bigain::simt::resolve_ballot, {"__syncwarp", line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return static_cast<unsigned>(
      bigain::simt::vote(mask, predicate != 0, bigain::simt::resolve_ballot, {"__ballot_sync", line}));
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, int line = __builtin_LINE()) {
  int64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return static_cast<unsigned>(bigain::simt::vote(mask, bits, bigain::simt::resolve_match, {"__match_any_sync", line}));
}

template <typename T>
T __reduce_add_sync(unsigned mask, T value, int line = __builtin_LINE()) {
  static_assert(sizeof(T) == 4 && std::is_integral_v<T>, "warp reductions take int or unsigned");
  return static_cast<T>(bigain::simt::vote(mask, value, bigain::simt::resolve_add, {"__reduce_add_sync", line}));
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
  const int first = bigain::simt::lane() / width * width;
  return bigain::simt::shuffle(mask, value, first + (source & (width - 1)), {"__shfl_sync", line});
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  const int source = bigain::simt::lane() - static_cast<int>(delta);
  const bool inside = source >= bigain::simt::lane() / width * width;
  return bigain::simt::shuffle(mask, value, inside ? source : bigain::simt::lane(), {"__shfl_up_sync", line});
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  const int source = bigain::simt::lane() + static_cast<int>(delta);
  const bool inside = source < bigain::simt::lane() / width * width + width;
  return bigain::simt::shuffle(mask, value, inside ? source : bigain::simt::lane(), {"__shfl_down_sync", line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, int line = __builtin_LINE()) {
  const int source = bigain::simt::lane() ^ lanes;
  const bool inside = source < bigain::simt::lane() / width * width + width;
  return bigain::simt::shuffle(mask, value, inside ? source : bigain::simt::lane(), {"__shfl_xor_sync", line});
}

// No other thread runs between the reading and the writing.
template <typename T, typename F>
T bigain_atomic(T* address, F&& next) {
  const T old = *address;
  *address = next(old);
  return old;
}
template <typename T>
T atomicAdd(T* address, T value) {
  return bigain_atomic(address, [&](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomicMin(T* address, T value) {
  return bigain_atomic(address, [&](T old) { return old < value ? old : value; });
}
template <typename T>
T atomicMax(T* address, T value) {
  return bigain_atomic(address, [&](T old) { return old > value ? old : value; });
}
template <typename To, typename From>
To bigain_bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "");
  To out;
  memcpy(&out, &value, sizeof(To));
  return out;
}
inline unsigned __float_as_uint(float value) { return bigain_bits<unsigned>(value); }
inline float __uint_as_float(unsigned value) { return bigain_bits<float>(value); }

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }
#define BIGAIN_MIN_MAX(type)                                \
  inline type min(type a, type b) { return b < a ? b : a; } \
  inline type max(type a, type b) { return a < b ? b : a; }
BIGAIN_MIN_MAX(int)
BIGAIN_MIN_MAX(unsigned)
BIGAIN_MIN_MAX(long)
BIGAIN_MIN_MAX(unsigned long)
BIGAIN_MIN_MAX(long long)
BIGAIN_MIN_MAX(unsigned long long)
#undef BIGAIN_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
// NOLINTEND
