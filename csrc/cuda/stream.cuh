// One pass: losses and final gradients of all levels in one launch, if the weight w of every cell is known before any
// feature is read: it is the prior, or comes from the score pass (forward.cuh).
//
//   L = weight / Z sum_p w_p sum_c rho(x),   x = (s + bias_c) - t',   t' = (t - mean_c) rstd_c
//   ds = factor weight / Z w_p rho'(x),      dbias_c = sum of ds over images and cells
//
// It must move 3 b bytes per element of b bytes, student and teacher read and gradient written, which are 3 units (one
// unit is the bytes of all student features), and one weight per cell. It does 10 operations per element (l2:
// standardise 2, bias, difference, penalty 2, derivative, weight 2, sum of the channel) and 3 conversions. The floor is
// 3 units / bandwidth: in the time in which the memory of an H200 delivers a bfloat16 element, its lanes can do about
// 36 operations.
//
// No sum over the channels of one cell is needed, so an image is one run of 16-byte packs in both layouts. Losses and
// sums per channel are added up from tiles to images to levels, each by the block that finishes last, in a fixed order.
#pragma once

#include <bit>

#include "tile.cuh"

namespace fastkd::cuda {

// ---- packs: read and written once, by streaming loads and stores, which are evicted from the caches first ----

template <class E, int V>
using Raw =
    std::conditional_t<sizeof(E) * V == 16, uint4, std::conditional_t<sizeof(E) == 4, unsigned, unsigned short>>;

template <class E, int V>
__device__ __forceinline__ Raw<E, V> read(const void* data, int64_t offset) {
  return __ldcs(reinterpret_cast<const Raw<E, V>*>(static_cast<const E*>(data) + offset));
}

template <class E, int V>
__device__ __forceinline__ void write(const Raw<E, V>& raw, void* data, int64_t offset) {
  __stcs(reinterpret_cast<Raw<E, V>*>(static_cast<E*>(data) + offset), raw);
}

// One element of a pack, which a thread keeps in its memory format, as that takes the fewest registers.
template <class E, int V>
__device__ __forceinline__ float get(const Raw<E, V>& raw, int v) {
  return float(std::bit_cast<Pack<E, V>>(raw).x[v]);
}

template <class E, int V>
__device__ __forceinline__ void set(Raw<E, V>& raw, int v, float x) {
  auto pack = std::bit_cast<Pack<E, V>>(raw);
  pack.x[v] = E(x);
  raw = std::bit_cast<Raw<E, V>>(pack);
}

// ---- the places of a block and its threads ----

struct Block {
  const StreamLaunch& launch;
  const Level<float>& level;
  const StreamPlan& plan;
  float* const shared;  // kSharedFloats
  int l, tile;          // tile: of the image
  int64_t image;

  __device__ __forceinline__ Block(const StreamLaunch& launch, float* shared)
      : launch(launch),
        level(launch.level[find_level(launch)]),
        plan(launch.plan[&level - launch.level]),
        shared(shared),
        l(int(&level - launch.level)) {
    const int block = int(blockIdx.x) - plan.first_block;
    image = block / plan.tiles;
    tile = block % plan.tiles;
  }

  // Weights of the image's cells; null: 1.
  __device__ __forceinline__ const float* weights() const {
    const float* const of_level = level.map ? level.map : level.prior;
    return of_level ? of_level + image * level.cells() : nullptr;
  }
  // The tile's sums of ds per channel; see tiles_of for the channels that a tile has.
  __device__ __forceinline__ float* columns() const {
    return plan.tile_columns + (image * plan.tiles + tile) * level.channels;
  }
  __device__ __forceinline__ double factor() const { return launch.factor ? double(*launch.factor) : 1; }
  __device__ __forceinline__ double z() const {
    return divisor(level, launch.options.divisor, launch.mass ? launch.mass[l] : 0);
  }
  // The divisor of the scaled terms of smooth_l1.
  __device__ __forceinline__ double scale() const {
    return launch.options.penalty == Penalty::smooth_l1 ? launch.options.beta : 1;
  }
  // The factor of w * scaled slope in ds. It is computed once per block, as a division in double is slow on consumer
  // cards.
  __device__ __forceinline__ float slope() const {
    __shared__ float slope;
    if (threadIdx.x == 0) slope = float(factor() * launch.weight[l] / (z() * scale()));
    __syncthreads();
    return slope;
  }
};

constexpr int kSharedFloats = 2 * kPacks * kThreads + 32;  // the larger of the two structs below

// The packs of a thread for channels_last: the same V channels of several cells, `rows` apart.
template <int V>
struct CellPacks {
  static constexpr int kVector = V;
  const Block& block;
  const int rows = block.plan.rows, column = int(threadIdx.x) % block.plan.width,
            row = int(threadIdx.x) / block.plan.width;
  const int first_channel = block.tile % block.plan.slices * block.plan.width * V, channel = first_channel + column * V;
  int cell;                                            // cell of the step's first pack, in the image
  int left = 0;                                        // number of cells from there on
  const int64_t stride = rows * block.level.channels;  // between packs
  int64_t start;                                       // of the step's first pack, in elements
  float sums[V] = {};

