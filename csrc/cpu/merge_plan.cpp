// merge_plan and block_merge_plan on the CPU: from matches, or from tile scores, to the tables of a MergePlan.
#include <atomic>
#include <cmath>

#include "op_common.h"

namespace bigain {
namespace {

using Tables = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// The tables of a plan of `batch` rows, and one row of them. See bigain_kernels.MergePlan.
struct Plan {
  int64_t tokens, slots;
  Tensor slot, offsets, members, anchor;

  Plan(int64_t batch, int64_t n, int64_t m)
      : tokens(n),
        slots(m),
        slot(new_tensor({batch, n}, ScalarType::Int)),
        offsets(new_tensor({batch, m + 1}, ScalarType::Int)),
        members(new_tensor({batch, n}, ScalarType::Int)),
        anchor(new_tensor({batch, m}, ScalarType::Int)) {}

  Tables tables() const { return {slot, offsets, members, anchor}; }
};

// Row pointers, taken once: every call of data_ptr goes through the C interface of torch.
struct PlanRows {
  int64_t tokens, slots;
  int32_t *slot, *offsets, *members, *anchor;

  explicit PlanRows(const Plan& plan)
      : tokens(plan.tokens),
        slots(plan.slots),
        slot(plan.slot.mutable_data_ptr<int32_t>()),
        offsets(plan.offsets.mutable_data_ptr<int32_t>()),
        members(plan.members.mutable_data_ptr<int32_t>()),
        anchor(plan.anchor.mutable_data_ptr<int32_t>()) {}

