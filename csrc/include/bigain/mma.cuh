// Tensor cores and asynchronous copies of sm_80 and up, one function per PTX instruction.
#pragma once

#include "bigain/common.cuh"

namespace bigain {

// ---- cp.async --------------------------------------------------------------------------------------------------

// Copies 16 bytes past the registers and L1: the first `bytes` of them from global memory, zeros for the rest. Both
// addresses are multiples of 16, also where nothing is read.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, int bytes) {
#ifdef BIGAIN_EMULATE
  simt::copy_async(shared, global, 16, bytes);
#else
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes)
               : "memory");
#endif
}

// Closes the group of this thread's copies since the last call; the group may be empty.
__device__ __forceinline__ void copy_async_commit() {
#ifdef BIGAIN_EMULATE
  simt::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kLeft groups of this thread are under way. Other threads see the bytes after a barrier.
template <int kLeft>
__device__ __forceinline__ void copy_async_wait() {
#ifdef BIGAIN_EMULATE
  simt::wait_for_copies(kLeft);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

// ---- ldmatrix --------------------------------------------------------------------------------------------------

// Four matrices of 8 rows of 16 bytes; `row` of lanes 8 i to 8 i + 7 points at the rows of matrix i. Lane l gets bytes
// 4 (l % 4) to 4 (l % 4) + 3 of row l / 4 of every matrix.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&out)[4], const void* row) {
#ifdef BIGAIN_EMULATE
  simt::LoadMatrix operands = {row, {}};
  simt::meet(kAllLanes, simt::resolve_load_matrix, operands, {"ldmatrix", 0});
  memcpy(out, operands.result, sizeof(out));
#else
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
#endif
}

// ---- mma -------------------------------------------------------------------------------------------------------

// c (16, 8) += a (16, K) times b (8, K) transposed, K = 32 / sizeof(T): float32 is read as TF32, its low 13 bits
// ignored. Lane l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next one of c: {row, row, row + 8, row +
// 8}.
template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef BIGAIN_EMULATE
  simt::Mma operands = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {c[0], c[1], c[2], c[3]}};
  constexpr auto resolve = std::is_same_v<T, Half>       ? simt::resolve_mma_16x8x16_half
                           : std::is_same_v<T, BFloat16> ? simt::resolve_mma_16x8x16_bfloat16
                                                         : simt::resolve_mma_16x8x8_tf32;
  simt::meet(kAllLanes, resolve, operands, {"mma", 0});
  memcpy(c, operands.c, sizeof(c));
#else
#define BIGAIN_MMA(shape_and_types)                                                                                   \
  asm volatile("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<T, Half>) {
    BIGAIN_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    BIGAIN_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  } else {
    BIGAIN_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  }
#undef BIGAIN_MMA
#endif
}

// Splits float32 bits into two TF32 numbers whose sum is the number but for a part below 2^-22 of it.
__device__ __forceinline__ void split_tf32(uint32_t bits, uint32_t& high, uint32_t& low) {
  constexpr uint32_t kHalf = 0x1000u, kKept = 0xffffe000u;  // round to the 10 bits kept, halves away from zero
  high = (bits + kHalf) & kKept;
  low = float_bits(bits_float(bits) - bits_float(high)) + kHalf;
}

}  // namespace bigain
