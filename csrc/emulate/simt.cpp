// The scheduler of the emulator: fibers, barriers, asynchronous copies.
//
// The checked longjmp of hardened builds takes a jump to another stack for a mistake.
#undef _FORTIFY_SOURCE
// macOS declares contexts for those alone who ask for the old standard.
#if defined(__APPLE__) && !defined(_XOPEN_SOURCE)
#define _XOPEN_SOURCE 700
#endif

#include "simt.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace bigain::simt {
namespace {

constexpr size_t kStackBytes = size_t{128} << 10, kPageBytes = 4096;
// What one block can have on sm_90; blocks of other devices have less.
constexpr size_t kMostShared = 232448, kGuardBytes = 256;
constexpr int kMostThreads = 1024;

enum class State { kReady, kAtWarp, kAtBlock, kDone };

struct Copy {
  void* to;
  const void* from;
  size_t bytes, copied;
};

struct Thread {
  State state;
  uint3 index;
  // Where it waits, and for whom.
  Place place;
  unsigned mask;
  Resolve resolve;
  void* operands;
  // Groups of copies that were committed, oldest first, and the open one.
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
  int64_t loads;
};

// A stack and the place where it goes on. It outlives the thread that ran on it and takes one of the next block.
struct Fiber {
  unsigned char* stack = nullptr;
  bool started = false;
  jmp_buf resume;
};

std::mutex launch_mutex;
int64_t launch_count = 0, launch_order = 0, load_count = 0, load_count_of_busiest = 0;

// The least shared memory of all devices from sm_80 on.
constexpr int64_t kMultiprocessors = 8, kSharedLimit = 101376;
int64_t device_multiprocessors = kMultiprocessors, device_shared_limit = kSharedLimit;
bool recording = false;
std::vector<int64_t> records;

std::vector<Fiber> fibers;
std::vector<Thread> threads;
std::vector<unsigned char> shared_buffer;
unsigned char* shared_memory;
uint64_t blocks_begun = 0;
const std::function<void()>* body;
int current, waiting_at_block, true_predicates, block_result;
std::exception_ptr failure;
jmp_buf scheduler;
ucontext_t start_context, dead_context;

// Back to the scheduler, until it resumes the current thread. _setjmp leaves signal masks alone: no system call.
void yield() {
  if (_setjmp(fibers[current].resume) == 0) _longjmp(scheduler, 1);
}

void fiber_main() {
  for (;;) {
    try {
      (*body)();
    } catch (...) {
      failure = std::current_exception();
    }
    threads[current].state = State::kDone;
    yield();
  }
}

void resume(int thread) {
  Fiber& fiber = fibers[thread];
  current = thread;
  threadIdx = threads[thread].index;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  if (fiber.stack == nullptr) {
    void* const memory =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    // A thread that runs off its stack faults instead of writing into that of another.
    if (memory == MAP_FAILED || mprotect(memory, kPageBytes, PROT_NONE) != 0) {
      throw std::runtime_error("no memory for the stack of an emulated thread");
    }
    fiber.stack = static_cast<unsigned char*>(memory);
  }
  fiber.started = true;
  getcontext(&start_context);
  start_context.uc_stack.ss_sp = fiber.stack;
  start_context.uc_stack.ss_size = kStackBytes;
  start_context.uc_link = nullptr;
  makecontext(&start_context, fiber_main, 0);
  swapcontext(&dead_context, &start_context);
}

std::string name_of(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

std::string describe(const Thread& thread) {
  if (thread.state == State::kDone) return "thread " + name_of(thread.index) + " has ended";
  std::string text = "thread " + name_of(thread.index) + " waits at " + thread.place.name + ", line " +
                     std::to_string(thread.place.line);
  if (thread.state == State::kAtWarp) {
    char mask[16];
    std::snprintf(mask, sizeof(mask), "%08x", thread.mask);
    text += ", for lanes " + std::string(mask);
  }
  return text;
}

// One line for every different thing that threads do.
[[noreturn]] void fail_deadlock() {
  std::string text = "threads wait for others that never come:";
  std::vector<std::string> seen;
  for (const Thread& thread : threads) {
    const std::string what = describe(thread), key = what.substr(what.find(')'));
    if (seen.size() == 8 || std::find(seen.begin(), seen.end(), key) != seen.end()) continue;
    seen.push_back(key);
    text += "\n  " + what;
  }
  throw std::runtime_error(text);
}

std::vector<int64_t> order_of(int64_t count, int64_t salt) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), int64_t{0});
  if (launch_order < 0) std::reverse(order.begin(), order.end());
  if (launch_order > 0) {
    std::mt19937_64 generator(launch_order * 1000003 + salt);
    for (int64_t i = count - 1; i > 0; --i) {
      std::swap(order[i], order[generator() % (i + 1)]);
    }
  }
  return order;
}

