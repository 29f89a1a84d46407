// The CPU kernels, compiled once per instruction set (kernels.inl) and chosen when the extension loads.
#pragma once

#include "../level.h"

namespace fastkd::cpu {

// What an image adds to its level.
struct Sums {
  double loss = 0;  // sum of w D
  double mass = 0;  // sum of w
};

// Cells [begin, end) of one image are the unit of work of measure and differentiate, see block_cells.
template <class Acc>
struct Kernels {
  // Score e and penalty sum D of each cell, in one read of student and teacher: 2 loads an element.
  void (*measure)(const Level<Acc>&, const Options&, int64_t image, int64_t begin, int64_t end);
  // Weights of one image's cells: normalised scores times the prior.
  Sums (*weigh)(const Level<Acc>&, const Options&, int64_t image);
  // The student's gradient, slope * w * rho'(s - t'): 2 loads and 1 store an element.
  void (*differentiate)(const Level<Acc>&, const Options&, int64_t image, int64_t begin, int64_t end);
};

template <class Acc>
const Kernels<Acc>& baseline();
template <class Acc>
const Kernels<Acc>& avx2();
template <class Acc>
const Kernels<Acc>& avx512();

constexpr int64_t kRun = 512;  // elements that a kernel converts and combines at a time

template <class Acc>
bool channels_last(const Level<Acc>& level) {
  return level.student.channel_stride == 1 && level.channels > 1;
}

// How many cells a unit of work holds: fixed, so that results do not depend on the number of threads.
template <class Acc>
int64_t block_cells(const Level<Acc>& level) {
  return channels_last(level) ? 128 : kRun;
}

}  // namespace fastkd::cpu
