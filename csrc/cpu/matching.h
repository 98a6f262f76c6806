// What the forms of bipartite matching share: the tensors, and the sources in dense chunks.
#pragma once

#include "op_common.h"
#include "row_kernels.h"

namespace bigain {

template <typename T>
struct Matching {
  using A = accumulate_t<T>;

  Tokens<T> x;  // (B, N, C)
  int64_t batch, tokens, channels;
  int64_t count;  // D, destinations in each row
  const RowKernels<T>* rows;
  const int32_t* destinations;    // (B, D)
  A* norm;                        // (B, N), see `length`: of the sources at least, before `store`
  const uint8_t* is_destination;  // (B, N)
  float* similarity;              // (B, N)
  int32_t* match;                 // (B, N)

  // The norm of a token; 0 for one without a direction (zero, NaN, or too large for the type), which is similar to
  // nothing.
  A length(const T* token) const {
    const A norm = rows->norm(token, channels);
    return norm > 0 && norm <= std::numeric_limits<A>::max() ? norm : 0;
  }

  // Writes a token, whose `length` is given, to `unit` (C), scaled to norm one. Zeros if it has no direction.
  void unit_token(const T* token, A length, A* unit) const {
    if (length > 0) {
      rows->divide(token, length, channels, unit);
    } else {
      std::fill_n(unit, channels, A(0));
    }
  }

  // The best destination of source n: `product` is the largest product of the token with a unit destination, -inf when
  // there is none; `position` counts destinations.
  void store(int64_t b, int64_t n, A product, int64_t position) const {
    const int64_t at = b * tokens + n;
    const bool usable = norm[at] > 0 && product > -std::numeric_limits<A>::infinity();
    match[at] = destinations[b * count + (usable ? position : 0)];
    if (usable) similarity[at] = static_cast<float>(product / norm[at]);
  }
};

// The sources of the rows first_row, ..., last_row - 1 in chunks of at most `size`, each of one row: the tokens that
// `others` (B, N) does not mark, as `is_destination` does. Destinations stand among the tokens, so chunks of tokens
// would leave vector lanes empty.
class SourceChunks {
 public:
  template <typename T>
  SourceChunks(const Matching<T>& m, const uint8_t* others, int64_t first_row, int64_t last_row, int64_t size)
      : first_row_(first_row), size_(size), starts_{0}, first_chunk_{0} {
    for (int64_t b = first_row; b < last_row; ++b) {
      for (int64_t n = 0; n < m.tokens; ++n) {
        if (!others[b * m.tokens + n]) sources_.push_back(static_cast<int32_t>(n));
      }
      const int64_t end = static_cast<int64_t>(sources_.size());
      first_chunk_.push_back(first_chunk_.back() + (end - starts_.back() + size - 1) / size);
      starts_.push_back(end);
    }
  }

  int64_t count() const { return first_chunk_.back(); }

  struct Chunk {
    int64_t row;  // in the batch
    const int32_t* sources;
    int64_t count;
  };

  Chunk operator[](int64_t i) const {
    const int64_t row = std::upper_bound(first_chunk_.begin(), first_chunk_.end(), i) - first_chunk_.begin() - 1;
    const int64_t start = starts_[row] + (i - first_chunk_[row]) * size_;
    return {first_row_ + row, sources_.data() + start, std::min(size_, starts_[row + 1] - start)};
  }

 private:
  int64_t first_row_, size_;
  std::vector<int32_t> sources_;
  std::vector<int64_t> starts_, first_chunk_;  // of each row, and one more
};

}  // namespace bigain
