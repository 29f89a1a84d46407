// The factor of the distillation loss at a step: schedule(step) * weight, where the weight is given, or balanced:
// share * mean |task loss| / mean |distillation loss|, moving averages over about 50 steps. One thread does about 30
// operations on some 40 bytes. Shared by csrc/small_ops.cpp and csrc/cuda/small_ops.cuh; fastkd/ops/factor.py has the
// same formula in PyTorch.
#pragma once

#include <cmath>
#include <cstdint>

#include "level.h"

namespace fastkd {

constexpr double kMaxAutoWeight = 1e12, kEmaSteps = 49;  // MAX_AUTO_WEIGHT and _EMA_STEPS of factor.py

enum class Decay : int64_t { none, linear, cosine };

struct Schedule {
  double weight = 1;  // negative: balanced
  double share = 1;
  int64_t warmup_steps = 0;
  Decay decay = Decay::none;
  int64_t stop_step = -1;  // negative: never
  int64_t advance = 0;
};

// Adds a step to averages = [n, sum |task loss|, sum |distillation loss|], which decay by 49/50 per step once n has
// reached 50. A step whose losses are not finite is left out.
FASTKD_INLINE void observe(float* averages, double task, double distillation) {
  const double values[] = {1, std::abs(task), std::abs(distillation)};
  for (const double value : values)
    if (!(float(value) - float(value) == 0)) return;
  const double n = averages[0], keep = n > kEmaSteps ? kEmaSteps / n : 1;
  for (int i = 0; i < 3; ++i) averages[i] = float(averages[i] * keep + values[i]);
}

// The schedule in [0, 1]: warm-up, decay and stop.
FASTKD_INLINE double ramp(const Schedule& schedule, int64_t step) {
  const double warmup = double(schedule.warmup_steps), rise = (double(step) + 1) / (warmup > 1 ? warmup : 1);
  const double risen = rise < 1 ? rise : 1;
  if (schedule.stop_step < 0) return risen;
  if (step >= schedule.stop_step) return 0;
  const double length = double(schedule.stop_step) - warmup;
  double past = (double(step) - warmup) / (length > 1 ? length : 1);
  past = past < 0 ? 0 : past > 1 ? 1 : past;
  if (schedule.decay == Decay::linear) return risen * (1 - past);
  return schedule.decay == Decay::cosine ? risen * (1 + cos(3.141592653589793 * past)) / 2 : risen;
}

FASTKD_INLINE double full_weight(const Schedule& schedule, const float* averages) {
  if (schedule.weight >= 0) return schedule.weight;
  if (!(averages[2] > 0)) return 0;  // for a loss of zero, so that its gradient is finite
  const double balanced = schedule.share * double(averages[1]) / double(averages[2]);
  return balanced > kMaxAutoWeight ? kMaxAutoWeight : balanced;
}

// Adds the losses of a step, if there are any, to the averages, advances the step and sets the factor.
FASTKD_INLINE void update_factor(const Schedule& schedule, bool has_losses, double task, double distillation,
                                 float* averages, int64_t* step, float* factor) {
  if (schedule.weight < 0 && has_losses) observe(averages, task, distillation);
  *step += schedule.advance;
  *factor = float(ramp(schedule, *step) * full_weight(schedule, averages));
}

}  // namespace fastkd
