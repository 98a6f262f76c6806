// Copying rows by index: out[b, n] = gate[b] * y[b, index[n]] + residual[b, n], gate and residual optional. With the
// slots of the tokens this undoes a merge; with the anchors of the slots it is the merge "prune".
#pragma once

#include "bigain/common.cuh"
#include "bigain/operand.cuh"

namespace bigain {

constexpr int kUnmergeThreads = 256;

template <typename T>
struct TokenUnmerge {
  const T* y;  // (batch, slots, channels), unit stride in channels
  int64_t batch_stride, slot_stride;
  int batch, slots, tokens;
  int64_t channels;
  const int32_t* index;  // (plan_rows, tokens) values in [0, slots); batch row b uses row b mod plan_rows
  int plan_rows;
  const void* gate;  // (batch, channels), unit stride in channels
  int64_t gate_stride;
  Operand gate_is;
  const void* residual;  // (batch, tokens, channels), unit stride in channels
  int64_t residual_batch_stride, residual_token_stride;
  Operand residual_is;
  T* out;  // (batch, tokens, channels), contiguous
};

// A thread owns one vector of one token. Indices out of range are clamped: see token_merge.cuh.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kUnmergeThreads)
    token_unmerge_kernel(const TokenUnmerge<T> p, const Divisor by_blocks, const Divisor by_vectors,
                         const Divisor by_plan_rows) {
  unsigned b = blockIdx.x;
  unsigned n = by_blocks.take(b) * kUnmergeThreads + threadIdx.x;  // first of all vectors of the row
  const int64_t c = by_vectors.take(n) * kVector<T>;
  const int32_t* const index = p.index + static_cast<int64_t>(by_plan_rows.remainder(b)) * p.tokens + n;
  follow_launches();
  if (n >= static_cast<unsigned>(p.tokens)) return;
  // All loads before the first use, and the index first: one load waits for it.
  const unsigned chosen = *index;
  RawOperand<T> raw_residual, raw_gate;
  const int64_t offset = b * p.residual_batch_stride + n * p.residual_token_stride;
  raw_residual.template load<kAligned>(p.residual, p.residual_is, offset, c, p.channels);
  raw_gate.template load<kAligned>(p.gate, p.gate_is, b * p.gate_stride, c, p.channels);
  const unsigned slot = min(chosen, static_cast<unsigned>(p.slots - 1));
  Vector<T> vector = load_vector<kAligned>(p.y + b * p.batch_stride + slot * p.slot_stride, c, p.channels);
  if (p.gate_is != Operand::kNone || p.residual_is != Operand::kNone) {
    float values[kVector<T>], gate[kVector<T>], residual[kVector<T>];
    if (p.gate_is != Operand::kNone) raw_gate.widen(p.gate_is, gate);
    if (p.residual_is != Operand::kNone) raw_residual.widen(p.residual_is, residual);
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) {
      values[k] = vector[k];
      if (p.gate_is != Operand::kNone) values[k] *= gate[k];
      if (p.residual_is != Operand::kNone) values[k] += residual[k];
    }
    vector = to_vector<T>(values);
  }
  store_vector<kAligned>(p.out + (b * static_cast<int64_t>(p.tokens) + n) * p.channels, c, p.channels, vector);
}

// One launch.
template <typename T>
void launch_token_unmerge(const TokenUnmerge<T>& p, cudaStream_t stream) {
  const int64_t vectors = num_vectors<T>(p.channels);
  const int64_t blocks = to_int(p.tokens * vectors + kUnmergeThreads - 1) / kUnmergeThreads;
  const auto fits = [&](const void* pointer, Operand kind, int64_t batch_stride, int64_t token_stride) {
    return operand_has_vectors<T>(pointer, kind, p.channels, batch_stride, token_stride);
  };
  const bool aligned = fits(p.y, Operand::kSame, p.batch_stride, p.slot_stride) &&
                       fits(p.out, Operand::kSame, p.channels, p.channels) &&
                       fits(p.gate, p.gate_is, p.gate_stride, 0) &&
                       fits(p.residual, p.residual_is, p.residual_batch_stride, p.residual_token_stride);
  launch(aligned ? token_unmerge_kernel<T, true> : token_unmerge_kernel<T, false>, grid_extent(p.batch * blocks),
         kUnmergeThreads, 0, stream, p, Divisor(blocks), Divisor(vectors), Divisor(p.plan_rows));
}

}  // namespace bigain
