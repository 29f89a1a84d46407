// The CPU kernels, compiled once per instruction set (kernels.inl) and chosen when the extension loads.
#pragma once

#include "../level.h"

namespace fastkd::cpu {

// Cells [begin, end) of one image; the forward calls weigh and loss once all its cells are there.
template <class Acc>
struct Kernels {
  // Score e of each cell: 1 load an element (entropy: 2).
  void (*score)(const Level<Acc>&, const Options&, int64_t image, int64_t begin, int64_t end);
  // Score e and penalty sum D of each cell, in one read of student and teacher: 2 loads an element (entropy: 4).
  void (*measure)(const Level<Acc>&, const Options&, int64_t image, int64_t begin, int64_t end);
  // The weight w of one image's cells, their scores normalised times the prior; replaces e, returns the sum of w.
  double (*weigh)(const Level<Acc>&, const Options&, int64_t image);
  // Penalty sum D of each cell, the student's gradient slope * w * rho'(x) and its sums over cells for the bias, where
  // the level wants them: 2 loads and 1 store an element.
  void (*imitate)(const Level<Acc>&, const Options&, int64_t image, int64_t begin, int64_t end);
  // The gradient alone: 2 loads and 1 store an element.
  void (*differentiate)(const Level<Acc>&, const Options&, int64_t image, int64_t begin, int64_t end);
  // Sum of w D over one image.
  double (*loss)(const Level<Acc>&, int64_t image);
};

template <class Acc>
const Kernels<Acc>& baseline();
template <class Acc>
const Kernels<Acc>& avx2();
template <class Acc>
const Kernels<Acc>& avx512();

constexpr int64_t kRun = 512;     // elements that a kernel converts and combines at a time
constexpr int64_t kBlock = 4096;  // cells whose sums a kernel keeps in the first-level caches

template <class Acc>
bool channels_last(const Level<Acc>& level) {
  return level.student.channel_stride == 1 && level.channels > 1;
}

// Cells of an image whose gradients of the bias are summed in one row of C, whoever sums them. Pieces of an image that
// are worked on at the same time begin at a multiple of it.
template <class Acc>
int64_t bias_cells(const Level<Acc>& level) {
  return channels_last(level) ? 128 : kRun;
}

template <class Acc>
int64_t bias_rows(const Level<Acc>& level) {
  return (level.cells() + bias_cells(level) - 1) / bias_cells(level);
}

// The row of a cell. In a kernel's level, bias_grad has those of all images.
template <class Acc>
Acc* bias_row(const Level<Acc>& level, int64_t image, int64_t cell) {
  return level.bias_grad + (image * bias_rows(level) + cell / bias_cells(level)) * level.channels;
}

}  // namespace fastkd::cpu
