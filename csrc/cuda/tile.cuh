// What forward and backward share on the device: which tile a block has, and how a thread reads it.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../terms.h"
#include "plan.h"

namespace fastkd::cuda {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Stands for an element type that the level says at run time: for student and teacher of different dtypes, and double.
struct Any {};

// Neighbours that a thread reads at once, in 16 bytes of E.
template <class E, class Acc>
constexpr int kVector = 16 / int(sizeof(E));
template <>
inline constexpr int kVector<Any, float> = 4;
template <>
inline constexpr int kVector<Any, double> = 1;  // a check of gradients does not need speed

template <class E, int V>
struct alignas(sizeof(E) * V) Pack {
  E x[V];
};

template <class E, class Acc, int V>
__device__ __forceinline__ void load(const Feature& f, int64_t offset, Acc (&out)[V]) {
  if constexpr (std::is_same_v<E, Any>) {
    switch (f.dtype) {
      case DType::float16: return load<Half>(f, offset, out);
      case DType::bfloat16: return load<BFloat16>(f, offset, out);
      case DType::float32: return load<float>(f, offset, out);
      case DType::float64:
        if constexpr (sizeof(Acc) == 8) return load<double>(f, offset, out);
    }
  } else {
    const auto pack = *reinterpret_cast<const Pack<E, V>*>(static_cast<const E*>(f.data) + offset);
#pragma unroll
    for (int v = 0; v < V; ++v) out[v] = Acc(pack.x[v]);
  }
}

template <class E, class Acc, int V>
__device__ __forceinline__ void store(const Acc (&x)[V], const Feature& f, int64_t offset) {
  if constexpr (std::is_same_v<E, Any>) {
    switch (f.dtype) {
      case DType::float16: return store<Half>(x, f, offset);
      case DType::bfloat16: return store<BFloat16>(x, f, offset);
      case DType::float32: return store<float>(x, f, offset);
      case DType::float64:
        if constexpr (sizeof(Acc) == 8) return store<double>(x, f, offset);
    }
  } else {
    using Through = std::conditional_t<sizeof(E) == 2, float, Acc>;  // the 16-bit types convert from float alone
    Pack<E, V> pack;
#pragma unroll
    for (int v = 0; v < V; ++v) pack.x[v] = E(Through(x[v]));
    *reinterpret_cast<Pack<E, V>*>(static_cast<E*>(f.data) + offset) = pack;
  }
}

// A block's tile and this thread's place in it.
struct Tile {
  int level;
  int64_t image, begin;  // begin: the tile's first cell
  int lane, lanes, group, groups;
  bool row_gaps;
};

template <class Acc>
__device__ __forceinline__ Tile find_tile(const Launch<Acc>& launch, int vector) {
  int l = 0;  // a level without tiles begins where the next one does
  while (l + 1 < launch.count && int(blockIdx.x) >= launch.plan[l + 1].first_block) ++l;
  const Plan& plan = launch.plan[l];
  const unsigned block = blockIdx.x - unsigned(plan.first_block), tiles = unsigned(plan.tiles);
  Tile tile;
  tile.level = l;
  tile.image = block / tiles;
  tile.begin = int64_t(block % tiles) * tile_cells<Acc>(plan, vector);
  tile.lanes = 1 << plan.log_lanes;
  tile.groups = kThreads >> plan.log_lanes;
  tile.lane = int(threadIdx.x) & (tile.lanes - 1);
  tile.group = int(threadIdx.x) >> plan.log_lanes;
  tile.row_gaps = plan.row_gaps;
  return tile;
}

// What a thread has in registers at a time: kRows rows of V neighbours, all of which are read before any is used.
// channels_last: a row is V channels of one cell. Else: V cells of one channel.
template <bool kChannelsLast, int V, class Acc>
struct Patch {
  static constexpr int kRows = V > 1 || sizeof(Acc) == 8 ? 2 : kChannelsLast ? 4 : 8;
  static constexpr int kCells = kChannelsLast ? kRows : V;
  static constexpr int kPasses = kChannelsLast ? kThreadCells<Acc> / kRows : 1;  // over all channels
  // index of an element's cell among those of the pass
  static __device__ constexpr int cell(int row, int v) { return kChannelsLast ? row : v; }
  // first cell of the thread's pass
  static __device__ __forceinline__ int64_t first(const Tile& tile, int pass) {
    return tile.begin + (kChannelsLast ? tile.group * kThreadCells<Acc> + pass * kRows : tile.lane * V);
  }
};

// Calls f(first channel, rows) for each patch of the thread's pass that has its first cell here.
template <bool kChannelsLast, int V, class Acc, class F>
__device__ __forceinline__ void each_patch(const Level<Acc>& level, const Tile& tile, int64_t first, const F& f) {
  constexpr int kRows = Patch<kChannelsLast, V, Acc>::kRows;
  const int64_t left = level.cells() - first;
  if (left <= 0) return;
  const int channels = int(level.channels);
  if constexpr (kChannelsLast) {
    const int rows = left < kRows ? int(left) : kRows;
#pragma unroll 1
    for (int c = tile.lane * V; c < channels; c += tile.lanes * V) f(c, rows);
  } else {
#pragma unroll 1
    for (int c = tile.group; c < channels; c += tile.groups * kRows) {
      const bool full = c + (kRows - 1) * tile.groups < channels;
      f(c, full ? kRows : (channels - c + tile.groups - 1) / tile.groups);
    }
  }
}

// Where the cells of a thread's rows lie; one cell where a row is of one channel. Without gaps between the rows of an
// image all cells stand in row 0.
template <bool kChannelsLast, int V, class Acc>
struct Places {
  static constexpr int kPlaces = kChannelsLast ? Patch<kChannelsLast, V, Acc>::kRows : 1;
  int64_t row[kPlaces], column[kPlaces];

