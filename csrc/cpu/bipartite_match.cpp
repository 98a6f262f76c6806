// bipartite_match on the CPU (bipartite soft matching of ToMe, Bolya et al. 2023).
#include "bipartite_match_bf16.h"
#include "bipartite_match_window.h"
#include "match_kernel.h"

namespace bigain {
namespace {

constexpr int64_t kNoWindow = -1;
// Batch rows are matched together while their packed destinations stay below this, so that small grids fill the
// threads.
constexpr int64_t kPackedBytes = int64_t{4} << 20;

// Unit destinations of one panel, transposed; the bias keeps out those without a direction and the empty columns.
template <typename T>
void pack_panel(const Matching<T>& m, int64_t b, int64_t first, accumulate_t<T>* unit, accumulate_t<T>* panel,
                accumulate_t<T>* bias) {
  using A = accumulate_t<T>;
  const MatchKernel<A>& kernel = match_kernel<A>();
  const int64_t count = std::min(kernel.panel_width, m.count - first);
  for (int64_t j = 0; j < kernel.panel_width; ++j) {
    bias[j] = -std::numeric_limits<A>::infinity();
    if (j >= count) continue;
    const T* const token = m.x.row(b, m.destinations[b * m.count + first + j]);
    const A length = m.length(token);
    m.unit_token(token, length, unit + j * m.channels);
    if (length > 0) bias[j] = 0;
  }
  kernel.pack(unit, count, m.channels, panel);
}

// All sources of rows first_row, ..., last_row - 1 against all destinations. Norms are found on the way, so that tokens
// are read from memory once.
template <typename T>
void match_rows(const Matching<T>& m, int64_t first_row, int64_t last_row) {
  using A = accumulate_t<T>;
  const MatchKernel<A>& kernel = match_kernel<A>();
  const int64_t num_rows = last_row - first_row, width = kernel.panel_width;
  const int64_t num_panels = (m.count + width - 1) / width;
  const ScalarType type = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  const Tensor packed = new_tensor({num_rows, num_panels, m.channels, width}, type);
  const Tensor biases = new_tensor({num_rows, num_panels * width}, type);
  A *const panels = packed.mutable_data_ptr<A>(), *const bias = biases.mutable_data_ptr<A>();
  for_each_task(num_rows * num_panels, 2 * width * m.channels, [&](int64_t begin, int64_t end) {
    std::vector<A> unit(width * m.channels);
    for (int64_t task = begin; task < end; ++task) {
      pack_panel(m, first_row + task / num_panels, task % num_panels * width, unit.data(),
                 panels + task * m.channels * width, bias + task * width);
    }
  });

  const SourceChunks chunks(m, m.is_destination, first_row, last_row, kMatchRows);
  for_each_task(chunks.count(), kMatchRows * m.count * m.channels / 16, [&](int64_t begin, int64_t end) {
    std::vector<A> wide(std::is_same_v<A, T> ? 0 : kMatchRows * m.channels);
    const A* rows[kMatchRows];
    A best[kMatchRows];
    int32_t position[kMatchRows];
    for (int64_t task = begin; task < end; ++task) {
      const SourceChunks::Chunk chunk = chunks[task];
      for (int64_t i = 0; i < chunk.count; ++i) {
        const T* const source = m.x.row(chunk.row, chunk.sources[i]);
        m.norm[chunk.row * m.tokens + chunk.sources[i]] = m.length(source);
        if constexpr (std::is_same_v<A, T>) {
          rows[i] = source;
        } else {
          A* const copy = wide.data() + i * m.channels;
          m.rows->divide(source, A(1), m.channels, copy);
          rows[i] = copy;
        }
      }
      const int64_t row = chunk.row - first_row;
      kernel.match(rows, chunk.count, panels + row * num_panels * m.channels * width, bias + row * num_panels * width,
                   m.count, m.channels, best, position);
      for (int64_t i = 0; i < chunk.count; ++i) {
        m.store(chunk.row, chunk.sources[i], best[i], position[i]);
      }
    }
  });
}

// x (B, N, C), destinations (B, D) int32 -> similarity (B, N) float32, match (B, N) int32
std::tuple<Tensor, Tensor> bipartite_match(const Tensor& input, const Tensor& destinations_in, int64_t window,
                                           int64_t height, int64_t width, int64_t sy, int64_t sx) {
  check_match(input, destinations_in, window, height, width, sy, sx);
  const int64_t batch = input.size(0), tokens = input.size(1), count = destinations_in.size(1);
  const Tensor x = with_unit_stride(input), destinations = torch::stable::contiguous(destinations_in);
  check_range("destinations", destinations, 0, tokens);
  const TileGrid grid = {height, width, sy, sx, window};
  Tensor similarity = new_tensor({batch, tokens}, ScalarType::Float);
  Tensor match = new_tensor({batch, tokens}, ScalarType::Int);

  with_type_of(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = accumulate_t<T>;
    std::vector<A> norm(batch * tokens);
    std::vector<uint8_t> is_destination(batch * tokens, 0);
    const int32_t* const chosen = destinations.const_data_ptr<int32_t>();
    const Matching<T> m = {Tokens<T>(x),
                           batch,
                           tokens,
                           x.size(2),
                           count,
                           &row_kernels<T>(),
                           chosen,
                           norm.data(),
                           is_destination.data(),
                           similarity.mutable_data_ptr<float>(),
                           match.mutable_data_ptr<int32_t>()};
    for (int64_t i = 0; i < batch * count; ++i) {
      is_destination[i / count * tokens + chosen[i]] = 1;
    }
    // What a token has before it is matched: itself and -inf.
    std::fill_n(m.similarity, batch * tokens, -std::numeric_limits<float>::infinity());
    for (int64_t i = 0; i < batch * tokens; ++i) m.match[i] = static_cast<int32_t>(i % tokens);
    if (count == 0) return;
    if (window != kNoWindow && !grid.window_is_everything()) {
      for_each_task(batch * tokens, m.channels, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) norm[i] = m.length(m.x.row(i / tokens, i % tokens));
      });
      match_in_window(m, grid);
      return;
    }
    const int64_t row_bytes = std::max<int64_t>(1, count * m.channels * sizeof(A));
    const int64_t at_once = std::max<int64_t>(1, kPackedBytes / row_bytes);
    for (int64_t first = 0; first < batch; first += at_once) {
      const int64_t last = std::min(first + at_once, batch);
      // There are no parts of float64, and no code for them, whatever the optimizer leaves.
      if constexpr (!std::is_same_v<T, double>) {
        if (bf16_kernel<T>() != nullptr && m.channels > 0) {
          for (const int64_t row : match_rows_in_bf16(m, first, last)) match_rows(m, row, row + 1);
          continue;
        }
      }
      match_rows(m, first, last);
    }
  });
  return {similarity, match};
}

}  // namespace
}  // namespace bigain

STABLE_TORCH_LIBRARY_FRAGMENT(bigain_cpp, m) {
  m.def(
      "bipartite_match(Tensor x, Tensor destinations, int window, int height, int width, int sy, int sx)"
      " -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(bigain_cpp, CPU, m) { m.impl("bipartite_match", TORCH_BOX(&bigain::bipartite_match)); }
