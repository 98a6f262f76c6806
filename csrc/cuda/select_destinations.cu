// select_destinations for CUDA tensors.
#include "bigain/select_destinations.cuh"
#include "op_common_cuda.h"

namespace bigain {
namespace {

// score (B, N) -> (B, D) int32, ascending
Tensor select_destinations(const Tensor& input, int64_t height, int64_t width, int64_t sy, int64_t sx) {
  check_tiles(input, height, width, sy, sx);
  const OnDeviceOf on(input);
  const Tensor score = with_unit_stride(input);
  const TileGrid grid(height, width, sy, sx);
  Tensor destinations = new_tensor(score, {score.size(0), grid.tiles()}, ScalarType::Int);
  const Tensor by_tile = new_tensor(score, {score.size(0), grid.tiles()}, ScalarType::Int);
  const TileTables tables = {mutable_data_of<int32_t>(destinations), mutable_data_of<int32_t>(by_tile), nullptr};
  launch_select_destinations<true>({data_of<float>(score), score.stride(0), to_int(score.size(0)), grid, tables},
                                   on.stream());
  return destinations;
}

}  // namespace
}  // namespace bigain

STABLE_TORCH_LIBRARY_FRAGMENT(bigain_cuda, m) {
  m.def("select_destinations(Tensor score, int height, int width, int sy, int sx) -> Tensor");
}
BIGAIN_IMPL(bigain_cuda, m) { m.impl("select_destinations", TORCH_BOX(&bigain::select_destinations)); }