  __device__ __forceinline__ Places(const Level<Acc>& level, const Tile& tile, int64_t first) {
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
      row[i] = tile.row_gaps ? (first + i) / level.width : 0;
      column[i] = first + i - row[i] * level.width;
    }
  }
};

// Offsets of a thread's rows in one feature, in elements; 64 bits, as a level may have more than 2^31.
template <bool kChannelsLast, int V, class Acc>
struct Rows {
  using P = Places<kChannelsLast, V, Acc>;
  int64_t start[P::kPlaces];
  int64_t channel_stride, row_stride;

  __device__ __forceinline__ Rows(const Feature& f, const Tile& tile, const P& places)
      : channel_stride(f.channel_stride), row_stride(tile.groups * f.channel_stride) {
#pragma unroll
    for (int i = 0; i < P::kPlaces; ++i)
      start[i] = tile.image * f.image_stride + places.row[i] * f.row_stride + places.column[i] * f.column_stride;
  }

  __device__ __forceinline__ int64_t at(int channel, int row) const {
    if constexpr (kChannelsLast) return start[row] + channel * channel_stride;
    return start[0] + channel * channel_stride + row * row_stride;
  }
};

// t' = (t - mean) * rstd, in place.
template <bool kChannelsLast, int V, int kRows, class Acc>
__device__ __forceinline__ void standardise(const Level<Acc>& level, const Tile& tile, int channel, int rows,
                                            Acc (&t)[kRows][V]) {
  if (!level.mean) return;
  using Moments = Pack<Acc, V>;
  if constexpr (kChannelsLast) {
    const auto mean = *reinterpret_cast<const Moments*>(level.mean + channel);
    const auto rstd = *reinterpret_cast<const Moments*>(level.rstd + channel);
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int v = 0; v < V; ++v) t[i][v] = (t[i][v] - mean.x[v]) * rstd.x[v];
  } else {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int c = channel + i * tile.groups;
      const Acc mean = i < rows ? level.mean[c] : Acc(0), rstd = i < rows ? level.rstd[c] : Acc(0);
#pragma unroll
      for (int v = 0; v < V; ++v) t[i][v] = (t[i][v] - mean) * rstd;
    }
  }
}

// Student and standardised teacher of a patch from a channel on. All loads are issued before any value is used.
template <class E, bool kChannelsLast, int V, int kRows, class Acc>
__device__ __forceinline__ void read_patch(const Level<Acc>& level, const Tile& tile,
                                           const Rows<kChannelsLast, V, Acc>& student,
                                           const Rows<kChannelsLast, V, Acc>& teacher, int channel, int rows,
                                           Acc (&s)[kRows][V], Acc (&t)[kRows][V]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i)
    if (i < rows) {
      load<E>(level.student, student.at(channel, i), s[i]);
      load<E>(level.teacher, teacher.at(channel, i), t[i]);
    }
  standardise<kChannelsLast>(level, tile, channel, rows, t);
}

}  // namespace fastkd::cuda
