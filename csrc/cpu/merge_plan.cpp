// merge_plan on the CPU: from matches to the tables of a MergePlan.
#include <atomic>
#include <limits>

#include "plan_rows.h"

namespace bigain {
namespace {

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
  // Waking a thread takes as long as a small row.
  for_each_task(batch, 4 * tokens, [&](int64_t begin, int64_t end) {
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

}  // namespace
}  // namespace bigain

STABLE_TORCH_LIBRARY_FRAGMENT(bigain_cpp, m) {
  m.def("merge_plan(Tensor similarity, Tensor match, Tensor destinations, int r) -> (Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(bigain_cpp, CPU, m) { m.impl("merge_plan", TORCH_BOX(&bigain::merge_plan)); }
