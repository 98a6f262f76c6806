// Best destination of every source by cosine similarity, without the similarity matrix (Bolya et al. 2023).
//
// A block multiplies a tile of sources with one tile of destinations after another on the tensor cores. Rows are
// gathered by token index with asynchronous 16-byte copies, three stages deep. The epilogue scales by the inverse norms
// and keeps a running maximum of (similarity, lowest token) for every source. There are as many blocks as the chip runs
// at a time, and each has an equal share of all pairs of tiles, wherever it begins and ends; blocks that share a tile
// of sources combine through a 64-bit atomic maximum of packed words, which is the same in any order.
//
// The same bits whatever the tile and the number of blocks: the channels of a similarity are summed in one order
// (below), scaled in one order, and every comparison is between scaled similarities, ties to the lowest token.
//
// Tensor cores truncate when they add to their accumulator, always in one direction. So they sum 256 channels (32 of
// float32), and ordinary float32 additions, rounded to nearest, sum those. What that error would be, and why tiles have
// their sizes: docs/kernels.md.
#pragma once

#include <climits>

#include "bigain/device.cuh"
#include "bigain/match_tile.cuh"
#include "bigain/packed.cuh"
#include "bigain/tile_grid.cuh"

namespace bigain {

// One call; P plan rows of N tokens, S sources and D destinations each.
template <typename T>
struct MatchProblem {
  const T* x;                              // (P, N, C), channels contiguous
  int64_t x_batch_stride, x_token_stride;  // in elements
  const float* inverse_norm;               // (P, N); 0 for tokens without a direction, whose similarity is -inf
  const int32_t* sources;                  // (P, S), every source once
  const int32_t* destinations;             // (P, D), those of one row of tiles together, rows of tiles ascending
  int64_t destination_stride;
  int64_t num_first;  // the lowest destination is among the first num_first
  Packed* packed;     // (P, N): pack(ordered_key(similarity), match); 0 at sources before the launch
  int64_t rows, tokens, channels, num_sources, num_destinations;
  int64_t window;  // below 0: all destinations, and the grid is not read
  TileGrid grid;
};

namespace match {

// What the epilogue reads about a destination.
struct alignas(8) Column {
  float scale;  // its inverse norm; NaN where it cannot be matched: no comparison with NaN is true
  int token;
};
struct alignas(8) Place {
  int tile_y, tile_x;
};

// Stages of destinations, and of sources unless all their channels stay; what the epilogue reads; sources that stay.
template <typename T, typename Shape, bool kWindow>
size_t shared_bytes(bool resident, int64_t channels) {
  const size_t columns = Shape::kN * (sizeof(Column) + (kWindow ? sizeof(Place) : 0));
  const size_t copies_of_sources = resident ? ceil_div(channels, kBlockK<T>) : kStages;
  return kStages * (Shape::kBytesN + columns) + copies_of_sources * Shape::kBytesM;
}

// For the bound on registers: 255, 168 or, where windows or single loads need more of them, 255 again.
template <typename Shape>
constexpr int blocks_per_multiprocessor(bool aligned, bool window) {
  return Shape::kThreads > 128 ? 1 : aligned && !window ? 3 : 2;
}

// Tiles of the grid; leftover strips belong to the nearest real tile.
__device__ __forceinline__ Place place_of(const TileGrid& grid, int token) {
  unsigned row = token;
  const unsigned column = grid.by_width.take(row);
  const int tile_y = grid.by_sy.quotient(row), tile_x = grid.by_sx.quotient(column);
  return {min(tile_y, max(grid.tiles_y() - 1, 0)), min(tile_x, max(grid.tiles_x() - 1, 0))};
}

// Entry i of a list of tokens. A list with entries out of range is a mistake of the caller; it must not read elsewhere.
__device__ __forceinline__ int token_at(const int32_t* list, int i, int tokens) {
  return min(max(list[i], 0), tokens - 1);
}

// How many entries of the list come before `value`; those below it all stand before those that are not.
__device__ __forceinline__ int lower_bound(const int32_t* list, int count, int64_t value) {
  int low = 0, high = count;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (list[middle] < value) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// How the blocks share the work. A part is a tile of sources with one tile of destinations, or, with a window, with all
// that the windows reach. Parts are numbered row by row, tile of sources by tile of sources; each block has a run.
struct Parts {
  Divisor by_parts, by_tiles;  // parts of a tile of sources, tiles of sources of a row
  unsigned parts;              // of a tile of sources
  unsigned each, extra;        // of a block; the first `extra` blocks have one more
};

// One tile of sources of row i_b, from first_source on, with its parts first_part to first_part + num_parts - 1.
// kResident keeps the sources in shared memory for all tiles of destinations. Begins and ends in step with the block.
template <typename T, typename Shape, bool kAligned, bool kWindow, bool kResident>
__device__ __forceinline__ void match_tile(const MatchProblem<T>& p, unsigned char* stages /* (kStages, kN rows) */,
                                           int64_t i_b, int first_source, int first_part, int num_parts) {
  constexpr int kRows = Shape::kRowsOfThread, kStep = Shape::kThreads / kChunks;
  constexpr int kCopiesM = Shape::kM / kStep, kCopiesN = Shape::kN / kStep;
  Column* const columns = reinterpret_cast<Column*>(stages + kStages * Shape::kBytesN);
  Place* const places = reinterpret_cast<Place*>(columns + kStages * Shape::kN);
  // (steps, kM rows) with kResident, else (kStages, kM rows)
  unsigned char* const source_rows = reinterpret_cast<unsigned char*>(places + (kWindow ? kStages * Shape::kN : 0));
  // The lowest destination; first and last row of tiles of the sources. Read before the first copy.
  int* const bounds = reinterpret_cast<int*>(stages);

  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int first_m = warp / Shape::kWarpsN * Shape::kWarpM, first_n = warp % Shape::kWarpsN * Shape::kWarpN;
  const int num_sources = static_cast<int>(p.num_sources), channels = static_cast<int>(p.channels);
  const int tokens = static_cast<int>(p.tokens);
  const T* const x = p.x + i_b * p.x_batch_stride;
  const float* const inverse_norm = p.inverse_norm + i_b * p.tokens;
  const int32_t* const sources = p.sources + i_b * p.num_sources;
  const int32_t* const destinations = p.destinations + i_b * p.destination_stride;

  // Rows that this thread copies. Past the ends of the lists it copies token 0: its similarities are not looked at.
  const int copy_row = thread / kChunks, chunk = thread % kChunks;
  const int64_t row_stride = kAligned ? p.x_token_stride / kVector<T> : p.x_token_stride;
  RowOffset<kAligned> source_offset[kCopiesM];
#pragma unroll
  for (int i = 0; i < kCopiesM; ++i) {
    const int row = first_source + copy_row + i * kStep;
    source_offset[i] = row_offset<kAligned>(row < num_sources ? token_at(sources, row, tokens) : 0, row_stride);
  }
  // Rows whose maxima it keeps: lane / 4 and lane / 4 + 8 of each mma.
  float row_scale[kRows], best[kRows];
  int best_token[kRows];
  Place row_place[kWindow ? kRows : 1];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = first_source + first_m + r / 2 * 16 + r % 2 * 8 + lane / 4;
    const int token = row < num_sources ? token_at(sources, row, tokens) : 0;
    row_scale[r] = row < num_sources ? inverse_norm[token] : 0.0f;
    best[r] = minus_infinity();
    best_token[r] = INT_MAX;
    if constexpr (kWindow) row_place[r] = place_of(p.grid, token);
  }

  if (thread == 0) {
    bounds[0] = bounds[1] = INT_MAX;
    bounds[2] = -1;
  }
  __syncthreads();
  int lowest = INT_MAX;
  for (int i = thread; i < p.num_first; i += Shape::kThreads) {
    lowest = min(lowest, token_at(destinations, i, tokens));
  }
  if (lowest < INT_MAX) atomicMin(&bounds[0], lowest);
  if (kWindow && thread < Shape::kM && first_source + thread < num_sources) {
    const int tile_y = place_of(p.grid, token_at(sources, first_source + thread, tokens)).tile_y;
    atomicMin(&bounds[1], tile_y);
    atomicMax(&bounds[2], tile_y);
  }
  __syncthreads();
  lowest = bounds[0];
  const int first_tile_y = bounds[1], last_tile_y = bounds[2];
  __syncthreads();

  // The destinations of the parts: [begin, end).
  const int num_destinations = static_cast<int>(p.num_destinations), window = static_cast<int>(p.window);
  int begin = first_part * Shape::kN, end = min(begin + num_parts * Shape::kN, num_destinations);
  if constexpr (kWindow) {
    const int64_t row_of_tiles = static_cast<int64_t>(p.grid.sy) * p.grid.width;
    begin = lower_bound(destinations, num_destinations, (first_tile_y - window) * row_of_tiles);
    // The leftover strip below belongs to the last row of tiles.
    const bool to_the_end = last_tile_y + window >= p.grid.tiles_y() - 1;
    end = num_destinations;
    if (!to_the_end) end = lower_bound(destinations, num_destinations, (last_tile_y + window + 1) * row_of_tiles);
  }
  const int steps_of_tile = (channels + kBlockK<T> - 1) / kBlockK<T>;
  const int steps = (end - begin + Shape::kN - 1) / Shape::kN * steps_of_tile;

  // What is fetched next, and the tokens of the tile after the one that is being fetched: their indices are read a tile
  // ahead, since the addresses of the copies depend on them.
  int fetched = 0, fetch_step = 0, fetch_tile = 0, fetch_stage = 0;
  RowOffset<kAligned> destination_offset[kCopiesN];
  int next_destination[kCopiesN], next_column = -1;
  const auto read_ahead = [&](int tile) {
    const int first = begin + tile * Shape::kN;
#pragma unroll
    for (int i = 0; i < kCopiesN; ++i) {
      const int column = first + copy_row + i * kStep;
      next_destination[i] = column < end ? token_at(destinations, column, tokens) : 0;
    }
    if (thread < Shape::kN) {
      next_column = first + thread < end ? token_at(destinations, first + thread, tokens) : -1;
    }
  };
  // Starts the copies of one step. Where it is the first of a tile, also reads what `columns` shall hold about it.
  Column column = {};
  int column_slot = -1;
  const auto fetch = [&] {
    column_slot = -1;
    if (fetched < steps) {
      if (fetch_step == 0) {
#pragma unroll
        for (int i = 0; i < kCopiesN; ++i) {
          destination_offset[i] = row_offset<kAligned>(next_destination[i], row_stride);
        }
        if (thread < Shape::kN) {
          const float scale = next_column < 0 ? 0.0f : inverse_norm[next_column];
          column = {scale > 0.0f ? scale : bits_float(0x7fffffffu), next_column};
          column_slot = fetch_tile % kStages * Shape::kN + thread;
        }
        read_ahead(fetch_tile + 1);
      }
      // Rows kStep apart are swizzled alike.
      static_assert(kStep % 8 == 0, "the swizzle repeats every 8 rows");
      const int at = swizzled(copy_row, chunk);
      const int c = fetch_step * kBlockK<T> + chunk * kVector<T>, left = min(max(channels - c, 0), kVector<T>);
      if (!kResident || fetch_tile == 0) {
        unsigned char* const to = source_rows + (kResident ? fetch_step : fetch_stage) * Shape::kBytesM + at;
#pragma unroll
        for (int i = 0; i < kCopiesM; ++i) {
          copy_chunk<kAligned>(to + i * kStep * kRowBytes, x, source_offset[i], c, left);
        }
      }
      unsigned char* const to = stages + fetch_stage * Shape::kBytesN + at;
#pragma unroll
      for (int i = 0; i < kCopiesN; ++i) {
        copy_chunk<kAligned>(to + i * kStep * kRowBytes, x, destination_offset[i], c, left);
      }
      ++fetched;
      fetch_stage = fetch_stage + 1 < kStages ? fetch_stage + 1 : 0;
      if (++fetch_step == steps_of_tile) {
        fetch_step = 0;
        ++fetch_tile;
      }
    }
    copy_async_commit();
  };
  // Apart from the fetch, so that the multiplication hides the latency of the reads. There is a barrier between this
  // and the epilogue that reads it, and another one between the last reading of the slot and this.
  const auto store_column = [&] {
    if (column_slot < 0) return;
    columns[column_slot] = column;
    if constexpr (kWindow) places[column_slot] = place_of(p.grid, max(column.token, 0));
  };

  read_ahead(0);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    fetch();
    store_column();
  }

