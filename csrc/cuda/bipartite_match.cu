// bipartite_match for CUDA tensors: norms, lists and matching, three launches, and a fourth that unpacks.
#include "bigain/bipartite_match.cuh"
#include "bigain/row_norms.cuh"
#include "op_common_cuda.h"

namespace bigain {

// lgtm_plan.cu calls these.
template void launch_match(const MatchProblem<float>&, int, cudaStream_t, int64_t, int);
template void launch_match(const MatchProblem<Half>&, int, cudaStream_t, int64_t, int);
template void launch_match(const MatchProblem<BFloat16>&, int, cudaStream_t, int64_t, int);

namespace {

// x (B, N, C), destinations (B, D) int32, ascending -> similarity (B, N) float32, match (B, N) int32
//
// window is -1 for none. blocks and large choose how blocks share the work, see launch_match; they do not change
// results.
std::tuple<Tensor, Tensor> bipartite_match(const Tensor& input, const Tensor& destinations_in, int64_t window,
                                           int64_t height, int64_t width, int64_t sy, int64_t sx, int64_t blocks,
                                           int64_t large) {
  check_match(input, destinations_in, window, height, width, sy, sx);
  const int64_t batch = input.size(0), tokens = input.size(1), channels = input.size(2),
                count = destinations_in.size(1);
  check_token_count("x", channels);
  if (blocks < 0) fail("blocks: got ", blocks, ", expected at least 1, or 0 to choose");
  const OnDeviceOf on(input);
  const Tensor x = with_unit_stride(input), destinations = with_unit_stride(destinations_in);
  Tensor similarity = new_tensor(x, {batch, tokens}, ScalarType::Float);
  Tensor match = new_tensor(x, {batch, tokens}, ScalarType::Int);
  if (batch * tokens == 0) return {similarity, match};
  Tensor norms = new_tensor(x, {batch, tokens}, ScalarType::Float);
  Tensor sources = new_tensor(x, {batch, tokens - count}, ScalarType::Int);
  Tensor packed = new_tensor(x, {batch, tokens}, ScalarType::Long);
  Packed* const words = mutable_data_of<Packed>(packed);

  with_type_of(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    RowNorms<T> norm = {};
    norm.x = data_of<T>(x);
    norm.batch_stride = x.stride(0);
    norm.token_stride = x.stride(1);
    norm.rows = batch;
    norm.tokens = tokens;
    norm.channels = channels;
    norm.inverse = true;
    norm.norms = mutable_data_of<float>(norms);
    launch_row_norms(norm, on.stream());
    launch_match_lists(data_of<int32_t>(destinations), destinations.stride(0), batch, count, tokens,
                       mutable_data_of<int32_t>(sources), words, on.stream());
    MatchProblem<T> p = {};
    p.x = norm.x;
    p.x_batch_stride = x.stride(0);
    p.x_token_stride = x.stride(1);
    p.inverse_norm = norm.norms;
    p.sources = data_of<int32_t>(sources);
    p.destinations = data_of<int32_t>(destinations);
    p.destination_stride = destinations.stride(0);
    p.num_first = 1;
    p.packed = words;
    p.rows = batch;
    p.tokens = tokens;
    p.channels = channels;
    p.num_sources = tokens - count;
    p.num_destinations = count;
    p.window = window;
    // Tiles larger than the grid are one tile. Without a window the four are not checked.
    if (window >= 0) p.grid = TileGrid(height, width, std::min(sy, height), std::min(sx, width));
    launch_match(p, multiprocessors(), on.stream(), blocks, static_cast<int>(large));
  });
  launch_match_unpack(words, mutable_data_of<float>(similarity), mutable_data_of<int32_t>(match), batch * tokens,
                      on.stream());
  return {similarity, match};
}

}  // namespace
}  // namespace bigain

STABLE_TORCH_LIBRARY_FRAGMENT(bigain_cuda, m) {
  m.def(
      "bipartite_match(Tensor x, Tensor destinations, int window, int height, int width, int sy, int sx, int blocks=0,"
      " int large=-1) -> (Tensor, Tensor)");
}
BIGAIN_IMPL(bigain_cuda, m) { m.impl("bipartite_match", TORCH_BOX(&bigain::bipartite_match)); }
