// Device code that the kernels share: the tile of a block, the reads of a thread, and sums in a fixed order.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../terms.h"
#include "plan.h"

namespace fastkd::cuda {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Stands for an element type known at run time only: if student and teacher have different dtypes, and for double.
struct Any {};

// Number of neighbours that a thread reads at once: 16 bytes of E.
template <class E, class Acc>
constexpr int kVector = 16 / int(sizeof(E));
template <>
inline constexpr int kVector<Any, float> = 4;
template <>
inline constexpr int kVector<Any, double> = 1;  // double is for checks of gradients, which need no speed

template <class E, int V>
struct alignas(sizeof(E) * V) Pack {
  E x[V];
};

// The type in which a thread holds elements until it computes with them: that of memory, as elements of 16 bits take
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
__device__ __forceinline__ void store(const Pack<Held<E, Acc>, V>& pack, const Feature& f, int64_t offset) {
  if constexpr (std::is_same_v<E, Any>) {
    const auto as = [&]<class D>(D) {
      using Through = std::conditional_t<sizeof(D) == 2, float, Acc>;  // the 16-bit types convert from float only
      Pack<D, V> out;
#pragma unroll
      for (int v = 0; v < V; ++v) out.x[v] = D(Through(pack.x[v]));
      store<D, D>(out, f, offset);
    };
    switch (f.dtype) {
      case DType::float16: return as(Half());
      case DType::bfloat16: return as(BFloat16());
      case DType::float32: return as(float());
      case DType::float64:
        if constexpr (sizeof(Acc) == 8) return as(double());
    }
  } else {
    *reinterpret_cast<Pack<E, V>*>(static_cast<E*>(f.data) + offset) = pack;
  }
}

// The tile of a block, and the place of this thread in it.
struct Tile {
  int level;
  int64_t image, begin;  // begin: the tile's first cell
  int lane, lanes, group, groups;
  bool row_gaps;
};

// The level of this block. A level without tiles has the same first block as the next level.
template <class L>
__device__ __forceinline__ int find_level(const L& launch) {
  int l = 0;
  while (l + 1 < launch.count && int(blockIdx.x) >= launch.plan[l + 1].first_block) ++l;
  return l;
}

template <class Acc>
__device__ __forceinline__ Tile find_tile(const Launch<Acc>& launch, int vector) {
  Tile tile;
  tile.level = find_level(launch);
  const Plan& plan = launch.plan[tile.level];
  const unsigned block = blockIdx.x - unsigned(plan.first_block), tiles = unsigned(plan.tiles);
  tile.image = block / tiles;
  tile.begin = int64_t(block % tiles) * tile_cells<Acc>(plan, vector);
  tile.lanes = 1 << plan.log_lanes;
  tile.groups = kThreads >> plan.log_lanes;
  tile.lane = int(threadIdx.x) & (tile.lanes - 1);
  tile.group = int(threadIdx.x) >> plan.log_lanes;
  tile.row_gaps = plan.row_gaps;
  return tile;
}

// The elements that a thread has in registers at a time: kRows rows of V neighbours, all read before any is used. A row
// is V channels of one cell (channels_last), or V cells of one channel (NCHW). Without the student, a thread can hold
// twice as many rows of the teacher.
template <bool kLast, int V, class Sum, bool kWithStudent = true>
struct Patch {
  using Acc = Sum;
  static constexpr bool kChannelsLast = kLast, kStudent = kWithStudent;
  static constexpr int kVector = V;
  static constexpr int kRows = V == 1 && !kLast && sizeof(Acc) == 4 ? 8 : kStudent ? 2 : 4;
  static constexpr int kCells = kLast ? kRows : V;
  static constexpr int kPasses = kLast ? kThreadCells<Acc> / kRows : 1;  // over all channels
  // index of the cell of an element among the cells of the pass
  static __device__ constexpr int cell(int row, int v) { return kLast ? row : v; }
  // first cell of the thread in a pass
  static __device__ __forceinline__ int64_t first(const Tile& tile, int pass) {
    return tile.begin + (kLast ? tile.group * kThreadCells<Acc> + pass * kRows : tile.lane * V);
  }
};

// Calls f(first channel, rows) for each patch of the thread in the pass that begins at cell `first`.
template <class P, class F>
__device__ __forceinline__ void each_patch(const Level<typename P::Acc>& level, const Tile& tile, int64_t first,
                                           const F& f) {
  const int64_t left = level.cells() - first;
  if (left <= 0) return;
  const int channels = int(level.channels);
  if constexpr (P::kChannelsLast) {
    const int rows = left < P::kRows ? int(left) : P::kRows;
#pragma unroll 1
    for (int c = tile.lane * P::kVector; c < channels; c += tile.lanes * P::kVector) f(c, rows);
  } else {
#pragma unroll 1
    for (int c = tile.group; c < channels; c += tile.groups * P::kRows) {
      const bool full = c + (P::kRows - 1) * tile.groups < channels;
      f(c, full ? P::kRows : (channels - c + tile.groups - 1) / tile.groups);
    }
  }
}

// The places of the cells of a thread; one place if a row of the patch is of one channel. Without gaps between the rows
// of an image, all cells are in row 0.
template <class P>
struct Places {
  static constexpr int kPlaces = P::kChannelsLast ? P::kRows : 1;
  int64_t row[kPlaces], column[kPlaces];

  __device__ __forceinline__ Places(const Level<typename P::Acc>& level, const Tile& tile, int64_t first) {
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
      row[i] = tile.row_gaps ? (first + i) / level.width : 0;
      column[i] = first + i - row[i] * level.width;
    }
  }
};