  float core[Shape::kTilesM][Shape::kTilesN][4] = {}, sum[Shape::kTilesM][Shape::kTilesN][4] = {};
  int step = 0, tile = 0, stage = 0;
  for (int i = 0; i < steps; ++i) {
    copy_async_wait<kStages - 2>();
    // The bytes of all threads have come, and all threads have done with the stage that is filled next.
    __syncthreads();
    fetch();
    multiply<T, Shape>(core, source_rows + (kResident ? step : stage) * Shape::kBytesM, stages + stage * Shape::kBytesN,
                       first_m, first_n, lane);
    stage = stage + 1 < kStages ? stage + 1 : 0;
    ++step;
    if (step % kStepsInCore<T> == 0 || step == steps_of_tile) {
#pragma unroll
      for (int j = 0; j < Shape::kTilesM * Shape::kTilesN * 4; ++j) {
        (&sum[0][0][0])[j] += (&core[0][0][0])[j];
        (&core[0][0][0])[j] = 0.0f;
      }
    }
    if (step == steps_of_tile) {
      const Column* const tile_columns = columns + tile % kStages * Shape::kN;
      const Place* const tile_places = places + tile % kStages * Shape::kN;
#pragma unroll
      for (int j = 0; j < Shape::kTilesN * 2; ++j) {
        const int at = first_n + j / 2 * 8 + lane % 4 * 2 + j % 2;
        const Column of = tile_columns[at];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          float& dot = sum[r / 2][j / 2][r % 2 * 2 + j % 2];
          const float cosine = dot * of.scale * row_scale[r];
          dot = 0.0f;
          bool better = cosine > best[r] || (cosine == best[r] && of.token < best_token[r]);
          if constexpr (kWindow) {
            const Place place = tile_places[at];
            better = better &&
                     max(abs(place.tile_y - row_place[r].tile_y), abs(place.tile_x - row_place[r].tile_x)) <= window;
          }
          if (better) {
            best[r] = cosine;
            best_token[r] = of.token;
          }
        }
      }
      step = 0;
      ++tile;
    }
    store_column();
  }