  __device__ __forceinline__ CellPacks(const Block& block) : block(block) {
    const int64_t cells = block.level.cells();
    cell = block.tile / block.plan.slices * block.plan.steps * kPacks * rows + row;
    if (row < rows && channel < block.level.channels) left = int(cells) - cell;
    start = (block.image * cells + cell) * block.level.channels + channel;
  }

  __device__ __forceinline__ bool has(int j) const { return j * rows < left; }
  __device__ __forceinline__ int64_t offset(int j) const { return start + j * stride; }
  // Calls f(pack, element, weight, mean, rstd, bias), which returns ds, for each element of the step. It computes four
  // channels of all packs at a time and reads their moments in every step (from the L1 cache), as keeping the moments
  // of V channels would take too many registers.
  template <class F>
  __device__ __forceinline__ void each(const F& f) {
    const float* const weights = block.weights();
    float w[kPacks];
#pragma unroll
    for (int j = 0; j < kPacks; ++j) w[j] = weights && has(j) ? __ldg(weights + cell + j * rows) : 1.f;
    constexpr int kFour = V < 4 ? V : 4;
#pragma unroll
    for (int first = 0; first < V; first += kFour) {
      const Moments<float, kFour> moments(block.level, has(0) ? channel + first : 0);
#pragma unroll
      for (int j = 0; j < kPacks; ++j)
        if (has(j))
#pragma unroll
          for (int v = 0; v < kFour; ++v)
            sums[first + v] += f(j, first + v, w[j], moments.mean[v], moments.rstd[v], moments.bias[v]);
    }
  }
  __device__ __forceinline__ void end_step(int) {
    cell += kPacks * rows;
    left -= kPacks * rows;
    start += kPacks * stride;
  }
  // Adds up the rows of threads. With the padding, reads of neighbouring channels use different banks.
  __device__ __forceinline__ void finish() const {
    if (!block.level.bias_grad) return;
    float* const shared = block.shared;
    constexpr int kLength = kThreads + 32 / V;
    static_assert(V * kLength <= kSharedFloats);
#pragma unroll
    for (int v = 0; v < V; ++v) shared[v * kLength + int(threadIdx.x)] = sums[v];
    __syncthreads();
    const int64_t channels = block.level.channels - first_channel;
    for (int c = int(threadIdx.x); c < block.plan.width * V && c < channels; c += kThreads) {
      double sum = 0;
      for (int r = 0; r < rows; ++r) sum += double(shared[c % V * kLength + r * block.plan.width + c / V]);
      block.columns()[first_channel + c] = float(sum);
    }
  }
};

// The packs of a thread for NCHW: consecutive in the image, across channels. With kSpans, the last elements of a pack
// may belong to the next channel, and weights are read one by one.
template <int V, bool kSpans>
struct ChannelPacks {
  static constexpr int kVector = V, kStep = kPacks * kThreads;
  const Block& block;
  const unsigned cells = unsigned(block.level.cells());
  int64_t first_channel;  // of the tile
  unsigned at;            // the step's first element, counted from the first element of first_channel
  int left;               // number of packs of the tile from there on
  int64_t start;          // of the thread's first pack of the step, in elements

  __device__ __forceinline__ ChannelPacks(const Block& block) : block(block) {
    const int64_t length = int64_t(block.plan.steps) * kStep, first = block.tile * length;
    const int64_t packs = block.level.channels * block.level.cells() / V - first;
    left = int(packs < length ? packs : length);
    first_channel = first * V / cells;
    at = unsigned(first * V - first_channel * cells);
    start = block.image * block.level.channels * cells + first * V + threadIdx.x * V;
  }

