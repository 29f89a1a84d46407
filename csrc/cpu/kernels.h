// The CPU kernels, compiled once per instruction set (kernels.inl) and chosen when the extension loads.
//
//   x = (s + bias_c) - t',  t' = (t - mean_c) rstd_c,  e_p = score(t'_p),  w_p = prior_p map_norm(e)_p
//   D_p = sum_c rho(x_pc),  L = weight / Z sum_p w_p D_p,  ds = slope w_p rho'(x),  dbias_c = sum of ds over cells
//   slope = factor weight / Z in one pass, and upstream gradient times weight / Z in two
//
// Bytes to move are in units (one unit is the bytes of all student features). Operations are per element, for l2 and
// energy, where a fused multiply-add counts as one.
#pragma once

#include "../level.h"

namespace fastkd::cpu {

// Each kernel computes cells [begin, end) of one image; weigh and loss need all cells of an image.
template <class Acc>
struct Kernels {
  // Score e of each cell: 1 unit (entropy: 2, the second from the cache), 4 operations (entropy: about 25).
  void (*score)(const Level<Acc>&, const Options&, int64_t image, int64_t begin, int64_t end);
  // Score e and penalty sum D of each cell, in one read of both features: 2 units (entropy: 2 more for the teacher,
  // one of them from the cache), 8 operations.
  void (*measure)(const Level<Acc>&, const Options&, int64_t image, int64_t begin, int64_t end);
  // Replaces e by the weight w = prior * map_norm(e) in one image, and returns the sum of w; 16 bytes per cell.
  double (*weigh)(const Level<Acc>&, const Options&, int64_t image);
  // Penalty sum D of each cell, the student's gradient ds = slope * w * rho'(x), and its sums over cells for the bias
  // if they are wanted: 3 units (s, t, ds), 8 operations, 9 with the bias gradient.
  void (*penalty_and_grad)(const Level<Acc>&, const Options&, int64_t image, int64_t begin, int64_t end);
  // The gradient alone: 3 units (s, t, ds), 6 operations.
  void (*differentiate)(const Level<Acc>&, const Options&, int64_t image, int64_t begin, int64_t end);
  // Sum of w D over one image: 16 bytes per cell.
  double (*loss)(const Level<Acc>&, int64_t image);
};

template <class Acc>
const Kernels<Acc>& baseline();
template <class Acc>
const Kernels<Acc>& avx2();
template <class Acc>
const Kernels<Acc>& avx512();

constexpr int64_t kRun = 512;     // elements that a kernel converts and computes at a time
constexpr int64_t kBlock = 4096;  // cells whose sums a kernel keeps in the L1 and L2 caches

template <class Acc>
bool channels_last(const Level<Acc>& level) {
  return level.student.channel_stride == 1 && level.channels > 1;
}

// Number of cells whose bias gradients are summed into one row of C values, by any thread. Pieces of an image that run
// at the same time begin at multiples of it.
template <class Acc>
int64_t bias_cells(const Level<Acc>& level) {
  return channels_last(level) ? 128 : kRun;
}

template <class Acc>
int64_t bias_rows(const Level<Acc>& level) {
  return (level.cells() + bias_cells(level) - 1) / bias_cells(level);
}

// The row of a cell. In a level that a kernel gets, bias_grad has the rows of all images.
template <class Acc>
Acc* bias_row(const Level<Acc>& level, int64_t image, int64_t cell) {
  return level.bias_grad + (image * bias_rows(level) + cell / bias_cells(level)) * level.channels;
}

}  // namespace fastkd::cpu