  // The maximum over the four lanes of a row, then over the warps that share it.
  copy_async_wait<0>();
  __syncthreads();
  Packed* const candidates = reinterpret_cast<Packed*>(stages);  // (kWarpsN, kM)
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const bool matched = row_scale[r] > 0.0f && best[r] > minus_infinity();
    Packed packed = matched ? pack(ordered_key(best[r]), best_token[r]) : pack(ordered_key(minus_infinity()), lowest);
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
      const Packed other = __shfl_xor_sync(kAllLanes, packed, distance);
      packed = max(packed, other);
    }
    const int row = first_m + r / 2 * 16 + r % 2 * 8 + lane / 4;
    if (lane % 4 == 0) candidates[warp % Shape::kWarpsN * Shape::kM + row] = packed;
  }
  __syncthreads();
  if (thread < Shape::kM && first_source + thread < num_sources) {
    Packed packed = candidates[thread];
#pragma unroll
    for (int i = 1; i < Shape::kWarpsN; ++i) {
      packed = max(packed, candidates[i * Shape::kM + thread]);
    }
    atomicMax(p.packed + i_b * p.tokens + token_at(sources, first_source + thread, tokens), packed);
  }
  __syncthreads();
}

}  // namespace match

template <typename T, typename Shape, bool kAligned, bool kWindow, bool kResident>
__global__ void __launch_bounds__(Shape::kThreads, match::blocks_per_multiprocessor<Shape>(kAligned, kWindow))
    bipartite_match_kernel(const MatchProblem<T> p, const match::Parts work) {
  BIGAIN_DYNAMIC_SHARED(unsigned char, stages);
  unsigned part = blockIdx.x * work.each + min(blockIdx.x, work.extra);
  const unsigned last = part + work.each + (blockIdx.x < work.extra ? 1 : 0);
  follow_launches();
#pragma unroll 1
  while (part < last) {
    unsigned row = part;
    const unsigned first_part = work.by_parts.take(row), num_parts = min(work.parts - first_part, last - part);
    const unsigned tile = work.by_tiles.take(row);
    match::match_tile<T, Shape, kAligned, kWindow, kResident>(p, stages, row, tile * Shape::kM, first_part, num_parts);
    part += num_parts;
  }
}

