// Backward: the student's gradients of all levels in one launch.
//
// Must move, for an element of b bytes, 3 b: student and teacher read, gradient written, and per cell one weight. Must
// do 5 operations an element (standardise 2, difference, derivative, product) and 3 conversions. The floor is 3 units
// of design.md's five, bytes / bandwidth.
#pragma once

#include "tile.cuh"

namespace fastkd::cuda {

template <class E, Penalty P, bool kChannelsLast, int V, class Read, class Offsets, class Acc>
__device__ __forceinline__ void differentiate(const Launch<Acc>& launch, const Level<Acc>& level, const Tile& tile,
                                              const Read& features, const Acc* weight, const Offsets& grad, int channel,
                                              int rows) {
  using Shape = Patch<kChannelsLast, V, Acc>;
  const Acc beta = Acc(launch.options.beta);
  features.each_row(level, tile, channel, rows, [&](int i, const Acc(&)[V], Acc(&x)[V]) {
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] = weight[Shape::cell(i, v)] * scaled_slope<P>(x[v], beta);
    store<E>(x, level.grad, grad.at(channel, i));
  });
}

template <class E, bool kChannelsLast, int V, class Acc>
__device__ __forceinline__ void differentiate_cells(const Launch<Acc>& launch, const Level<Acc>& level,
                                                    const Tile& tile, Acc slope, int64_t first) {
  using P = Patch<kChannelsLast, V, Acc>;
  using Offsets = Rows<kChannelsLast, V, Acc>;
  const Places<kChannelsLast, V, Acc> places(level, tile, first);
  const Offsets student(level.student, tile, places), teacher(level.teacher, tile, places),
      grad(level.grad, tile, places);
  if (launch.options.penalty == Penalty::smooth_l1) slope /= Acc(launch.options.beta);
  Acc weight[P::kCells];  // of a cell's scaled slopes
#pragma unroll
  for (int i = 0; i < P::kCells; ++i)
    weight[i] = first + i < level.cells() ? slope * level.map[tile.image * level.cells() + first + i] : Acc(0);
  each_patch<kChannelsLast, V>(level, tile, first, [&](int c, int rows) {
    const Features<E, kChannelsLast, V, Acc> features(level, student, teacher, c, rows);
    const auto by = [&](auto penalty) {
      differentiate<E, penalty, kChannelsLast, V>(launch, level, tile, features, weight, grad, c, rows);
    };
    with_penalty(launch.options.penalty, by);
  });
}

template <class E, bool kChannelsLast, int V, class Acc>
__device__ __forceinline__ void differentiate_tile(const Launch<Acc>& launch, const Level<Acc>& level, const Tile& tile,
                                                   Acc slope) {
  using P = Patch<kChannelsLast, V, Acc>;
#pragma unroll 1
  for (int pass = 0; pass < P::kPasses; ++pass)
    differentiate_cells<E, kChannelsLast, V>(launch, level, tile, slope, P::first(tile, pass));
}

template <class E, class Acc>
__global__ void __launch_bounds__(kThreads, kBlocks<false>) backward(const __grid_constant__ Launch<Acc> launch) {
  constexpr int V = kVector<E, Acc>;
  const Tile tile = find_tile(launch, V);
  const Level<Acc>& level = launch.level[tile.level];
  const Plan& plan = launch.plan[tile.level];
  const Acc upstream = launch.upstream[tile.level * launch.upstream_stride];
  if (launch.assumed && launch.assumed[tile.level] == upstream) return;
  __shared__ Acc slope;  // once a block: its division in double is slow on cards for graphics
  if (threadIdx.x == 0) {
    const double z = divisor(level, launch.normalizer, double(launch.forward_mass[tile.level]));
    slope = Acc(double(upstream) * launch.weight[tile.level] / z);
  }
  __syncthreads();
  if (V > 1 && plan.vector)
    plan.channels_last ? differentiate_tile<E, true, V>(launch, level, tile, slope)
                       : differentiate_tile<E, false, V>(launch, level, tile, slope);
  else
    plan.channels_last ? differentiate_tile<E, true, 1>(launch, level, tile, slope)
                       : differentiate_tile<E, false, 1>(launch, level, tile, slope);
}

}  // namespace fastkd::cuda
