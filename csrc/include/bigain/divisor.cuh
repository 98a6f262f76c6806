// Division by a number that a launch fixes: a multiplication and a shift in place of some twenty instructions.
#pragma once

#include "bigain/launch.cuh"

namespace bigain {

// Divides numbers below 2^31 by a divisor from 1 to 2^31 - 1, exactly: T. Granlund and P. L. Montgomery, "Division by
// invariant integers using multiplication", 1994, figure 4.1.
class Divisor {
 public:
  Divisor() = default;
  // 0, of launches with nothing to do, is taken as 1.
  explicit Divisor(int64_t divisor) : divisor_(grid_extent(divisor > 0 ? divisor : 1)) {
    while ((int64_t{1} << shift_) < divisor_) ++shift_;
    const uint64_t above = (uint64_t{1} << shift_) - divisor_;
    multiplier_ = static_cast<uint32_t>((above << 32) / divisor_ + 1);
  }

  __device__ __forceinline__ unsigned quotient(unsigned n) const { return (__umulhi(n, multiplier_) + n) >> shift_; }
  __device__ __forceinline__ unsigned remainder(unsigned n) const { return n - quotient(n) * divisor_; }
  // What remains of n, which becomes the quotient: the innermost coordinate of a number of several.
  __device__ __forceinline__ unsigned take(unsigned& n) const {
    const unsigned whole = n, left = quotient(n);
    n = left;
    return whole - left * divisor_;
  }

 private:
  uint32_t divisor_ = 1, multiplier_ = 1, shift_ = 0;
};

}  // namespace bigain
