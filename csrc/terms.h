// The terms of the loss for one element: its part in the score e, its penalty rho(x), and the derivative rho'(x).
//
//   l2: rho = x^2, rho' = 2 x;   l1: rho = |x|, rho' = sign(x);   magnitude: |t'|;   energy: t'^2
//   smooth_l1: beta rho = c (|x| - c / 2), beta rho' = clamp(x, -beta, beta), with c = min(|x|, beta)
#pragma once

#include <cmath>

#include "level.h"

namespace fastkd {

template <class T>
FASTKD_INLINE T absolute(T x) {
  return x < 0 ? -x : x;
}

// -1, 0 or 1; 0 for a NaN, as in PyTorch's l1_loss
template <class T>
FASTKD_INLINE T sign(T x) {
  return T(x > 0) - T(x < 0);
}

template <Score S, class T>
FASTKD_INLINE T score_term(T x) {
  if constexpr (S == Score::magnitude) return absolute(x);
  if constexpr (S == Score::energy) return x * x;
  return T(0);
}

// 1 - H / log C of a cell, from its sums of exp(u) and of u exp(u) over channels. It is 0 where rounding makes it
// negative, because weights relative to a mean of such scores would be arbitrary. A NaN is propagated.
FASTKD_INLINE double entropy_score(double sum, double weighted, double channels) {
  const double log_channels = std::log(channels), entropy = std::log(sum) - weighted / sum;
  const double score = 1 - entropy / (log_channels > kTiny ? log_channels : kTiny);
  return score < 0 ? 0 : score;
}

// The penalty, for smooth_l1 times beta, so that a sum needs only one division.
template <Penalty P, class T>
FASTKD_INLINE T scaled_penalty(T x, T beta) {
  if constexpr (P == Penalty::l2) return x * x;
  const T a = absolute(x);
  if constexpr (P == Penalty::l1) return a;
  const T c = a < beta ? a : beta;  // no branch: quadratic below beta, linear above
  return c * (a - T(0.5) * c);
}

template <Penalty P, class T>
FASTKD_INLINE T penalty(T x, T beta) {
  return P == Penalty::smooth_l1 ? scaled_penalty<P>(x, beta) / beta : scaled_penalty<P>(x, beta);
}

// The derivative of the penalty, for smooth_l1 times beta.
template <Penalty P, class T>
FASTKD_INLINE T scaled_slope(T x, T beta) {
  if constexpr (P == Penalty::l2) return x + x;
  if constexpr (P == Penalty::l1) return sign(x);
  const T c = x < -beta ? -beta : x;
  return c > beta ? beta : c;
}

template <Penalty P, class T>
FASTKD_INLINE T penalty_slope(T x, T beta) {
  return P == Penalty::smooth_l1 ? scaled_slope<P>(x, beta) / beta : scaled_slope<P>(x, beta);
}

// Z, which divides the level's sum of w D; mass is its sum of w.
template <class Acc>
FASTKD_INLINE double divisor(const Level<Acc>& level, Divisor divisor, double mass) {
  const double n = double(level.images), c = double(level.channels);
  const double elements = n * c * double(level.cells());
  switch (divisor) {
    case Divisor::elements: return elements > 1 ? elements : 1;
    case Divisor::batch: return n > 1 ? n : 1;
    case Divisor::map: return c * mass + kEps;
    case Divisor::map_all_ranks: return 1;
  }
  return 1;
}

}  // namespace fastkd
