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
  // The map w of one image's cells, their scores normalised times the prior; replaces e, returns the sum of w.
  double (*weigh)(const Level<Acc>&, const Options&, int64_t image);
  // Penalty sum D of each cell, and the student's gradient slope * w * rho'(s - t'): 2 loads and 1 store an element.
  void (*imitate)(const Level<Acc>&, const Options&, int64_t image, int64_t begin, int64_t end);
  // The gradient alone: 2 loads and 1 store an element.
  void (*differentiate)(const Level<Acc>&, const Options&, int64_t image, int64_t begin, int64_t end);
  // The gradient that is there, times slope: 1 load and 1 store an element.
  void (*rescale)(const Level<Acc>&, const Options&, int64_t image, int64_t begin, int64_t end);
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

}  // namespace fastkd::cpu