void run_block(size_t shared_bytes, int64_t salt) {
  ++blocks_begun;
  memset(shared_memory, 0xff, shared_bytes + kGuardBytes);
  waiting_at_block = true_predicates = 0;
  failure = nullptr;
  const int count = static_cast<int>(threads.size());
  for (int i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    thread.state = State::kReady;
    thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    thread.groups.clear();
    thread.open.clear();
    thread.loads = 0;
  }
  const std::vector<int64_t> order = order_of(count, salt);
  for (int done = 0; done < count;) {
    bool progress = false;
    done = 0;
    for (const int64_t i : order) {
      if (threads[i].state == State::kReady) {
        progress = true;
        resume(static_cast<int>(i));
        if (failure) std::rethrow_exception(failure);
      }
      done += threads[i].state == State::kDone;
    }
    if (!progress && done < count) fail_deadlock();
  }
  int64_t most = 0;
  for (const Thread& thread : threads) {
    load_count += thread.loads;
    most = std::max(most, thread.loads);
  }
  load_count_of_busiest += most;
  for (size_t i = 0; i < kGuardBytes; ++i) {
    if (shared_memory[shared_bytes + i] != 0xff) throw std::runtime_error("a write past the dynamic shared memory");
  }
}

}  // namespace

void run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  const int64_t count = int64_t{block.x} * block.y * block.z, blocks = int64_t{grid.x} * grid.y * grid.z;
  if (count < 1 || count > kMostThreads || block.z > 64) {
    throw std::runtime_error("launch: " + std::to_string(count) + " threads in a block, expected 1 to 1024");
  }
  if (blocks < 1 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    throw std::runtime_error("launch: a grid of (" + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " +
                             std::to_string(grid.z) + ") blocks is empty or too large");
  }
  if (shared_bytes > kMostShared) {
    throw std::runtime_error("launch: " + std::to_string(shared_bytes) + " bytes of dynamic shared memory, at most " +
                             std::to_string(kMostShared) + " expected");
  }
  ++launch_count;
  if (recording) {
    Dl_info library = {};
    dladdr(kernel, &library);
    const auto* const address = static_cast<const char*>(kernel);
    const auto bytes = static_cast<int64_t>(shared_bytes);
    records.insert(records.end(), {address - static_cast<const char*>(library.dli_fbase), blocks, count, bytes});
    return;
  }
  gridDim = grid;
  blockDim = block;
  body = &thread;
  threads.resize(count);
  if (static_cast<int64_t>(fibers.size()) < count) fibers.resize(count);
  shared_buffer.resize(shared_bytes + kGuardBytes + 1024);
  shared_memory = shared_buffer.data() + (1024 - reinterpret_cast<uintptr_t>(shared_buffer.data()) % 1024);
  for (const int64_t i : order_of(blocks, -1)) {
    blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                static_cast<unsigned>(i / grid.x / grid.y)};
    try {
      run_block(shared_bytes, i);
    } catch (const std::exception& error) {
      // Threads that were left in the middle never go on.
      for (Fiber& fiber : fibers) fiber.started = false;
      throw std::runtime_error("block " + name_of(blockIdx) + ", thread " + name_of(threadIdx) + ": " + error.what());
    }
  }
}

