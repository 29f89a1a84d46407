// The CPU kernels, compiled for the instruction set FASTKD_ISA; kernels.h has their formulas and costs. No header may
// be included here: its inline functions would be compiled for this instruction set, and the linker could choose them
// for older processors.
//
// A run is a row of neighbouring elements: the cells of one channel (NCHW) or the channels of one cell (channels_last).
// Runs are converted to Acc if dtype or stride require it, else read in place.

namespace fastkd::cpu {
namespace FASTKD_ISA_NAMESPACE {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// In this order: each part uses those before it.
#include "runs.inl"
//
#include "arithmetic.inl"
//
#include "sweeps.inl"
//
#include "entropy.inl"

// ---- weigh ----

// w = (e - shift) * factor for every map norm; softmax first replaces e by its exponentials
template <class Acc>
void apply_map_norm(double* e, int64_t count, const Options& options) {
  double lowest = e[0], highest = e[0], sum = 0;
#pragma omp simd reduction(min : lowest) reduction(max : highest) reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) {
    lowest = e[j] < lowest ? e[j] : lowest;
    highest = e[j] > highest ? e[j] : highest;
    sum += e[j];
  }
  if (sum != sum) lowest = highest = sum;  // comparisons drop a NaN, which must make the whole image NaN as in PyTorch
  double shift = 0, factor = 1;
  if (options.map_norm == MapNorm::mean) {
    const double mean = sum / double(count);
    factor = 1 / (mean < kTiny ? kTiny : mean);
  } else if (options.map_norm == MapNorm::minmax) {
    shift = lowest;
    factor = 1 / (highest - lowest + kEps);
  } else if (options.map_norm == MapNorm::softmax) {
    sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < count; ++j) {
      e[j] = exponential(Acc(logit(e[j], highest, options.temperature)));
      sum += e[j];
    }
    factor = double(count) / sum;
  }
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) e[j] = (e[j] - shift) * factor;
}

template <class Acc>
double weigh(const Level<Acc>& level, const Options& options, int64_t image) {
  const int64_t count = level.cells(), first = image * count;
  double* e = level.score + first;
  if (options.map_norm != MapNorm::none) apply_map_norm<Acc>(e, count, options);
  if (level.prior) {
    const Acc* q = level.prior + first;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) e[j] *= double(q[j]);
  }
  if (level.map)
    for (int64_t j = 0; j < count; ++j) level.map[first + j] = Acc(e[j]);
  double mass = 0;
#pragma omp simd reduction(+ : mass)
  for (int64_t j = 0; j < count; ++j) mass += e[j];
  return mass;
}

template <class Acc>
double loss(const Level<Acc>& level, int64_t image) {
  const int64_t count = level.cells(), first = image * count;
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = first; j < first + count; ++j) sum += weight(level, j) * level.distance[j];
  return sum;
}

// ---- the kernels: cells [begin, end) of an image ----

template <int kParts, Score S, Penalty P, class Acc>
void sweep_layout(const Level<Acc>& level, const Options& options, int64_t image, int64_t begin, int64_t end) {
  double* const e = level.score ? level.score + image * level.cells() + begin : nullptr;
  double* const d = level.distance ? level.distance + image * level.cells() + begin : nullptr;
  const auto sweep = [&](auto* element) {
    using E = std::remove_pointer_t<decltype(element)>;
    if (channels_last(level))
      sweep_channels<kParts, S, P, E>(level, options, image, begin, end, e, d);
    else
      sweep_cells<kParts, S, P, E>(level, options, image, begin, end, e, d);
  };
  if constexpr (std::is_same_v<Acc, float>)
    if (all_bfloat16(level)) return sweep(static_cast<BFloat16*>(nullptr));
  sweep(static_cast<Acc*>(nullptr));
}

template <int kParts, Score S, class Acc>
void sweep_penalty(const Level<Acc>& level, const Options& options, int64_t image, int64_t begin, int64_t end) {
  if constexpr (kParts == kScore) return sweep_layout<kParts, S, Penalty::l2>(level, options, image, begin, end);
  switch (options.penalty) {
    case Penalty::l2: return sweep_layout<kParts, S, Penalty::l2>(level, options, image, begin, end);
    case Penalty::l1: return sweep_layout<kParts, S, Penalty::l1>(level, options, image, begin, end);
    case Penalty::smooth_l1: return sweep_layout<kParts, S, Penalty::smooth_l1>(level, options, image, begin, end);
  }
}

// The sweep, in pieces that fit the buffers for the sums of cells.
template <int kParts, Score S, class Acc>
void sweep_blocks(const Level<Acc>& level, const Options& options, int64_t image, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; p += kBlock)
    sweep_penalty<kParts, S>(level, options, image, p, smaller(p + kBlock, end));
}

template <class Acc>
void entropy(const Level<Acc>& level, const Options& options, int64_t image, int64_t begin, int64_t end) {
  double* const e = level.score + image * level.cells();
  if (channels_last(level)) return entropy_channels(level, options, image, begin, end, e + begin);
  for (int64_t p = begin; p < end; p += kRun) entropy_cells(level, options, image, p, smaller(p + kRun, end), e + p);
}

template <class Acc>
void score(const Level<Acc>& level, const Options& options, int64_t image, int64_t begin, int64_t end) {
  switch (options.score) {
    case Score::uniform:
      for (int64_t p = begin; p < end; ++p) level.score[image * level.cells() + p] = 1;
      return;
    case Score::magnitude: return sweep_blocks<kScore, Score::magnitude>(level, options, image, begin, end);
    case Score::energy: return sweep_blocks<kScore, Score::energy>(level, options, image, begin, end);
    case Score::entropy: return entropy(level, options, image, begin, end);
  }
}

template <class Acc>
void measure(const Level<Acc>& level, const Options& options, int64_t image, int64_t begin, int64_t end) {
  constexpr int kBoth = kScore | kDistance;
  switch (options.score) {
    case Score::magnitude: return sweep_blocks<kBoth, Score::magnitude>(level, options, image, begin, end);
    case Score::energy: return sweep_blocks<kBoth, Score::energy>(level, options, image, begin, end);
    default:
      score(level, options, image, begin, end);  // first, so that the other sweep finds the teacher in the cache
      return sweep_blocks<kDistance, Score::uniform>(level, options, image, begin, end);
  }
}

template <class Acc>
void penalty_and_grad(const Level<Acc>& level, const Options& options, int64_t image, int64_t begin, int64_t end) {
  if (level.bias_grad)
    return sweep_blocks<kDistance | kGradient | kBias, Score::uniform>(level, options, image, begin, end);
  if (level.grad.data) return sweep_blocks<kDistance | kGradient, Score::uniform>(level, options, image, begin, end);
  sweep_blocks<kDistance, Score::uniform>(level, options, image, begin, end);
}

template <class Acc>
void differentiate(const Level<Acc>& level, const Options& options, int64_t image, int64_t begin, int64_t end) {
  sweep_blocks<kGradient, Score::uniform>(level, options, image, begin, end);
}

template <class Acc>
constexpr Kernels<Acc> kKernels{score<Acc>,         measure<Acc>, weigh<Acc>, penalty_and_grad<Acc>,
                                differentiate<Acc>, loss<Acc>};

}  // namespace
}  // namespace FASTKD_ISA_NAMESPACE

template <>
const Kernels<float>& FASTKD_ISA<float>() {
  return FASTKD_ISA_NAMESPACE::kKernels<float>;
}
template <>
const Kernels<double>& FASTKD_ISA<double>() {
  return FASTKD_ISA_NAMESPACE::kKernels<double>;
}
}  // namespace fastkd::cpu
