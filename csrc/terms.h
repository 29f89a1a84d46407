// The scalar terms of the loss: what one element adds to a score or a penalty, and the penalty's derivative.
#pragma once

#include "level.h"

#ifdef __CUDACC__
#define FASTKD_INLINE __host__ __device__ __forceinline__
#else
#define FASTKD_INLINE inline __attribute__((always_inline))
#endif

namespace fastkd {

template <class T>
FASTKD_INLINE T absolute(T x) {
  return x < 0 ? -x : x;
}

// -1, 0 or 1; 0 of a NaN, as PyTorch's l1_loss has it
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

template <Penalty P, class T>
FASTKD_INLINE T penalty(T x, T beta) {
  if constexpr (P == Penalty::l2) return x * x;
  const T a = absolute(x);
  if constexpr (P == Penalty::l1) return a;
  const T c = a < beta ? a : beta;  // no branch: quadratic below beta, linear above
  return c * (a - T(0.5) * c) / beta;
}

template <Penalty P, class T>
FASTKD_INLINE T penalty_slope(T x, T beta) {
  if constexpr (P == Penalty::l2) return x + x;
  if constexpr (P == Penalty::l1) return sign(x);
  const T c = x < -beta ? -beta : x;
  return (c > beta ? beta : c) / beta;
}

}  // namespace fastkd