// The list of sources, ascending, and the packed words before matching, for calls in which no score pass has made them.
// Grid (blocks of 256 tokens * P).
static __global__ void __launch_bounds__(256)
    match_lists_kernel(const int32_t* destinations /* (P, D), ascending */, int64_t destination_stride,
                       int num_destinations, int tokens, const Divisor by_blocks, int32_t* sources /* (P, N - D) */,
                       Packed* packed /* (P, N) */) {
  unsigned row = blockIdx.x;
  const int token = static_cast<int>(by_blocks.take(row) * 256 + threadIdx.x);
  const int64_t i_b = row;
  follow_launches();
  if (token >= tokens) return;
  const int32_t* const list = destinations + i_b * destination_stride;
  const int before = match::lower_bound(list, num_destinations, token);
  const bool is_destination = before < num_destinations && list[before] == token;
  // Without destinations every token is its own match.
  const bool done = is_destination || num_destinations == 0;
  packed[i_b * tokens + token] = done ? pack(ordered_key(minus_infinity()), token) : 0;
  // Out of range only if the destinations are.
  const int position = token - before, num_sources = tokens - num_destinations;
  if (!is_destination && position >= 0 && position < num_sources) sources[i_b * num_sources + position] = token;
}

// packed (count) -> similarity (count), match (count)
static __global__ void __launch_bounds__(256)
    match_unpack_kernel(const Packed* packed, float* similarity, int32_t* match, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  follow_launches();
  if (i >= count) return;
  similarity[i] = key_to_float(unpack_key(packed[i]));
  match[i] = unpack_token(packed[i]);
}

