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

// What a thread holds of a feature until it computes with it: the elements as they lie in memory, which of 16 bits take
// half the registers.
template <class E, class Acc>
using Held = std::conditional_t<std::is_same_v<E, Any>, Acc, E>;

template <class To, class From, int V>
__device__ __forceinline__ void convert(const Pack<From, V>& pack, To (&out)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) out[v] = To(pack.x[v]);
}

template <class E, class Acc, int V>
__device__ __forceinline__ void load(const Feature& f, int64_t offset, Pack<Held<E, Acc>, V>& out) {
  if constexpr (std::is_same_v<E, Any>) {
    const auto through = [&]<class D>(Pack<D, V> pack) {
      load<D, D>(f, offset, pack);
      convert(pack, out.x);
    };
    switch (f.dtype) {
      case DType::float16: return through(Pack<Half, V>());
      case DType::bfloat16: return through(Pack<BFloat16, V>());
      case DType::float32: return through(Pack<float, V>());
      case DType::float64:
        if constexpr (sizeof(Acc) == 8) return through(Pack<double, V>());
    }
  } else {
    out = *reinterpret_cast<const Pack<E, V>*>(static_cast<const E*>(f.data) + offset);
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
  static constexpr int kRows = V == 1 && !kChannelsLast && sizeof(Acc) == 4 ? 8 : 2;
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
    if constexpr (kChannelsLast) return start[row] + channel;
    return start[0] + channel * channel_stride + row * row_stride;
  }
};

// Never fused with a product before it: where student and teacher, or a logit and the highest, are equal, it is 0.
__device__ __forceinline__ float difference(float x, float y) { return __fsub_rn(x, y); }
__device__ __forceinline__ double difference(double x, double y) { return __dsub_rn(x, y); }

// Calls f with the penalty as a constant, outside of what must be straight code.
template <class F>
__device__ __forceinline__ void with_penalty(Penalty penalty, const F& f) {
  switch (penalty) {
    case Penalty::l2: return f(std::integral_constant<Penalty, Penalty::l2>());
    case Penalty::l1: return f(std::integral_constant<Penalty, Penalty::l1>());
    case Penalty::smooth_l1: return f(std::integral_constant<Penalty, Penalty::smooth_l1>());
  }
}

// Student and teacher of a patch from a channel on. All their loads are issued before any value is used, but of Any.
template <class E, bool kChannelsLast, int V, class Acc>
struct Features {
  static constexpr int kRows = Patch<kChannelsLast, V, Acc>::kRows;
  using Offsets = Rows<kChannelsLast, V, Acc>;
  Pack<Held<E, Acc>, V> s[kRows] = {}, t[kRows] = {};
  Pack<Acc, V> mean, rstd;  // channels_last: the same for all rows

  __device__ __forceinline__ Features(const Level<Acc>& level, const Offsets& student, const Offsets& teacher,
                                      int channel, int rows) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (i < rows) {
        load<E, Acc>(level.student, student.at(channel, i), s[i]);
        load<E, Acc>(level.teacher, teacher.at(channel, i), t[i]);
      }
    if (kChannelsLast && level.mean) {
      mean = *reinterpret_cast<const Pack<Acc, V>*>(level.mean + channel);
      rstd = *reinterpret_cast<const Pack<Acc, V>*>(level.rstd + channel);
    }
  }

  // t' = (t - mean) * rstd of a row
  __device__ __forceinline__ void teacher(const Level<Acc>& level, const Tile& tile, int channel, int row,
                                          Acc (&out)[V]) const {
    convert(t[row], out);
    if (!level.mean) return;
    if constexpr (kChannelsLast) {
#pragma unroll
      for (int v = 0; v < V; ++v) out[v] = (out[v] - mean.x[v]) * rstd.x[v];
    } else {
      const int c = channel + row * tile.groups;
      const Acc mu = level.mean[c], r = level.rstd[c];
#pragma unroll
      for (int v = 0; v < V; ++v) out[v] = (out[v] - mu) * r;
    }
  }

  // Calls f(row, t', s - t') for each row that is there.
  template <class F>
  __device__ __forceinline__ void each_row(const Level<Acc>& level, const Tile& tile, int channel, int rows,
                                           const F& f) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (i < rows) {
        Acc t[V], x[V];
        teacher(level, tile, channel, i, t);
        differences(t, i, x);
        f(i, t, x);
      }
  }

  // s - t' of a row
  __device__ __forceinline__ void differences(const Acc (&teacher)[V], int row, Acc (&out)[V]) const {
    convert(s[row], out);
#pragma unroll
    for (int v = 0; v < V; ++v) out[v] = difference(out[v], teacher[v]);
  }
};

}  // namespace fastkd::cuda