  // Row b of the plan in which token n is represented by assign[n]; exactly `slots` tokens represent themselves, and
  // all others are represented by one of those.
  void fill(int64_t b, const int32_t* assign) const {
    int32_t *const row_slot = slot + b * tokens, *const row_offsets = offsets + b * (slots + 1);
    int32_t *const row_members = members + b * tokens, *const row_anchor = anchor + b * slots;
    int32_t used = 0;
    for (int64_t n = 0; n < tokens; ++n) {
      if (assign[n] == n) {
        row_anchor[used] = static_cast<int32_t>(n);
        row_slot[n] = used++;
      }
    }
    // A stable counting sort by slot. row_offsets[m + 1] counts, then points at the next free place of slot m.
    std::fill(row_offsets, row_offsets + slots + 1, 0);
    for (int64_t n = 0; n < tokens; ++n) {
      row_slot[n] = row_slot[assign[n]];
      ++row_offsets[row_slot[n] + 1];
    }
    int32_t start = 0;
    for (int64_t m = 1; m <= slots; ++m) {
      const int32_t size = row_offsets[m];
      row_offsets[m] = start;
      start += size;
    }
    for (int64_t n = 0; n < tokens; ++n) {
      row_members[row_offsets[row_slot[n] + 1]++] = static_cast<int32_t>(n);
    }
  }
};

// A key whose unsigned order is: higher similarity first, then lower token. NaN counts as -inf.
uint64_t merge_key(float similarity, int64_t token) {
  // Adding zero makes -0 equal to +0.
  const float value = similarity != similarity ? -std::numeric_limits<float>::infinity() : similarity + 0.0f;
  const uint32_t bits = float_bits(value);
  const uint32_t ascending = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(~ascending) << 32 | static_cast<uint64_t>(token);
}

// similarity (B, N) float32, match (B, N) int32, destinations (B, D) int32 -> tables with M = N - r slots
Tables merge_plan(const Tensor& similarity_in, const Tensor& match_in, const Tensor& destinations_in, int64_t r) {
  check_plan_arguments(similarity_in, match_in, destinations_in, r);
  const int64_t batch = similarity_in.size(0), tokens = similarity_in.size(1), count = destinations_in.size(1);
  const Tensor similarity = torch::stable::contiguous(similarity_in), match = torch::stable::contiguous(match_in);
  const Tensor destinations = torch::stable::contiguous(destinations_in);
  check_range("destinations", destinations, 0, tokens);
  check_range("match", match, 0, tokens);

  const Plan plan(batch, tokens, tokens - r);
  const PlanRows rows(plan);
  const float* const similarities = similarity.const_data_ptr<float>();
  const int32_t *const matches = match.const_data_ptr<int32_t>(), *const chosen =
                                                                      destinations.const_data_ptr<int32_t>();
  std::atomic<int64_t> bad_row = -1;
  for_each_task(batch, 16 * tokens, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> keys;
    std::vector<int32_t> assign(tokens);
    std::vector<bool> is_destination(tokens);
    for (int64_t b = begin; b < end; ++b) {
      std::fill(is_destination.begin(), is_destination.end(), false);
      for (int64_t d = 0; d < count; ++d) {
        is_destination[chosen[b * count + d]] = true;
      }
      keys.clear();
      for (int64_t n = 0; n < tokens; ++n) {
        assign[n] = static_cast<int32_t>(n);
        if (!is_destination[n]) keys.push_back(merge_key(similarities[b * tokens + n], n));
      }
      // Only which r come first is asked, not their order.
      if (r < static_cast<int64_t>(keys.size())) std::nth_element(keys.begin(), keys.begin() + r, keys.end());
      for (int64_t i = 0; i < r; ++i) {
        const int64_t n = static_cast<int64_t>(keys[i] & 0xffffffffu);
        assign[n] = matches[b * tokens + n];
      }
      // A merging token must go to another one that stays; otherwise there are no slots to count.
      bool is_valid = true;
      for (int64_t i = 0; i < r; ++i) {
        const int64_t n = static_cast<int64_t>(keys[i] & 0xffffffffu);
        is_valid = is_valid && assign[n] != n && assign[assign[n]] == assign[n];
      }
      if (is_valid) {
        rows.fill(b, assign.data());
      } else {
        bad_row = b;
      }
    }
  });
  // An exception that leaves a thread would lose its message.
  if (bad_row >= 0) fail("match: row ", bad_row.load(), " matches a merging token to no destination");
  return plan.tables();
}

// One number for the scores of a tile, in float64; NaN counts as +inf.
double reduce_tile(const float* tile, int64_t width, int64_t sy, int64_t sx, const std::string& reduce) {
  double sum = 0, largest = -std::numeric_limits<double>::infinity(), smallest = -largest;
  for (int64_t i = 0; i < sy; ++i) {
    for (int64_t j = 0; j < sx; ++j) {
      const double value = tile[i * width + j];
      if (value != value) return std::numeric_limits<double>::infinity();
      sum += value;
      largest = std::max(largest, value);
      smallest = std::min(smallest, value);
    }
  }
  const double mean = sum / static_cast<double>(sy * sx);
  double squares = 0;
  for (int64_t i = 0; i < sy; ++i) {
    for (int64_t j = 0; j < sx; ++j) {
      const double difference = tile[i * width + j] - mean;
      squares += difference * difference;
    }
  }
  const double value = reduce == "max"    ? largest
                       : reduce == "min"  ? smallest
                       : reduce == "sum"  ? sum
                       : reduce == "mean" ? mean
                                          : std::sqrt(squares / static_cast<double>(sy * sx));
  return value != value ? std::numeric_limits<double>::infinity() : value;
}

// score (B, N) float32 -> tables with M = N - (sy * sx - 1) * min(r // (sy * sx - 1), tiles) slots
Tables block_merge_plan(const Tensor& input, int64_t height, int64_t width, int64_t sy, int64_t sx, int64_t r,
                        const std::string& reduce) {
  const BlockSizes sizes = check_block_plan(input, height, width, sy, sx, r, reduce);
  const Tensor score = torch::stable::contiguous(input);
  const int64_t batch = score.size(0), tokens = height * width;
  const int64_t tiles_x = width / sx, tiles = height / sy * tiles_x;
  const int64_t removed = sizes.removed, merged = sizes.merged;

  const Plan plan(batch, tokens, tokens - merged * removed);
  const PlanRows rows(plan);
  const float* const scores = score.const_data_ptr<float>();
  for_each_task(batch, 16 * tokens, [&](int64_t begin, int64_t end) {
    std::vector<std::pair<double, int64_t>> order(tiles);  // compares by value, then by tile
    std::vector<int32_t> assign(tokens);
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t n = 0; n < tokens; ++n) {
        assign[n] = static_cast<int32_t>(n);
      }
      if (merged > 0) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t corner = tile / tiles_x * sy * width + tile % tiles_x * sx;
          order[tile] = {reduce_tile(scores + b * tokens + corner, width, sy, sx, reduce), tile};
        }
        if (merged < tiles) std::nth_element(order.begin(), order.begin() + merged, order.end());
      }
      for (int64_t k = 0; k < merged; ++k) {
        const int64_t tile = order[k].second, corner = tile / tiles_x * sy * width + tile % tiles_x * sx;
        for (int64_t i = 0; i < sy; ++i) {
          std::fill_n(assign.begin() + corner + i * width, sx, static_cast<int32_t>(corner));
        }
      }
      rows.fill(b, assign.data());
    }
  });
  return plan.tables();
}

}  // namespace
}  // namespace bigain

STABLE_TORCH_LIBRARY_FRAGMENT(bigain_cpp, m) {
  m.def("merge_plan(Tensor similarity, Tensor match, Tensor destinations, int r) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "block_merge_plan(Tensor score, int height, int width, int sy, int sx, int r, str reduce)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(bigain_cpp, CPU, m) {
  m.impl("merge_plan", TORCH_BOX(&bigain::merge_plan));
  m.impl("block_merge_plan", TORCH_BOX(&bigain::block_merge_plan));
}
