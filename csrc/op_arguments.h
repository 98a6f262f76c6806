// What the ops ask of their arguments, once for all libraries. Each function raises ValueError or returns sizes.
//
// Values that lie in tables (token indices, offsets) are checked where they can be read without waiting: the CPU ops
// check them beside this, the CUDA kernels clamp them.
#pragma once

#include <algorithm>

#include "op_checks.h"

namespace bigain {

inline void check_operand(const char* name, const std::optional<Tensor>& tensor, const Tensor& x,
                          std::initializer_list<int64_t> shape) {
  if (!tensor.has_value()) return;
  check_floating(name, *tensor, static_cast<int64_t>(shape.size()));
  check_shape(name, *tensor, shape);
  check_same_device(name, *tensor, x);
}

// One table of a plan, (P, width) int32.
inline void check_table(const char* name, const Tensor& table, const Tensor& x, int64_t rows, int64_t width) {
  check_int32(name, table, 2);
  check_shape(name, table, {rows, width});
  check_same_device(name, table, x);
}

// P, the rows of the plan, which divide the batch of `x`.
inline int64_t plan_rows(const char* name, const Tensor& x, const Tensor& slot) {
  check_int32("slot", slot, 2);
  const int64_t rows = slot.size(0), batch = x.size(0);
  if (rows == 0 ? batch != 0 : batch % rows != 0) {
    fail(name, ": got batch ", batch, ", expected a multiple of the plan's ", rows, " rows");
  }
  return rows;
}

struct PlanSizes {
  int64_t batch, tokens, channels, slots, rows;  // B, N, C, M, P
};

// x (B, N, C), weights (B, N) or none, and a plan.
inline PlanSizes check_merge(const Tensor& x, const Tensor& slot, const Tensor& offsets, const Tensor& members,
                             const Tensor& anchor, const std::optional<Tensor>& weights) {
  check_floating("x", x, 3);
  check_int32("anchor", anchor, 2);
  const PlanSizes sizes = {x.size(0), x.size(1), x.size(2), anchor.size(1), plan_rows("x", x, slot)};
  check_token_count("x", sizes.tokens);
  if (sizes.slots > sizes.tokens) {
    fail("anchor: got ", sizes.slots, " slots, expected at most ", sizes.tokens, ", as x has tokens");
  }
  check_table("slot", slot, x, sizes.rows, sizes.tokens);
  check_table("offsets", offsets, x, sizes.rows, sizes.slots + 1);
  check_table("members", members, x, sizes.rows, sizes.tokens);
  check_table("anchor", anchor, x, sizes.rows, sizes.slots);
  check_operand("weights", weights, x, {sizes.batch, sizes.tokens});
  return sizes;
}

inline void check_merge_mode(const std::string& mode) {
  if (mode != "mean" && mode != "mlerp" && mode != "prune") {
    fail("mode: got '", mode, "', expected mean, mlerp or prune");
  }
}

// norm_weight and norm_bias (C), scale and shift (B, C); each pair both or neither.
inline void check_norm(const Tensor& x, const PlanSizes& sizes, const std::optional<Tensor>& norm_weight,
                       const std::optional<Tensor>& norm_bias, const std::optional<Tensor>& scale,
                       const std::optional<Tensor>& shift) {
  check_pair("norm_weight", norm_weight, "norm_bias", norm_bias);
  check_pair("scale", scale, "shift", shift);
  check_operand("norm_weight", norm_weight, x, {sizes.channels});
  check_operand("norm_bias", norm_bias, x, {sizes.channels});
  check_operand("scale", scale, x, {sizes.batch, sizes.channels});
  check_operand("shift", shift, x, {sizes.batch, sizes.channels});
}

// y (B, M, C), a plan, residual (B, N, C) or none, gate (B, C) or none.
inline PlanSizes check_unmerge(const Tensor& y, const Tensor& slot, const Tensor& offsets, const Tensor& members,
                               const Tensor& anchor, const std::optional<Tensor>& residual,
                               const std::optional<Tensor>& gate) {
  check_floating("y", y, 3);
  const int64_t rows = plan_rows("y", y, slot);
  const PlanSizes sizes = {y.size(0), slot.size(1), y.size(2), y.size(1), rows};
  check_token_count("slot", sizes.tokens);
  if (sizes.slots == 0 && sizes.tokens > 0) {
    fail("y: got no slots, expected at least one for ", sizes.tokens, " tokens");
  }
  check_table("slot", slot, y, rows, sizes.tokens);
  check_table("offsets", offsets, y, rows, sizes.slots + 1);
  check_table("members", members, y, rows, sizes.tokens);
  check_table("anchor", anchor, y, rows, sizes.slots);
  check_operand("gate", gate, y, {sizes.batch, sizes.channels});
  check_operand("residual", residual, y, {sizes.batch, sizes.tokens, sizes.channels});
  return sizes;
}

// x (B, N, C)
inline void check_score_arguments(const Tensor& x, int64_t height, int64_t width, const std::string& norm,
                                  int64_t frames) {
  check_floating("x", x, 3);
  if (frames < 1 || x.size(1) % frames != 0) {
    fail("frames: got ", frames, ", expected a divisor of ", x.size(1), ", the number of tokens of x");
  }
  check_grid(height, width, x.size(1) / frames);
  if (norm != "l1" && norm != "l2") fail("norm: got '", norm, "', expected 'l1' or 'l2'");
}

// score (B, N) float32
inline void check_tiles(const Tensor& score, int64_t height, int64_t width, int64_t sy, int64_t sx) {
  check_dtype("score", score, 2, ScalarType::Float, "float32");
  check_grid(height, width, score.size(1));
  check_token_count("score", score.size(1));
  check_stride(sy, sx);
}

inline void check_window(int64_t window, int64_t height, int64_t width, int64_t sy, int64_t sx, int64_t tokens) {
  if (window < -1) fail("window: got ", window, ", expected at least 0, or -1 for none");
  if (window == -1) return;
  check_grid(height, width, tokens);
  check_stride(sy, sx);
}

// x (B, N, C), destinations (B, D) int32
inline void check_match(const Tensor& x, const Tensor& destinations, int64_t window, int64_t height, int64_t width,
                        int64_t sy, int64_t sx) {
  check_floating("x", x, 3);
  check_int32("destinations", destinations, 2);
  check_same_device("destinations", destinations, x);
  const int64_t tokens = x.size(1), count = destinations.size(1);
  check_token_count("x", tokens);
  check_shape("destinations", destinations, {x.size(0), count});
  if (count > tokens) fail("destinations: got ", count, " for ", tokens, " tokens, expected them to be distinct");
  check_window(window, height, width, sy, sx, tokens);
}

inline void check_removed(int64_t r, int64_t most) {
  if (r < 0 || r > most) fail("r: got ", r, ", expected 0 <= r <= ", most, ", the number of sources that can merge");
}

// similarity (B, N) float32, match (B, N) int32, destinations (B, D) int32
inline void check_plan_arguments(const Tensor& similarity, const Tensor& match, const Tensor& destinations, int64_t r) {
  check_dtype("similarity", similarity, 2, ScalarType::Float, "float32");
  const int64_t batch = similarity.size(0), tokens = similarity.size(1);
  check_token_count("similarity", tokens);
  check_table("match", match, similarity, batch, tokens);
  check_int32("destinations", destinations, 2);
  const int64_t count = destinations.size(1);
  check_table("destinations", destinations, similarity, batch, count);
  // Without destinations there is nothing to merge into.
  check_removed(r, count > 0 ? std::max<int64_t>(tokens - count, 0) : 0);
}

// How block_merge_plan merges: `merged` tiles, each of which loses `removed` tokens.
struct BlockSizes {
  int64_t removed, merged;
};

inline BlockSizes check_block_plan(const Tensor& score, int64_t height, int64_t width, int64_t sy, int64_t sx,
                                   int64_t r, const std::string& reduce) {
  check_tiles(score, height, width, sy, sx);
  if (r < 0) fail("r: got ", r, ", expected at least 0");
  if (reduce != "max" && reduce != "sum" && reduce != "mean" && reduce != "min" && reduce != "std") {
    fail("reduce: got '", reduce, "', expected max, sum, mean, min or std");
  }
  const int64_t tiles = height / sy * (width / sx);
  // Without a tile, sy * sx may be too large to multiply.
  const int64_t removed = tiles > 0 ? sy * sx - 1 : 0;
  return {removed, removed > 0 ? std::min(r / removed, tiles) : 0};
}

// xs: (B, N, C_i), row_alpha (B,) float32 or none
inline void check_pool(const std::vector<Tensor>& xs, int64_t height, int64_t width, int64_t sy, int64_t sx,
                       const std::optional<Tensor>& row_alpha) {
  if (xs.empty()) fail("xs: got no tensor, expected at least one");
  for (const Tensor& x : xs) {
    check_floating("xs", x, 3);
    check_grid(height, width, x.size(1));
    check_token_count("xs", x.size(1));
    check_same_device("xs", x, xs[0]);
    if (x.size(0) != xs[0].size(0)) fail("xs: got batches ", xs[0].size(0), " and ", x.size(0), ", expected one");
  }
  if (sy < 1 || sx < 1 || sy > height || sx > width) {
    fail("factor: got (", sy, ", ", sx, "), expected at least 1 and at most the grid");
  }
  if (!row_alpha.has_value()) return;
  check_dtype("row_alpha", *row_alpha, 1, ScalarType::Float, "float32");
  check_shape("row_alpha", *row_alpha, {xs[0].size(0)});
  check_same_device("row_alpha", *row_alpha, xs[0]);
}

}  // namespace bigain