// Offsets of the rows of a thread in one feature, in elements; 64 bits, as a level may have more than 2^31 elements.
template <class P>
struct Rows {
  static constexpr int kPlaces = Places<P>::kPlaces;
  int64_t start[kPlaces];
  int64_t channel_stride, row_stride;

  __device__ __forceinline__ Rows(const Feature& f, const Tile& tile, const Places<P>& places)
      : channel_stride(f.channel_stride), row_stride(tile.groups * f.channel_stride) {
#pragma unroll
    for (int i = 0; i < kPlaces; ++i)
      start[i] = tile.image * f.image_stride + places.row[i] * f.row_stride + places.column[i] * f.column_stride;
  }

  __device__ __forceinline__ int64_t at(int channel, int row) const {
    if constexpr (P::kChannelsLast) return start[row] + channel;
    return start[0] + channel * channel_stride + row * row_stride;
  }
};

// A difference that is never fused with a product, so that it is exactly 0 for equal student and teacher or logits.
__device__ __forceinline__ float difference(float x, float y) { return __fsub_rn(x, y); }
__device__ __forceinline__ double difference(double x, double y) { return __dsub_rn(x, y); }

// Calls f with the penalty as a compile-time constant, outside of code that must not branch.
template <class F>
__device__ __forceinline__ void with_penalty(Penalty penalty, const F& f) {
  switch (penalty) {
    case Penalty::l2: return f(std::integral_constant<Penalty, Penalty::l2>());
    case Penalty::l1: return f(std::integral_constant<Penalty, Penalty::l1>());
    case Penalty::smooth_l1: return f(std::integral_constant<Penalty, Penalty::smooth_l1>());
  }
}

// The constants of N neighbouring channels, in t' = (t - mean) * rstd and x = (s + bias) - t'.
template <class Acc, int N>
struct Moments {
  Acc mean[N] = {}, rstd[N], bias[N] = {};

  __device__ __forceinline__ Moments(const Level<Acc>& level, int64_t channel) {
#pragma unroll
    for (int i = 0; i < N; ++i) rstd[i] = 1;
    if (!level.mean) return;
    read(level.mean + channel, mean);
    read(level.rstd + channel, rstd);
    read(level.bias + channel, bias);
  }
  static __device__ __forceinline__ void read(const Acc* from, Acc (&to)[N]) {
    const auto pack = *reinterpret_cast<const Pack<Acc, N>*>(from);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = pack.x[i];
  }
};

// Student and teacher of a patch from a channel on, or the teacher alone. All loads are issued before any value is
// used, except for Any.
template <class E, class P>
struct Features {
  using Acc = typename P::Acc;
  static constexpr int V = P::kVector, kRows = P::kRows;
  const Level<Acc>& level;
  const Tile& tile;
  int channel, rows;
  Pack<Held<E, Acc>, V> s[P::kStudent ? kRows : 1] = {}, t[kRows] = {};
  __device__ __forceinline__ Features(const Level<Acc>& level, const Tile& tile, const Rows<P>& student,
                                      const Rows<P>& teacher, int channel, int rows)
      : level(level), tile(tile), channel(channel), rows(rows) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (i < rows) {
        if constexpr (P::kStudent) load<E, Acc>(level.student, student.at(channel, i), s[i]);
        load<E, Acc>(level.teacher, teacher.at(channel, i), t[i]);
      }
  }

  // Calls f(row, v, t', x) for each element; without the student x is 0. For channels_last it computes four channels of
  // all rows at a time, as keeping the moments of V channels would take too many registers.
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
    constexpr int kStep = P::kChannelsLast && V > 4 ? 4 : V;
#pragma unroll
    for (int first = 0; first < V; first += kStep) {
      Moments<Acc, P::kChannelsLast ? kStep : 1> moments(level, channel + first);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (i >= rows) continue;
        if constexpr (!P::kChannelsLast) moments = Moments<Acc, 1>(level, channel + i * tile.groups);
#pragma unroll
        for (int v = 0; v < kStep; ++v) {
          const int m = P::kChannelsLast ? v : 0;
          const Acc u = (Acc(t[i].x[first + v]) - moments.mean[m]) * moments.rstd[m];
          const Acc x = P::kStudent ? difference(Acc(s[i].x[first + v]) + moments.bias[m], u) : Acc(0);
          f(i, first + v, u, x);
        }
      }
    }
  }
};

// ---- the last block of several ----

// True in the last of `count` blocks that call this; that block sees, past the L1 cache, everything that the others
// wrote before. The fence of one thread is enough, as the barrier before it orders the writes of the whole block.
__device__ __forceinline__ bool comes_last(unsigned* done, unsigned count) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(done, 1u) == count - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// Combines one value per thread in a fixed order; every thread gets the result.
template <class F>
__device__ __forceinline__ double combine(double x, double* shared, const F& f) {
  __syncthreads();
  shared[threadIdx.x] = x;
  __syncthreads();
  for (int half = kThreads / 2; half; half /= 2) {
    if (int(threadIdx.x) < half) shared[threadIdx.x] = f(shared[threadIdx.x], shared[threadIdx.x + half]);
    __syncthreads();
  }
  return shared[0];
}

// The sum over a warp in a fixed order; every lane gets it.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int half = 16; half; half /= 2) x += __shfl_xor_sync(~0u, x, half);
  return x;
}

struct Add {
  __device__ double operator()(double a, double b) const { return a + b; }
};

}  // namespace fastkd::cuda
