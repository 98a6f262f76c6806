// Bipartite matching that compares only with the destinations of near tiles.
#pragma once

#include "matching.h"

namespace bigain {

// Tiles of the grid; leftover strips belong to the nearest real tile.
struct TileGrid {
  int64_t height, width, sy, sx, window;

  int64_t tiles_y() const { return std::max<int64_t>(height / sy, 1); }
  int64_t tiles_x() const { return std::max<int64_t>(width / sx, 1); }
  int64_t tile_y(int64_t n) const { return std::min(n / width / sy, tiles_y() - 1); }
  int64_t tile_x(int64_t n) const { return std::min(n % width / sx, tiles_x() - 1); }
  bool window_is_everything() const { return window >= std::max(tiles_y(), tiles_x()) - 1; }
};

template <typename T>
void match_in_window(const Matching<T>& m, const TileGrid& grid) {
  using A = accumulate_t<T>;
  const int64_t tiles_y = grid.tiles_y(), tiles_x = grid.tiles_x(), tiles = tiles_y * tiles_x;
  std::vector<A> unit(m.count * m.channels);
  std::vector<int64_t> starts(tiles + 1), order(m.count);
  for (int64_t b = 0; b < m.batch; ++b) {
    // Destinations grouped by tile, ascending inside each: a counting sort.
    std::fill(starts.begin(), starts.end(), 0);
    const auto tile_of = [&](int64_t d) {
      const int64_t n = m.destinations[b * m.count + d];
      return grid.tile_y(n) * tiles_x + grid.tile_x(n);
    };
    for (int64_t d = 0; d < m.count; ++d) {
      ++starts[tile_of(d) + 1];
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      starts[tile + 1] += starts[tile];
    }
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t d = 0; d < m.count; ++d) {
      order[next[tile_of(d)]++] = d;
    }
    for_each_task(m.count, m.channels, [&](int64_t begin, int64_t end) {
      for (int64_t d = begin; d < end; ++d) {
        const int64_t n = m.destinations[b * m.count + d];
        m.unit_token(m.x.row(b, n), m.norm[b * m.tokens + n], unit.data() + d * m.channels);
      }
    });

    const int64_t most = std::min((2 * grid.window + 1) * (2 * grid.window + 1), m.count);
    for_each_task(m.tokens, most * m.channels, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> near;
      for (int64_t n = begin; n < end; ++n) {
        if (m.is_destination[b * m.tokens + n]) continue;
        const int64_t y = grid.tile_y(n), x = grid.tile_x(n);
        const int64_t first_x = std::max<int64_t>(x - grid.window, 0), last_x = std::min(x + grid.window, tiles_x - 1);
        near.clear();
        for (int64_t ty = std::max<int64_t>(y - grid.window, 0); ty <= std::min(y + grid.window, tiles_y - 1); ++ty) {
          for (int64_t i = starts[ty * tiles_x + first_x]; i < starts[ty * tiles_x + last_x + 1]; ++i) {
            // Without a direction it is similar to nothing.
            if (m.norm[b * m.tokens + m.destinations[b * m.count + order[i]]] > 0) near.push_back(order[i]);
          }
        }
        A best = -std::numeric_limits<A>::infinity();
        int64_t position = 0;
        for (size_t i = 0; i < near.size(); i += 4) {
          const A* four[4];
          A products[4];
          for (size_t j = 0; j < 4; ++j) {
            four[j] = unit.data() + near[std::min(i + j, near.size() - 1)] * m.channels;
          }
          m.rows->dot_four(m.x.row(b, n), four, m.channels, products);
          for (size_t j = 0; j < std::min<size_t>(4, near.size() - i); ++j) {
            const int64_t d = near[i + j];
            if (products[j] > best || (products[j] == best && d < position)) {
              best = products[j];
              position = d;
            }
          }
        }
        m.store(b, n, best, position);
      }
    });
  }
}

}  // namespace bigain
