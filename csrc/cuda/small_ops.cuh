// Kernels and launches of the small ops: priors from boxes, their sums, and the factor of the loss (formulas in
// ../priors.h and ../factor.h). Each is one launch for all levels. Nothing here waits for the device or reads from it.
//
// A block computes a tile of 32 x 8 cells of one image of one level. Its threads read all M boxes, 256 at a time, and
// keep those of their image that reach the tile in shared memory, in any order, as a maximum does not depend on it. The
// last block of a level, determined by an integer ticket, adds up the sums of the blocks in a fixed order.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <limits>

#include "../small_ops.h"
#include "error.cuh"

namespace fastkd::cuda::small {

using priors::Anchor;
using priors::Box;
using priors::Covered;
using priors::Interval;
using priors::Place;

constexpr int kThreads = 256, kTileWidth = 32, kTileHeight = kThreads / kTileWidth;
constexpr int kMaxLevels = 32;  // per launch, whose parameters may have 4 KiB on every card; more take more launches

// ---- what the kernels share ----

// True in the last of `count` blocks that call this; that block sees everything that the others wrote before.
__device__ __forceinline__ bool comes_last(unsigned* done, unsigned count) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(done, 1u) == count - 1;
  __syncthreads();
  __threadfence();
  return last;
}

// Adds up one value per thread in a fixed order; every thread gets the sum.
__device__ __forceinline__ double block_sum(double x) {
  __shared__ double shared[kThreads];
  __syncthreads();
  shared[threadIdx.x] = x;
  __syncthreads();
  for (int half = kThreads / 2; half; half /= 2) {
    if (int(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  return shared[0];
}

// Reads data of other blocks, past the L1 cache.
template <class T>
__device__ __forceinline__ T fresh(const T* x) {
  return *static_cast<const volatile T*>(x);
}

__device__ __forceinline__ double sum_of(const double* parts, int64_t count) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += fresh(parts + i);
  return block_sum(sum);
}

// ---- priors from boxes ----

struct PriorLaunch {
  priors::Level level[kMaxLevels];
  int first_block[kMaxLevels];
  int count = 0;
  priors::Options options;
  bool inclusive = false;
  double* parts = nullptr;           // sum per block (iou_mask) or image (box_balance), level after level
  unsigned* levels_done = nullptr;   // tickets, like the next two
  unsigned* images_done = nullptr;   // (levels, N)
  unsigned* images_empty = nullptr;  // (levels, N): number of cells without a box
};
static_assert(sizeof(PriorLaunch) <= 4096, "more than a kernel's parameters");

FASTKD_INLINE int tiles_across(const priors::Level& level) { return (level.width + kTileWidth - 1) / kTileWidth; }
FASTKD_INLINE int64_t tiles_of(const priors::Level& level) {
  return int64_t(tiles_across(level)) * ((level.height + kTileHeight - 1) / kTileHeight);
}

// The tile of a block, and the cell of this thread.
struct Tile {
  int level, first_x, first_y, x, y;
  unsigned image, tiles;
  bool inside;
  int64_t cell;  // in the level's map

  __device__ __forceinline__ explicit Tile(const PriorLaunch& launch) : level(0) {
    while (level + 1 < launch.count && int(blockIdx.x) >= launch.first_block[level + 1]) ++level;
    const priors::Level& of = launch.level[level];
    const unsigned block = blockIdx.x - unsigned(launch.first_block[level]), across = unsigned(tiles_across(of));
    tiles = unsigned(tiles_of(of));
    image = block / tiles;
    first_x = int(block % tiles % across) * kTileWidth;
    first_y = int(block % tiles / across) * kTileHeight;
    x = first_x + int(threadIdx.x) % kTileWidth;
    y = first_y + int(threadIdx.x) / kTileWidth;
    inside = x < of.width && y < of.height;
    cell = (int64_t(image) * of.height + y) * of.width + x;
  }
  // Whether the centre of some cell is nearer to that of the box than this reach.
  __device__ __forceinline__ bool reached(const Place& place, const priors::Reach& reach) const {
    return near(first_x, kTileWidth, place.x.centre, reach.x) && near(first_y, kTileHeight, place.y.centre, reach.y);
  }
  static __device__ __forceinline__ bool near(int first, int cells, double centre, double reach) {
    return first + 0.5 - centre < reach && centre - (first + cells - 0.5) < reach;
  }
  __device__ __forceinline__ bool overlapped(const Covered& box) const {
    return box.x.first < first_x + kTileWidth && box.x.end > first_x && box.y.first < first_y + kTileHeight &&
           box.y.end > first_y;
  }
};

// For each piece of the boxes: calls keep(box, slot) for the boxes of the image, where slot() returns the index to
// store one at, then use(number of stored boxes) in all threads.
template <class T, class Keep, class Use>
__device__ __forceinline__ void each_piece(const priors::Options& options, unsigned image, const Keep& keep,
                                           const Use& use) {
  __shared__ unsigned count;
  for (int64_t begin = 0; begin < options.count; begin += kThreads) {
    __syncthreads();
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    const int64_t index = begin + threadIdx.x;
    Box box;
    int64_t of;
    if (index < options.count && priors::read_box<T>(options, index, box, of) && of == int64_t(image))
      keep(box, [&] { return atomicAdd(&count, 1u); });
    __syncthreads();
    use(int(count));
  }
}

// A box that reaches the tile, and its m_k (graded) or the share of both areas that an overlap must exceed.
template <class Limit>
struct Kept {
  Place place;
  Limit limit;
};

// Graded: grade = max over boxes of IoU / m_k, by g = column(x) * row(y), the largest over anchors.
//
// It must read 20 bytes per box and block (from L2) and write 4 bytes per cell. It does a product and a maximum per
// cell, box and anchor that reach the tile, 2 divisions per cell and box, and computes 40 entries of column and row in
// double per tile, box and anchor.
template <class T>
__device__ __forceinline__ float grade_cell(const PriorLaunch& launch, const Tile& tile) {
  constexpr int kPairs = 32, kSides = kTileWidth + kTileHeight;
  __shared__ Kept<float> kept[kThreads];
  __shared__ float table[kPairs][kSides];  // column of each x and row of each y, of a box and an anchor
  const priors::Level& level = launch.level[tile.level];
  const int anchors = level.anchor_count, x = int(threadIdx.x) % kTileWidth, y = int(threadIdx.x) / kTileWidth;
  float value = 0;
  const auto keep = [&](const Box& box, const auto& slot) {
    const Place place(box, launch.options, level);
    priors::Reach reach;
    float best = 0;
    for (int a = 0; a < anchors; ++a) {
      const Anchor anchor(launch.options, level, a);
      best = priors::higher(best, priors::largest_share(place, anchor));
      reach.include(place, anchor);
    }
    if (tile.reached(place, reach)) kept[slot()] = {place, priors::largest_iou(best)};
  };
  const auto fill = [&](int64_t first_pair, int pairs) {
    for (int i = int(threadIdx.x); i < pairs * kSides; i += kThreads) {
      const int side = i % kSides;
      const int64_t pair = first_pair + i / kSides;
      const Place& place = kept[pair / anchors].place;
      const Anchor anchor(launch.options, level, int(pair % anchors));
      table[i / kSides][side] =
          side < kTileWidth
              ? priors::column(place, anchor, anchor.both_areas(place), place.x.distance(tile.first_x + side))
              : priors::row(place, anchor, place.y.distance(tile.first_y + side - kTileWidth));
    }
  };
  each_piece<T>(launch.options, tile.image, keep, [&](int count) {
    const int64_t all = int64_t(count) * anchors;
    float share = 0;
    int box = 0, anchor = 0;
    for (int64_t first = 0; first < all; first += kPairs) {
      const int pairs = all - first < kPairs ? int(all - first) : kPairs;
      fill(first, pairs);
      __syncthreads();
      for (int i = 0; i < pairs; ++i) {
        share = priors::higher(share, priors::product(table[i][kTileWidth + y], table[i][x]));
        if (++anchor < anchors) continue;
        value = priors::higher(value, priors::grade(share, kept[box++].limit));
        share = 0;
        anchor = 0;
      }
      __syncthreads();
    }
  });
  return value;
}

// Mask: 1 if an IoU is above threshold * m_k. Each box marks one interval of each row, see ../priors.h. It must move as
// much as grade_cell, and does 2 integer comparisons per cell and box, and about 10 operations in double per row, box
// and anchor.
template <class T>
__device__ __forceinline__ float mark_cell(const PriorLaunch& launch, const Tile& tile) {
  constexpr int kBoxes = kThreads / kTileHeight;
  __shared__ Kept<double> kept[kThreads];
  __shared__ Interval marked[kBoxes][kTileHeight];
  const priors::Level& level = launch.level[tile.level];
  const int anchors = level.anchor_count, y = int(threadIdx.x) / kTileWidth;
  float value = 0;
  const auto keep = [&](const Box& box, const auto& slot) {
    const Place place(box, launch.options, level);
    priors::Reach reach;
    double best = 0;
    for (int a = 0; a < anchors; ++a) {
      const Anchor anchor(launch.options, level, a);
      best = priors::higher(best, priors::best_iou(place, anchor));
      reach.include(place, anchor);
    }
    if (tile.reached(place, reach)) kept[slot()] = {place, priors::least_share(best, launch.options.number)};
  };
  const auto mark_row = [&](const Kept<double>& box, int row) {
    double half = -HUGE_VAL;
    for (int a = 0; a < anchors; ++a) {
      const Anchor anchor(launch.options, level, a);
      half = priors::higher(half, priors::half_interval(box.place, anchor, box.limit, box.place.y.distance(row)));
    }
    return priors::interval(box.place.x, half);
  };
  each_piece<T>(launch.options, tile.image, keep, [&](int count) {
    for (int first = 0; first < count; first += kBoxes) {
      const int boxes = count - first < kBoxes ? count - first : kBoxes;
      const int box = int(threadIdx.x) / kTileHeight, row = int(threadIdx.x) % kTileHeight;
      if (box < boxes) marked[box][row] = mark_row(kept[first + box], tile.first_y + row);
      __syncthreads();
      for (int i = 0; i < boxes; ++i)
        if (marked[i][y].first <= tile.x && tile.x < marked[i][y].end) value = 1;
      __syncthreads();
    }
  });
  return value;
}

template <class T, bool kGraded>
__global__ void __launch_bounds__(kThreads) iou_mask(const __grid_constant__ PriorLaunch launch) {
  const Tile tile(launch);
  const priors::Level& level = launch.level[tile.level];
  const float value = kGraded ? grade_cell<T>(launch, tile) : mark_cell<T>(launch, tile);
  if (tile.inside) level.map[tile.cell] = value;
  const double sum = block_sum(tile.inside ? double(value) : 0);
  if (threadIdx.x == 0) launch.parts[blockIdx.x] = sum;
  const unsigned blocks = tile.tiles * unsigned(launch.options.batch);
  if (!comes_last(launch.levels_done + tile.level, blocks)) return;
  const double total = sum_of(launch.parts + launch.first_block[tile.level], blocks);
  if (threadIdx.x == 0) *level.sum = total;
}

// weight = 1 / area of the smallest box that covers the cell, else background / number of such cells in the image,
// which the last block of the image writes. It must move as much as iou_mask, and reads and writes the map again: 12
// bytes per cell. It does 4 integer comparisons and a maximum per cell and box that overlaps the tile.
template <class T>
__global__ void __launch_bounds__(kThreads) box_balance(const __grid_constant__ PriorLaunch launch) {
  __shared__ Covered kept[kThreads];
  const Tile tile(launch);
  const priors::Level& level = launch.level[tile.level];
  float value = 0;
  const auto keep = [&](const Box& box, const auto& slot) {
    const Covered covered(box, launch.options, level, launch.inclusive);
    if (tile.overlapped(covered)) kept[slot()] = covered;
  };
  each_piece<T>(launch.options, tile.image, keep, [&](int count) {
    for (int i = 0; i < count; ++i) {
      const Covered& box = kept[i];
      if (box.x.first <= tile.x && tile.x < box.x.end && box.y.first <= tile.y && tile.y < box.y.end)
        value = priors::higher(value, box.weight);
    }
  });
  if (tile.inside) level.map[tile.cell] = value;
  const int64_t image = int64_t(tile.level) * launch.options.batch + tile.image;
  const double empty = block_sum(tile.inside && value == 0);
  if (threadIdx.x == 0) atomicAdd(launch.images_empty + image, unsigned(empty));
  if (!comes_last(launch.images_done + image, tile.tiles)) return;
  const float background = priors::background_weight(launch.options.number, fresh(launch.images_empty + image));
  float* const map = level.map + int64_t(tile.image) * level.cells();
  double sum = 0;
  for (int64_t i = threadIdx.x; i < level.cells(); i += kThreads) {
    float weight = fresh(map + i);
    if (weight == 0) map[i] = weight = background;
    sum += double(weight);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) launch.parts[image] = sum;
  if (!comes_last(launch.levels_done + tile.level, unsigned(launch.options.batch))) return;
  const double total = sum_of(launch.parts + int64_t(tile.level) * launch.options.batch, launch.options.batch);
  if (threadIdx.x == 0) *level.sum = total;
}

template <class Launch>
void run(void (*kernel)(const Launch), int64_t blocks, int threads, const Launch& launch, cudaStream_t stream) {
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), "fastkd: more blocks than a launch takes");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, launch));
  check(cudaGetLastError());
}

