// Backward: the student's gradients of all levels in one launch.
//
// ds = g weight / Z w rho'(x), x = (s + bias) - t', t' = (t - mean) rstd; g the upstream gradient, w the map.
//
// It must move 3 b bytes per element of b bytes, student and teacher read and gradient written, which are 3 units (one
// unit is the bytes of all student features), and one weight per cell. It does 6 operations per element (standardise 2,
// bias, difference, derivative, product) and 3 conversions. The floor is 3 units / bandwidth.
#pragma once

#include "tile.cuh"

namespace fastkd::cuda {

template <class E, Penalty kPenalty, class P, class Acc>
__device__ __forceinline__ void differentiate(const Launch<Acc>& launch, Features<E, P>& features, const Acc* weight,
                                              const Rows<P>& grad) {
  const Acc beta = Acc(launch.options.beta);
  features.each([&](int i, int v, Acc, Acc x) {
    features.s[i].x[v] = Held<E, Acc>(weight[P::cell(i, v)] * scaled_slope<kPenalty>(x, beta));
  });
#pragma unroll
  for (int i = 0; i < P::kRows; ++i)
    if (i < features.rows) store<E, Acc>(features.s[i], features.level.grad, grad.at(features.channel, i));
}

template <class E, class P, class Acc>
__device__ __forceinline__ void differentiate_cells(const Launch<Acc>& launch, const Level<Acc>& level,
                                                    const Tile& tile, Acc slope, int64_t first) {
  const Places<P> places(level, tile, first);
  const Rows<P> student(level.student, tile, places), teacher(level.teacher, tile, places),
      grad(level.grad, tile, places);
  if (launch.options.penalty == Penalty::smooth_l1) slope /= Acc(launch.options.beta);
  Acc weight[P::kCells];  // factor of the scaled slopes of a cell
#pragma unroll
  for (int i = 0; i < P::kCells; ++i)
    weight[i] = first + i < level.cells() ? slope * level.map[tile.image * level.cells() + first + i] : Acc(0);
  each_patch<P>(level, tile, first, [&](int c, int rows) {
    Features<E, P> features(level, tile, student, teacher, c, rows);
    with_penalty(launch.options.penalty,
                 [&](auto penalty) { differentiate<E, penalty, P>(launch, features, weight, grad); });
  });
}

template <class E, class P, class Acc>
__device__ __forceinline__ void differentiate_tile(const Launch<Acc>& launch, const Level<Acc>& level, const Tile& tile,
                                                   Acc slope) {
#pragma unroll 1
  for (int pass = 0; pass < P::kPasses; ++pass)
    differentiate_cells<E, P>(launch, level, tile, slope, P::first(tile, pass));
}

template <class E, class Acc>
__global__ void __launch_bounds__(kThreads, kBlocks<false>) backward(const __grid_constant__ Launch<Acc> launch) {
  constexpr int V = kVector<E, Acc>;
  const Tile tile = find_tile(launch, V);
  const Level<Acc>& level = launch.level[tile.level];
  const Plan& plan = launch.plan[tile.level];
  __shared__ Acc slope;  // once per block, as a division in double is slow on consumer cards
  if (threadIdx.x == 0) {
    const double upstream = double(launch.upstream[tile.level * launch.upstream_stride]);
    const double z = divisor(level, launch.options.divisor, double(launch.forward_mass[tile.level]));
    slope = Acc(upstream * launch.weight[tile.level] / z);
  }
  __syncthreads();
  if (V > 1 && plan.vector)
    plan.channels_last ? differentiate_tile<E, Patch<true, V, Acc>>(launch, level, tile, slope)
                       : differentiate_tile<E, Patch<false, V, Acc>>(launch, level, tile, slope);
  else
    plan.channels_last ? differentiate_tile<E, Patch<true, 1, Acc>>(launch, level, tile, slope)
                       : differentiate_tile<E, Patch<false, 1, Acc>>(launch, level, tile, slope);
}

}  // namespace fastkd::cuda
