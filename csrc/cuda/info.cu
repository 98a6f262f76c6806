// What the CUDA library was built with, and whether it can run here.
#include "op_common_cuda.h"

namespace bigain {
namespace {

#ifdef BIGAIN_EMULATE
std::string build_info() { return "emulated on the CPU"; }
std::string problem() { return ""; }
bool runs_on(int64_t) { return true; }
#else
__global__ void probe_kernel() {}

// A CUDA version, 13000, as people write it, 13.0.
std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string build_info() { return std::string("sm_" BIGAIN_CUDA_ARCHS ", CUDA ") + version_text(CUDART_VERSION); }

// Why the driver cannot run the library; empty when it can, or when there is no driver and nothing to run.
std::string problem() {
  int driver = 0;
  check_cuda(cudaDriverGetVersion(&driver));
  if (driver == 0 || driver / 1000 >= CUDART_VERSION / 1000) return "";
  return "built with CUDA " + version_text(CUDART_VERSION) + ", the driver here supports " + version_text(driver);
}

// Whether the library holds code for a device.
bool runs_on(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  cudaGetLastError();  // a later call must not report it again
  return error == cudaSuccess;
}
#endif

}  // namespace
}  // namespace bigain

STABLE_TORCH_LIBRARY_FRAGMENT(bigain_cuda, m) {
  m.def("build_info() -> str");
  m.def("problem() -> str");
  m.def("runs_on(int device) -> bool");
}
STABLE_TORCH_LIBRARY_IMPL(bigain_cuda, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&bigain::build_info));
  m.impl("problem", TORCH_BOX(&bigain::problem));
  m.impl("runs_on", TORCH_BOX(&bigain::runs_on));
}
