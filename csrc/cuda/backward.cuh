// Backward: the student's gradients of all levels in one launch.
//
// Must move, for an element of b bytes, 3 b: student and teacher read, gradient written, and per cell one weight. Must
// do 5 operations an element (standardise 2, difference, derivative, product) and 3 conversions. The floor is 3 units
// of design.md's five, bytes / bandwidth.
#pragma once

#include "tile.cuh"

namespace fastkd::cuda {

template <Penalty P, int V, int kRows, class Acc, class Cell>
__device__ __forceinline__ void differentiate(const Acc (&t)[kRows][V], const Acc* weight, Acc beta, const Cell& cell,
                                              Acc (&s)[kRows][V]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int v = 0; v < V; ++v) s[i][v] = weight[cell(i, v)] * scaled_slope<P>(s[i][v] - t[i][v], beta);
}

template <class E, bool kChannelsLast, int V, class Acc>
__device__ __forceinline__ void differentiate_cells(const Launch<Acc>& launch, const Level<Acc>& level,
                                                    const Tile& tile, Acc slope, int64_t first) {
  using P = Patch<kChannelsLast, V, Acc>;
  constexpr int kRows = P::kRows;
  using Offsets = Rows<kChannelsLast, V, Acc>;
  const Places<kChannelsLast, V, Acc> places(level, tile, first);
  const Offsets student(level.student, tile, places), teacher(level.teacher, tile, places),
      grad(level.grad, tile, places);
  const Acc beta = Acc(launch.options.beta);
  if (launch.options.penalty == Penalty::smooth_l1) slope /= beta;
  Acc weight[P::kCells];  // of a cell's scaled slopes
#pragma unroll
  for (int i = 0; i < P::kCells; ++i)
    weight[i] = first + i < level.cells() ? slope * level.map[tile.image * level.cells() + first + i] : Acc(0);
  each_patch<kChannelsLast, V>(level, tile, first, [&](int c, int rows) {
    Acc s[kRows][V] = {}, t[kRows][V] = {};
    read_patch<E>(level, tile, student, teacher, c, rows, s, t);
    const auto cell = [](int i, int v) { return P::cell(i, v); };
    switch (launch.options.penalty) {
      case Penalty::l2: differentiate<Penalty::l2>(t, weight, beta, cell, s); break;
      case Penalty::l1: differentiate<Penalty::l1>(t, weight, beta, cell, s); break;
      case Penalty::smooth_l1: differentiate<Penalty::smooth_l1>(t, weight, beta, cell, s); break;
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (i < rows) store<E>(s[i], level.grad, grad.at(c, i));
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
__global__ void __launch_bounds__(kThreads, 2) backward(const __grid_constant__ Launch<Acc> launch) {
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