// ---- launchers -------------------------------------------------------------------------------------------------

namespace match {

// What a launch with one tile shape does: all parts, and the blocks that share them.
struct Share {
  int64_t parts, blocks;
  double cost;
};

// As many blocks as run at a time. The cost is that of the busiest multiprocessor, in steps of `step_cost`: a block
// also pays the filling of its pipeline and its epilogues, about four steps.
template <typename T, typename Shape>
Share share_of(const MatchProblem<T>& p, int multiprocessors, int64_t resident, double step_cost) {
  const int64_t tiles_n = p.window < 0 ? ceil_div(p.num_destinations, Shape::kN) : 1;
  const int64_t parts = ceil_div(p.num_sources, Shape::kM) * p.rows * tiles_n, room = multiprocessors * resident;
  const int64_t blocks = parts < room ? parts : room;
  const int64_t steps = ceil_div(parts, blocks) * ceil_div(p.channels, kBlockK<T>) + 4;
  return {parts, blocks, static_cast<double>(ceil_div(blocks, multiprocessors) * steps) * step_cost};
}

template <typename T, typename Shape, bool kAligned, bool kWindow, bool kResident = false>
void launch_tile(const MatchProblem<T>& p, int multiprocessors, int64_t blocks, cudaStream_t stream) {
  const Share share = share_of<T, Shape>(p, multiprocessors, blocks_per_multiprocessor<Shape>(kAligned, kWindow), 1);
  blocks = blocks > 0 && blocks < share.parts ? blocks : share.blocks;
  const int64_t tiles_m = ceil_div(p.num_sources, Shape::kM), parts = share.parts / (tiles_m * p.rows);
  const Parts work = {Divisor(parts), Divisor(tiles_m), grid_extent(parts), grid_extent(share.parts / blocks),
                      grid_extent(share.parts % blocks)};
  launch(bipartite_match_kernel<T, Shape, kAligned, kWindow, kResident>, dim3(grid_extent(blocks)),
         dim3(Shape::kThreads), shared_bytes<T, Shape, kWindow>(kResident, p.channels), stream, p, work);
}

}  // namespace match