// Scratch memory: `part_count` doubles, and tickets that are 0.
struct Scratch {
  Tensor tensor;
  double* parts;
  unsigned* tickets;

  Scratch(const Tensor& like, int64_t part_count, int64_t ticket_count, cudaStream_t stream)
      : tensor(torch::stable::new_empty(like, {part_count + (ticket_count + 1) / 2}, ScalarType::Double)),
        parts(static_cast<double*>(tensor.mutable_data_ptr())),
        tickets(reinterpret_cast<unsigned*>(parts + part_count)) {
    check(cudaMemsetAsync(tickets, 0, size_t(ticket_count) * sizeof(unsigned), stream));
  }
};

inline void launch_prior(void (*kernel)(const PriorLaunch), const priors::Options& options, bool inclusive,
                         const std::vector<priors::Level>& levels, const Tensor& like, cudaStream_t stream) {
  const int64_t count = int64_t(levels.size());
  if (count == 0) return;
  if (options.batch == 0) return check(cudaMemsetAsync(levels[0].sum, 0, size_t(count) * sizeof(double), stream));
  for (int64_t begin = 0; begin < count; begin += kMaxLevels) {
    PriorLaunch launch;
    launch.count = int(count - begin < kMaxLevels ? count - begin : kMaxLevels);
    launch.options = options;
    launch.inclusive = inclusive;
    int64_t blocks = 0;
    for (int i = 0; i < launch.count; ++i) {
      launch.level[i] = levels[size_t(begin + i)];
      launch.first_block[i] = int(blocks);
      blocks += options.batch * tiles_of(launch.level[i]);
      STD_TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), "fastkd: more blocks than a launch takes");
    }
    const int64_t images = launch.count * options.batch;  // at most as many as blocks
    const Scratch scratch(like, blocks, launch.count + 2 * images, stream);
    launch.parts = scratch.parts;
    launch.levels_done = scratch.tickets;
    launch.images_done = scratch.tickets + launch.count;
    launch.images_empty = launch.images_done + images;
    run(kernel, blocks, kThreads, launch, stream);
  }
}