  __device__ __forceinline__ int pack(int j) const { return j * kThreads + int(threadIdx.x); }
  __device__ __forceinline__ bool has(int j) const { return pack(j) < left; }
  __device__ __forceinline__ int64_t offset(int j) const { return start + j * kThreads * V; }
  // As CellPacks::each, one pack at a time.
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
#pragma unroll
    for (int j = 0; j < kPacks; ++j)
      if (has(j)) each_element(j, f);
  }
  template <class F>
  __device__ __forceinline__ void each_element(int j, const F& f) const {
    const unsigned element = at + unsigned(pack(j) * V), channel = element / cells, cell = element - channel * cells;
    const int end =
        cells - cell < V ? int(cells - cell) : V;  // number of elements of this channel; the others belong to the next
    const Moments<float, 1> here(block.level, first_channel + channel),
        next(block.level, first_channel + channel + (end < V));
    const float* const weights = block.weights();
    float w[V], sum = 0, sum_of_next = 0;
    read_weights(weights, cell, w);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const bool is_next = kSpans && v >= end;
      const float ds = f(j, v, w[v], is_next ? next.mean[0] : here.mean[0], is_next ? next.rstd[0] : here.rstd[0],
                         is_next ? next.bias[0] : here.bias[0]);
      sum += is_next ? 0 : ds;
      sum_of_next += is_next ? ds : 0;
    }
    if (!block.level.bias_grad) return;
    block.shared[pack(j)] = sum;
    if constexpr (kSpans) block.shared[kStep + pack(j)] = sum_of_next;
  }
  __device__ __forceinline__ void read_weights(const float* weights, unsigned cell, float (&out)[V]) const {
    constexpr int kFour = kSpans || V < 4 ? 1 : 4;
#pragma unroll
    for (int v = 0; v < V; v += kFour) {
      const unsigned at =
          cell + v < cells ? cell + v : cell + v - cells;  // the next channel starts at the first cell again
      Pack<float, kFour> pack = {};
      if (weights) pack = *reinterpret_cast<const Pack<float, kFour>*>(weights + at);
#pragma unroll
      for (int i = 0; i < kFour; ++i) out[v + i] = weights ? pack.x[i] : 1.f;
    }
  }
  // Adds up the step's packs per channel, one warp per channel. Part of a channel may come from an earlier step.
  __device__ __forceinline__ void end_step(int step) {
    if (block.level.bias_grad && left > 0) {
      const int64_t from = at, to = from + int64_t(left < kStep ? left : kStep) * V;
      const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
      __syncthreads();
      for (int64_t c = from / cells + warp; c * cells < to; c += kThreads / 32) {
        const int64_t begin = c * cells < from ? from : c * cells, end = (c + 1) * cells < to ? (c + 1) * cells : to;
        const int first = int(begin - from) / V, stop = int(end - from + V - 1) / V;
        const bool spans = kSpans && (begin - from) % V != 0;  // only the last elements of the first pack belong to c
        float sum = 0;
        for (int p = first + lane; p < stop; p += 32) sum += block.shared[spans && p == first ? kStep + p : p];
        sum = warp_sum(sum);
        float& column = block.columns()[first_channel + c];
        if (lane == 0) column = step == 0 || c * cells >= from ? sum : column + sum;
      }
      __syncthreads();
    }
    at += kStep * V;
    left -= kStep;
    start += kStep * V;
  }
  __device__ __forceinline__ void finish() const {}
};

// ---- a tile ----

// Writes the tile's gradient and its sums per channel. Returns the thread's part of sum w rho (for smooth_l1 times
// beta).
template <class E, Penalty kPenalty, class Packs>
__device__ __forceinline__ double penalty_and_grad(const Block& block) {
  constexpr int V = Packs::kVector;
  const Level<float>& level = block.level;
  const float beta = float(block.launch.options.beta);
  Packs packs(block);
  float slope = 0;
  double total = 0;
#pragma unroll 1
  for (int step = 0; step < block.plan.steps; ++step) {
    Raw<E, V> s[kPacks] = {}, t[kPacks] = {};
#pragma unroll
    for (int j = 0; j < kPacks; ++j)
      if (packs.has(j)) {
        s[j] = read<E, V>(level.student.data, packs.offset(j));
        t[j] = read<E, V>(level.teacher.data, packs.offset(j));
      }
    if (step == 0) slope = block.slope();  // waits here, while features are being loaded
    float loss = 0;
    packs.each([&](int j, int v, float w, float mean, float rstd, float bias) {
      const float x = difference(get<E, V>(s[j], v) + bias, (get<E, V>(t[j], v) - mean) * rstd);
      const float ds = slope * w * scaled_slope<kPenalty>(x, beta);
      loss += w * scaled_penalty<kPenalty>(x, beta);
      set<E, V>(s[j], v, ds);
      return ds;
    });
    if (level.grad.data)
#pragma unroll
      for (int j = 0; j < kPacks; ++j)
        if (packs.has(j)) write<E, V>(s[j], level.grad.data, packs.offset(j));
    packs.end_step(step);
    total += double(loss);
  }
  packs.finish();
  return total;
}