// One launch, or none without sources or destinations: then `packed` is complete before.
// blocks: how many share the work, 0 to choose; large: whether to use the large tile, -1 to choose.
template <typename T>
void launch_match(const MatchProblem<T>& p, int multiprocessors, cudaStream_t stream, int64_t blocks = 0,
                  int large = -1) {
  using namespace match;
  if (p.rows * p.num_sources * p.num_destinations == 0) return;
  const bool aligned = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.x_token_stride % kVector<T> == 0 &&
                       p.x_batch_stride % kVector<T> == 0 && p.tokens * (p.x_token_stride / kVector<T>) <= UINT32_MAX;
  if (p.window >= 0) {
    // A larger window than the grid would overflow.
    MatchProblem<T> clipped = p;
    const int64_t everything = p.grid.height > p.grid.width ? p.grid.height : p.grid.width;
    clipped.window = p.window < everything ? p.window : everything;
    return aligned ? launch_tile<T, SmallTile, true, true>(clipped, multiprocessors, blocks, stream)
                   : launch_tile<T, SmallTile, false, true>(clipped, multiprocessors, blocks, stream);
  }
  // In steps of the small tile by operations. The small tile moves more bytes per operation, which is taken to cost a
  // third; no GPU has measured it yet.
  using Large = LargeTile<T>;
  constexpr double kLargeCost = static_cast<double>(Large::kM) * Large::kN / (SmallTile::kM * SmallTile::kN);
  constexpr double kSmallCost = 4.0 / 3.0;
  const double big = share_of<T, Large>(p, multiprocessors, 1, kLargeCost).cost;
  const double small = share_of<T, SmallTile>(p, multiprocessors, 3, kSmallCost).cost;
  if (aligned && (large < 0 ? big <= small : large > 0)) {
    const bool resident = shared_bytes<T, Large, false>(true, p.channels) <= shared_limit();
    return resident ? launch_tile<T, Large, true, false, true>(p, multiprocessors, blocks, stream)
                    : launch_tile<T, Large, true, false>(p, multiprocessors, blocks, stream);
  }
  return aligned ? launch_tile<T, SmallTile, true, false>(p, multiprocessors, blocks, stream)
                 : launch_tile<T, SmallTile, false, false>(p, multiprocessors, blocks, stream);
}

// destinations (P, D) ascending -> sources (P, N - D), packed (P, N) as launch_match expects them; one launch.
inline void launch_match_lists(const int32_t* destinations, int64_t destination_stride, int64_t rows,
                               int64_t num_destinations, int64_t tokens, int32_t* sources, Packed* packed,
                               cudaStream_t stream) {
  launch(match_lists_kernel, dim3(grid_extent(ceil_div(tokens, 256) * rows)), dim3(256), 0, stream, destinations,
         destination_stride, num_destinations, tokens, Divisor(ceil_div(tokens, 256)), sources, packed);
}

// packed (count) -> similarity (count), match (count); one launch.
inline void launch_match_unpack(const Packed* packed, float* similarity, int32_t* match, int64_t count,
                                cudaStream_t stream) {
  launch(match_unpack_kernel, dim3(grid_extent(ceil_div(count, 256))), dim3(256), 0, stream, packed, similarity, match,
         count);
}

}  // namespace bigain
