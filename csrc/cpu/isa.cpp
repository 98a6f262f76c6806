// Choice of the instruction set when the first kernel runs, and the tables of kernels compiled for it.
#include <cstdlib>
#include <stdexcept>
#include <string>

#ifdef BIGAIN_X86_ISAS
#include <cpuid.h>
#endif
#ifdef BIGAIN_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "match_bf16.h"
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
#ifdef BIGAIN_VDPBF16
namespace vdpbf16 {
const Bf16Kernel<BFloat16>& bf16_kernel();
}
#endif
#ifdef BIGAIN_AMX
namespace amx {
template <typename T>
const Bf16Kernel<T>& bf16_kernel();
}
#endif

namespace {

// Each has what those before it have, on the machines where it is chosen.
enum class Isa { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmx };
constexpr Isa kAll[] = {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx};

const char* name(Isa isa) {
  constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};
  return kNames[static_cast<int>(isa)];
}

#ifdef BIGAIN_AMX
// Whether the machine has AMX for bfloat16, and the kernel lets this process use it: its registers are so large that
// Linux gives room for them only to those who ask (Documentation/arch/x86/xstate.rst).
bool has_amx() {
  constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBFloat16) == 0 || (d & kTiles) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

#ifdef BIGAIN_X86_ISAS
// __builtin_cpu_supports does not know this name in the older compilers that are supported (clang before 18).
bool has_f16c() {
  constexpr unsigned kF16c = 1u << 29;
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & kF16c) != 0;
}
#endif

// Whether this build has an instruction set and this machine can run it: what build_native.py compiles the objects for.
bool runs(Isa isa) {
#ifdef BIGAIN_X86_ISAS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#ifdef BIGAIN_AMX
  if (isa == Isa::kAmx) return avx512 && __builtin_cpu_supports("avx512bf16") && has_amx();
#endif
#ifdef BIGAIN_VDPBF16
  if (isa == Isa::kAvx512Bf16) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  if (isa == Isa::kAvx512) return avx512;
  if (isa == Isa::kAvx2) return avx2;
#endif
  return isa == Isa::kBaseline;
}

// Whether an instruction set that runs is the faster choice. vdpbf16ps: on AMD's CPUs (Zen 4 and 5) it multiplies twice
// as many channels a cycle as float32's FMA, on Intel's no more.
bool pays([[maybe_unused]] Isa isa) {
#ifdef BIGAIN_X86_ISAS
  return isa != Isa::kAvx512Bf16 || __builtin_cpu_is("amd");
#else
  return true;
#endif
}

Isa best_isa() {
  Isa best = Isa::kBaseline;
  for (const Isa isa : kAll) {
    if (runs(isa) && pays(isa)) best = isa;
  }
  return best;
}

// BIGAIN_CPU_ISA names another one that the machine can run, so that one machine can test all.
Isa choose_isa() {
  const char* wanted = std::getenv("BIGAIN_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best_isa();
  std::string names;
  for (const Isa isa : kAll) {
    if (!runs(isa)) continue;
    if (std::string(wanted) == name(isa)) return isa;
    names += (names.empty() ? "" : ", ") + std::string(name(isa));
  }
  fail("BIGAIN_CPU_ISA: got '", wanted, "', expected one of what this machine and this build have: ", names);
}

Isa isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

// The instruction set in use, how each dtype is matched with it, and what the library was built with.
std::string build_info() {
#ifdef __clang__
  const std::string compiler = "clang " __clang_version__;
#else
  const std::string compiler = "g++ " __VERSION__;
#endif
  std::string used = name(isa());
  if (isa() == Isa::kAmx) used += " (matching on the matrix unit but in float64, all else avx512)";
  if (isa() == Isa::kAvx512Bf16) used += " (bfloat16 matched by vdpbf16ps, all else avx512)";
  if (isa() != best_isa())
    used += std::string(" (asked for by BIGAIN_CPU_ISA, the machine has ") + name(best_isa()) + ")";
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
const Bf16Kernel<T>* bf16_kernel() {
#ifdef BIGAIN_AMX
  if (isa() == Isa::kAmx) return &amx::bf16_kernel<T>();
#endif
#ifdef BIGAIN_VDPBF16
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (isa() == Isa::kAvx512Bf16) return &vdpbf16::bf16_kernel();
  }
#endif
  return nullptr;
}

template const RowKernels<float>& row_kernels<float>();
template const RowKernels<double>& row_kernels<double>();
template const RowKernels<BFloat16>& row_kernels<BFloat16>();
template const RowKernels<Half>& row_kernels<Half>();
template const MatchKernel<float>& match_kernel<float>();
template const MatchKernel<double>& match_kernel<double>();
template const Bf16Kernel<float>* bf16_kernel<float>();
template const Bf16Kernel<BFloat16>* bf16_kernel<BFloat16>();
template const Bf16Kernel<Half>* bf16_kernel<Half>();

}  // namespace bigain

STABLE_TORCH_LIBRARY_FRAGMENT(bigain_cpp, m) { m.def("build_info() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(bigain_cpp, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&bigain::build_info));
}
