// The layout of a launch over blocks and threads: index arithmetic on the host, without CUDA.
//
// A block computes a tile: some cells of one image, all channels. Its threads form a grid of lanes x groups, with lanes
// along memory. If channels are neighbours in memory (channels_last), the lanes share the channels of a cell and groups
// have different cells; else lanes have different cells and the groups share the channels. A thread reads kVector
// neighbours at a time, or one if alignment, strides or sizes do not allow more.
#pragma once

#include <cstdint>
#include <limits>

#include "../level.h"

namespace fastkd::cuda {

constexpr int kThreads = 256;
// Blocks per SM: with 2, an H200 had too few reads in flight; with 4, too many registers spill. The entropy needs more
// registers.
template <bool kEntropy>
constexpr int kBlocks = kEntropy ? 2 : 3;
constexpr int kMaxLevels = 12;  // per launch, whose parameters may have 4 KiB on every card; more take more launches

// Cells per thread for channels_last: as many as fit shared memory. For NCHW they are those of one read.
template <class Acc>
constexpr int kThreadCells = sizeof(Acc) == 8 ? 4 : 8;

struct Plan {
  int first_block = 0;
  int tiles = 0;        // blocks per image
  int first_image = 0;  // index of the level's first image among those of the call, for counters and sums
  int log_lanes = 0;
  bool channels_last = false, vector = false;
  bool row_gaps = false;  // of some feature: there are gaps between rows of cells
};

// The parameters of forward, score pass and backward, passed by value.
template <class Acc>
struct Launch {
  Level<Acc> level[kMaxLevels];
  Plan plan[kMaxLevels];
  double weight[kMaxLevels];
  int count = 0;
  Options options;
  double inverse_temperature = 1;  // finite
  double* sums = nullptr;          // (images, 2): loss and mass of an image
  unsigned* images_done = nullptr;
  unsigned* levels_done = nullptr;
  Acc* losses = nullptr;  // forward: (levels,)
  Acc* mass = nullptr;
  double* score_mass = nullptr;   // score pass: (levels,)
  const Acc* upstream = nullptr;  // backward
  const Acc* forward_mass = nullptr;
  int64_t upstream_stride = 0;
};

// The layout of the one pass. A tile has `steps` times kPacks packs per thread. channels_last: the threads form `rows`
// cells of `width` packs, and the channels of a level are divided into `slices` tiles. NCHW: the threads follow the
// image.
struct StreamPlan {
  int first_block = 0, tiles = 0, first_image = 0;  // as in Plan
  int steps = 1, vector = 1, rows = 0, width = 0, slices = 0;
  bool channels_last = false;
  bool spans = false;               // NCHW: packs may contain two channels, or weights are not aligned
  float* tile_columns = nullptr;    // (images, tiles, C): sums of the gradient per channel
  double* image_columns = nullptr;  // (images, C)
};

constexpr int kPacks = 4;      // per thread of student and teacher each, all read before any is used
constexpr int kMostSteps = 4;  // fewer where a level has few tiles

struct StreamLaunch {
  Level<float> level[kMaxLevels];
  StreamPlan plan[kMaxLevels];
  double weight[kMaxLevels];
  int count = 0;
  int levels = 0, levels_with_cells = 0;  // of the call
  Options options;
  const float* factor = nullptr;  // null: 1
  const double* mass = nullptr;   // (levels,)
  double *tile_losses = nullptr, *image_losses = nullptr, *level_losses = nullptr, *call_losses = nullptr;
  unsigned *images_done = nullptr, *levels_done = nullptr, *call_done = nullptr;
  float *losses = nullptr, *total = nullptr;
};
static_assert(sizeof(Launch<float>) <= 4096 && sizeof(Launch<double>) <= 4096 && sizeof(StreamLaunch) <= 4096,
              "more than a kernel's parameters");

inline int64_t size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

inline bool aligned(const void* data, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % uintptr_t(bytes) == 0;
}

template <class Acc>
bool moments_aligned(const Level<Acc>& level, int64_t bytes) {
  return aligned(level.mean, bytes) && aligned(level.rstd, bytes) && aligned(level.bias, bytes);
}

// Strides of dimensions of size 1 are arbitrary: they are set so that there are no gaps between rows if possible.
template <class Acc>
Feature normalised(const Level<Acc>& level, Feature f) {
  if (level.images == 1) f.image_stride = 0;
  if (level.channels == 1) f.channel_stride = 0;
  if (level.width == 1) f.column_stride = level.height == 1 ? 0 : f.row_stride;
  if (level.height == 1 || level.width == 1) f.row_stride = level.width * f.column_stride;
  return f;
}

// Whether threads can read `vector` neighbours of the feature at once.
template <class Acc>
bool vectorises(const Level<Acc>& level, const Feature& f, bool channels_last, int vector) {
  const bool dense = channels_last ? f.channel_stride == 1 : f.column_stride == 1 && f.row_stride == level.width;
  const int64_t a = f.image_stride, b = channels_last ? f.row_stride : f.channel_stride,
                c = channels_last ? f.column_stride : 0;
  return dense && a % vector == 0 && b % vector == 0 && c % vector == 0 && aligned(f.data, vector * size_of(f.dtype));
}

inline int ceil_log2(int64_t x) {
  int log = 0;
  while ((int64_t(1) << log) < x) ++log;
  return log;
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int as_int(int64_t x) { return int(smaller(x, std::numeric_limits<int>::max())); }

// Number of cells of a tile.
template <class Acc>
FASTKD_INLINE int64_t tile_cells(const Plan& plan, int vector) {
  const int64_t lanes = int64_t(1) << plan.log_lanes;
  return plan.channels_last ? kThreads / lanes * kThreadCells<Acc> : lanes * (plan.vector ? vector : 1);
}

// Returns the layout of a level and normalises its strides. `vector` is the number of elements of a 16-byte read. The
// gradient's layout counts too if there is one. The result depends on the level alone, so sums have the same order on
// every card.
template <class Acc>
Plan make_plan(Level<Acc>& level, int vector) {
  Plan plan;
  Feature* features[] = {&level.student, &level.teacher, &level.grad};
  const int used = level.grad.data ? 3 : 2;
  bool neighbours = true, by_channels = true, by_cells = true;
  for (int i = 0; i < used; ++i) {
    *features[i] = normalised(level, *features[i]);
    plan.row_gaps |= features[i]->row_stride != level.width * features[i]->column_stride;
    neighbours &= features[i]->channel_stride == 1;
    by_channels &= vectorises(level, *features[i], true, vector);
    by_cells &= vectorises(level, *features[i], false, vector);
  }
  by_channels &= level.channels % vector == 0 && moments_aligned(level, vector * int64_t(sizeof(Acc)));
  by_cells &= level.cells() % vector == 0;
  plan.channels_last = neighbours;
  plan.vector = neighbours ? by_channels : by_cells;
  const int64_t step = plan.vector ? vector : 1;
  if (plan.channels_last) {
    plan.log_lanes = smaller(5, ceil_log2((level.channels + step - 1) / step));
  } else {
    // at most 8 groups, of at least 8 channels where possible; smaller tiles if there are few images
    const int groups = smaller(3, ceil_log2((level.channels + 7) / 8));
    plan.log_lanes = smaller(8 - groups, ceil_log2((level.cells() + step - 1) / step));
    const auto blocks = [&] { return level.images * (level.cells() / tile_cells<Acc>(plan, vector)); };
    while (plan.log_lanes > (plan.vector ? 3 : 4) && level.channels >= 64 && blocks() < 128) --plan.log_lanes;
  }
  const int64_t tile = tile_cells<Acc>(plan, vector);
  plan.tiles = level.images && level.channels ? as_int(ceil_div(level.cells(), tile)) : 0;
  return plan;
}

// Whether a feature is dense in memory, in channels_last or NCHW.
inline bool is_dense(const Level<float>& level, const Feature& f, bool channels_last) {
  const auto is = [](int64_t size, int64_t stride, int64_t expected) { return size == 1 || stride == expected; };
  const int64_t column = channels_last ? level.channels : 1, channel = channels_last ? 1 : level.cells();
  return is(level.images, f.image_stride, level.channels * level.cells()) &&
         is(level.channels, f.channel_stride, channel) && is(level.height, f.row_stride, level.width * column) &&
         is(level.width, f.column_stride, column);
}

inline bool are_dense(const Level<float>& level, bool channels_last) {
  return is_dense(level, level.student, channels_last) && is_dense(level, level.teacher, channels_last) &&
         (!level.grad.data || is_dense(level, level.grad, channels_last));
}

// Returns the layout of a level with dense features; `vector` as in make_plan. It depends on the level alone, too.
inline StreamPlan make_stream_plan(const Level<float>& level, int vector) {
  StreamPlan plan;
  const int64_t elements = level.channels * level.cells();
  if (level.images == 0 || elements == 0) return plan;
  plan.channels_last = level.channels > 1 && are_dense(level, true);
  bool wide = elements % vector == 0 && aligned(level.student.data, 16) && aligned(level.teacher.data, 16) &&
              aligned(level.grad.data, 16);
  if (plan.channels_last) {
    wide &= level.channels % vector == 0 && moments_aligned(level, 16);
  } else {
    wide &= level.cells() >= vector;
    plan.spans = wide && (level.cells() % vector != 0 || !aligned(level.map ? level.map : level.prior, 16));
  }
  plan.vector = wide ? vector : 1;
  const auto tiles = [&](int steps) {
    if (!plan.channels_last) return ceil_div(elements / plan.vector, steps * kPacks * kThreads);
    return ceil_div(level.cells(), steps * kPacks * plan.rows) * plan.slices;
  };
  if (plan.channels_last) {
    const int64_t packs = level.channels / plan.vector;
    plan.slices = int(ceil_div(packs, kThreads));
    plan.width = int(ceil_div(packs, plan.slices));
    plan.rows = kThreads / plan.width;
  }
  while (plan.steps < kMostSteps && level.images * tiles(2 * plan.steps) >= 512) plan.steps *= 2;
  plan.tiles = as_int(tiles(plan.steps));
  return plan;
}

}  // namespace fastkd::cuda
