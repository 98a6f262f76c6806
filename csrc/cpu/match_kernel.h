// The matrix product of bipartite matching with a running maximum in place of its result. See match_kernel.cpp.
#pragma once

#include <cstdint>

namespace bigain {

// Most sources that one call of MatchKernel::match takes.
constexpr int64_t kMatchRows = 64;

// A is float or double.
template <typename A>
struct MatchKernel {
  // Destinations are matched this many at a time.
  int64_t panel_width;

  // Transpose `count` <= panel_width rows of `channels` values into panel (channels, panel_width), the rest zero.
  void (*pack)(const A* rows, int64_t count, int64_t channels, A* panel);

  // For each of `count` <= kMatchRows sources: the largest rows[i] . destination + bias[destination] and the first
  // destination that has it. Sources that compare with nothing (NaN) get -inf and 0.
  // panels (num_panels, channels, panel_width), bias (num_panels * panel_width); the last panel may be partly empty.
  void (*match)(const A* const* rows, int64_t count, const A* panels, const A* bias, int64_t num_destinations,
                int64_t channels, A* best, int32_t* position);
};

// The table for this machine.
template <typename A>
const MatchKernel<A>& match_kernel();

}  // namespace bigain
