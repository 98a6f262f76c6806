// Launches on two devices from many threads, for test_launch.py. Prints what the stand-in of the runtime counted.
#include <cstdio>
#include <thread>
#include <vector>

#include "bigain/launch.cuh"

void first(int) {}
void second(int) {}

int main() {
  constexpr int kThreads = 8, kLaunches = 500;
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([i] {
      device = i % 2;
      for (int j = 0; j < kLaunches; ++j) {
        // More than 48 KiB now and then, and of two sizes.
        bigain::launch(first, dim3(1), dim3(32), j % 2 ? 50000 : 70000, nullptr, j);
        bigain::launch(second, dim3(1), dim3(32), 1000, nullptr, j);
        bigain::launch(second, dim3(0), dim3(32), 1000, nullptr, j);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  std::printf("%d %d %d %d %d\n", launches.load(), early.load(), attributes_set.load(), largest_set.load(),
              attributes_read.load());
}