template <class T>
void launch_iou_mask(const priors::Options& options, bool graded, const std::vector<priors::Level>& levels,
                     const Tensor& like, cudaStream_t stream) {
  launch_prior(graded ? iou_mask<T, true> : iou_mask<T, false>, options, false, levels, like, stream);
}

template <class T>
void launch_box_balance(const priors::Options& options, bool inclusive, const std::vector<priors::Level>& levels,
                        const Tensor& like, cudaStream_t stream) {
  launch_prior(box_balance<T>, options, inclusive, levels, like, stream);
}

// ---- sums of given priors ----

constexpr int64_t kPiece = 16 * kThreads;  // elements per block

struct SumsLaunch {
  Weights level[kMaxLevels];
  int first_block[kMaxLevels];
  int count = 0;
  double *parts = nullptr, *sums = nullptr, *minima = nullptr;
  unsigned* done = nullptr;
};

FASTKD_INLINE int64_t pieces_of(const Weights& level) { return (level.count + kPiece - 1) / kPiece; }

__device__ __forceinline__ double element(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::float16: return double(float(static_cast<const torch::headeronly::Half*>(data)[i]));
    case DType::bfloat16: return double(float(static_cast<const torch::headeronly::BFloat16*>(data)[i]));
    case DType::float32: return double(static_cast<const float*>(data)[i]);
    default: return static_cast<const double*>(data)[i];
  }
}