int64_t launches() { return launch_count; }
int multiprocessors() { return static_cast<int>(device_multiprocessors); }
size_t shared_limit() { return static_cast<size_t>(device_shared_limit); }
void record(int64_t multiprocessors, int64_t shared_limit) {
  recording = multiprocessors > 0;
  records.clear();
  device_multiprocessors = recording ? multiprocessors : kMultiprocessors;
  device_shared_limit = recording ? shared_limit : kSharedLimit;
}
std::vector<int64_t> recorded() { return records; }
void count_load() { ++threads[current].loads; }
std::vector<int64_t> loads() { return {load_count, load_count_of_busiest}; }
void set_order(int64_t order) { launch_order = order; }
unsigned char* dynamic_shared() { return shared_memory; }
uint64_t block_number() { return blocks_begun; }
int lane() { return current % kWarp; }

void meet(unsigned mask, Resolve resolve, void* operands, Place place) {
  Thread& self = threads[current];
  const int first = current / kWarp * kWarp;
  self.place = place;
  self.mask = mask;
  self.resolve = resolve;
  self.operands = operands;
  self.state = State::kAtWarp;
  if ((mask >> lane() & 1u) == 0) throw std::runtime_error(describe(self) + ", which it is not one of");
  void* lanes[kWarp] = {};
  bool complete = true;
  for (int i = 0; i < kWarp && complete; ++i) {
    if ((mask >> i & 1u) == 0) continue;
    if (first + i >= static_cast<int>(threads.size())) {
      throw std::runtime_error(describe(self) + ", some of which do not exist");
    }
    const Thread& other = threads[first + i];
    if (other.state == State::kDone) throw std::runtime_error(describe(self) + ", but " + describe(other));
    complete = other.state == State::kAtWarp && other.mask == mask && other.resolve == resolve &&
               other.place.line == place.line;
    lanes[i] = other.operands;
  }
  if (!complete) {
    yield();
    return;
  }
  resolve(lanes);
  for (int i = 0; i < kWarp; ++i) {
    if (lanes[i] != nullptr) threads[first + i].state = State::kReady;
  }
}

int meet_block(bool predicate, Place place) {
  Thread& self = threads[current];
  self.place = place;
  self.state = State::kAtBlock;
  ++waiting_at_block;
  true_predicates += predicate;
  for (const Thread& other : threads) {
    const bool elsewhere = other.state == State::kAtBlock && other.place.line != place.line;
    if (elsewhere || other.state == State::kDone) {
      throw std::runtime_error("a barrier in divergent code: " + describe(self) + ", " + describe(other));
    }
  }
  if (waiting_at_block < static_cast<int>(threads.size())) {
    yield();
    return block_result;
  }
  block_result = true_predicates;
  waiting_at_block = true_predicates = 0;
  for (Thread& thread : threads) thread.state = State::kReady;
  return block_result;
}

void copy_async(void* shared, const void* global, size_t bytes, size_t copied) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(shared);
  if (address % bytes != 0 || (copied > 0 && reinterpret_cast<uintptr_t>(global) % bytes != 0)) {
    throw std::runtime_error("an asynchronous copy of " + std::to_string(bytes) + " bytes is not aligned");
  }
  if (copied > 0) count_load();
  memset(shared, 0xff, bytes);
  threads[current].open.push_back({shared, global, bytes, copied});
}

void commit_copies() {
  Thread& self = threads[current];
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}

void wait_for_copies(int groups_left) {
  Thread& self = threads[current];
  for (; static_cast<int>(self.groups.size()) > groups_left; self.groups.pop_front()) {
    for (const Copy& copy : self.groups.front()) {
      memset(copy.to, 0, copy.bytes);
      if (copy.copied > 0) memcpy(copy.to, copy.from, copy.copied);
    }
  }
}

}  // namespace bigain::simt