template <class E, Penalty kPenalty>
__device__ __forceinline__ double penalty_and_grad_of_tile(const Block& block) {
  constexpr int V = kVector<E, float>;
  const bool wide = block.plan.vector == V;
  if (block.plan.channels_last)
    return wide ? penalty_and_grad<E, kPenalty, CellPacks<V>>(block)
                : penalty_and_grad<E, kPenalty, CellPacks<1>>(block);
  if (!wide) return penalty_and_grad<E, kPenalty, ChannelPacks<1, false>>(block);
  return block.plan.spans ? penalty_and_grad<E, kPenalty, ChannelPacks<V, true>>(block)
                          : penalty_and_grad<E, kPenalty, ChannelPacks<V, false>>(block);
}

// ---- sums of tiles, images and levels: each by one block, in a fixed order, read past the L1 cache ----

// Returns the sum over the block, to every thread. There must be a barrier between two calls.
__device__ __forceinline__ double block_sum(double x) {
  __shared__ double of_warps[kThreads / 32];
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) sum += of_warps[i];
  return sum;
}

// The sum of `count` values, computed by the block.
__device__ __forceinline__ double block_sum_of(const double* x, int64_t count) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += __ldcg(x + i);
  return block_sum(sum);
}

// The tiles of an image that have a sum of a channel.
struct Tiles {
  int64_t first, end, step;
};
__device__ __forceinline__ Tiles tiles_of(const Block& block, int64_t channel) {
  const StreamPlan& plan = block.plan;
  if (plan.channels_last) return {channel / (plan.width * plan.vector), plan.tiles, plan.slices};
  const int64_t length = int64_t(plan.steps) * kPacks * kThreads * plan.vector, cells = block.level.cells();
  return {channel * cells / length, ((channel + 1) * cells - 1) / length + 1, 1};
}

__device__ __forceinline__ void sum_image(const Block& block) {
  const double* const parts = block.launch.tile_losses + block.plan.first_block + block.image * block.plan.tiles;
  const double loss = block_sum_of(parts, block.plan.tiles);
  if (threadIdx.x == 0) block.launch.image_losses[block.plan.first_image + block.image] = loss;
  if (!block.level.bias_grad) return;
  const int64_t channels = block.level.channels;
  const float* const columns = block.plan.tile_columns + block.image * block.plan.tiles * channels;
  for (int64_t c = threadIdx.x; c < channels; c += kThreads) {
    const Tiles tiles = tiles_of(block, c);
    double sum = 0;
    for (int64_t i = tiles.first; i < tiles.end; i += tiles.step) sum += double(__ldcg(columns + i * channels + c));
    block.plan.image_columns[block.image * channels + c] = sum;
  }
}

__device__ __forceinline__ void sum_level(const Block& block) {
  const StreamLaunch& launch = block.launch;
  const Level<float>& level = block.level;
  const double loss = block_sum_of(launch.image_losses + block.plan.first_image, level.images);
  if (threadIdx.x == 0) {
    launch.level_losses[block.l] = launch.weight[block.l] * loss / (block.z() * block.scale());
    launch.losses[block.l] = float(launch.level_losses[block.l]);
  }
  if (!level.bias_grad) return;
  for (int64_t c = threadIdx.x; c < level.channels; c += kThreads) {
    double sum = 0;
    for (int64_t n = 0; n < level.images; ++n) sum += __ldcg(block.plan.image_columns + n * level.channels + c);
    level.bias_grad[c] = float(sum);
  }
}

template <class E, Penalty kPenalty>
__global__ void __launch_bounds__(kThreads, kBlocks<false>) stream_pass(const __grid_constant__ StreamLaunch launch) {
  __shared__ float shared[kSharedFloats];
  const Block block(launch, shared);
  const double loss = block_sum(penalty_and_grad_of_tile<E, kPenalty>(block));
  if (threadIdx.x == 0) launch.tile_losses[blockIdx.x] = loss;
  const int64_t image = block.plan.first_image + block.image;
  if (!comes_last(launch.images_done + image, unsigned(block.plan.tiles))) return;
  sum_image(block);
  if (!comes_last(launch.levels_done + block.l, unsigned(block.level.images))) return;
  sum_level(block);
  if (!comes_last(launch.call_done, unsigned(launch.levels_with_cells))) return;
  const double total = block_sum_of(launch.call_losses, launch.levels);
  if (threadIdx.x == 0) *launch.total = float(block.factor() * total);
}

}  // namespace fastkd::cuda
