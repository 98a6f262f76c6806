// Choice of the instruction set when the first kernel runs, and the tables of kernels compiled for it.
#include <cstdlib>
#include <stdexcept>
#include <string>

#ifdef BIGAIN_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "match_amx.h"
#include "match_kernel.h"
#include "op_common.h"
#include "row_kernels.h"

namespace bigain {

#define DECLARE_TABLES(NAMESPACE)       \
  namespace NAMESPACE {                 \
  template <typename T>                 \
  const RowKernels<T>& row_kernels();   \
  template <typename A>                 \
  const MatchKernel<A>& match_kernel(); \
  }
DECLARE_TABLES(baseline)
#ifdef BIGAIN_X86_ISAS
DECLARE_TABLES(avx2)
DECLARE_TABLES(avx512)
#endif
#undef DECLARE_TABLES
#ifdef BIGAIN_AMX
namespace amx {
template <typename T>
const AmxKernel<T>& amx_kernel();
}
#endif

namespace {

const char* const kNames[] = {"baseline", "avx2", "avx512", "amx"};

enum class Isa { kBaseline, kAvx2, kAvx512, kAmx };

// Whether the machine has AMX for bfloat16, and the kernel lets this process use it: its registers are so large that
// Linux gives room for them only to those who ask (Documentation/arch/x86/xstate.rst).
[[maybe_unused]] bool has_amx() {
#ifdef BIGAIN_AMX
  constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBFloat16) == 0 || (d & kTiles) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// The best instruction set that this build has and this machine can run.
Isa best_isa() {
#ifdef BIGAIN_X86_ISAS
  __builtin_cpu_init();
  // What build_native.py compiles the objects for.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) return has_amx() ? Isa::kAmx : Isa::kAvx512;
  return avx2 ? Isa::kAvx2 : Isa::kBaseline;
#else
  return Isa::kBaseline;
#endif
}

// BIGAIN_CPU_ISA (baseline, avx2, avx512 or amx) lowers it, so that one machine can test all.
Isa choose_isa() {
  const Isa best = best_isa();
  const char* wanted = std::getenv("BIGAIN_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    return best;
  }
  for (int i = 0; i <= static_cast<int>(best); ++i) {
    if (std::string(wanted) == kNames[i]) {
      return static_cast<Isa>(i);
    }
  }
  fail("BIGAIN_CPU_ISA: got '", wanted, "', expected baseline, avx2, avx512 or amx, and at most what the machine has, ",
       kNames[static_cast<int>(best)]);
}

Isa isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

// The instruction set in use, and what the library was built with.
std::string build_info() {
#ifdef __clang__
  const std::string compiler = "clang " __clang_version__;
#else
  const std::string compiler = "g++ " __VERSION__;
#endif
  const Isa best = best_isa();
  std::string used = kNames[static_cast<int>(isa())];
  if (isa() == Isa::kAmx) used += " (matching on the matrix unit but in float64, all else avx512)";
  if (isa() != best)
    used += std::string(" (asked for by BIGAIN_CPU_ISA, the machine has ") + kNames[static_cast<int>(best)] + ")";
  return used + ", built by " + compiler + " for torch 2.11 and later";
}

}  // namespace

template <typename T>
const RowKernels<T>& row_kernels() {
#ifdef BIGAIN_X86_ISAS
  if (isa() >= Isa::kAvx512) return avx512::row_kernels<T>();
  if (isa() == Isa::kAvx2) return avx2::row_kernels<T>();
#endif
  return baseline::row_kernels<T>();
}

template <typename A>
const MatchKernel<A>& match_kernel() {
#ifdef BIGAIN_X86_ISAS
  if (isa() >= Isa::kAvx512) return avx512::match_kernel<A>();
  if (isa() == Isa::kAvx2) return avx2::match_kernel<A>();
#endif
  return baseline::match_kernel<A>();
}

template <typename T>
const AmxKernel<T>* amx_kernel() {
#ifdef BIGAIN_AMX
  if (isa() == Isa::kAmx) return &amx::amx_kernel<T>();
#endif
  return nullptr;
}

template const RowKernels<float>& row_kernels<float>();
template const RowKernels<double>& row_kernels<double>();
template const RowKernels<BFloat16>& row_kernels<BFloat16>();
template const RowKernels<Half>& row_kernels<Half>();
template const MatchKernel<float>& match_kernel<float>();
template const MatchKernel<double>& match_kernel<double>();
template const AmxKernel<float>* amx_kernel<float>();
template const AmxKernel<BFloat16>* amx_kernel<BFloat16>();
template const AmxKernel<Half>* amx_kernel<Half>();

}  // namespace bigain

STABLE_TORCH_LIBRARY_FRAGMENT(bigain_cpp, m) { m.def("build_info() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(bigain_cpp, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&bigain::build_info));
}
