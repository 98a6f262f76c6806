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
__global__ void __launch_bounds__(kUnmergeThreads) token_unmerge_kernel(const TokenUnmerge<T> p) {
  // The launcher makes sure that a row has fewer than 2^31 vectors.
  const unsigned vectors = num_vectors<T>(p.channels), blocks = ceil_div(p.tokens * vectors, kUnmergeThreads);
  const int b = blockIdx.x / blocks;
  const unsigned own = blockIdx.x % blocks * kUnmergeThreads + threadIdx.x;
  const int n = own / vectors;
  const int64_t c = own % vectors * kVector<T>;
  if (n >= p.tokens) return;
  float gate[kVector<T>], residual[kVector<T>];
  if (p.residual_is != Operand::kNone) {
    const int64_t offset = b * p.residual_batch_stride + n * p.residual_token_stride;
    load_operand<kAligned, T>(p.residual, p.residual_is, offset, c, p.channels, residual);
  }
  if (p.gate_is != Operand::kNone) {
    load_operand<kAligned, T>(p.gate, p.gate_is, b * p.gate_stride, c, p.channels, gate);
  }
  const int64_t index_row = static_cast<int64_t>(b % p.plan_rows) * p.tokens;
  const int slot = min(static_cast<unsigned>(p.index[index_row + n]), static_cast<unsigned>(p.slots - 1));
  Vector<T> values = load_vector<kAligned>(p.y + b * p.batch_stride + slot * p.slot_stride, c, p.channels);
  if (p.gate_is != Operand::kNone || p.residual_is != Operand::kNone) {
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) {
      float value = to_float(values.value[k]);
      if (p.gate_is != Operand::kNone) value *= gate[k];
      if (p.residual_is != Operand::kNone) value += residual[k];
      values.value[k] = from_float<T>(value);
    }
  }
  store_vector<kAligned>(p.out + (b * static_cast<int64_t>(p.tokens) + n) * p.channels, c, p.channels, values);
}

// One launch.
template <typename T>
void launch_token_unmerge(const TokenUnmerge<T>& p, cudaStream_t stream) {
  const int row = to_int(p.tokens * num_vectors<T>(p.channels));
  const unsigned blocks = grid_extent(p.batch * ceil_div(row, kUnmergeThreads));
  const auto fits = [&](const void* pointer, Operand kind, int64_t batch_stride, int64_t token_stride) {
    return operand_has_vectors<T>(pointer, kind, p.channels, batch_stride, token_stride);
  };
  const bool aligned = fits(p.y, Operand::kSame, p.batch_stride, p.slot_stride) &&
                       fits(p.out, Operand::kSame, p.channels, p.channels) &&
                       fits(p.gate, p.gate_is, p.gate_stride, 0) &&
                       fits(p.residual, p.residual_is, p.residual_batch_stride, p.residual_token_stride);
  launch(aligned ? token_unmerge_kernel<T, true> : token_unmerge_kernel<T, false>, blocks, kUnmergeThreads, 0, stream,
         p);
}

}  // namespace bigain