// sum_p q_p of each level in double. It must read each prior once, and does 1 operation per cell. Minima are not
// computed: they are 0, or 1 for an absent prior.
__global__ void __launch_bounds__(kThreads) prior_sums(const __grid_constant__ SumsLaunch launch) {
  if (blockIdx.x == 0 && int(threadIdx.x) < launch.count) {
    const Weights& level = launch.level[threadIdx.x];
    launch.minima[threadIdx.x] = level.count ? 0 : 1;
    if (level.count == 0) launch.sums[threadIdx.x] = double(level.cells);
  }
  int l = launch.count - 1;
  while (l > 0 && int(blockIdx.x) < launch.first_block[l]) --l;
  const Weights& level = launch.level[l];
  const int64_t blocks = pieces_of(level), begin = int64_t(blockIdx.x - unsigned(launch.first_block[l])) * kPiece;
  if (begin >= level.count) return;  // a launch without any prior
  const int64_t end = level.count - begin < kPiece ? level.count : begin + kPiece;
  double sum = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) sum += element(level.data, level.dtype, i);
  sum = block_sum(sum);
  if (threadIdx.x == 0) launch.parts[blockIdx.x] = sum;
  if (!comes_last(launch.done + l, unsigned(blocks))) return;
  const double total = sum_of(launch.parts + launch.first_block[l], blocks);
  if (threadIdx.x == 0) launch.sums[l] = total;
}

