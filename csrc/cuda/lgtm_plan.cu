// lgtm_plan for CUDA tensors: the whole of L-GTM planning (BiGain, arXiv 2603.12240) in one call, which launches three
// kernels back to back: scores with all that matching needs, matching, tables.
#include "bigain/bipartite_match.cuh"
#include "bigain/laplacian_score.cuh"
#include "bigain/merge_plan.cuh"
#include "op_common_cuda.h"
#include "plan_tables.h"

namespace bigain {

// Compiled in bipartite_match.cu and merge_plan.cu.
extern template void launch_match(const MatchProblem<float>&, int, cudaStream_t, int64_t, int);
extern template void launch_match(const MatchProblem<Half>&, int, cudaStream_t, int64_t, int);
extern template void launch_match(const MatchProblem<BFloat16>&, int, cudaStream_t, int64_t, int);
extern template void plan::launch_words<true, plan::Narrow>(const PlanInputs&, int64_t, const plan::Layout&,
                                                            const PlanTables&, void*, cudaStream_t);
extern template void plan::launch_words<true, plan::Wide>(const PlanInputs&, int64_t, const plan::Layout&,
                                                          const PlanTables&, void*, cudaStream_t);
extern template void plan::launch_words<false, plan::Narrow>(const PlanInputs&, int64_t, const plan::Layout&,
                                                             const PlanTables&, void*, cudaStream_t);
extern template void plan::launch_words<false, plan::Wide>(const PlanInputs&, int64_t, const plan::Layout&,
                                                           const PlanTables&, void*, cudaStream_t);

namespace {

// Parts of one allocation, each aligned to 256 bytes: a call of torch's allocator costs as much as half a launch.
class Scratch {
 public:
  int64_t add(int64_t bytes) {
    const int64_t offset = bytes_;
    bytes_ += ceil_div(bytes, 256) * 256;
    return offset;
  }
  void allocate(const Tensor& like) { memory_ = new_tensor(like, {bytes_ / 8}, ScalarType::Long); }
  template <typename T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(memory_.mutable_data_ptr()) + offset);
  }

 private:
  int64_t bytes_ = 0;
  Tensor memory_;
};

template <typename T>
void plan(const Tensor& x, const TileGrid& grid, int64_t r, int64_t window, int64_t share, const PlanTables& tables,
          cudaStream_t stream) {
  const int64_t rows = x.size(0) / share, tokens = x.size(1), channels = x.size(2), count = grid.tiles();
  const int on_device = multiprocessors();
  Scratch scratch;
  const int64_t packed = scratch.add(8 * rows * tokens), score = scratch.add(4 * rows * tokens);
  const int64_t norms = scratch.add(4 * rows * tokens), destinations = scratch.add(4 * rows * count);
  const int64_t sources = scratch.add(4 * rows * (tokens - count));
  const int64_t for_tables = scratch.add(merge_plan_scratch_bytes(rows, tokens, on_device));
  const int64_t mean = scratch.add(share > 1 ? rows * tokens * channels * static_cast<int64_t>(sizeof(T)) : 0);
  scratch.allocate(x);

  LaplacianScore<T> scored = {};
  scored.x = data_of<T>(x);
  scored.batch_stride = x.stride(0);
  scored.token_stride = x.stride(1);
  scored.rows = to_int(rows);
  scored.share = to_int(share);
  scored.channels = channels;
  scored.grid = grid;
  scored.score = scratch.at<float>(score);
  scored.inverse_norm = scratch.at<float>(norms);
  scored.tables = {scratch.at<int32_t>(destinations), scratch.at<int32_t>(sources), scratch.at<Packed>(packed)};
  scored.mean = scratch.at<T>(mean);
  if (share > 1) {
    launch_laplacian_score<T, ScoreMode::kPlanShared>(scored, stream);
  } else {
    launch_laplacian_score<T, ScoreMode::kPlan>(scored, stream);
  }

  MatchProblem<T> matched = {};
  matched.x = share > 1 ? scored.mean : scored.x;
  matched.x_batch_stride = share > 1 ? tokens * channels : x.stride(0);
  matched.x_token_stride = share > 1 ? channels : x.stride(1);
  matched.inverse_norm = scored.inverse_norm;
  matched.sources = scored.tables.sources;
  matched.destinations = scored.tables.destinations;
  matched.destination_stride = count;
  matched.num_first = grid.tiles_x();
  matched.packed = scored.tables.packed;
  matched.rows = rows;
  matched.tokens = tokens;
  matched.channels = channels;
  matched.num_sources = tokens - count;
  matched.num_destinations = count;
  matched.window = window;
  matched.grid = grid;
  launch_match(matched, on_device, stream);
  launch_merge_plan_packed(scored.tables.packed, rows, tokens, r, tables, scratch.at<void>(for_tables), on_device,
                           stream);
}

// x (share * P, N, C), row b belonging to plan row b mod P; window -1 for none -> tables of P rows with N - r slots
Tables lgtm_plan(const Tensor& input, int64_t height, int64_t width, int64_t sy, int64_t sx, int64_t r, int64_t window,
                 int64_t share) {
  check_floating("x", input, 3);
  check_grid(height, width, input.size(1));
  check_token_count("x", input.size(1));
  check_token_count("x", input.size(2));
  check_stride(sy, sx);
  if (share < 1 || input.size(0) % share != 0) {
    fail("share: got ", share, ", expected a divisor of the batch, ", input.size(0));
  }
  check_window(window, height, width, sy, sx, input.size(1));
  const TileGrid grid(height, width, sy, sx);
  const int64_t rows = input.size(0) / share, tokens = input.size(1);
  check_removed(r, grid.tiles() > 0 ? tokens - grid.tiles() : 0);
  const OnDeviceOf on(input);
  const Tensor x = with_unit_stride(input);
  NewPlan tables(x, rows, tokens, tokens - r);
  if (rows > 0) {
    with_type_of(x, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      plan<T>(x, grid, r, window, share, tables.pointers(), on.stream());
    });
  }
  return tables.tables();
}

}  // namespace
}  // namespace bigain

STABLE_TORCH_LIBRARY_FRAGMENT(bigain_cuda, m) {
  m.def(
      "lgtm_plan(Tensor x, int height, int width, int sy, int sx, int r, int window, int share)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
}
BIGAIN_IMPL(bigain_cuda, m) { m.impl("lgtm_plan", TORCH_BOX(&bigain::lgtm_plan)); }