inline void launch_prior_sums(const std::vector<Weights>& levels, double* sums, const Tensor& like,
                              cudaStream_t stream) {
  const int64_t count = int64_t(levels.size());
  for (int64_t begin = 0; begin < count; begin += kMaxLevels) {
    SumsLaunch launch;
    launch.count = int(count - begin < kMaxLevels ? count - begin : kMaxLevels);
    int64_t blocks = 0;
    for (int i = 0; i < launch.count; ++i) {
      launch.level[i] = levels[size_t(begin + i)];
      launch.first_block[i] = int(blocks);
      blocks += pieces_of(launch.level[i]);
      STD_TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), "fastkd: more blocks than a launch takes");
    }
    const Scratch scratch(like, blocks, launch.count, stream);
    launch.parts = scratch.parts;
    launch.done = scratch.tickets;
    launch.sums = sums + begin;
    launch.minima = sums + count + begin;
    run(prior_sums, blocks ? blocks : 1, kThreads, launch, stream);
  }
}

// ---- the factor: about 30 operations of one thread, as only the device knows the values ----

__global__ void factor_step(const __grid_constant__ FactorStep call) {
  double task = 0, distillation = 0;
  if (call.losses) {
    task = element(call.task, call.task_dtype, 0);
    const DType dtype = call.wide_losses ? DType::float64 : DType::float32;
    for (int64_t l = 0; l < call.loss_count; ++l) distillation += element(call.losses, dtype, l);
  }
  fastkd::update_factor(call.schedule, call.losses, task, distillation, call.averages, call.step, call.factor);
}

inline void launch_update_factor(const FactorStep& call, cudaStream_t stream) { run(factor_step, 1, 1, call, stream); }

}  // namespace fastkd::cuda::small
